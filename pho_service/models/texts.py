"""
Texts for calibration, confirmation and reports: a local file, or a data set by name.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import TextError
from pho_service.models.loading import LanguageModel
from pho_service.pruning.perplexity import cut_windows
from pho_service.spec import C4_DATASET, C4_FILE

POOL = 20_000  # documents that a sample is drawn from; C4's first file has 356,317
SEPARATOR = "\n\n"  # between documents, as in the perplexity protocol


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """
    Where documents come from: exactly one of ``path`` and ``dataset``.

    Attributes:
        path: .txt (one document), .jsonl or .parquet (one document a row).
        dataset: Hub id or local folder, for the ``datasets`` library.
        data_file: One file of the data set.
        split: Of the data set.
        field: Column that holds the text.
    """

    path: str | None = None
    dataset: str | None = None
    data_file: str | None = None
    split: str = "train"
    field: str = "text"

    def __str__(self) -> str:
        if self.path:
            return self.path
        return " ".join(filter(None, (self.dataset, self.data_file, self.split)))


C4 = TextSource(dataset=C4_DATASET, data_file=C4_FILE)


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """
    What a number was measured on, to be stored with it.

    Attributes:
        source: As :class:`TextSource` prints itself.
        sha256: Of the documents that were read, joined by two newlines.
        documents: How many were read.
    """

    source: str
    sha256: str
    documents: int


def read_documents(source: TextSource) -> Iterator[str]:
    """
    Give the documents of a text, one by one, empty ones left out.

    Raises:
        TextError: Nothing there, not readable, no such column.
    """
    rows = _read_file(source) if source.path is not None else _read_dataset(source)
    for document in rows:
        if not document.strip():
            continue
        try:
            document.encode()
        except UnicodeEncodeError as error:  # JSON may hold half a character
            raise TextError(
                f"the text {source} has a document that is not Unicode text: {error.reason}."
            ) from error
        yield document


def _read_file(source: TextSource) -> Iterator[str]:
    path = Path(str(source.path)).expanduser()
    if not path.is_file():
        raise TextError(f"the text {path} does not exist. Give a .txt, .jsonl or .parquet file.")
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, source.field)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, source.field)
        elif path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        else:
            raise TextError(
                f"the text {path} has an unknown kind {path.suffix!r}. "
                "Give a .txt, .jsonl or .parquet file."
            )
    except UnicodeDecodeError as error:
        raise TextError(
            f"the text {path} is not UTF-8: {error.reason} at byte {error.start}."
        ) from error
    except OSError as error:
        raise TextError(f"the text {path} cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(f"{path}, line {number} is not JSON: {error}.") from error
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, str):
                raise TextError(
                    f"{path}, line {number} has no text in the field {field!r}. "
                    "Name the field with --field."
                )
            yield value


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise TextError(
                    f"{path} has no column {field!r}, only {', '.join(table.schema_arrow.names)}. "
                    "Name the column with --field."
                )
            for batch in table.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise TextError(f"{path}: the column {field!r} does not hold text.")
                    yield value
    except pyarrow.ArrowException as error:
        raise TextError(f"{path} is not a readable parquet file: {error}") from error


def _read_dataset(source: TextSource) -> Iterator[str]:
    for row in _dataset_rows(source):
        value = row.get(source.field)
        if not isinstance(value, str):
            raise TextError(
                f"the data set {source} has no text column {source.field!r}, only "
                f"{', '.join(row)}. Name the column with --field."
            )
        yield value


def _dataset_rows(source: TextSource) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(
            source.dataset, data_files=source.data_file, split=source.split, streaming=True
        )
    except Exception as error:  # datasets raises whatever its file systems raise
        reason = " ".join(str(error).split())[:300]
        raise TextError(
            f"the data set {source} cannot be read: {type(error).__name__}: {reason} Check the "
            "name, --data-file and --split, and the network; or give a local file with --text."
        ) from error


def read_windows(
    model: LanguageModel,
    source: TextSource,
    *,
    context_length: int,
    bos: str,
    max_windows: int | None = None,
) -> tuple[Tensor, TextRecord]:
    """
    Read a whole text for perplexity: joined, tokenised once, cut, the tail dropped.

    Args:
        model: Whose tokenizer counts.
        source: The text.
        context_length: Tokens of a window, BOS included.
        bos: ``auto``, ``always`` or ``never``.
        max_windows: Keep only the first so many.

    Returns:
        (windows, context_length), int64, and what was read.

    Raises:
        TextError: Not readable, empty, or shorter than one window.
    """
    model.check_context(context_length)
    documents = list(read_documents(source))
    _require_text(documents, source)
    text = SEPARATOR.join(documents)
    prefix = model.window_prefix(bos)
    windows = cut_windows(model.tokenize(text), context_length, prefix)
    return windows[:max_windows], _record(source, documents)


def sample_windows(
    model: LanguageModel,
    source: TextSource,
    *,
    count: int,
    context_length: int,
    bos: str,
    seed: int,
) -> tuple[Tensor, TextRecord]:
    """
    Draw windows that do not overlap from a text, at random, without replacement.

    Documents of the first 20,000 are shuffled and joined until they hold enough
    tokens, so short documents are used as well as long ones.

    Args:
        model: Whose tokenizer counts.
        source: The text.
        count: How many windows are wanted; fewer are given if the text is short.
        context_length: Tokens of a window, BOS included.
        bos: ``auto``, ``always`` or ``never``.
        seed: Of the order of documents and of windows.

    Returns:
        (windows, context_length), int64, in random order, and what was read.

    Raises:
        TextError: Not readable, empty, or shorter than one window.
    """
    model.check_context(context_length)
    documents = list(itertools.islice(read_documents(source), POOL))
    _require_text(documents, source)
    random.Random(seed).shuffle(documents)  # noqa: S311 - a sample, not a secret
    prefix = model.window_prefix(bos)
    wanted = count * (context_length - len(prefix))
    separator = model.tokenize(SEPARATOR)
    pieces: list[Tensor] = []
    used: list[str] = []
    tokens = 0
    for document in documents:
        piece = model.tokenize(document)
        pieces += [piece, separator]
        used.append(document)
        tokens += len(piece) + len(separator)
        if tokens >= wanted:
            break
    windows = cut_windows(torch.cat(pieces), context_length, prefix)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    return windows[order[:count]], _record(source, used)


def _require_text(documents: list[str], source: TextSource) -> None:
    if not documents:
        raise TextError(f"the text {source} is empty. Give one with words in it.")


def _record(source: TextSource, documents: list[str]) -> TextRecord:
    digest = hashlib.sha256(SEPARATOR.join(documents).encode()).hexdigest()
    return TextRecord(source=str(source), sha256=digest, documents=len(documents))


def record_to_dict(record: TextRecord, **more: Any) -> dict[str, Any]:
    """JSON values of a record, with ``more`` beside them."""
    return {"source": record.source, "sha256": record.sha256, **more}
