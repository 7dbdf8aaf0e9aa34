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


def locked(name: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """What a file pins, by name: with markers there may be several; each with its hashes."""
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    lines = (LOCKS / name).read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    for line in text.splitlines():
        pinned, *hashes = line.split("--hash=")
        requirement = Requirement(pinned.strip())
        found.setdefault(canonicalize_name(requirement.name), []).append(
            (requirement, [each.strip() for each in hashes])
        )
    return found


def declared(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for, but for torch and the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [r for r in map(Requirement, lines) if r.name not in ("torch", "pho-service")]


@pytest.mark.parametrize("name", NAMES)
def test_pinned_by_hash(name: str) -> None:
    """Every line is one version with the SHA-256 of its files, from no place in particular."""
    text = (LOCKS / name).read_text()

    for requirement, hashes in (each for found in locked(name).values() for each in found):
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement
    assert "://" not in text
    assert "--index-url" not in text


@pytest.mark.parametrize("name", [*EXTRAS])
def test_all_that_is_declared(name: str) -> None:
    """What pyproject.toml names is in it, within its bounds: else `make lock` was forgotten."""
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
def test_the_images_have_what_was_tested(name: str) -> None:
    def versions(file: str) -> set[str]:
        return {f"{p.name}{p.specifier}" for found in locked(file).values() for p, _ in found}

    assert versions(name) <= versions("dev.txt")


def test_what_an_image_lacks() -> None:
    """The API has no model's library, a worker no web server, and none a build of torch."""
    assert not locked("api.txt").keys() & {"transformers", "datasets", "numba"}
    assert not locked("worker.txt").keys() & {"fastapi", "uvicorn", "starlette"}
    for name in NAMES:
        assert not [p for p in locked(name) if re.match("torch$|nvidia-|cuda-|triton$", p)]


def test_torch() -> None:
    """torch is installed by what pyproject.toml says of it."""
    command = [sys.executable, str(LOCKS / "lock.py"), "torch"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert Requirement(said.strip()).name == "torch"


@pytest.mark.thorough
def test_bill_of_materials(tmp_path: Path) -> None:
    """`make audit` lists what is installed as CycloneDX, and no path of this machine."""
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
