"""
How a calibration stays within a memory: planned before the work starts.
"""

from dataclasses import replace

import torch

from pho_service.errors import InvalidInput
from pho_service.models.footprint import footprint_of
from pho_service.models.loading import LanguageModel
from pho_service.planning.calibration_run import CalibrationPlan, choose_run
from pho_service.planning.footprint import Footprint
from pho_service.planning.stage_memory import Place
from pho_service.pruning.memory import available_memory, format_bytes, free_memory, memory_in_use
from pho_service.spec.calibration import CalibrationSettings

USED = 0.9  # of what is free; the rest is lost between blocks of torch's allocator


def plan_calibration(
    model: LanguageModel, settings: CalibrationSettings, *, windows: int, fisher_windows: int
) -> CalibrationPlan:
    """
    The fastest plan that fits into ``settings.memory_bytes``, or, without it, into a GPU.

    What torch's allocator holds and no tensor uses counts as free. For a model on several GPUs
    the memory of all counts, since each has about as many blocks.

    Args:
        model: Loaded, so that what is in use counts it.
        settings: Settings of the calibration.
        windows: How many there are.
        fisher_windows: How many of them are run backward.

    Raises:
        InvalidInput: Not even the most frugal plan fits; says what would.
    """
    footprint = footprint_of(model.model)
    place = Place(on_gpu=model.device.type == "cuda", stream=model.stream)
    in_use = sum(map(memory_in_use, model.devices))
    loaded = 0 if model.stream else footprint.weights  # of what is in use
    limit, size, host_limit = settings.memory_bytes, None, None
    if place.on_gpu:
        size = sum(torch.cuda.mem_get_info(device)[1] for device in model.devices)
        if limit is None:
            limit = in_use + int(USED * _free(model))
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
    footprint = footprint_of(model.model)
    place = Place(on_gpu=model.device.type == "cuda", stream=model.stream)
    limit = _free(model) if place.on_gpu else available_memory()
    limit += 0 if model.stream else footprint.weights
    return _ways_out(footprint, settings, place, limit, fisher_windows)


def _free(model: LanguageModel) -> int:
    """Bytes that a model's GPUs have for work that each does as much of: the fullest one counts."""
    return len(model.devices) * min(map(free_memory, model.devices))


def _ways_out(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    limit: int,
    fisher_windows: int,
) -> str:
    """Return the settings that would fit."""

    def fits(changed: CalibrationSettings) -> bool:
        plan = choose_run(
            footprint, changed, place, windows=changed.samples, fisher_windows=fisher_windows,
            device_limit=limit if place.on_gpu else None,
            host_limit=None if place.on_gpu else limit,
        )  # fmt: skip
        return plan.fits

    ways = ["allow it more (--calibration-memory)"]
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
