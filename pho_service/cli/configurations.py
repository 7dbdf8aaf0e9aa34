"""`pho configurations`: the library of what was found."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.library import LIBRARY, matches
from pho_service.cli.options import at_least, json_verb
from pho_service.cli.remote import open_client, service_verb
from pho_service.cli.terminal import print_json, print_table, say, tell
from pho_service.errors import ConfigurationError, InvalidInput, OutputError

if TYPE_CHECKING:
    from pho_service.library import LibraryFile


@click.group(invoke_without_command=True)
@click.option("--pattern", help="Share of weights to remove (0.5), or N kept of M (2:4).")
@click.option("--scope", type=click.Choice(["row", "layer", "global"]), help="[default: any]")
@click.option("--family", help="model_type of the model that it is for: llama, gemma3_text.")
@click.option("--parameters", type=int, help="Number of parameters of that model.")
@click.option("--limit", type=int, default=10, show_default=True, help="At most so many.")
@click.option(
    "--why", is_flag=True, help="The reasons of each for its place, not of the first alone."
)
@click.option("--all", "others", is_flag=True, help="Those of another pattern or scope, too.")
@click.option("--library", help=LIBRARY)
@click.pass_context
@json_verb
def configurations(
    context: click.Context,
    pattern: str | None,
    scope: str | None,
    family: str | None,
    parameters: int | None,
    limit: int,
    why: bool,
    others: bool,
    library: str | None,
    as_json: bool,
) -> None:
    """
    Find the configurations of a library that are likely to be good on a model.

    They are ranked by pattern, by the similarity of the models, and by what was
    measured. The reasons of the first are printed below the table.

    \b
    Example:
      pho configurations --pattern 2:4 --family llama
      pho configurations --library shared/configurations --pattern 0.5 --why
    """
    if context.invoked_subcommand is not None:
        return
    from pho_service.library import Wanted
    from pho_service.shown.tables import GAINS

    at_least(1, limit=limit, parameters=parameters)
    entries = matches(library, Wanted.parse(pattern, scope, family, parameters), limit)
    if as_json:
        print_json(entries)
        return
    if not entries:
        say(
            "The library is empty. Every finished job puts its configuration there; `pho "
            "configurations import FILE...` those of others."
        )
        return
    listed = [match for match in entries if match["fits"] or others]
    left_out = len(entries) - len(listed)
    if left_out:
        say(f"Left out, as they are of another pattern or scope: {left_out}. --all lists them.")
    if not listed:
        return
    gains = [by for by in GAINS if any(any(_gains(match, by)) for match in listed)]
    print_table(
        "Configurations, the most promising first",
        (
            "id",
            "found on",
            "pattern",
            "scope",
            "method",
            *(heading for by in gains for heading in (GAINS[by], f"{GAINS[by]}, expected")),
        ),
        [
            (
                match["id"],
                " + ".join(model["name"] for model in match["models"]),
                match["pattern"],
                match["scope"],
                match["method"],
                *(cell for by in gains for cell in _gains(match, by)),
            )
            for match in listed
        ],
        caption="Gain in perplexity: the share of RIA's that is saved where it was found; by "
        "divergence: as the divergence from the dense model tells; in the proxy: the share of "
        "RIA's proxy. Expected: on the model that is asked for.",
        spare=(*(f"{GAINS[by]}, expected" for by in gains), "method", "scope"),
    )
    for match in listed if why else listed[:1]:
        tell(f"{match['id']}: {'fits' if match['fits'] else 'does not fit'}")
        for reason in match["reasons"]:
            tell(f"  {reason}")


@configurations.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@service_verb
def import_files(files: tuple[str, ...], url: str | None, as_json: bool) -> None:
    """
    Put configurations that were found elsewhere into a service's library.

    FILE is a config.json of `pho search` or a transfer.json of `pho transfer`,
    or a folder of such. What is there already is not stored twice.

    \b
    Example:
      pho configurations import config.json shared
    """
    read: dict[str, LibraryFile] = {}
    for name in files:
        read |= _read(Path(name))
    with open_client(url) as client:
        stored = [client.import_configuration(file) for file in read.values()]
    if as_json:
        print_json([match.model_dump(mode="json") for match in stored])
        return
    for name, match in zip(read, stored, strict=True):
        tell(f"{match.id}  {name}")


def _read(path: Path) -> "dict[str, LibraryFile]":
    """What a file holds, or all files below a folder, by their names."""
    from pho_service.library import read_folder, read_library_file

    if not path.is_dir():
        return {str(path): read_library_file(path)}
    files, others = read_folder(path)
    for other in others:
        say(f"Note: left out: {other}")
    if not files:
        raise ConfigurationError(f"the folder {path} holds no configuration. Give another.")
    return {str(path / name): file for name, file in files.items()}


@configurations.command("export")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option("--out", required=True, help="A folder; it is made if it is not there.")
@service_verb
def export_files(ids: tuple[str, ...], out: str, url: str | None, as_json: bool) -> None:
    """
    Write configurations of a service's library to a folder, a file each; all of them without ID.

    The folder is a library itself: --library FOLDER takes it.

    \b
    Example:
      pho configurations export --out shared
    """
    from pho_service.host.files import write_json

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"--out {out} is a file. Give a folder.")
    written = []
    with open_client(url) as client:
        chosen = ids or [str(match.id) for match in client.configurations(limit=200)]
        if not ids and len(chosen) == 200:
            say("Note: these are the 200 most promising; name others by their ids.")
        for entry_id in chosen:
            file = client.export_configuration(entry_id)
            configuration = file.configuration
            model = configuration.model.get("name", "model")
            name = Path(f"{model} {configuration.pattern} {configuration.scope}").name
            # Only letters, and so many, that every file system and shell takes.
            plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:100] or "configuration"
            path = folder / f"{plain}-{entry_id[:8]}.json"
            _make(folder)
            write_json(path, file.to_dict(str(entry_id)))
            written.append(str(path))
    if as_json:
        print_json(written)
        return
    if not written:
        say("The library is empty: nothing is written.")
    for file_path in written:
        tell(file_path)


@configurations.command("delete")
@click.argument("configuration_id", metavar="ID")
@service_verb
def delete_entry(configuration_id: str, url: str | None, as_json: bool) -> None:
    """
    Take a configuration out of a service's library. The job that found it stays.

    \b
    Example:
      pho configurations delete d5aed9d3-7b7c-40f9-9896-b5f528363229
    """

    with open_client(url) as client:
        client.delete_configuration(configuration_id)
    if as_json:
        print_json({"deleted": configuration_id})
        return
    say("deleted")


def _gains(match: Mapping[str, Any], by: str) -> tuple[str | None, str | None]:
    """Where it was found, and what is expected; None for what was measured otherwise."""
    gain, expected = match["gains"][by], match["expected_gains"][by]
    return (
        None if gain is None else f"{gain:.1%}",
        None if expected is None else f"{expected:.1%}",
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {folder} was not made: {error.strerror}.") from error
