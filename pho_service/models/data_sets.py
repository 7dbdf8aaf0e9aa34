"""
Rows of text from data sets and files of any size, in little memory.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from pho_service.errors import InvalidInput, TextError, field_name, shown
from pho_service.host.access import is_path
from pho_service.host.data_sets import (
    CARDS,
    MOST_BYTES,
    USUAL_TEXTS,
    check_card,
    check_cards,
    near_usual,
)
from pho_service.host.settings import Settings
from pho_service.models.loading import hub_is_away

_NAMES_SHOWN = 10  # columns, in a message
_BATCH = 64  # rows of a parquet file, whose texts are looked at one by one
_GULP = 2**20
# What `datasets` knows by these endings, and what it is read as.
_KINDS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "lines",
    ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
_PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where documents come from: exactly one of ``path`` and ``dataset``."""

    path: str | None = None  # .txt (one document), .jsonl or .parquet (one document a row)
    # Hub id or local folder, for the ``datasets`` library; or the name of a usual text.
    dataset: str | None = None
    config: str | None = None  # Configuration of the data set
    data_file: str | None = None  # One file of the data set
    # Split of the data set; None takes test, or the only one that there is.
    split: str | None = "train"
    field: str = "text"  # Column that holds the text
    rows: int | None = None  # How many rows are joined, the first; None takes all
    # What joins the rows to one document, empty ones, too; None leaves each a document, unless they
    # are lines of one text (WikiText).
    separator: str | None = None

    def __str__(self) -> str:
        if self.path:
            return self.path
        return " ".join(filter(None, (self.dataset, self.config, self.data_file, self.split)))

    def usual(self, *, measured: bool) -> "tuple[TextSource, int | None]":
        """Return what a usual text's name stands for, and how many windows are measured on."""
        usual = USUAL_TEXTS.get(self.dataset or "")
        if usual is None:
            return self, None
        part = usual.evaluation if measured else usual.calibration
        source = TextSource(
            dataset=usual.dataset,
            config=part.config,
            data_file=part.data_file,
            split=part.split,
            field=self.field,
            rows=part.rows,
            separator=part.separator,
        )
        return source, part.windows


class TextTooLong(TextError):
    """More would have to be read of a text than the limits allow."""


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """The most that is read."""

    document_bytes: int  # Largest size of a document, a line or a text that is tokenised whole
    text_bytes: int  # Largest size of all of a text, unpacked

    @classmethod
    def of(cls, settings: Settings) -> "TextLimits":
        return cls(document_bytes=settings.max_document_bytes, text_bytes=settings.max_text_bytes)


class Budget:
    """Rest of a text that may still be read."""

    def __init__(self, limits: TextLimits, *, whole: bool) -> None:
        self.limits = limits
        self._most = min(limits.text_bytes, limits.document_bytes) if whole else limits.text_bytes
        self._variable = (
            "PHO_MAX_DOCUMENT_BYTES" if self._most < limits.text_bytes else "PHO_MAX_TEXT_BYTES"
        )
        self._taken = 0

    def take(self, count: int, where: str) -> None:
        """Note that so many bytes were read."""
        self._taken += count
        if self._taken > self._most:
            raise TextTooLong(
                f"{where}: more than {self._most} bytes would have to be read, unpacked. Give a "
                f"shorter text, or let the operator raise {self._variable}."
            )

    def check_document(self, count: int, where: str) -> None:
        if count > self.limits.document_bytes:
            raise TextTooLong(
                f"{where} is longer than {self.limits.document_bytes} bytes. Cut it into "
                "documents, or let the operator raise PHO_MAX_DOCUMENT_BYTES."
            )


def kind_of(name: str) -> tuple[str, str | None]:
    """The format that a file of a data set is read in, and how it is packed."""
    path = PurePath(name)
    packing = _PACKED.get(path.suffix.lower())
    suffix = PurePath(path.stem).suffix if packing else path.suffix
    kind = _KINDS.get(suffix.lower())
    if kind is None:
        raise TextError(
            f"the file {shown(path.name)} cannot be read as text: only .json, .jsonl, .parquet, "
            ".txt, .csv and .tsv can, also packed as .gz, .bz2, .xz or .zst. Name others out of "
            f"the way with {field_name('calibration/data_file')}."
        )
    return kind, packing


def unpacked(file: BinaryIO, packing: str | None) -> BinaryIO:
    """The content of a file that may be packed, read a little at a time."""
    if packing is None:
        return _buffered(file)
    if packing == "zstd":
        import pyarrow

        return _buffered(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd"))
    kinds: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    return cast(BinaryIO, kinds[packing](file))


def _buffered(file: Any) -> BinaryIO:
    """With lines of a bounded length, which files of the hub and of pyarrow do not have."""
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)


def read_text(file: BinaryIO, where: str, budget: Budget) -> str:
    return _decoded(_whole(file, where, budget), where).replace("\r\n", "\n").replace("\r", "\n")


def read_json(
    file: BinaryIO, field: str, where: str, budget: Budget, *, lists: bool = False
) -> Iterator[str]:
    """The texts of JSON: an object a line, or, with ``lists``, a list of objects as well."""
    for number, line in _lines(file, where, budget):
        if not line.strip():
            continue
        if lists and number == 1 and line.lstrip().startswith("["):
            rest = _decoded(_whole(file, where, budget), where)
            for place, row in enumerate(_parsed(line + "\n" + rest, where), start=1):
                yield _text_of(row, field, f"{where}, object {place}")
            return
        here = f"{where}, line {number}"
        yield _text_of(_parsed(line, here), field, here)


def read_csv(
    file: BinaryIO, field: str, delimiter: str, where: str, budget: Budget
) -> Iterator[str]:
    """The texts of a table whose first line names its columns."""
    csv.field_size_limit(budget.limits.document_bytes)
    lines = (f"{line}\n" for _, line in _lines(file, where, budget))
    rows = csv.DictReader(lines, delimiter=delimiter)
    try:
        for row in rows:
            here = f"{where}, line {rows.line_num}"
            text = _text_of(row, field, here)
            budget.check_document(len(text), here)
            yield text
    except csv.Error as error:
        here = f"{where}, line {rows.line_num}"
        if "field limit" in str(error):
            budget.check_document(budget.limits.document_bytes + 1, f"a cell at {here}")
        raise TextError(f"{here} is not CSV: {shown(str(error))}.") from error


def read_parquet(file: BinaryIO, field: str, where: str, budget: Budget) -> Iterator[str]:
    """The texts of a column of a parquet file."""
    # They are read as a dictionary, so that what the file has once is in memory once.
    import pyarrow
    import pyarrow.parquet

    strings = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    try:
        schema = pyarrow.parquet.read_schema(file)
        if field not in schema.names:
            raise TextError(
                f"{where} has no column {shown(field)!r}, only {listed(schema.names)}. "
                f"{_way_out('column')}"
            )
        kind = schema.field(field).type
        if getattr(kind, "value_type", kind) not in strings or pyarrow.types.is_nested(kind):
            raise TextError(f"{where}: the column {shown(field)!r} does not hold text.")
        file.seek(0)
        with pyarrow.parquet.ParquetFile(file, read_dictionary=[field]) as table:
            for batch in table.iter_batches(batch_size=_BATCH, columns=[field]):
                for scalar in batch.column(0):
                    content = scalar.value
                    if content is None or not content.is_valid:
                        raise TextError(f"{where}: the column {shown(field)!r} does not hold text.")
                    size = content.as_buffer().size
                    budget.check_document(size, f"a row of {where}")
                    budget.take(size, where)
                    yield content.as_py()
    except pyarrow.ArrowException as error:
        reason = shown(" ".join(str(error).split()), 300)
        raise TextError(f"{where} is not a readable parquet file: {reason}") from error


def listed(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    names_shown = ", ".join(shown(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return names_shown if more <= 0 else f"{names_shown} and {more} more"


def _whole(file: BinaryIO, where: str, budget: Budget) -> bytes:
    parts = []
    size = 0
    while part := file.read(_GULP):
        size += len(part)
        budget.check_document(size, where)
        budget.take(len(part), where)
        parts.append(part)
    return b"".join(parts)


def _lines(file: BinaryIO, where: str, budget: Budget) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without their ends; none is read that is too long."""
    number, at = 0, 0
    while line := file.readline(budget.limits.document_bytes + 2):
        budget.check_document(len(line.rstrip(b"\r\n")), f"line {number + 1} of {where}")
        budget.take(len(line), where)
        for part in line.splitlines():
            number += 1
            yield number, _decoded(part, where, at)
        at += len(line)


def _decoded(content: bytes, where: str, at: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise TextError(
            f"the text {where} is not UTF-8: {error.reason} at byte {at + error.start}."
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where} is not JSON: {shown(str(error))}.") from error


def _text_of(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    names = [str(name) for name in row] if isinstance(row, dict) else []
    only = f", only {listed(names)}" if names else ""
    raise TextError(f"{where} has no text in the field {shown(field)!r}{only}. {_way_out('field')}")


def _way_out(what: str) -> str:
    """How texts are found that lie in a column or a field of another name."""
    name = field_name("calibration/field")
    return f"Name the {what} with {name}." if name else f"Call the {what} 'text'."


def read_dataset(source: TextSource, budget: Budget) -> Iterator[str]:
    """The documents of all files of a split, in the order of the ``datasets`` library."""
    # It finds the files, and follows no card that was not checked before; they are read here,
    # because it sets no bounds to what it reads.
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
                yield from (line for _, line in _lines(content, where, budget))


def with_split(source: TextSource) -> TextSource:
    """Return the source with the split that is read of its data set, which records name."""
    if source.dataset is None or source.split is not None:
        return source
    with _readable(source):
        _, builder = _found_dataset(source)
    return replace(source, split=_split(source, [*map(str, builder.config.data_files or {})]))


def _split(source: TextSource, splits: list[str]) -> str:
    """The split to read; by default test, or the only one that there is."""
    wanted = source.split or ("test" if "test" in splits or len(splits) != 1 else splits[0])
    if wanted not in splits:
        raise TextError(
            f"the data set {source} cannot be read: there is no split {wanted!r}, only "
            f"{listed(splits)}. Name one with {field_name('calibration/split')}."
        )
    return wanted


def _found_dataset(source: TextSource) -> tuple[str, Any]:
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


def _found_folder(source: TextSource, folder: Path) -> tuple[str, Any]:
    place = str(folder.resolve())
    check_cards(folder, f"the data set {source}")
    return place, _builder(source, place)


def _builder(source: TextSource, place: str, **more: Any) -> Any:
    """Let ``datasets`` look for the files of a data set."""
    import datasets

    try:
        return datasets.load_dataset_builder(
            place, source.config, data_files=source.data_file, **more
        )
    except ValueError as error:
        if "Config name is missing" in str(error):
            problem = "it has several configurations"
        elif source.config is not None and "not found. Available" in str(error):
            problem = f"there is no configuration {source.config!r}"
        else:
            raise
        configs = listed([*map(str, datasets.get_dataset_config_names(place, **more))])
        raise TextError(
            f"the data set {source.dataset} cannot be read: {problem}. Name one of these with "
            f"{field_name('calibration/dataset_config')}: {configs}."
        ) from error


def _cached(dataset: str) -> Path:
    """The folder of the hub's cache that has a data set, as `hf download` leaves it."""
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
            f"with {field_name('calibration/text')}." + near_usual(dataset)
        ) from error


def _checked_commit(dataset: str) -> tuple[str, str]:
    """The id of a data set of the hub, and the commit that it is at, whose cards were checked."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    hub = HfApi(endpoint=config.HF_ENDPOINT)
    info = hub.dataset_info(dataset)
    dataset, commit = info.id, str(info.sha)  # wikitext is Salesforce/wikitext by now
    for card in CARDS:
        try:
            path = hub.hf_hub_download(dataset, card, repo_type="dataset", revision=commit)
        except EntryNotFoundError:
            continue
        with Path(path).open("rb") as file:
            check_card(card, file.read(MOST_BYTES + 1), f"data set {dataset!r}")
    return dataset, commit


@contextmanager
def _readable(source: TextSource) -> Iterator[None]:
    try:
        yield
    except (TextError, InvalidInput, GeneratorExit, MemoryError):
        raise
    except Exception as error:  # datasets raises whatever its file systems raise
        reason = shown(" ".join(str(error).split()), 300)
        raise _unreadable(source, f"{type(error).__name__}: {reason}") from error


def _unreadable(source: TextSource, reason: str) -> TextError:
    return TextError(
        f"the data set {source} cannot be read: {reason}. Check the name, its configuration, file "
        "and split, and the network; or give a local file with "
        f"{field_name('calibration/text')}." + near_usual(source.dataset)
    )
