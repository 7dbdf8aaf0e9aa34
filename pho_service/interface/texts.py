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
from pho_service.interface.models import Model, check_dense, check_prefix, opened
from pho_service.models.calibration import CalibrationText, drawn_windows
from pho_service.models.given_texts import GivenText, GivenWindows
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import Text, TextSource
from pho_service.pipeline.inputs import Calibrated, Inputs
from pho_service.pipeline.rating import ReportText
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings

if TYPE_CHECKING:
    import datasets

    from pho_service.pipeline.inputs import Cut

    Texts: TypeAlias = (
        str | Path | Sequence[str] | Tensor | datasets.Dataset | datasets.IterableDataset
    )

FIELD = "text"  # column of a data set in memory


def text_of(texts: "Texts") -> Text:
    """Take a text in any of its forms: a path or a usual name, documents, a data set, windows."""
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
    model: LanguageModel, texts: "Texts", how: "Cut", most: int | None, unlike: Tensor | None = None
) -> ReportText:
    """A text cut into windows to measure on, as `pho evaluate` does."""
    if most is not None and most < 1:
        raise InvalidInput(f"{most} windows are asked for, but at least 1 is needed.")
    return Inputs().report(model, text_of(texts), how, most, unlike)


def settings_of(bundle: ProxyBundle) -> CalibrationSettings:
    """The settings that a bundle was made with; one that was put together by hand has none."""
    stored = bundle.provenance.get("settings")
    if not stored:
        raise InvalidInput(
            "the bundle does not say how it was calibrated, so no text can be cut as its text "
            "was. Make it with pho.calibrate."
        )
    return CalibrationSettings(**{**stored, "kernel_sizes": tuple(stored["kernel_sizes"])})


def opened_for(bundle: ProxyBundle, model: Model, tokenizer: Any) -> LanguageModel:
    """Take a bundle's model, dense, with the tokenizer that it was calibrated with."""
    loaded = opened(model, tokenizer or getattr(bundle, "tokenizer", None))
    check_dense(loaded, bundle)
    check_prefix(loaded, bundle)
    return loaded


def calibrated(
    model: LanguageModel,
    bundle: ProxyBundle,
    texts: "Texts | None",
    confirm: "Texts | None" = None,
    windows: int | None = None,
) -> Calibrated:
    """
    A model with its bundle and texts.

    What ``pho.calibrate`` gave includes the windows of its text, and some that were held out; a
    bundle from a file does not. None of the first ``windows`` to confirm on overlaps with those of
    the calibration; without ``windows`` there are none.
    """
    drawn: CalibrationText | None = getattr(bundle, "text", None)
    calibration = None if drawn is None else drawn.calibration
    if texts is not None:
        settings = settings_of(bundle)
        calibration = drawn_windows(model, text_of(texts), settings)[0][: settings.samples]
    text = None
    if windows is not None and confirm is not None:
        text = measured_text(model, confirm, settings_of(bundle), windows, calibration)
    elif windows is not None:
        text = Inputs().held_out(drawn, windows)
    return Calibrated(
        bundle=bundle,
        model=model,
        calibration=calibration,
        confirm=text,
        left=None if drawn is None else len(drawn.held_out),
    )
