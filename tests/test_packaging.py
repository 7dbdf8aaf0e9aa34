"""The wheel: what it holds, which extra brings what, and that each extra is enough for its part."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("pho_service", "storage", "workers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from this checkout, without a network."""
    pytest.importorskip("hatchling", reason="the build backend is not installed: see extra dev")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def extras(wheel: zipfile.ZipFile) -> dict[str, dict[str, Requirement]]:
    """What each extra brings beside the base, by name; the base is ``""``."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    found: dict[str, dict[str, Requirement]] = {"": {}}
    found |= {extra: {} for extra in metadata.get_all("Provides-Extra", ())}
    for line in metadata.get_all("Requires-Dist", ()):
        requirement = Requirement(line)
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
        requirement.marker = None
        found[extra[1] if extra else ""][requirement.name] = requirement
    return found


def modules(requirements: dict[str, Requirement]) -> set[str]:
    """What they are imported as."""
    return {name.replace("-", "_") for name in requirements}


def run_without(missing: set[str], code: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a fresh interpreter that finds nothing of ``missing``."""
    script = f"""
import sys

class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {sorted(missing)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
{code}
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_wheel_packages(wheel: zipfile.ZipFile) -> None:
    """It holds the three packages and no test, benchmark or container file."""
    top = {name.partition("/")[0] for name in wheel.namelist()}

    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_files(wheel: zipfile.ZipFile, package: str) -> None:
    """Every module is in it, with the migrations, the templates and py.typed."""
    wanted = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / package).rglob("*")
        if file.suffix in (".py", ".mako", ".html", ".css", ".js", ".svg", ".typed")
    }

    assert f"{package}/py.typed" in wanted
    assert wanted == {name for name in wheel.namelist() if name.startswith(f"{package}/")}


def test_base_is_small(extras: dict[str, dict[str, Requirement]]) -> None:
    """Without an extra there is neither a model's library nor a web server nor a database's."""
    assert not modules(extras[""]) & {"torch", "transformers", "fastapi", "uvicorn", "psycopg"}


def test_api_has_no_torch(extras: dict[str, dict[str, Requirement]]) -> None:
    """The extra api brings the web server, and nothing that runs a model."""
    assert {"fastapi", "uvicorn", "optuna-dashboard"} <= extras["api"].keys()
    assert not extras["api"].keys() & {"torch", "transformers", "datasets", "numba", "safetensors"}


def test_worker_has_no_fastapi(extras: dict[str, dict[str, Requirement]]) -> None:
    """The extra worker brings what runs a model, and no web server."""
    assert {"torch", "transformers", "datasets", "numba"} <= extras["worker"].keys()
    assert not extras["worker"].keys() & {"fastapi", "uvicorn", "sse-starlette", "a2wsgi"}


def test_all_is_both(extras: dict[str, dict[str, Requirement]]) -> None:
    """The extra all brings what api and worker bring, in the same versions."""
    assert extras["all"] == extras["api"] | extras["worker"] == extras["worker"] | extras["api"]


def test_base_is_enough(extras: dict[str, dict[str, Requirement]]) -> None:
    """Remote verbs, client, configuration, library and search need no extra."""
    code = """
import pho_service.client, pho_service.spec.configuration, pho_service.library
import pho_service.tuning.search, pho_service.tuning.validation, pho_service.host.settings
from pho_service.cli import main
main(["configurations", "--pattern", "2:4", "--library", "."], standalone_mode=False)
"""
    result = run_without(modules(extras["all"]), code)

    assert result.returncode == 0, result.stderr


def test_api_is_enough(extras: dict[str, dict[str, Requirement]]) -> None:
    """The front end is imported without anything that only the extra worker brings."""
    missing = modules(extras["worker"]) - modules(extras["api"])
    result = run_without(missing, "import pho_service.api.serving, storage.embedded")

    assert result.returncode == 0, result.stderr


def test_worker_is_enough(extras: dict[str, dict[str, Requirement]]) -> None:
    """A worker is imported without anything that only the extra api brings."""
    missing = modules(extras["api"]) - modules(extras["worker"])
    result = run_without(missing | {"starlette"}, "import workers.worker, optuna_dashboard")

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("verb", "options", "module", "extra"),
    [
        ("search", "org/name --pattern 0.5", "torch", "worker"),
        ("evaluate", "org/name --text a.txt", "torch", "worker"),
        ("evaluate", "org/name --tasks boolq", "lm_eval", "eval"),
        ("serve", "--workers 0", "fastapi", "api"),
        ("keys list", "", "fastapi", "api"),
    ],
)
def test_missing_extra(verb: str, options: str, module: str, extra: str) -> None:
    """A verb whose extra is not installed says in one sentence what to install; exit code 1."""
    code = f"from pho_service.cli import main\nmain({[*verb.split(), *options.split()]})"
    result = run_without({module}, code)

    assert result.returncode == 1
    assert result.stderr == f"pho: {verb} needs {module}: pip install 'pho-service[{extra}]'\n"


def test_pho_worker_says_so_too() -> None:
    code = "from workers.__main__ import main\nmain(['--database-url', 'postgresql://x'])"
    result = run_without({"torch"}, code)

    assert result.returncode == 1
    assert result.stderr == "pho worker needs torch: pip install 'pho-service[worker]'\n"


def test_other_missing_module() -> None:
    """A module that no extra brings is a fault of the installation: its traceback is shown."""
    code = "from pho_service.cli import main\nmain(['evaluate', 'org/name', '--text', 'a.txt'])"
    result = run_without({"numpy"}, code)

    assert "ModuleNotFoundError" in result.stderr


def test_what_the_packages_import_is_declared_and_what_is_declared_is_imported() -> None:
    pytest.importorskip("deptry", reason="it is not installed: see extra dev")
    result = subprocess.run(
        [sys.executable, "-m", "deptry", ".", "--no-ansi"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
