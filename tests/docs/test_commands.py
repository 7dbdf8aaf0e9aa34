"""Commands in the documentation exist: verbs, options and values, operations and documents."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.exceptions import Exit

from pho_service.api.app import create_app
from pho_service.cli import main
from pho_service.host.settings import Settings
from pho_service.spec.job import JobSpec
from pho_service.spec.transfer import TransferRequest
from storage.database import Database

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)  # lists are indented by less
ADDRESS = re.compile(r"(?:https?://)?(?:localhost|127\.0\.0\.1):\d+([^?]*)")
SHELL = ("sh", "bash", "console")
WORDS = {"do", "then", "time", "until", "while"}  # a command may come after them


def blocks(page):
    """What a page shows to be pasted into a shell."""
    text = (ROOT / page).read_text()
    found = [code for language, code in FENCED.findall(text) if language in SHELL]
    return found + [block for block in INDENTED.findall(FENCED.sub("", text)) if "pho " in block]


def commands(code):
    """The simple commands of a shell's text, word by word, assignments and prompts left out."""
    text = re.sub(r"(?:^|(?<=\s))#.*", "", code.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words = []
    for word in [*lexer, "\n"]:
        if set(word) <= set("();<>|&\n"):
            if words:
                yield words
            words = []
        elif words or not (word in WORDS or re.match(r"\w+=", word)):
            words.append(word)


def pho_commands(page):
    """The arguments of each `pho` that a page shows in a block."""
    found = [words for code in blocks(page) for words in commands(code)]
    # What `kubectl exec` runs comes after a --.
    found = [w[w.index("--") + 1 :] if w[0] == "kubectl" and "--" in w else w for w in found]
    return [words[1:] for words in found if words[0].rpartition("/")[2] == "pho"]


def spans(page):
    """The arguments of each `pho` in the running text, where arguments may be left out."""
    text = FENCED.sub("", (ROOT / page).read_text())
    return [shlex.split(span)[1:] for span in re.findall(r"`(pho [^`]*)`", text)]


def parse(words, *, whole):
    """Have click read a command; with ``whole``, values are checked and nothing may be missing."""
    command = main
    context = click.Context(main, info_name="pho", **main.context_settings)
    while isinstance(command, click.Group):
        if not words or words[0] in ("--help", "-h", "--version"):
            return
        found = command.get_command(context, words[0])
        if found is None:
            if not command.invoke_without_command:
                raise click.UsageError(f"no such verb: {words[0]}")
            break
        command, context = found, click.Context(found, info_name=words[0], parent=context)
        words = words[1:]
    if whole:
        try:
            command.make_context(str(context.info_name), list(words), parent=context.parent)
        except Exit:  # --help
            return
    else:
        command.make_parser(context).parse_args(list(words))


@pytest.mark.parametrize(("of_page", "whole"), [(pho_commands, True), (spans, False)])
def test_each_pho_of_a_block_is_complete_and_in_the_text_has_the_options_that_are_named(
    of_page, whole
):
    for page in NAMES:
        for words in of_page(page):
            try:
                parse([word for word in words if whole or word not in ("VERB", "...")], whole=whole)
            except click.UsageError as error:
                pytest.fail(f"{page}: pho {shlex.join(words)}: {error.format_message()}")
    assert sum(len(of_page(page)) for page in NAMES) > 60  # commands are read at all


def test_each_make_is_a_target_and_each_script_of_benchmarks_and_each_variable_is_there():
    assert ["workers"] in pho_commands("docs/how-to/many-gpus.md")
    assert ["keys", "create", "me", "--all-jobs"] in pho_commands("docs/containers.md")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in NAMES:
        text = (ROOT / page).read_text()
        code = [*blocks(page), *re.findall(r"`([^`\n]+)`", text)]
        made = {name for each in code for name in re.findall(r"\bmake ([a-z-]+)", each)}
        named = set(re.findall(r"\bPHO_[A-Z_]*[A-Z]\b", text))
        now = re.sub(r"at\s+commit\s+\w+\s+by\s+`benchmarks/\w+\.py", "", text)  # others are gone
        scripts = dict.fromkeys(re.findall(r"benchmarks/\w+\.py", now), page)

        assert made <= targets, page
        assert named <= {f"PHO_{name.upper()}" for name in Settings.model_fields}, page
        assert [path for path in scripts if not (ROOT / path).is_file()] == [], page


@pytest.fixture(scope="module")
def operations():
    database = Database("postgresql://localhost/pho")
    paths = create_app(database, Settings()).openapi()["paths"]
    database.close()
    return paths


def test_each_curl_asks_for_what_there_is(operations):
    code = [block for page in NAMES for block in blocks(page)]
    for words in (words for each in code for words in commands(each) if words[0] == "curl"):
        (asked,) = (found[1] for word in words if (found := ADDRESS.match(word)))
        (path,) = (p for p in operations if re.fullmatch(re.sub(r"\{\w+\}", "[^/:]+", p), asked))
        body = words[words.index("-d") + 1] if "-d" in words else None
        assert ("get" if body is None else "post") in operations[path], asked
        if body is not None:
            model = TransferRequest if path.endswith(":transfer") else JobSpec
            whole = {"model": "org/name", "pattern": "0.5"} if path.endswith(":fork") else {}
            model.model_validate({**whole, **json.loads(body)})


def test_each_summary_is_how_the_description_begins(operations):
    for operation in (each for path in operations.values() for each in path.values()):
        assert " " in operation["summary"]
        assert operation["description"].startswith(operation["summary"])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_each_file_that_the_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())

    assert links
    assert all((ROOT / link).exists() for link in links)
