"""
The fastest way to run a calibration that fits a memory.
"""

from dataclasses import dataclass, replace

from pho_service.planning.footprint import Footprint
from pho_service.planning.stage_memory import (
    HELD,
    CalibrationRun,
    Peak,
    Place,
    block_inputs,
    calibration_peak,
)
from pho_service.spec.calibration import CalibrationSettings

AT_ONCE = 8192  # tokens that a GPU runs at once, if they fit
BATCHED = 0.75  # of a card, for more windows than one at once: so its other users matter little


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """
    Way in which a calibration is run. Its result only differs by rounding; on a CPU it is the same.

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
        footprint: Footprint of the model.
        settings: Settings of the calibration; its ``memory_bytes`` is not looked at.
        place: Where the model will run.
        windows: How many there are.
        fisher_windows: How many of them are run backward.
        device_limit: Bytes of a GPU that model and calibration may take; None means no limit.
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
