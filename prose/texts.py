"""
The words that readers and users of PHO see, block by block.

They are in pages, docstrings, messages and templates. Code in them is replaced by ``CODE``.
"""

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

CODE = "CODE"  # stands where a page has `code`, and a message has a value
SQL = re.compile(
    r"^\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|WITH|GRANT|REVOKE|LOCK|SET)\b"
)
MARKUP = re.compile(r"[{}]|</|/>|=>")
FEWEST = 4  # words in a string that is taken for a sentence
ITEM = re.compile(r"(?:[*-] |[\w*`\[\], |.]+: )")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Source|Attributes):$")


class Block(NamedTuple):
    """A paragraph, an item, a cell or a message, with code replaced by ``CODE``."""

    path: str
    line: int
    text: str


def blocks(path: Path, name: str) -> Iterator[Block]:
    """Yield the blocks of one file, by its suffix; ``name`` is what they are reported under."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = _newest(text) if path.name == "CHANGELOG.md" else text
        yield from _page(lines, name)
    elif path.suffix == ".py":
        yield from _code(text, name)
    else:
        yield from _template(text, name)


def _newest(changelog: str) -> str:
    """Return a changelog up to the end of its newest section."""
    return "\n## [".join(changelog.split("\n## [")[:2])


def _page(text: str, name: str) -> Iterator[Block]:
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "inline" and token.map and token.children:
            yield Block(name, token.map[0] + 1, _inline(token.children))


def _inline(tokens: list[Token]) -> str:
    words = []
    for token in tokens:
        if token.type == "code_inline":
            words.append(CODE)
        elif token.type in ("softbreak", "hardbreak"):
            words.append(" ")
        elif token.type == "text":
            words.append(token.content)
    return "".join(words)


def _code(text: str, name: str) -> Iterator[Block]:
    """Yield each paragraph of a docstring, and each string that is a sentence."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else CODE for part in node.values)
            said = "".join(map(str, parts))
        else:
            continue
        if node in docstrings or _is_sentence(said):
            yield from _paragraphs(said, name, node.lineno)


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= FEWEST and not SQL.search(text) and not MARKUP.search(text)


def _paragraphs(text: str, name: str, line: int) -> Iterator[Block]:
    """Cut a docstring into paragraphs, list items and the entries of Args, Returns and Raises."""
    part: list[str] = []
    start, drawn = line, False
    for number, row in enumerate([*text.split("\n"), ""], line):
        words = row.strip()
        begins = not words or SECTION.match(words) or (row[:4].isspace() and ITEM.match(words))
        if begins and part:
            yield Block(name, start, re.sub(r"``[^`]+``|`[^`]+`", CODE, " ".join(part)))
            part = []
        # After \b come lines that click prints as they stand, up to an empty one; trees are drawn.
        drawn = words != "" and (drawn or "\b" in row or "\u2500" in row)
        if words and not SECTION.match(words) and not drawn:
            start = start if part else number
            part.append(words)


class _Words(HTMLParser):
    """The text of a page, cut at tags that begin a block, and attributes that are read out."""

    INLINE = frozenset({"a", "abbr", "b", "code", "em", "span", "strong", "time"})
    READ = frozenset({"alt", "aria-label", "content", "placeholder", "title"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self.part = ""
        self.line = 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.INLINE:
            self.cut()
        self.found += [
            (self.getpos()[0], value) for key, value in attrs if key in self.READ and value
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.cut()

    def handle_data(self, data: str) -> None:
        if not self.part.strip():
            before = data[: len(data) - len(data.lstrip())]
            self.line = self.getpos()[0] + before.count("\n")
        self.part += data

    def cut(self) -> None:
        if self.part.strip():
            self.found.append((self.line, " ".join(self.part.split())))
        self.part = ""


def _template(text: str, name: str) -> Iterator[Block]:
    """Yield the words of a Jinja template; what it fills in is ``CODE``."""

    def blank(match: "re.Match[str]") -> str:
        return ("|" if match[0].startswith("{%") else CODE) + "\n" * match[0].count("\n")

    text = re.sub(r"\{#.*?#\}", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", blank, text, flags=re.DOTALL)
    text = re.sub(
        r"<(script|style)\b.*?</\1>", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL
    )
    words = _Words()
    words.feed(text)
    words.cut()
    for line, part in words.found:
        for said in part.split("|"):
            if len(said.split()) >= 3:
                yield Block(name, line, said.strip())
