"""The lint of the words that readers and users see: each rule finds what it is for."""

from importlib import import_module
from pathlib import Path

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
def lint(monkeypatch):
    """The script behind `make check`, which finds its files beside it."""
    pytest.importorskip("proselint", reason="it is not installed: see extra dev")
    monkeypatch.syspath_prepend(ROOT / "prose")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return import_module("lint")


@pytest.fixture
def found(lint, tmp_path, monkeypatch):
    """Lint a file with this text, and return what is found, by the line."""
    monkeypatch.setattr(lint, "ROOT", tmp_path)

    def run(name, text):
        (tmp_path / name).write_text(text)
        return {finding.rule: finding.line for finding in lint.lint(tmp_path / name)}

    return run


def test_plain_sentences_break_no_rule(found):
    assert not found("good.md", GOOD)


def test_each_rule_is_broken_by_its_example(lint, found):
    for rule in lint.RULES:
        assert rule.name in found("a.md", f"{rule.breaks}\n")
        assert rule.name in found("a.py", f'"""\n{rule.breaks}\n"""\n'), rule.name
        assert not found("a.md", f"```text\n{rule.breaks}\n```\n"), rule.name


def test_messages_args_templates_cells_and_the_newest_changes_are_read_line_by_line(found):
    for name, text, line in (
        ("a.py", 'raise ValueError(\n    f"{name!r} is no model of ours"\n)\n', 2),
        ("a.py", 'def f():\n    """\n    Do.\n\n    Args:\n        a: It is no id.\n    """\n', 6),
        ("a.html", "{% if a %}\n<p>\nIt is no {{ name }} here.</p>\n{% endif %}\n", 3),
        ("a.md", "| a |\n| --- |\n| It is no job. |\n", 3),
        ("CHANGELOG.md", "# Changes\n\n## [2]\n\nIt is no job.\n\n## [1]\n\nIt is no job.\n", 5),
    ):
        assert found(name, text) == {"is-no": line}


def test_the_lint_reads_pages_code_and_templates(lint):
    names = {path.relative_to(ROOT).as_posix() for path in lint.all_files()}

    assert {"README.md", "docs/service.md", "pho_service/errors.py", "storage/jobs.py"} <= names
    assert any(name.endswith(".html") for name in names)
    assert "$(BIN)/python prose/lint.py\n" in (ROOT / "Makefile").read_text()
