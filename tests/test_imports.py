"""Heavy libraries are loaded where they are needed and nowhere else."""

import json
import os
import subprocess
import sys

import pytest

from pho_service.cli import VERBS

LIGHT = (
    "pho_service.spec.steps", "pho_service.spec.configuration", "pho_service.host.settings",
    "pho_service.host.files", "pho_service.host.logs", "pho_service.library",
    "pho_service.tuning.samplers", "pho_service.tuning.search", "pho_service.spec.space",
    "pho_service.tuning.validation", "pho_service.spec.job", "pho_service.client",
    "pho_service.api.app", "pho_service.api.serving", "pho_service.shown.page",
    "storage.studies", "storage.jobs", "storage.embedded",
)  # fmt: skip


SEARCH = "pho_service.pipeline.search, pho_service.models.bundle_file, pho_service.pruning.hardware"

# Of each module in an interpreter of its own, all of which have the libraries already that take
# seconds and that any of ours may load.
EACH = """
import importlib, json, os, sys
import alembic, cmaes, fastapi, optuna, pydantic, rich, scipy.stats, sqlalchemy, uvicorn
for module in sys.argv[1:]:
    if (child := os.fork()) == 0:
        for name in module.split(", "):
            importlib.import_module(name)
        with importlib.import_module("pho_service.host.logs").span("x", job="j"):
            print(json.dumps([module, [*sys.modules]]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


def run(code, *words):
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    ).stdout


def loaded_by(code):
    """Top-level modules in a fresh interpreter after ``code``."""
    listing = "import sys; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    return set(run(f"{code}\n{listing}").split())


@pytest.fixture(scope="module")
def loaded():
    return dict(map(json.loads, run(EACH, *LIGHT, SEARCH).splitlines()))


@pytest.mark.parametrize("module", LIGHT)
def test_neither_torch_nor_traces_are_loaded(module, loaded):
    assert module in loaded[module]
    assert not {*loaded[module]} & {"torch", "transformers", "datasets", "opentelemetry.sdk"}


def test_who_only_asks_a_service_needs_no_artifact_store(loaded):
    for module in ("pho_service.client", "pho_service.spec.job"):
        assert "fsspec" not in loaded[module]


def test_to_search_a_bundle_neither_models_nor_data_sets_are_loaded_which_takes_seconds(loaded):
    assert not {*loaded[SEARCH]} & {"transformers", "datasets"}


def test_pho_help_and_the_verbs_modules_load_nothing_that_takes_time():
    verbs = ", ".join(sorted({module for module, _ in VERBS.values()}))
    heavy = {
        "torch", "transformers", "datasets", "optuna", "scipy", "matplotlib", "rich", "numpy",
        "fastapi", "sqlalchemy", "httpx",
    }  # fmt: skip

    assert not loaded_by(f"from pho_service.cli import main, {verbs}") & heavy


@pytest.mark.thorough
def test_a_worker_never_loads_the_front_end():
    assert not loaded_by("import workers.worker") & {"fastapi", "starlette", "uvicorn"}


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_torchs_threads_wait_for_each_other_briefly_unless_told_otherwise(given, count):
    code = "import pho_service, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    left = {n: v for n, v in os.environ.items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.run(
        [sys.executable, "-c", code], env={**left, **given}, capture_output=True, text=True
    )

    assert said.stdout.strip() == count
