"""A model with the texts and statistics that a benchmark prunes it with."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pho_service.cli.terminal import progress
from pho_service.models.builtin import gemma3, smollm2, write_texts
from pho_service.models.calibration import calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource, read_windows
from pho_service.pipeline.bundles import cached_bundle
from pho_service.pipeline.rating import ReportText
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings

MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    Attributes:
        model: Dense.
        bundle: Of the calibration part of the texts.
        calibration: The windows of that part.
        confirmation: Windows that searches choose on.
        report: Windows that nothing is chosen on.
    """

    model: LanguageModel
    bundle: ProxyBundle
    calibration: Tensor
    confirmation: ReportText
    report: ReportText


def load_subject(
    model_name: str,
    folder: Path,
    *,
    samples: int,
    confirm_windows: int,
    report_windows: int,
    context_length: int,
    dtype: str,
    seed: int,
    calibrating: AbstractContextManager[object] | None = None,
) -> Subject:
    """
    Load a model, cut Python's documentation into three texts, and calibrate on the first.

    Args:
        model_name: A key of :data:`MODELS`, a model folder, or a hub id.
        folder: For the texts and the bundle.
        samples: Windows of calibration text; a quarter of them is run backward too.
        confirm_windows, report_windows: Of the two other texts.
        context_length: Tokens of every window.
        dtype: Of the weights.
        seed: Of the calibration.
        calibrating: Entered around the calibration alone.
    """
    texts = write_texts(folder / "texts")
    path = str(MODELS[model_name]()) if model_name in MODELS else model_name
    model = load_model(path, dtype=dtype)
    settings = CalibrationSettings(
        samples=samples,
        context_length=context_length,
        fisher_samples=max(1, samples // 4),
        seed=seed,
    )
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)

    def measured_on(part: str, windows: int) -> ReportText:
        cut, record = read_windows(
            model,
            TextSource(path=str(texts[part])),
            context_length=context_length,
            bos="auto",
            max_windows=windows,
        )
        return ReportText(windows=cut, record=record)

    with calibrating or nullcontext():
        bundle = cached_bundle(model, text, settings, folder / "cache", progress)
    return Subject(
        model=model,
        bundle=bundle,
        calibration=text.calibration,
        confirmation=measured_on("confirmation", confirm_windows),
        report=measured_on("report", report_windows),
    )
