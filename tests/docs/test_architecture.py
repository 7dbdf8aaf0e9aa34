"""The page on the layout of the code: its picture and its file names are the code's."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that draws the picture."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return import_module("architecture")


def test_picture(drawing: Any) -> None:
    """The picture is what is drawn of the code now: `python docs/site/architecture.py`."""
    parts = drawing.imports()

    assert (ROOT / "docs" / "architecture.svg").read_text() == drawing.picture(parts)
    assert {*parts} == {*re.findall(r"`(\w+)`", _section("Where a line belongs"))}
    assert {name for part, name in drawing.UPWARDS if name in parts[part]} == {
        name for _, name in drawing.UPWARDS
    }


def test_tree(drawing: Any) -> None:
    """The page lists the files as they are now, a line each: `python docs/site/architecture.py`."""
    (tree,) = drawing.TREE.findall(PAGE)
    files = [path for package in drawing.LISTED for path in (ROOT / package).rglob("*.py")]
    listed = [
        path for path in files if path.name != "__init__.py" and "migrations" not in path.parts
    ]

    assert tree == drawing.tree()
    assert len(re.findall(r"^ +\S+\.py\b", tree, re.MULTILINE)) == len(listed)


@pytest.mark.parametrize(
    ("docstring", "shown"),
    [
        ('"""The queue: what waits."""', "The queue"),
        ('"""\nA line that goes\non, and on. And.\n\nMore.\n"""', "A line that goes on, and on"),
        ('"""A line of ten words or more, whose comma ends it."""', "A line of ten words or more"),
        ("", ""),
    ],
)  # fmt: skip
def test_line(drawing: Any, tmp_path: Path, docstring: str, shown: str) -> None:
    """A file is shown with the first clause of its docstring, if it has one."""
    for name in drawing.LISTED:
        (tmp_path / name).mkdir()
    (tmp_path / "storage" / "queue.py").write_text(docstring)

    assert drawing.tree(tmp_path).splitlines()[2] == f"  queue.py               {shown}".rstrip()


def test_parts_that_import_each_other_cannot_be_drawn_and_are_named(drawing: Any) -> None:
    with pytest.raises(ValueError, match=r"cycle.*(api.*cli|cli.*api)"):
        drawing.picture({"api": {"cli"}, "cli": {"api"}})


def test_each_file_that_a_change_touches_is_there_as_are_the_names_in_it() -> None:
    section = _section("What to touch for")
    paths = re.findall(r"`((?:pho_service|docs)/[\w/.]+)`", section)

    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert "class SearchOptions" in (ROOT / "pho_service/spec/objective.py").read_text()
    assert "class ProxyRating" in (ROOT / "pho_service/pruning/proxy.py").read_text()


def _section(title: str) -> str:
    """What stands under a heading."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
