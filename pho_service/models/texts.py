"""
Texts for calibration, confirmation and reports: a file, a data set by name, or what is in memory.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, TextError, field_name
from pho_service.host.access import did_you_mean
from pho_service.host.data_sets import USUAL_TEXTS, separator_of
from pho_service.host.settings import read_settings
from pho_service.models.data_sets import (
    Budget,
    TextLimits,
    TextSource,
    TextTooLong,
    read_dataset,
    read_json,
    read_parquet,
    read_text,
    with_split,
)
from pho_service.models.loading import LanguageModel
from pho_service.pruning.perplexity import cut_windows, windows_key
from pho_service.spec.calibration import windows_of, with_shares

SHORTEST = 8  # tokens of a window


@dataclass(frozen=True, kw_only=True)
class GivenText:
    """Documents in memory."""

    documents: Iterable[str] = field(repr=False)  # Can be iterated over again and again
    # For messages, and what is stored with a number that was measured on it.
    name: str = "a text in memory"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class GivenWindows:
    """Tokens in memory, one window a row; they are taken as they are, in their order."""

    tokens: Tensor  # (windows, context_length), whole numbers
    name: str = "token windows in memory"  # As of :class:`GivenText`

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype is torch.bool:
            raise InvalidInput(
                f"{self.name}: a tensor {tuple(tokens.shape)} of {tokens.dtype} is given, but "
                "windows are (windows, context_length), int64."
            )
        if not len(tokens) or tokens.shape[1] < SHORTEST:
            raise TextError(
                f"{self.name}: {tuple(tokens.shape)} is {len(tokens)} windows of "
                f"{tokens.shape[1]} tokens, but at least one of {SHORTEST} is needed."
            )

    def __str__(self) -> str:
        return self.name

    def windows(self, context_length: int, vocabulary: int) -> Tensor:
        """(windows, context_length), int64, on the CPU."""
        if self.tokens.shape[1] != context_length:
            raise InvalidInput(
                f"{self.name} have {self.tokens.shape[1]} tokens each, but "
                f"context_length={context_length} is asked for. Leave it out, or cut them again."
            )
        windows = self.tokens.detach().to("cpu", torch.int64).contiguous()
        lowest, highest = int(windows.min()), int(windows.max())
        if lowest < 0 or highest >= vocabulary:
            odd = lowest if lowest < 0 else highest
            raise TextError(
                f"{self.name}: token {odd} is not in 0..{vocabulary - 1}, the model's vocabulary: "
                "the tokenizer was of another model."
            )
        return windows

    @property
    def sha256(self) -> str:
        """Hash of the tokens, in their order."""
        tokens = self.tokens.detach().to("cpu", torch.int64).contiguous()
        return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


RUN = 32  # tokens in a row that two texts do not share by chance
_BASE = 6_364_136_223_846_793_005  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64) - 2**64  # as a signed number; negative, as it is above 2^63
ASIDE = 8  # windows of a text that is trained on for each that is measured on
_CHUNK = 64  # windows that are looked at together


def apart(windows: Tensor, others: Tensor, limit: int | None = None) -> Tensor:
    """Return the windows that share no run of 32 tokens with others, in their order."""
    # In windows of fewer than 128 tokens a quarter of one is a run, but no less than 8 tokens.
    length = min(windows.shape[1], others.shape[1])
    run = min(length, RUN, max(SHORTEST, length // 4))
    other_runs = _runs(others, run).unique()
    chunks: list[Tensor] = []
    count = 0
    for chunk in windows.split(_CHUNK):
        fresh = chunk[~torch.isin(_runs(chunk, run), other_runs).any(dim=1)]
        chunks.append(fresh)
        count += len(fresh)
        if limit is not None and count >= limit:
            break
    return torch.cat([windows[:0], *chunks])[:limit]


def shared(windows: Tensor, others: Tensor) -> int:
    """How many windows share a run of 32 tokens with others, as :func:`apart` counts them."""
    return len(windows) - len(apart(windows, others))


def recut(windows: Tensor, count: int, seed: int) -> Tensor:
    """
    So many windows of the tokens of some: those, and then the same text in other orders, cut at
    other places, so that no window comes twice. A first token that all have in common stays first.
    """
    first = int(bool((windows[:, 0] == windows[0, 0]).all()))
    generator = torch.Generator().manual_seed(seed)
    cuts = -(-count // len(windows))
    parts = [windows]
    for cut in range(1, cuts):
        text = windows[torch.randperm(len(windows), generator=generator), first:]
        moved = text.flatten().roll(text.shape[1] * cut // cuts)
        parts.append(cut_windows(moved, windows.shape[1], windows[0, :first].tolist()))
    return torch.cat(parts)[:count]


def _runs(windows: Tensor, run: int) -> Tensor:
    """Return a number for each run of tokens: (windows, context_length - run + 1), int64."""
    # The polynomial hash of Rabin and Karp, modulo 2^64, from sums along the window.
    count, length = windows.shape
    powers = torch.full((length,), _BASE, dtype=torch.int64).cumprod(dim=0)
    inverse = torch.full((length - run + 1,), _INVERSE, dtype=torch.int64).cumprod(dim=0)
    terms = (windows + 1) * powers
    sums = torch.cat([torch.zeros(count, 1, dtype=torch.int64), terms.cumsum(dim=1)], dim=1)
    return (sums[:, run:] - sums[:, :-run]) * inverse


POOL = 20_000  # documents that a sample is drawn from; C4's first file has 356,317
SEPARATOR = "\n\n"  # between documents, as in the perplexity protocol


Text = TextSource | GivenText | GivenWindows
T = TypeVar("T", TextSource, Text)


@dataclass(frozen=True, kw_only=True)
class MixedText:
    """Several texts, each of which gives its share of the windows of a calibration."""

    texts: tuple[Text, ...]
    shares: tuple[float, ...]  # Only their proportions count

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.shares):
            raise InvalidInput(
                f"there are {len(self.shares)} shares of {len(self.texts)} texts. Give as many."
            )
        identities: set[object] = set()
        for text, share in zip(self.texts, self.shares, strict=True):
            if not 0 < share < math.inf:
                raise InvalidInput(
                    f"the share of {text} is {share}. Give a number above 0, or leave the text out."
                )
            identity: object = id(text)
            if isinstance(text, TextSource):
                identity = Path(text.path).expanduser().resolve() if text.path else text
            if identity in identities:
                raise InvalidInput(f"the text {text} is given twice. Give each text once.")
            identities.add(identity)

    def __str__(self) -> str:
        return with_shares(map(str, self.texts), self.shares)

    @property
    def parts(self) -> list[tuple[Text, float]]:
        """Each text with the share of all windows that it gives."""
        return [(t, s / sum(self.shares)) for t, s in zip(self.texts, self.shares, strict=True)]


def mixed_text(texts: Sequence[T], shares: Sequence[float] = ()) -> T | MixedText:
    """Return the text if it is one; without shares, each of several gives as many windows."""
    if len(texts) == 1 and len(shares) < 2:
        return texts[0]
    return MixedText(texts=tuple(texts), shares=tuple(shares or [1.0] * len(texts)))


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """The text that a number was measured on, to be stored with it."""

    source: str  # As :class:`TextSource` prints itself
    # SHA-256 of the documents that were read, joined by two newlines; of several texts, of theirs.
    sha256: str
    documents: int
    # Of several texts: each with its share of the windows.
    texts: tuple[tuple["TextRecord", float], ...] = ()
    left_out: int = 0  # Of the windows that were asked for: those that others have a part of


def read_documents(
    source: TextSource | GivenText, limits: TextLimits | None = None, *, whole: bool = True
) -> Iterator[str]:
    """Give the documents of a text, one by one, empty ones left out."""
    budget = Budget(limits or TextLimits.of(read_settings()), whole=whole)
    for document in _joined(source, budget):
        if not document.strip():
            continue
        try:
            document.encode()
        except UnicodeEncodeError as error:  # JSON may hold half a character
            raise TextError(
                f"the text {source} has a document that is not Unicode text: {error.reason}."
            ) from error
        yield document


def check_text(source: TextSource, *, measured: bool = False) -> TextSource:
    """Return a text as it was found; its first row was read, before any long work."""
    named, (source, _) = source, source.usual(measured=measured)
    source = with_split(source)
    limits = TextLimits.of(read_settings())
    lines = _separator(source) is not None  # of which the first may be empty
    first = _rows(source, Budget(limits, whole=True)) if lines else read_documents(source, limits)
    _require_text([*itertools.islice(first, 1)], source)
    return named if named.dataset in USUAL_TEXTS else source


def _separator(source: TextSource | GivenText) -> str | None:
    if not isinstance(source, TextSource):
        return None
    return source.separator or separator_of(source.config)


def _joined(source: TextSource | GivenText, budget: Budget) -> Iterator[str]:
    """The documents: rows, or all of them as one."""
    separator = _separator(source)
    rows = _rows(source, budget)
    if separator is None:
        yield from rows
        return
    assert isinstance(source, TextSource)  # it has a separator
    yield separator.join(itertools.islice(rows, source.rows))


def _rows(source: TextSource | GivenText, budget: Budget) -> Iterator[str]:
    if isinstance(source, TextSource):
        read = _read_file if source.path is not None else read_dataset
        yield from read(source, budget)
        return
    for document in source.documents:
        size = len(document.encode(errors="replace"))
        budget.check_document(size, f"a document of {source}")
        budget.take(size, str(source))
        yield document


def _read_file(source: TextSource, budget: Budget) -> Iterator[str]:
    path = Path(str(source.path)).expanduser()
    if not path.is_file():
        raise TextError(
            f"the text {path} does not exist. Give a .txt, .jsonl or .parquet file."
            + did_you_mean(str(path))
        )
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise TextError(
            f"the text {path} has an unknown kind {path.suffix!r}. "
            "Give a .txt, .jsonl or .parquet file."
        )
    try:
        with path.open("rb") as file:
            if path.suffix == ".txt":
                budget.check_document(path.stat().st_size, str(path))
                yield read_text(file, str(path), budget)
            elif path.suffix == ".jsonl":
                yield from read_json(file, source.field, str(path), budget)
            else:
                yield from read_parquet(file, source.field, str(path), budget)
    except OSError as error:
        raise TextError(f"the text {path} cannot be read: {error.strerror or error}.") from error


def read_windows(
    model: LanguageModel,
    source: Text,
    *,
    context_length: int,
    bos: str,
    max_windows: int | None = None,
    unlike: Tensor | None = None,
) -> tuple[Tensor, TextRecord]:
    """Read a whole text for perplexity: joined, tokenised once, cut, the tail dropped."""
    model.check_context(context_length)
    if isinstance(source, TextSource):
        source, default_windows = source.usual(measured=True)
        source, max_windows = with_split(source), max_windows or default_windows
    if isinstance(source, GivenWindows):
        windows, record = _given(model, source, context_length)
    else:
        documents = list(read_documents(source))
        _require_text(documents, source)
        text = SEPARATOR.join(documents)
        prefix = model.window_prefix(bos)
        windows = cut_windows(model.tokenize(text), context_length, prefix, str(source))
        record = _record(source, documents)
    if unlike is not None:
        record = replace(record, left_out=shared(windows[:max_windows], unlike))
        windows = apart(windows, unlike, max_windows)
        if len(windows) == 0:
            raise TextError(
                f"the text {source} has no window of {context_length} tokens that nothing was "
                "calibrated or chosen on: it is the same text, or shares its documents. Give "
                "another one, or calibrate on fewer windows."
            )
    return windows[:max_windows], record


def sample_windows(
    model: LanguageModel,
    source: Text | MixedText,
    *,
    count: int,
    beside: int = 0,
    context_length: int,
    bos: str,
    seed: int,
) -> tuple[Tensor, TextRecord]:
    """Draw windows that do not overlap from a text, at random, without replacement."""
    # After ``count`` windows as many as there are of ``beside`` more, which are held out. Windows
    # that are given as tokens are taken in their order.
    #
    # Documents of the first 20,000 (fewer if they are longer than ``PHO_MAX_TEXT_BYTES`` together)
    # are shuffled and joined until they hold enough tokens, so short documents are used as well as
    # long ones.
    model.check_context(context_length)
    if isinstance(source, MixedText):
        how = {"context_length": context_length, "bos": bos, "seed": seed}
        return _sample_mixed(model, source, count, beside, **how)
    count += beside
    if isinstance(source, GivenWindows):
        windows, record = _given(model, source, context_length)
        return windows[:count], record
    if isinstance(source, TextSource):
        source, _ = source.usual(measured=False)
    documents = _pool(source)
    _require_text(documents, source)
    random.Random(seed).shuffle(documents)  # noqa: S311 - a sample, not a secret
    prefix = model.window_prefix(bos)
    tokens_needed = count * (context_length - len(prefix))
    separator = model.tokenize(SEPARATOR)
    pieces: list[Tensor] = []
    used: list[str] = []
    tokens = 0
    for document in documents:
        piece = model.tokenize(document)
        pieces += [piece, separator]
        used.append(document)
        tokens += len(piece) + len(separator)
        if tokens >= tokens_needed:
            break
    windows = cut_windows(torch.cat(pieces), context_length, prefix, str(source))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    return windows[order[:count]], _record(source, used)


def _sample_mixed(
    model: LanguageModel, source: MixedText, count: int, beside: int, **how: Any
) -> tuple[Tensor, TextRecord]:
    """Draw windows of several texts, of each its share of ``count`` to the window."""
    # Every beginning of them nearly has these shares, too: what is run backward, or measured on,
    # is the first windows.
    drawn: list[list[Tensor]] = [[], []]
    records: list[tuple[TextRecord, float]] = []
    for (text, share), needed, more in zip(
        source.parts,
        windows_of(source.shares, count),
        windows_of(source.shares, beside),
        strict=True,
    ):
        if count and not needed:
            raise InvalidInput(
                f"the text {text} gets none of {count} windows. Give it a larger share, more "
                "windows, or leave it out."
            )
        windows, record = sample_windows(model, text, count=needed, beside=more, **how)
        if len(windows) < needed:
            raise TextError(
                f"the text {text} fills too few windows of {windows.shape[1]} tokens: "
                f"{len(windows)}, and its share of {count} is {needed}. Give a longer text, a "
                f"smaller share of it, or take fewer windows ({field_name('calibration/samples')})."
            )
        for other, _ in records:
            if record.sha256 == other.sha256:
                raise TextError(
                    f"the text {text} has the documents of {other.source}. Give each text once."
                )
        drawn[0].append(windows[:needed])
        drawn[1].append(windows[needed:])
        records.append((record, share))
    together = "\n".join(f"{record.sha256} {share:.6f}" for record, share in records)
    return torch.cat([*map(_in_turns, drawn)]), TextRecord(
        source=with_shares((_short(r.source) for r, _ in records), source.shares),
        sha256=hashlib.sha256(together.encode()).hexdigest(),
        documents=sum(record.documents for record, _ in records),
        texts=tuple(records),
    )


def _in_turns(windows: list[Tensor]) -> Tensor:
    """Spread the windows of several texts evenly."""
    order = sorted(
        ((place + 0.5) / len(text_windows), number, place)
        for number, text_windows in enumerate(windows)
        for place in range(len(text_windows))
    )
    return torch.cat([windows[0][:0], *(windows[n][p : p + 1] for _, n, p in order)])


def _short(source: str) -> str:
    """A text without the folder that it lay in."""
    return Path(source).name if source.startswith(("/", ".", "~")) else source


def _given(
    model: LanguageModel, source: GivenWindows, context_length: int
) -> tuple[Tensor, TextRecord]:
    windows = source.windows(context_length, model.vocabulary)
    record = TextRecord(source=str(source), sha256=source.sha256, documents=len(windows))
    return windows, record


def _pool(source: TextSource | GivenText) -> list[str]:
    """The documents that a sample is drawn from: the first, as many as may be read."""
    documents: list[str] = []
    try:
        for document in itertools.islice(read_documents(source, whole=False), POOL):
            documents.append(document)
    except TextTooLong:
        if not documents:
            raise
    return documents


def pool_sha256(source: TextSource | MixedText) -> str:
    """Hash of all that windows may be drawn from."""
    texts = source.texts if isinstance(source, MixedText) else (source,)
    digest = hashlib.sha256()
    for text in texts:
        assert not isinstance(text, GivenWindows)
        pool = text.usual(measured=False)[0] if isinstance(text, TextSource) else text
        for document in _pool(pool):
            digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def _require_text(documents: list[str], source: TextSource | GivenText) -> None:
    if not documents:
        raise TextError(f"the text {source} is empty. Give one with words in it.")


def _record(source: TextSource | GivenText, documents: list[str]) -> TextRecord:
    digest = hashlib.sha256(SEPARATOR.join(documents).encode()).hexdigest()
    return TextRecord(source=str(source), sha256=digest, documents=len(documents))


def record_to_dict(record: TextRecord, **more: Any) -> dict[str, Any]:
    """JSON values of a record, with ``more`` beside them."""
    parts = [{**record_to_dict(part), "share": round(share, 6)} for part, share in record.texts]
    several: dict[str, Any] = {"texts": parts} if parts else {}
    several |= {"left_out": record.left_out} if record.left_out else {}
    return {"source": record.source, "sha256": record.sha256, **several, **more}


@dataclass(frozen=True, kw_only=True)
class ReportText:
    """A text to measure perplexity on, cut for one model."""

    windows: Tensor  # (windows, context_length), int64
    record: TextRecord  # Where it is from

    @property
    def key(self) -> str:
        """Hash of exactly these windows."""
        return windows_key(self.windows)

    def measured_on(self) -> dict[str, Any]:
        return {
            "divergence_tokens": None,
            "tokens": self.windows.shape[0] * (self.windows.shape[1] - 1),
            "context_length": self.windows.shape[1],
            "text": self.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """What is stored with every perplexity."""
        return record_to_dict(self.record, windows=len(self.windows))


@dataclass(frozen=True, kw_only=True)
class RecoveryText:
    """What a model is recovered on, and how it is cut into windows."""

    source: Text | MixedText
    context_length: int
    bos: str = "auto"
    unlike: Tensor | None = None  # Other windows than those measured on that are not trained on
    # Of these, what is trained on for all that where there are too few others: no held-out window
    # is one of them.
    seen: Tensor | None = None
    measured: ReportText | None = None  # What perplexities are measured on, before and after

    def setting_aside(self, model: LanguageModel, most: int | None, seed: int) -> "RecoveryText":
        """The same with windows of the text itself to measure on: one of eight, or none of few."""
        most = most or ASIDE
        windows, record = sample_windows(
            model, self.source, count=0, beside=ASIDE * most,
            context_length=self.context_length, bos=self.bos, seed=seed,
        )  # fmt: skip
        measured = ReportText(windows=windows[: min(most, len(windows) // ASIDE)], record=record)
        return replace(self, measured=measured) if len(measured.windows) else self
