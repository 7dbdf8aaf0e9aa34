"""
From a model and a text to a proxy bundle.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, OutOfMemory
from pho_service.faults import first_words, let_go_of_memory, ran_out_of_memory
from pho_service.models.architecture import decoder_blocks
from pho_service.models.blockwise import collect_statistics_blockwise
from pho_service.models.calibration_memory import plan_calibration, would_fit
from pho_service.models.footprint import footprint_of
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import scratch_folder
from pho_service.models.texts import TextRecord, TextSource, record_to_dict, sample_windows
from pho_service.planning.stage_memory import CalibrationRun, block_inputs
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.statistics import Statistics, collect_statistics
from pho_service.spec import CalibrationSettings
from pho_service.versions import versions

logger = logging.getLogger(__name__)

ALGORITHM = 2  # goes up when the same settings give a bundle other numbers
HELD_OUT = 16  # windows that are drawn besides, to confirm candidates with


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """
    The windows that a model is calibrated on, and some that were held out.

    Attributes:
        calibration: (samples or fewer, context_length), int64.
        held_out: (up to 16, context_length), int64, of the same text; empty if
            the text had no more.
        record: The text.
        bundle_key: Names the bundle that these windows and settings give:
            hash of the model's weights, the windows, the settings and the
            version of the algorithm.
    """

    calibration: Tensor
    held_out: Tensor
    record: TextRecord
    bundle_key: str


def calibration_text(
    model: LanguageModel, source: TextSource, settings: CalibrationSettings
) -> CalibrationText:
    """
    Read and sample the text for a calibration.

    Raises:
        TextError: Not readable, empty, or shorter than one window.
    """
    windows, record = sample_windows(
        model,
        source,
        count=settings.samples + HELD_OUT,
        context_length=settings.context_length,
        bos=settings.bos,
        seed=settings.seed,
    )
    calibration = windows[: settings.samples]
    identity = [
        ALGORITHM,
        model.weights_sha256,
        str(model.dtype),
        model.device.type,
        settings.to_dict(),
        versions("torch", "transformers"),
        *(["streamed"] if model.stream else []),  # the same but for the last digits of sums
    ]
    digest = hashlib.sha256(json.dumps(identity).encode())
    digest.update(calibration.contiguous().numpy().tobytes())
    return CalibrationText(
        calibration=calibration,
        held_out=windows[settings.samples :],
        record=record,
        bundle_key=digest.hexdigest(),
    )


def measure(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress = silent,
) -> Statistics:
    """
    Run the dense model once over the calibration windows.

    Where memory runs out although the plan said that it is enough, half as many windows are run
    at once, or the activations are computed again instead of kept; that is tried once.

    Raises:
        OutOfMemory: Not even so; says what would fit.
        InvalidInput: It does not fit into the memory that it may take, or mixed precision is
            asked of a model that is not float32.
        ModelError: A linear is never used.
        NumericalError: An activation or a gradient is NaN or infinite.
    """
    count = len(text.calibration)
    fisher = min(settings.fisher_samples or max(1, settings.samples // 4), count)
    if settings.mixed_precision and model.dtype != torch.float32:
        raise InvalidInput(
            f"mixed precision is for float32 models, but {model.name} is loaded as "
            f"{str(model.dtype).removeprefix('torch.')}, which is as fast. Leave --mixed-precision "
            "out."
        )
    plan = plan_calibration(model, settings, windows=count, fisher_windows=fisher)
    logger.info("calibration planned", extra={**asdict(plan.run), **asdict(plan.peak)})
    run, retried = plan.run, False
    while True:
        try:
            return _measured(model, text, settings, run, fisher, progress)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            smaller = None if retried else run.halved()
            if smaller is None:
                ways = would_fit(model, settings, fisher_windows=fisher)
                raise OutOfMemory(
                    f"the calibration of {model.name} on windows of {settings.context_length} "
                    f"tokens ran out of memory{first_words(error)}. {ways}"
                ) from error
        # After the error, which holds on to what was computed.
        logger.warning("memory ran out: calibrating in smaller pieces", extra=asdict(smaller))
        run, retried = smaller, True
        let_go_of_memory()


def _measured(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    run: CalibrationRun,
    fisher_windows: int,
    progress: Progress,
) -> Statistics:
    blocks = [block for _, block in decoder_blocks(model.model)]
    count = len(text.calibration)
    title, steps = "Calibrating the dense model", count
    if model.stream:
        title, steps = f"{title}, block by block", len(blocks) * (count + fisher_windows)
    spill = None
    if run.spill:
        footprint = footprint_of(model.model, model.linears)
        spill = scratch_folder(block_inputs(footprint, settings.context_length, fisher_windows))
    collect = (
        partial(
            collect_statistics_blockwise,
            model,
            spill=spill,
            states_on_device=run.states_on_device,
        )
        if model.stream
        else partial(
            collect_statistics,
            model.model,
            model.linears,
            batch_windows=run.windows,
            forward_windows=run.forward_windows,
            recompute=blocks if run.recompute else (),
        )
    )
    products = torch.autocast(
        model.device.type, dtype=torch.bfloat16, enabled=settings.mixed_precision
    )
    with progress(title, steps) as advance, products:
        return collect(
            windows=text.calibration,
            fisher_windows=fisher_windows,
            projection_rows=settings.projection_rows,
            seed=settings.seed,
            advance=advance,
        )


def calibrate(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress = silent,
) -> ProxyBundle:
    """
    Make the proxy bundle of a model: one pass of the dense model, then a sample of rows.

    Raises:
        InvalidInput, ModelError, NumericalError: As :func:`measure`.
    """
    statistics = measure(model, text, settings, progress)
    with progress("Sampling rows", len(model.linears)) as advance:
        return sample_bundle(
            model.linears,
            statistics,
            rows_per_layer=settings.rows_per_layer,
            kernel_sizes=tuple(sorted(set(settings.kernel_sizes))),
            seed=settings.seed,
            provenance=_provenance(model, text, settings),
            advance=advance,
        )


def _provenance(
    model: LanguageModel, text: CalibrationText, settings: CalibrationSettings
) -> dict[str, Any]:
    return {
        "key": text.bundle_key,
        "model": model.to_dict(),
        "text": record_to_dict(text.record, windows=len(text.calibration)),
        "settings": settings.to_dict(),
        "prefix": model.window_prefix(settings.bos),
        "device": model.device.type,
        "versions": versions("torch", "transformers"),
    }
