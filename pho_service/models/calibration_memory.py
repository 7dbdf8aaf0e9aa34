"""
How a calibration stays within a memory: planned before the work starts.
"""

from dataclasses import dataclass, replace

import torch

from pho_service.errors import InvalidInput
from pho_service.memory import available_memory, format_bytes, free_memory, memory_in_use
from pho_service.models.footprint import Footprint
from pho_service.models.loading import LanguageModel
from pho_service.models.stage_memory import (
    HELD,
    CalibrationRun,
    Peak,
    Place,
    block_inputs,
    calibration_peak,
)
from pho_service.spec import CalibrationSettings

AT_ONCE = 8192  # tokens that a GPU runs at once, if they fit
USED = 0.9  # of what is free; the rest is lost between blocks of torch's allocator
BATCHED = 0.75  # of a card, for more windows than one at once: so its other users matter little


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """
    How a calibration is run. What it gives is the same but for rounding, and on a CPU the same.

    Attributes:
        run: How.
        peak: What it takes, the model included.
        fits: Whether that is within the limits.
    """

    run: CalibrationRun
    peak: Peak
    fits: bool


def choose_run(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    *,
    windows: int,
    fisher_windows: int,
    device_limit: int | None = None,
    host_limit: int | None = None,
    device_size: int | None = None,
) -> CalibrationPlan:
    """
    The fastest run that fits, or the most frugal one if none does; no model need be loaded.

    On a CPU windows are run one by one: more at once are not faster there.

    Args:
        footprint: Of the model.
        settings: Of the calibration; its ``memory_bytes`` is not looked at.
        place: Where the model will run.
        windows: How many there are.
        fisher_windows: How many of them are run backward.
        device_limit: Bytes of a GPU that model and calibration may take together; None is no limit.
        host_limit: The same of main memory; on a CPU the model is in it, too.
        device_size: Bytes of the GPU. Several windows are run at once only if that takes no more
            than three quarters of it, so results depend on the card, and hardly on who uses it.
    """
    plans = []
    for run in _runs(footprint, settings, place, fisher_windows):
        peak = calibration_peak(
            footprint, settings, place, run, windows=windows, fisher_windows=fisher_windows
        )
        fits = _within(peak.device, device_limit) and _within(peak.host, host_limit)
        if max(run.windows, run.forward_windows) > 1 and device_size is not None:
            fits = fits and peak.device <= BATCHED * device_size
        plans.append(CalibrationPlan(run=run, peak=peak, fits=fits))
        if fits:
            break
    return plans[-1]


def _within(needed: int, limit: int | None) -> bool:
    return limit is None or needed <= limit


def _runs(
    footprint: Footprint, settings: CalibrationSettings, place: Place, fisher_windows: int
) -> list[CalibrationRun]:
    """Ways to run a calibration, the fastest first."""
    if place.stream:
        inputs = block_inputs(footprint, settings.context_length, fisher_windows)
        run = CalibrationRun(recompute=True, spill=inputs > HELD)
        return [replace(run, states_on_device=True), run] if place.on_gpu else [run]
    most = max(1, AT_ONCE // settings.context_length) if place.on_gpu else 1
    counts = [2**i for i in reversed(range(most.bit_length()))]
    both = [CalibrationRun(windows=count, forward_windows=counts[0]) for count in counts]
    few = [CalibrationRun(forward_windows=count) for count in counts]
    recomputing = [replace(run, recompute=True) for run in few]
    return [*both, *few, *recomputing]


def plan_calibration(
    model: LanguageModel, settings: CalibrationSettings, *, windows: int, fisher_windows: int
) -> CalibrationPlan:
    """
    The fastest plan that fits into ``settings.memory_bytes``, or, without it, into a GPU.

    What torch's allocator holds and no tensor uses counts as free.

    Args:
        model: Loaded, so that what is in use counts it.
        settings: Of the calibration.
        windows: How many there are.
        fisher_windows: How many of them are run backward.

    Raises:
        InvalidInput: Not even the most frugal plan fits; says what would.
    """
    footprint = Footprint.of(model.model, model.linears)
    place = Place(on_gpu=model.device.type == "cuda", stream=model.stream)
    in_use = memory_in_use(model.device)
    loaded = 0 if model.stream else footprint.weights  # of what is in use
    limit, size, host_limit = settings.memory_bytes, None, None
    if place.on_gpu:
        size = torch.cuda.mem_get_info(model.device)[1]
        if limit is None:
            limit = in_use + int(USED * free_memory(model.device))
        host_limit = available_memory()
    ours = None if limit is None else limit - in_use + loaded
    plan = choose_run(
        footprint, settings, place, windows=windows, fisher_windows=fisher_windows,
        device_limit=ours if place.on_gpu else None,
        host_limit=host_limit if place.on_gpu else ours,
        device_size=size,
    )  # fmt: skip
    if plan.fits:
        return plan
    needed = plan.peak.device if place.on_gpu else plan.peak.host
    what, needed, used, allowed = "memory", needed - loaded + in_use, in_use, limit
    if host_limit is not None and plan.peak.host > host_limit:
        what, needed, used, allowed = "main memory", plan.peak.host, 0, host_limit
    assert allowed is not None  # with no limit the first plan is taken
    ways = _ways_out(footprint, settings, place, ours or 0, fisher_windows)
    raise InvalidInput(
        f"the calibration of {model.name} on windows of {settings.context_length} tokens needs up "
        f"to {format_bytes(needed)} of {what}, {format_bytes(used)} of them in use already, but "
        f"may take {format_bytes(allowed)}. {ways}"
    )


def would_fit(model: LanguageModel, settings: CalibrationSettings, *, fisher_windows: int) -> str:
    """What would fit, in words, where a plan that should have fitted ran out of memory."""
    footprint = Footprint.of(model.model, model.linears)
    place = Place(on_gpu=model.device.type == "cuda", stream=model.stream)
    limit = free_memory(model.device) if place.on_gpu else available_memory()
    limit += 0 if model.stream else footprint.weights
    return _ways_out(footprint, settings, place, limit, fisher_windows)


def _ways_out(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    limit: int,
    fisher_windows: int,
) -> str:
    """What would fit."""

    def fits(changed: CalibrationSettings) -> bool:
        plan = choose_run(
            footprint, changed, place, windows=changed.samples, fisher_windows=fisher_windows,
            device_limit=limit if place.on_gpu else None,
            host_limit=None if place.on_gpu else limit,
        )  # fmt: skip
        return plan.fits

    ways = ["allow it more (--calibration-memory; memory_bytes of a job)"]
    shorter = settings.context_length // 2
    while shorter >= 64 and not fits(replace(settings, context_length=shorter)):
        shorter //= 2
    if shorter >= 64:
        ways.append(f"take shorter windows (--context-length {shorter})")
    if not settings.projection_rows and fits(replace(settings, projection_rows=128)):
        ways.append("project the activations (--projection-rows 128)")
    if not place.stream:
        ways.append("leave the weights on disk (--stream, for safetensors)")
    else:
        ways.append("take fewer windows (--samples, --fisher-samples)")
    return f"A{', or '.join(ways)[1:]}."
