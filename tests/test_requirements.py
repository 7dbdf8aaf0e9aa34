"""The lock files: all that is declared, by its hashes, and nothing that a machine must choose."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"
NAMES = ("dev.txt", "api.txt", "worker.txt", "build.txt", "model.txt")
EXTRAS = {
    "dev.txt": ("api", "worker", "otel", "dev", "docs", "eval"),
    "api.txt": ("api", "otel"),
    "worker.txt": ("worker", "otel"),
}


def locked(name):
    """What a file pins, by name: with markers there may be several; each with its hashes."""
    found = {}
    lines = (LOCKS / name).read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    for line in text.splitlines():
        pinned, *hashes = line.split("--hash=")
        requirement = Requirement(pinned.strip())
        found.setdefault(canonicalize_name(requirement.name), []).append(
            (requirement, [each.strip() for each in hashes])
        )
    return found


def declared(extras):
    """What pyproject.toml asks for, but for torch and the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [r for r in map(Requirement, lines) if r.name not in ("torch", "pho-service")]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_one_version_with_the_sha_256_of_its_files(name):
    text = (LOCKS / name).read_text()

    for requirement, hashes in (each for found in locked(name).values() for each in found):
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement
    assert "://" not in text
    assert "--index-url" not in text


@pytest.mark.parametrize("name", [*EXTRAS])
def test_what_pyproject_toml_names_is_in_it_within_its_bounds(name):
    found = locked(name)
    missing = [r for r in declared(EXTRAS[name]) if canonicalize_name(r.name) not in found]
    outside = [
        (str(r), str(pinned))
        for r in declared(EXTRAS[name])
        for pinned, _ in found.get(canonicalize_name(r.name), ())
        if not r.specifier.contains(str(pinned.specifier).removeprefix("=="), prereleases=True)
    ]

    assert not missing, f"run `make lock`: {missing}"
    assert not outside, f"run `make lock`: {outside}"


@pytest.mark.parametrize("name", ["api.txt", "worker.txt", "build.txt"])
def test_the_images_have_what_was_tested(name):
    def versions(file):
        return {f"{p.name}{p.specifier}" for found in locked(file).values() for p, _ in found}

    assert versions(name) <= versions("dev.txt")


def test_the_api_has_no_models_library_a_worker_no_web_server_and_none_a_build_of_torch():
    assert not locked("api.txt").keys() & {"transformers", "datasets", "numba"}
    assert not locked("worker.txt").keys() & {"fastapi", "uvicorn", "starlette"}
    for name in NAMES:
        assert not [p for p in locked(name) if re.match("torch$|nvidia-|cuda-|triton$", p)]


def test_torch_is_installed_by_what_pyproject_toml_says_of_it():
    command = [sys.executable, str(LOCKS / "lock.py"), "torch"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert Requirement(said.strip()).name == "torch"


@pytest.mark.thorough
def test_make_audit_lists_what_is_installed_as_cyclonedx(tmp_path):
    pytest.importorskip("cyclonedx_py", reason="it is not installed: see extra dev")
    line = re.search(r"\$\(BIN\)/(cyclonedx-py .*)", (ROOT / "Makefile").read_text())
    assert line is not None
    words = line[1].replace("$(BIN)/python", sys.executable).replace("sbom.json", "{out}").split()
    out = tmp_path / "sbom.json"
    command = [Path(sys.executable).with_name(words[0]), *(w.format(out=out) for w in words[1:])]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = out.read_text()

    assert '"bomFormat": "CycloneDX"' in text
    for name in ("torch", "optuna", "procrastinate", "pho-service"):
        assert f'"name": "{name}"' in text
    assert str(ROOT) not in text
