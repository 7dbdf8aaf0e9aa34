"""
The rows of a data set: of the Hugging Face hub, of its cache, or of a folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pho_service.errors import InvalidInput, TextError
from pho_service.host.access import is_path
from pho_service.host.dataset_card import CARDS, MOST_BYTES, check_card, check_cards
from pho_service.host.plain import shown
from pho_service.host.usual_texts import USUAL_TEXTS
from pho_service.models.hub_or_cache import hub_is_away
from pho_service.models.text_files import (
    Budget,
    kind_of,
    listed,
    read_csv,
    read_json,
    read_lines,
    read_parquet,
    unpacked,
)

if TYPE_CHECKING:
    from pho_service.models.texts import TextSource

# The options of a data set's fields, of calibrations and of reports.
_OPTIONS = {
    "config": "--dataset-config (or --report-dataset-config; dataset_config in a job)",
    "split": "--split (or --report-split; split in a job)",
}


def read_dataset(source: "TextSource", budget: Budget) -> Iterator[str]:
    """
    The documents of all files of a split, in the order of the ``datasets`` library.

    It finds the files, and follows no card that was not checked before; they are read here,
    because it sets no bounds to what it reads.
    """
    from datasets.utils.file_utils import xopen

    with _readable(source):
        place, builder = _found_dataset(source)
    files = builder.config.data_files or {}
    for file in map(str, files[_split(source, [*map(str, files)])]):
        if not file.startswith(f"{place}/"):
            raise _unreadable(source, f"it has the file {shown(file)}, which lies elsewhere")
        inside = file.removeprefix(f"{place}/")
        kind, packing = kind_of(inside)
        where = f"the data set {source}: {shown(inside)}"
        with _readable(source), xopen(file, "rb") as opened:
            content = unpacked(cast(BinaryIO, opened), packing)
            if kind == "json":
                yield from read_json(content, source.field, where, budget, lists=True)
            elif kind == "parquet":
                yield from read_parquet(content, source.field, where, budget)
            elif kind == "csv":
                mark = getattr(builder.config, "delimiter", None) or builder.config.sep
                yield from read_csv(content, source.field, mark, where, budget)
            elif source.field != "text":
                raise TextError(f"{where} is plain text, whose field is 'text' alone.")
            else:
                yield from read_lines(content, where, budget)


def with_split(source: "TextSource") -> "TextSource":
    """
    Return the source with the split that is read of its data set, which records name.

    Raises:
        TextError, InvalidInput: The data set cannot be found, or has several splits and no test.
    """
    if source.dataset is None or source.split is not None:
        return source
    with _readable(source):
        _, builder = _found_dataset(source)
    return replace(source, split=_split(source, [*map(str, builder.config.data_files or {})]))


def _split(source: "TextSource", known: list[str]) -> str:
    """The split to read; by default test, or the only one that there is."""
    wanted = source.split or ("test" if "test" in known or len(known) != 1 else known[0])
    if wanted not in known:
        raise TextError(
            f"the data set {source} cannot be read: there is no split {wanted!r}, only "
            f"{listed(known)}. Name one with {_OPTIONS['split']}."
        )
    return wanted


def _found_dataset(source: "TextSource") -> tuple[str, Any]:
    """Where a data set is, and how ``datasets`` reads it; its cards are checked before."""
    name = str(source.dataset)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _found_folder(source, folder)
    if is_path(name):
        raise TextError(
            f"the data set {name} does not exist. Give a folder, a hub id, or "
            f"{' or '.join(USUAL_TEXTS)}."
        )
    if hub_is_away():
        return _found_folder(source, _cached(name))
    name, commit = _checked_commit(name)
    builder = _builder(source, f"hf://datasets/{name}", revision=commit)
    return f"hf://datasets/{name}@{commit}", builder


def _found_folder(source: "TextSource", folder: Path) -> tuple[str, Any]:
    place = str(folder.resolve())
    check_cards(folder, f"the data set {source}")
    return place, _builder(source, place)


def _builder(source: "TextSource", place: str, **more: Any) -> Any:
    """
    What ``datasets`` knows of the files of a data set.

    Raises:
        TextError: There are several configurations, and none of them is named.
    """
    import datasets

    try:
        return datasets.load_dataset_builder(
            place, source.config, data_files=source.data_file, **more
        )
    except ValueError as error:
        if "Config name is missing" in str(error):
            told = "it has several configurations"
        elif source.config is not None and "not found. Available" in str(error):
            told = f"there is no configuration {source.config!r}"
        else:
            raise
        configs = listed([*map(str, datasets.get_dataset_config_names(place, **more))])
        raise TextError(
            f"the data set {source.dataset} cannot be read: {told}. Name one of these with "
            f"{_OPTIONS['config']}: {configs}."
        ) from error


def _cached(dataset: str) -> Path:
    """
    The folder of the hub's cache that has a data set, as `hf download` leaves it.

    Raises:
        TextError: There is none.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                dataset,
                repo_type="dataset",
                local_files_only=True,
                cache_dir=constants.HF_HUB_CACHE,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise TextError(
            f"the data set {dataset} cannot be read: no folder here has this name, and as a name "
            "on the hub it cannot be looked up: the hub cannot be reached, and no copy is in the "
            "local cache. Check the spelling, the network and HF_ENDPOINT, or give a local file "
            "with --text."
        ) from error


def _checked_commit(dataset: str) -> tuple[str, str]:
    """
    The id of a data set of the hub, and the commit that it is at, whose cards were checked.

    Raises:
        InvalidInput: They name files elsewhere.
    """
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    hub = HfApi(endpoint=config.HF_ENDPOINT)
    found = hub.dataset_info(dataset)
    dataset, commit = found.id, str(found.sha)  # wikitext is Salesforce/wikitext by now
    for card in CARDS:
        try:
            path = hub.hf_hub_download(dataset, card, repo_type="dataset", revision=commit)
        except EntryNotFoundError:
            continue
        with Path(path).open("rb") as file:
            check_card(card, file.read(MOST_BYTES + 1), f"data set {dataset!r}")
    return dataset, commit


@contextmanager
def _readable(source: "TextSource") -> Iterator[None]:
    try:
        yield
    except (TextError, InvalidInput, GeneratorExit, MemoryError):
        raise
    except Exception as error:  # datasets raises whatever its file systems raise
        reason = shown(" ".join(str(error).split()), 300)
        raise _unreadable(source, f"{type(error).__name__}: {reason}") from error


def _unreadable(source: "TextSource", reason: str) -> TextError:
    return TextError(
        f"the data set {source} cannot be read: {reason}. Check the name, its configuration, file "
        "and split, and the network; or give a local file with --text."
    )
