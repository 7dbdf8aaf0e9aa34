"""The page on the layout of the code: its picture and its names are the code's."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.fixture
def drawing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return import_module("architecture")


def test_the_picture_is_what_is_drawn_of_the_code_now(drawing):
    parts = drawing.imports()

    assert (ROOT / "docs" / "architecture.svg").read_text() == drawing.picture(parts)
    assert {*parts} == {*re.findall(r"`(\w+)`", _section("Where a line belongs"))}
    assert {name for part, name in drawing.UPWARDS if name in parts[part]} == {
        name for _, name in drawing.UPWARDS
    }


def test_the_page_lists_the_folders_as_they_are_now(drawing):
    (tree,) = drawing.TREE.findall(PAGE)
    folders = [path for package in drawing.LISTED for path in (ROOT / package).rglob("*.py")]

    assert tree == drawing.tree()
    assert {*re.findall(r"^ *(\w+)/ +\S", tree, re.MULTILINE)} == {
        path.parent.name for path in folders if "migrations" not in path.parts
    }


def test_each_file_that_a_change_touches_is_there_as_are_the_names_in_it():
    section = _section("What to touch for")
    paths = re.findall(r"`((?:pho_service|docs)/[\w/.]+)`", section)

    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert "class SearchOptions" in (ROOT / "pho_service/spec/objective.py").read_text()
    assert "class ProxyRating" in (ROOT / "pho_service/pruning/proxy.py").read_text()


def _section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
