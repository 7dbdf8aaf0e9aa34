"""
`pho doctor`.
"""

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click

from pho_service.cli.options import json_verb
from pho_service.cli.terminal import print_json, print_table
from pho_service.errors import plain_line
from pho_service.host.machine import EXTRAS, hub_answers, install_command, machine, missing_of
from pho_service.host.settings import Settings, read_settings
from pho_service.spec.document import format_bytes, sizes_told

Checked = tuple[str, str, str]  # what, ``ok``, ``note`` or ``fails``, and what is to be known
GIB = 2**30
LITTLE = 5 * GIB  # of free disk: a model of a billion weights is about as large


@click.command()
@json_verb
def doctor(as_json: bool) -> None:
    """
    Look at this machine: device, hub, caches, extras, database, store and disk.

    Nothing is changed or downloaded. Exit code 1 if something fails.

    \b
    Example:
      pho doctor
    """
    settings = read_settings()
    checks: list[Checked] = []
    for look in (_packages, _device, _hub, _database, _store, _disk):
        try:
            checks += look(settings)
        except Exception as error:  # whatever is wrong with it is what is asked for
            checks.append((look.__name__.removeprefix("_"), "fails", plain_line(str(error))))
    names = ("what", "state", "detail")
    if as_json:
        print_json([dict(zip(names, check, strict=True)) for check in checks])
    else:
        print_table("This machine", names, checks)
    if any(state == "fails" for _, state, _ in checks):
        raise SystemExit(1)


def _packages(_: Settings) -> Iterator[Checked]:
    yield "pho", "ok", f"{version('pho-service')}, in {Path(__file__).parents[1]}"
    for extra, purpose in EXTRAS.items():
        missing = ", ".join(missing_of(extra))
        way = f": {missing} missing; {install_command(extra)}" if missing else ""
        yield f"extra {extra}", "note" if missing else "ok", f"{purpose}{way}"


def _device(_: Settings) -> Iterator[Checked]:
    if find_spec("torch") is None:
        yield "device", "note", "torch is not installed, so that no model can be run here"
        return
    import torch

    from pho_service.pruning.hardware import available_memory, free_memory, gpus

    yield "cpu", "ok", f"{machine()}, {format_bytes(available_memory())} of memory free"
    for card in gpus():
        about = torch.cuda.get_device_properties(card)
        sparse = "" if about.major >= 8 else "; older than Ampere: no kernels for 2:4"
        free = f"{format_bytes(free_memory(card))} of {format_bytes(about.total_memory)} free"
        yield str(card), "ok", f"{about.name}, {free}{sparse}"
    if not gpus():
        yield "gpu", "note", f"torch {torch.__version__} sees none: models run on the CPU"


def _hub(_: Settings) -> Iterator[Checked]:
    if find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants, get_token

        token = "with a token" if get_token() else "without a token: public models alone"
        well = hub_answers()
        answer = f"answers, {token}" if well else "does not answer, or may not be asked"
        yield "hub", "ok" if well else "note", f"{constants.ENDPOINT} {answer}"
        yield _place("cache of the hub", Path(constants.HF_HUB_CACHE))


def _database(settings: Settings) -> Iterator[Checked]:
    if find_spec("psycopg") is None:
        return
    from storage.database import Database
    from storage.embedded import running_url

    secret = settings.database_url
    url = secret.get_secret_value() if secret else running_url(settings.data_dir.expanduser())
    if url is None:
        yield (
            "database",
            "ok",
            "the embedded PostgreSQL is not running; `pho serve` starts it",
        )
        return
    database = Database(url, pool=1)
    try:
        (version, size), tables = database.server(), database.tables()
    finally:
        database.close()
    who = "PHO_DATABASE_URL answers" if secret else "the embedded one runs"
    yield "database", "ok", f"{who}: PostgreSQL {version.split()[0]}, {format_bytes(size)}"
    for table in tables:
        yield "dead rows", "note" if table.is_swollen else "ok", str(table)


def _store(settings: Settings) -> Iterator[Checked]:
    if find_spec("fsspec") is None:
        return
    from pho_service.host.artifacts import PrunedStore, store_url

    if not (settings.artifacts or Path(store_url(settings)).is_dir()):
        return  # no service has been here
    sizes = PrunedStore.of(settings).sizes()
    state = "ok" if sizes.get("free", LITTLE) >= LITTLE else "note"
    yield "artifact store", state, f"{store_url(settings)}: {sizes_told(sizes)}"


def _disk(settings: Settings) -> Iterator[Checked]:
    yield _place("cache of bundles", settings.cache_dir)
    yield _place("data of a service", settings.data_dir)
    yield _place("this folder", Path())


def _place(what: str, folder: Path) -> Checked:
    """Whether a folder can be written, and what is free there."""
    path = folder.expanduser().resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        return what, "fails", f"{path} cannot be written. Give yourself the right to."
    free = shutil.disk_usage(there).free
    return what, "ok" if free >= LITTLE else "note", f"{path}, {free / GIB:,.1f} GiB free"
