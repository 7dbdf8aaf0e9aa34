"""
Lint the words that readers and users of PHO see, with proselint and our own rules.

    python prose/lint.py              pages, docstrings, messages and templates: `make check`
    python prose/lint.py FILE ...     these files
    python prose/lint.py --counts     how often each rule is broken
"""

import re
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from proselint.checks import __register__
from proselint.registry import CheckRegistry
from rules import LONGEST, PROSELINT, RULES
from texts import CODE, Block, blocks

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md")
PACKAGES = ("pho_service", "storage", "workers")
END = re.compile(r"""(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bal\.)["')]*\s+""")
ENTRY = re.compile(r"^(?:[\w*`\[\], |.]+|CODE): (?=Of\b)")  # of Args


class Finding(NamedTuple):
    """What is wrong, and where."""

    path: str
    line: int
    rule: str
    advice: str
    sentence: str


def main(words: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    files = [Path(word).resolve() for word in words if not word.startswith("--")]
    found = [finding for file in files or all_files() for finding in lint(file)]
    if "--counts" in words:
        print(dict(Counter(finding.rule for finding in found)))
        return 0
    for finding in found:
        print(f"{finding.path}:{finding.line}: {finding.rule}: {finding.sentence}")
        print(f"    {finding.advice}")
    if found:
        print(f"{len(found)} sentences to mend; the rules are in prose/rules.py.")
    return bool(found)


def all_files() -> list[Path]:
    """Return every file whose words somebody reads."""
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    code = [
        path
        for package in PACKAGES
        for suffix in ("py", "html")
        for path in sorted((ROOT / package).rglob(f"*.{suffix}"))
    ]
    return pages + code


def lint(file: Path) -> Iterator[Finding]:
    """Yield what is wrong in a file."""
    found = [*blocks(file, file.relative_to(ROOT).as_posix())]
    for block in found:
        for sentence in sentences(block.text):
            yield from _ours(block, sentence)
    yield from _proselint(found)


def sentences(text: str) -> list[str]:
    """Cut a block into sentences."""
    return [part.strip() for part in END.split(text) if part.strip()]


def _ours(block: Block, sentence: str) -> Iterator[Finding]:
    sentence = ENTRY.sub("", sentence)
    for rule in RULES:
        if rule.pattern.search(sentence):
            yield Finding(block.path, block.line, rule.name, rule.advice, sentence)
    length = len(sentence.split())
    if length > LONGEST:
        advice = f"{length} words; {LONGEST} are enough"
        yield Finding(block.path, block.line, "long", advice, sentence)


def _proselint(found: Iterable[Block]) -> Iterator[Finding]:
    """Check all blocks of a file at once: each check costs more to begin than to run."""
    registry = CheckRegistry()
    if not registry.checks:
        registry.register_many(__register__)
    text, starts, number = "\n", [], count(10_000)
    for block in found:
        starts.append((len(text), block))
        # Two values that follow each other are not one word twice.
        text += re.sub(CODE, lambda _: str(next(number)), block.text) + "\n\n.\n\n"
    for check in registry.get_all_enabled(PROSELINT):
        for result in check.check_with_flags(text):
            place = result.span[0]
            block = starts[bisect(starts, place + 1, key=itemgetter(0)) - 1][1]
            around = text[max(0, place - 30) : place + 40].strip()
            yield Finding(block.path, block.line, result.check_path, result.message, around)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
