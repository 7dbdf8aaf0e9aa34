"""What must start fast never loads torch, seen from fresh interpreters."""

import subprocess
import sys

# Prints each module that it imports, and the heavy ones that are there by then.
IMPORT_EACH = """
import importlib, pkgutil, sys
import pho_service.cli, pho_service.search, storage

names = ["pho_service.spec", "pho_service.configuration", "pho_service.files",
         "pho_service.settings", "pho_service.errors"]
for package in (pho_service.search, pho_service.cli, storage):
    names += [package.__name__]
    names += [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]
for name in names:
    importlib.import_module(name)
    heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
    print(name, *heavy)
"""

HELP = """
import sys
from click.testing import CliRunner
from pho_service.cli import main

result = CliRunner().invoke(main, ["--help"])
assert result.exit_code == 0, result.output
heavy = {"torch", "transformers", "datasets", "optuna", "numpy", "scipy", "rich"}
print(*sorted(heavy & set(sys.modules)))
"""


def output_of(program: str) -> str:
    """What a program prints in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def test_light_modules() -> None:
    """The search, the storage, the specification and the verbs' own files load nothing heavy."""
    lines = output_of(IMPORT_EACH).splitlines()

    assert {"pho_service.search.search", "pho_service.cli.search", "storage.studies"} <= {
        line.split()[0] for line in lines
    }
    assert [line for line in lines if len(line.split()) > 1] == []


def test_help_is_light() -> None:
    """`pho --help` imports click and nothing that takes time."""
    assert output_of(HELP).split() == []
