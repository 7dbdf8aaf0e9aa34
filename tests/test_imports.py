"""Heavy libraries are loaded where they are needed and nowhere else."""

import subprocess
import sys

import pytest

LIGHT = (
    "pho_service.spec.candidate", "pho_service.spec.configuration", "pho_service.host.settings",
    "pho_service.host.files", "pho_service.library.ranking", "pho_service.library.files",
    "pho_service.tuning.samplers", "pho_service.tuning.search", "pho_service.spec.space",
    "pho_service.tuning.validation", "pho_service.spec.job", "pho_service.client",
    "pho_service.api.app", "pho_service.api.serving", "pho_service.report.page",
    "storage.studies", "storage.jobs", "storage.embedded",
)  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    listing = "import sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    script = f"{code}\n{listing}"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_no_torch(module: str) -> None:
    """Search, specification, API, client and storage never reach torch and its like."""
    assert not loaded_by(f"import {module}") & {"torch", "transformers", "datasets"}


def test_bundle_needs_no_transformers() -> None:
    """To search a bundle neither models nor data sets are loaded, which takes seconds."""
    code = (
        "import pho_service.pipeline.search, pho_service.models.bundle_file, "
        "pho_service.models.devices"
    )

    assert not loaded_by(code) & {"transformers", "datasets"}


def test_help_is_light() -> None:
    """`pho --help` and the verbs' modules load nothing that takes time."""
    verbs = (
        "calibrate, compare, demo, evaluate, example, prune, remote, report, search, serve, "
        "validate"
    )
    heavy = {
        "torch", "transformers", "datasets", "optuna", "scipy", "matplotlib", "rich", "numpy",
        "fastapi", "sqlalchemy", "httpx",
    }  # fmt: skip

    assert not loaded_by(f"from pho_service.cli import main, {verbs}") & heavy


def test_workers_serve_no_http() -> None:
    """A worker never loads the front end."""
    assert not loaded_by("import workers.worker") & {"fastapi", "starlette", "uvicorn"}
