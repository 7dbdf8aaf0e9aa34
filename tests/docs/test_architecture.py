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


def test_cycle(drawing: Any) -> None:
    """Parts that import each other cannot be drawn, and are named."""
    with pytest.raises(ValueError, match=r"cycle.*(api.*cli|cli.*api)"):
        drawing.picture({"api": {"cli"}, "cli": {"api"}})


def test_files() -> None:
    """Each file that a change touches is there, as are the names in it."""
    section = _section("What to touch for")
    paths = re.findall(r"`((?:pho_service|docs)/[\w/.]+)`", section)

    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert "class SearchOptions" in (ROOT / "pho_service/spec/samplers.py").read_text()
    assert "class ProxyRating" in (ROOT / "pho_service/pruning/proxy.py").read_text()


def _section(title: str) -> str:
    """What stands under a heading."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
