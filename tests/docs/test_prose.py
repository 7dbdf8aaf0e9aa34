"""The lint of the words that readers and users see: each rule finds what it is for."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

GOOD = """\
# A page

It is not a fragment. Of course there is no limit, and weights that are removed stay at zero.
What a search costs depends on the model. It takes a few minutes, or longer; nothing else.

| name | meaning |
| --- | --- |
| `seed` | Seed of the sampler. |
"""


@pytest.fixture
def lint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script behind `make check`, which finds its files beside it."""
    pytest.importorskip("proselint", reason="it is not installed: see extra dev")
    monkeypatch.syspath_prepend(ROOT / "prose")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return import_module("lint")


@pytest.fixture
def found(lint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Lint a file with this text, and return what is found, by the line."""
    monkeypatch.setattr(lint, "ROOT", tmp_path)

    def run(name: str, text: str) -> dict[str, int]:
        (tmp_path / name).write_text(text)
        return {finding.rule: finding.line for finding in lint.lint(tmp_path / name)}

    return run


def test_good_page(found: Callable[..., Any]) -> None:
    """Plain sentences break no rule; what looks like a fragment or an old word may be none."""
    assert not found("good.md", GOOD)


def test_each_rule(lint: Any, found: Callable[..., Any]) -> None:
    """Each rule is broken by its example, on a page and in a docstring; no code sample is read."""
    for rule in lint.RULES:
        assert rule.name in found("a.md", f"{rule.breaks}\n")
        assert rule.name in found("a.py", f'"""\n{rule.breaks}\n"""\n'), rule.name
        assert not found("a.md", f"```text\n{rule.breaks}\n```\n"), rule.name


def test_long_sentence(found: Callable[..., Any]) -> None:
    """A sentence has 40 words at most; two of them may have more together."""
    words = "one two three " * 13

    assert not found("a.md", f"{words}end. {words}end.\n")
    assert found("a.md", f"{words}too long.\n") == {"long": 1}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.py", 'raise ValueError(\n    f"{name!r} is no model of ours"\n)\n', 2),
        ("a.py", 'def f():\n    """\n    Do.\n\n    Args:\n        a: It is no id.\n    """\n', 6),
        ("a.html", "{% if a %}\n<p>\nIt is no {{ name }} here.</p>\n{% endif %}\n", 3),
        ("a.md", "| a |\n| --- |\n| It is no job. |\n", 3),
        ("CHANGELOG.md", "# Changes\n\n## [2]\n\nIt is no job.\n\n## [1]\n\nIt is no job.\n", 5),
    ],
)
def test_where(name: str, text: str, line: int, found: Callable[..., Any]) -> None:
    """Messages, entries of Args, templates, cells and the newest changes are read, line by line."""
    assert found(name, text) == {"is-no": line}


def test_what_proselint_finds(found: Callable[..., Any]) -> None:
    """A word of proselint's own lists is found, in its paragraph."""
    assert [*found("a.md", "Words.\n\nIt was done irregardless of it.\n").values()] == [3]


def test_the_lint_reads_pages_code_and_templates(lint: Any) -> None:
    names = {path.relative_to(ROOT).as_posix() for path in lint.all_files()}

    assert {"README.md", "docs/service.md", "pho_service/errors.py", "storage/jobs.py"} <= names
    assert any(name.endswith(".html") for name in names)
    assert "$(BIN)/python prose/lint.py\n" in (ROOT / "Makefile").read_text()
