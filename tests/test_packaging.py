"""The wheel: what it holds, which extra brings what, and that each extra is enough for its part."""

import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pho_service.host import machine

ROOT = Path(__file__).parents[1]
PACKAGES = ("pho_service", "storage", "workers")


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory):
    """Built from this checkout, without a network."""
    pytest.importorskip("hatchling", reason="the build backend is not installed: see extra dev")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file):
    return zipfile.ZipFile(wheel_file)


@pytest.fixture(scope="module")
def extras(wheel):
    """What each extra brings beside the base, by name; the base is ``""``."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    found = {"": {}}
    found |= {extra: {} for extra in metadata.get_all("Provides-Extra", ())}
    for line in metadata.get_all("Requires-Dist", ()):
        requirement = Requirement(line)
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
        requirement.marker = None
        found[extra[1] if extra else ""][requirement.name] = requirement
    return found


def run(*words, **options):
    """What a command prints; the test fails with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(requirements):
    """What they are imported as."""
    return {name.replace("-", "_") for name in requirements}


def run_without(missing, code):
    """Run code in a fresh interpreter that finds nothing of ``missing``."""
    script = f"""
import sys

class Missing:
    names = {sorted(missing)}

    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in Missing.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
{code}
"""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel):
    wanted = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in (".py", ".mako", ".html", ".css", ".js", ".svg", ".typed")
    }

    assert {f"{package}/py.typed" for package in PACKAGES} <= wanted
    assert wanted == {name for name in wheel.namelist() if ".dist-info/" not in name}


@pytest.mark.thorough
def test_installed_from_the_wheel_alone_it_says_its_version_imports_and_finds(wheel_file, tmp_path):
    """The dependencies are those of this environment, for nothing is fetched."""
    venv.create(tmp_path / "env")
    programs = tmp_path / "env" / "bin"
    words = ("--quiet", "--no-deps", "--no-index", "--no-compile", wheel_file)
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", *words)
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))

    def installed(program, *words):
        return run(programs / program, *words, cwd=tmp_path)

    library = ROOT / "tests" / "stored" / "0.1.0"
    places = "import pho_service, pho_service.api.serving, storage, workers.__main__"
    shown = "print(pho_service.__file__, storage.__file__, workers.__file__, sep='\\n')"

    version = re.search(r"-([\d.]+)-", wheel_file.name)[1]
    assert installed("pho", "--version").split()[-1] == version
    assert "prune" in installed("pho", "--help")
    assert "config.json" in installed("pho", "configurations", "--library", library)
    for path in installed("python", "-c", f"{places}; {shown}").splitlines():
        assert Path(path).is_relative_to(packages)


def test_each_extra_brings_what_its_part_needs_and_no_more(extras):
    base, api, worker = (modules(extras[name]) for name in ("", "api", "worker"))

    assert not base & {"torch", "transformers", "fastapi", "uvicorn", "psycopg"}
    assert {"fastapi", "uvicorn", "optuna_dashboard"} <= api
    assert not api & {"torch", "transformers", "datasets", "numba", "safetensors"}
    assert {"torch", "transformers", "datasets", "numba"} <= worker
    assert not worker & {"fastapi", "uvicorn", "sse_starlette", "a2wsgi"}
    assert extras["all"] == extras["api"] | extras["worker"] == extras["worker"] | extras["api"]


def test_remote_verbs_and_search_need_no_extra_and_the_front_end_api_alone(extras):
    needless = sorted(modules(extras["worker"]) - modules(extras["api"]))
    code = f"""
import pho_service.client, pho_service.spec.configuration, pho_service.library
import pho_service.tuning.search, pho_service.tuning.validation, pho_service.host.settings
from pho_service.cli import main
main(["configurations", "--pattern", "2:4", "--library", "."], standalone_mode=False)
Missing.names = {needless}
import pho_service.api.serving, storage.embedded
"""
    result = run_without(modules(extras["all"]), code)

    assert result.returncode == 0, result.stderr


@pytest.mark.thorough
def test_a_worker_needs_worker_alone(extras):
    missing = modules(extras["api"]) - modules(extras["worker"])
    result = run_without(missing | {"starlette"}, "import workers.worker, optuna_dashboard")

    assert result.returncode == 0, result.stderr


MISSING = [
    ("search", "org/name --pattern 0.5", "torch", "torch>=2.7"),
    ("serve", "--workers 0", "fastapi", "fastapi>=0.125"),
    ("keys list", "", "fastapi", "fastapi>=0.125"),
    ("evaluate", "org/name --tasks boolq", "lm_eval", "lm-eval<0.5,>=0.4.13"),
    ("worker", "--database-url postgresql://x", "torch", "torch>=2.7"),
]


def test_a_verb_that_misses_a_package_says_what_installs_that_and_not_pho_which_no_index_has():
    verbs = [([*verb.split(), *options.split()], module) for verb, options, module, _ in MISSING]
    code = f"""
from pho_service.cli import main
from workers.__main__ import main as worker
for words, module in {verbs}:
    Missing.names = [module]
    try:
        worker(words[1:]) if words[0] == "worker" else main(words)
    except SystemExit as ended:
        assert ended.code == 1
"""
    result = run_without(set(), code)

    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        f"pho{':' * (verb != 'worker')} {verb} needs {module}: pip install '{requirement}'"
        for verb, _, module, requirement in MISSING
    ]


def test_all_that_is_missing_of_an_extra_is_in_one_command(monkeypatch):
    monkeypatch.setattr(machine, "missing_of", lambda _: ["opentelemetry-sdk", "psycopg"])

    assert machine.install_command("otel") == "pip install 'opentelemetry-sdk>=1.30'"
    assert machine.install_command("api", "fastapi") == (
        "pip install 'fastapi>=0.125' 'psycopg[binary,pool]>=3.2'"
    )
    monkeypatch.undo()
    assert machine.install_command("otel").endswith("'opentelemetry-sdk>=1.30'")


def test_a_missing_module_that_no_extra_brings_has_its_traceback():
    code = "from pho_service.cli import main\nmain(['evaluate', 'org/name', '--text', 'a.txt'])"

    assert "ModuleNotFoundError" in run_without({"numpy"}, code).stderr


def test_what_the_packages_import_is_declared_and_what_is_declared_is_imported():
    pytest.importorskip("deptry", reason="it is not installed: see extra dev")
    result = subprocess.run(
        [sys.executable, "-m", "deptry", ".", "--no-ansi"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
