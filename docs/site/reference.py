"""
What is made when the site is built: the references of the command line and of the HTTP API, and the
mark, which the pages of the service have, too.

A hook of MkDocs. Two libraries were tried for it: mkdocs-click runs the examples in a verb's help
together, and essentials-openapi, which MkDocs' plugins render OpenAPI documents with, shows neither
a type where a value may be null nor a default.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, FileSystemLoader
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

MARK = Path(__file__).parents[2] / "pho_service" / "shown" / "mark.svg"
PLACE = "<!-- made when the site is built -->"
WIDTH = 100  # characters of a line of help


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Put the mark beside the pages."""
    files.append(File.generated(config, "site/mark.svg", abs_src_path=str(MARK)))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put what is made into its page; other pages stay as they are."""
    made = {"reference/cli.md": command_line, "reference/http.md": http}
    if page.file.src_uri not in made:
        return markdown
    if PLACE not in markdown:
        raise ValueError(f"{page.file.src_uri} has no place for what is made: {PLACE}")
    return markdown.replace(PLACE, made[page.file.src_uri]())


def command_line() -> str:
    """The help of every verb, in the order and under the titles of `pho --help`."""
    from pho_service.cli import LOCAL_VERBS, SERVICE_VERBS, main

    group = main.make_context("pho", [], resilient_parsing=True)
    parts = [f"```text\n{_help(main, group)}\n```"]
    for title, verbs in (("Verbs", LOCAL_VERBS), ("Verbs of the service", SERVICE_VERBS)):
        parts.append(f"## {title}")
        for name in verbs:
            command = main.get_command(group, name)
            assert command is not None
            for context in _contexts(command, name, group):
                path = context.command_path
                anchor = path.replace(" ", "-")
                shown = _help(context.command, context)
                parts.append(f"### {path} {{ #{anchor} }}\n\n```text\n{shown}\n```")
    return "\n\n".join(parts)


def _contexts(command: click.Command, name: str, parent: click.Context) -> Iterator[click.Context]:
    """Of a command and those below it."""
    context = click.Context(command, info_name=name, parent=parent)
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _contexts(found, below, context)


def _help(command: click.Command, context: click.Context) -> str:
    from pho_service.cli.document import WHOLE_HELP

    context.terminal_width = WIDTH
    context.meta[WHOLE_HELP] = True
    return command.get_help(context)


def http() -> str:
    """The operations and the schemas of the OpenAPI document."""
    from pho_service.api.reference import body, words

    environment = Environment(  # noqa: S701 - Markdown, of our own words
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(words=words, cell=cell, answer=body)
    return environment.get_template("http.md.jinja").render(openapi_document())


def openapi_document() -> dict[str, Any]:
    """What the service answers at ``/openapi.json``; no database is asked for it."""
    from pho_service.api.app import create_app
    from pho_service.host.settings import Settings
    from storage.database import Database

    database = Database("postgresql://localhost/pho")
    try:
        return create_app(database, Settings()).openapi()
    finally:
        database.close()


def cell(text: object) -> str:
    """A text that fits into a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")
