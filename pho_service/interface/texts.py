"""
Texts as the functions of the API take them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from pho_service.errors import InvalidInput, TextError
from pho_service.host.usual_texts import USUAL_TEXTS
from pho_service.models.calibration import drawn_windows
from pho_service.models.given_texts import GivenText, GivenWindows
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import Text, TextSource, read_windows
from pho_service.pipeline.rating import ReportText
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings

if TYPE_CHECKING:
    import datasets

    Texts: TypeAlias = (
        str | Path | Sequence[str] | Tensor | datasets.Dataset | datasets.IterableDataset
    )

FIELD = "text"  # column of a data set in memory


def text_of(texts: "Texts") -> Text:
    """
    Take a text in any of its forms.

    Args:
        texts: The path of a .txt, .jsonl or .parquet file; ``"c4"`` or ``"wikitext2"``, for what
            papers take; a list of documents; a data set of the library ``datasets`` with a column
            ``text``; or token windows, (windows, context_length), whole numbers.

    Raises:
        TextError: The data set has no such column, or there is nothing in the list.
        InvalidInput: Something else is given.
    """
    if isinstance(texts, str) and texts in USUAL_TEXTS:
        return TextSource(dataset=texts)
    if isinstance(texts, (str, Path)):
        return TextSource(path=str(texts))
    if isinstance(texts, Tensor):
        return GivenWindows(tokens=texts)
    if hasattr(texts, "select_columns") and hasattr(texts, "info"):  # datasets is not loaded here
        return _data_set(texts)
    if isinstance(texts, Sequence) and all(isinstance(each, str) for each in texts):
        return GivenText(documents=texts)
    raise InvalidInput(
        f"texts is a {type(texts).__name__}, which is not a text. Give the path of a .txt, .jsonl "
        "or .parquet file, a list of strings, a data set of `datasets` (one split of it), or a "
        "tensor of token windows."
    )


def _data_set(given: Any) -> GivenText:
    columns = given.column_names
    if columns is not None and FIELD not in columns:
        raise TextError(
            f"the data set has no column {FIELD!r}, only {', '.join(map(str, columns))}. Rename "
            f"the one with the text: dataset.rename_column(..., {FIELD!r})."
        )
    name = " ".join(
        str(part)
        for part in (given.info.dataset_name, given.info.config_name, given.split)
        if part is not None
    )
    return GivenText(documents=_Column(given), name=name or "a data set in memory")


@dataclass(frozen=True)
class _Column:
    """The documents of a data set, read again each time."""

    rows: Any

    def __iter__(self) -> Iterator[str]:
        for row in self.rows.select_columns([FIELD]):
            document = row[FIELD]
            if not isinstance(document, str):
                raise TextError(
                    f"the column {FIELD!r} of the data set holds a {type(document).__name__} "
                    "where a document is expected."
                )
            yield document


def length_of(texts: "Texts", asked: int | None, default: int) -> int:
    """The tokens of a window: as asked for, as the windows have that are given, or the default."""
    if asked is not None:
        return asked
    return texts.shape[-1] if isinstance(texts, Tensor) else default


def measured_text(
    model: LanguageModel,
    texts: "Texts",
    *,
    context_length: int,
    bos: str,
    max_windows: int | None,
    unlike: Tensor | None = None,
) -> ReportText:
    """
    A text cut into windows to measure on, as `pho evaluate` does.

    Args:
        model: Whose tokenizer counts.
        texts: As of :func:`text_of`.
        context_length: Tokens of a window.
        bos: ``auto``, ``always`` or ``never``.
        max_windows: Only the first so many; None takes all.
        unlike: Windows that none may overlap with.

    Raises:
        TextError: It cannot be read, or does not fill one window.
        InvalidInput: A length or a number that breaks a rule.
    """
    if context_length < 8:
        raise InvalidInput(f"context_length={context_length} is below 8.")
    if max_windows is not None and max_windows < 1:
        raise InvalidInput(f"{max_windows} windows are asked for, but at least 1 is needed.")
    windows, record = read_windows(
        model,
        text_of(texts),
        context_length=context_length,
        bos=bos,
        max_windows=max_windows,
        unlike=unlike,
    )
    return ReportText(windows=windows, record=record)


def settings_of(bundle: ProxyBundle) -> CalibrationSettings:
    """
    The settings that a bundle was made with.

    Raises:
        InvalidInput: It does not say them: it was put together by hand.
    """
    stored = bundle.provenance.get("settings")
    if not stored:
        raise InvalidInput(
            "the bundle does not say how it was calibrated, so no text can be cut as its text "
            "was. Make it with pho.calibrate."
        )
    return CalibrationSettings(**{**stored, "kernel_sizes": tuple(stored["kernel_sizes"])})


def confirmation_text(
    model: LanguageModel,
    bundle: ProxyBundle,
    texts: "Texts | None",
    calibration: Tensor | None,
    max_windows: int,
) -> ReportText | None:
    """
    The windows that finalists are measured on.

    Args:
        model: Model of the bundle.
        bundle: Windows are cut as its settings say.
        texts: None takes windows that the calibration of a bundle in memory held out.
        calibration: Windows that none may overlap with.
        max_windows: Only the first so many.

    Returns:
        None if there are none.
    """
    if texts is not None:
        settings = settings_of(bundle)
        return measured_text(
            model,
            texts,
            context_length=settings.context_length,
            bos=settings.bos,
            max_windows=max_windows,
            unlike=calibration,
        )
    known = getattr(bundle, "text", None)
    if known is None or not len(known.held_out):
        return None
    return ReportText(windows=known.held_out[:max_windows], record=known.record)


def calibration_windows(
    model: LanguageModel, bundle: ProxyBundle, texts: "Texts | None"
) -> Tensor | None:
    """
    The windows of a bundle's calibration, for steps that run a text through the model.

    Args:
        model: Model of the bundle.
        bundle: What ``pho.calibrate`` gave includes the windows; one from a file does not.
        texts: The text of the calibration, to draw them again; None takes those of the bundle.

    Returns:
        (windows, context_length), int64; None if there is no text.
    """
    if texts is not None:
        settings = settings_of(bundle)
        return drawn_windows(model, text_of(texts), settings)[0][: settings.samples]
    known = getattr(bundle, "text", None)
    return None if known is None else known.calibration
