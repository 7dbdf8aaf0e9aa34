"""
From a model and a text to a proxy bundle.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from pho_service.host.versions import versions
from pho_service.models.architecture import decoder_blocks
from pho_service.models.blockwise import collect_statistics_blockwise, measure_perplexity
from pho_service.models.calibration_run import Run, Shard, within_memory
from pho_service.models.footprint import footprint_of
from pho_service.models.loading import LanguageModel
from pho_service.models.overlap import apart
from pho_service.models.scratch import scratch_folder
from pho_service.models.texts import Text, TextRecord, record_to_dict, sample_windows
from pho_service.planning.stage_memory import block_inputs
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.statistics import Collector, Statistics
from pho_service.pruning.sums import Sums, shard_seed
from pho_service.spec.calibration import CalibrationSettings

T = TypeVar("T")

ALGORITHM = 2  # goes up when the same settings give a bundle other numbers
DENSE_TOKENS = 512  # that tell whether the dense model predicts anything at all
HELD_OUT = 16  # windows that are drawn besides, to confirm candidates with


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """
    The windows that a model is calibrated on, and some that were held out.

    Attributes:
        calibration: (samples or fewer, context_length), int64.
        beside: (up to 16, context_length), int64: other windows of the same text.
        record: The text.
        bundle_key: Names the bundle that these windows and settings give:
            hash of the model's weights, the windows, the settings and the
            version of the algorithm.
    """

    calibration: Tensor
    beside: Tensor
    record: TextRecord
    bundle_key: str

    @cached_property
    def held_out(self) -> Tensor:
        """
        (up to 16, context_length), int64: those of ``beside`` without a passage that is among the
        calibration's; empty if the text had no more.
        """
        return apart(self.beside, self.calibration)


def calibration_text(
    model: LanguageModel, source: Text, settings: CalibrationSettings
) -> CalibrationText:
    """
    Read and sample the text for a calibration.

    Raises:
        TextError: Not readable, empty, or shorter than one window.
    """
    windows, record = drawn_windows(model, source, settings)
    calibration = windows[: settings.samples]
    shards = settings.shards(stream=model.stream)
    identity = [
        ALGORITHM,
        model.weights_sha256,
        str(model.dtype),
        model.device.type,
        settings.to_dict(),
        versions("torch", "transformers"),
        *(["streamed"] if model.stream else []),  # the same but for the last digits of sums
        *([f"{shards} shards"] if shards > 1 else []),  # other signs, in another order of sums
    ]
    digest = hashlib.sha256(json.dumps(identity).encode())
    digest.update(calibration.contiguous().numpy().tobytes())
    return CalibrationText(
        calibration=calibration,
        beside=windows[settings.samples :],
        record=record,
        bundle_key=digest.hexdigest(),
    )


def drawn_windows(
    model: LanguageModel, source: Text, settings: CalibrationSettings
) -> tuple[Tensor, TextRecord]:
    """
    Draw the windows of a calibration, and after them those that are held out.

    Returns:
        (up to samples + 16, context_length), int64, and the text.

    Raises:
        TextError: Not readable, empty, or shorter than one window.
    """
    return sample_windows(
        model,
        source,
        count=settings.samples + HELD_OUT,
        context_length=settings.context_length,
        bos=settings.bos,
        seed=settings.seed,
    )


def cut(text: CalibrationText, settings: CalibrationSettings, *, stream: bool) -> list[Shard]:
    """The shards of a calibration, in the order in which their sums are added up."""
    windows = text.calibration
    fisher = _fisher_windows(text, settings)
    count = min(settings.shards(stream=stream), len(windows))
    return [
        Shard(
            windows=windows[number::count],
            fisher_windows=len(range(number, fisher, count)),
            seed=shard_seed(settings.seed, number),
        )
        for number in range(count)
    ]


def measure(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress = silent,
    known: Callable[[int], Sums | None] = lambda _: None,
) -> Statistics:
    """
    Run the dense model once over the calibration windows.

    Where memory runs out although the plan said that it is enough, half as many windows are run
    at once, or the activations are computed again instead of kept; that is tried once.

    Args:
        model: In evaluation mode.
        text: To calibrate on.
        settings: Settings of the calibration.
        progress: Told of each window.
        known: Gives the sums of the shard with a number, if they have been gathered elsewhere.

    Raises:
        OutOfMemory: Not even so; says what would fit.
        InvalidInput: It does not fit into the memory that it may take, or mixed precision is
            asked of a model that is not float32.
        ModelError: A linear is never used.
        NumericalError: An activation or a gradient is NaN or infinite.
    """
    shards = cut(text, settings, stream=model.stream)

    def run(how: Run) -> Statistics:
        count = len(text.calibration)
        if model.stream:
            return _measured_blockwise(how, text)
        with how.progress("Calibrating the dense model", count) as advance:
            if len(shards) == 1:
                total = how.gather(shards[0], advance)
            else:
                total = Collector(model.linears, settings.projection_rows, settings.seed)
                for number, shard in enumerate(shards):
                    sums = known(number)
                    if sums is None:
                        sums = how.gather(shard, advance).sums()
                    else:
                        advance(len(shard.windows))
                    total.add(sums)
        total.finish_inputs(sequences=count, tokens=text.calibration.numel())
        return total.finish()

    return _within_memory(model, text, settings, progress, run)


def measure_shard(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    number: int,
    progress: Progress = silent,
) -> Sums:
    """
    Run the dense model over the windows of one shard, for :func:`measure` to add up.

    Raises:
        OutOfMemory, InvalidInput: As :func:`measure`.
    """
    shard = cut(text, settings, stream=model.stream)[number]

    def run(how: Run) -> Sums:
        with how.progress(f"Calibrating, shard {number}", len(shard.windows)) as advance:
            return how.gather(shard, advance).sums()

    return _within_memory(model, text, settings, progress, run)


def _measured_blockwise(how: Run, text: CalibrationText) -> Statistics:
    model = how.model
    blocks = len(decoder_blocks(model.model))
    steps = blocks * (len(text.calibration) + how.fisher_windows)
    title = "Calibrating the dense model, block by block"
    spill = None
    if how.plan.spill:
        footprint, tokens = footprint_of(model.model), how.settings.context_length
        spill = scratch_folder(block_inputs(footprint, tokens, how.fisher_windows))
    with how.progress(title, steps) as advance, how.products():
        return collect_statistics_blockwise(
            model,
            text.calibration,
            fisher_windows=how.fisher_windows,
            projection_rows=how.settings.projection_rows,
            seed=how.settings.seed,
            spill=spill,
            states_on_device=how.plan.states_on_device,
            advance=advance,
        )


def _fisher_windows(text: CalibrationText, settings: CalibrationSettings) -> int:
    asked = settings.fisher_samples or max(1, settings.samples // 4)
    return min(asked, len(text.calibration))


def _within_memory(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress,
    run: Callable[[Run], T],
) -> T:
    """What a run over the windows of a text gives, in pieces that fit."""
    fisher = _fisher_windows(text, settings)
    return within_memory(model, len(text.calibration), fisher, settings, progress, run)


def calibrate(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress = silent,
    known: Callable[[int], Sums | None] = lambda _: None,
) -> ProxyBundle:
    """
    Make the proxy bundle of a model: one pass of the dense model, then a sample of rows.

    Args:
        model, text, settings, progress, known: As of :func:`measure`.

    Raises:
        InvalidInput, ModelError, NumericalError: As :func:`measure`.
    """
    statistics = measure(model, text, settings, progress, known)
    with progress("Sampling rows", len(model.linears)) as advance:
        return sample_bundle(
            model.linears,
            statistics,
            rows_per_layer=settings.rows_per_layer,
            kernel_sizes=tuple(sorted(set(settings.kernel_sizes))),
            seed=settings.seed,
            provenance=_provenance(model, text, settings, _dense(model, text)),
            advance=advance,
        )


def _dense(model: LanguageModel, text: CalibrationText) -> dict[str, Any]:
    """How well the dense model predicts the first windows, beside chance: its vocabulary."""
    count = max(1, DENSE_TOKENS // text.calibration.shape[1])
    rating = measure_perplexity(model, text.calibration[:count])
    return {
        "perplexity": rating.perplexity,
        "tokens": rating.tokens,
        "vocabulary": model.model.config.get_text_config().vocab_size,
    }


def _provenance(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    dense: dict[str, Any],
) -> dict[str, Any]:
    return {
        "key": text.bundle_key,
        "model": model.to_dict(),
        "text": record_to_dict(text.record, windows=len(text.calibration)),
        "settings": settings.to_dict(),
        "dense": dense,
        "prefix": model.window_prefix(settings.bos),
        "device": model.device.type,
        "versions": versions("torch", "transformers"),
    }
