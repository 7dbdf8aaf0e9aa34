"""
The sizes of a job that takes the minutes that it is given.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pho_service.spec.job import JobSpec
from pho_service.spec.minutes import AFTER_CALIBRATION, REST_TOKENS, SizeName
from pho_service.spec.recovery import CHECKS

if TYPE_CHECKING:
    from pho_service.planning.plan import Plan

# Windows of a calibration and their tokens, in few steps, so that jobs share bundles.
LEVELS = (
    (4, 256), (4, 512), (8, 512), (12, 512), (16, 512), (24, 512), (32, 512), (48, 512), (64, 512),
    (80, 512), (96, 512), (128, 512), (128, 1024), (128, 2048),
)  # fmt: skip
FEW_WINDOWS = 8  # to confirm on, and windows to calibrate on up to which that is enough
USUAL_FROM = 16  # windows to calibrate on from which on the confirmation is as published

Sizes = dict[SizeName, int | None]


def fitted(
    spec: JobSpec,
    context: int | None,
    plan: Callable[[JobSpec], "Plan"],
    left_s: float,
    took: "Callable[[Plan], float] | None" = None,
) -> "Plan":
    """
    The plan with the largest sizes that take no more than the seconds that are left; the least if
    none does. Where the calibration lies behind, its sizes are not free, and it is not counted;
    otherwise what is chosen behind it is planned as if it took as long as it is planned to.

    ``took`` says how long what has these sizes takes, if that is not the job itself.
    """
    calibrated, each_s = _is_calibrated(spec), left_s / len(spec.models)
    least: Plan | None = None
    kept: Sizes = {path: spec.sizes.get(path) for path in spec.free_sizes}
    for sizes in ladder(spec, context):
        try:
            sized = spec.sized(kept | sizes)
        except ValidationError:  # too few windows for several texts, or for those run backward
            break
        least = plan(sized)
        seconds = least.own_seconds(calibrated=calibrated) if took is None else took(least)
        if least.fits and seconds <= each_s:
            break
    least = least or plan(spec.sized(kept))
    later = [path for path in spec.free_sizes if path in AFTER_CALIBRATION]
    if calibrated or took is not None or not later:
        return least
    chosen = {path: size for path, size in least.spec.sizes.items() if path not in later}
    return behind(least, spec.sized(chosen), context, plan, left_s)


def behind(
    chosen: "Plan",
    spec: JobSpec,
    context: int | None,
    plan: Callable[[JobSpec], "Plan"],
    left_s: float,
) -> "Plan":
    """A plan with the sizes that are free behind its calibration, if that takes as long as here."""
    before_s = chosen.own_seconds() - chosen.own_seconds(calibrated=True)
    return fitted(spec, context, plan, left_s - before_s * len(spec.models))


def _is_calibrated(spec: JobSpec) -> bool:
    return {*spec.free_sizes} <= {*AFTER_CALIBRATION}


def _is_costly(spec: JobSpec) -> bool:
    """Whether each finalist that is pruned in full runs a text through the model."""
    return not spec.is_cut and spec.request(0).steps.needs_text


def least_in_rest(plan: "Plan") -> int:
    """Tokens that a recovery in what the minutes leave trains on at least; a cut needs it more."""
    least = CHECKS * plan.work.calibration.context_length
    return least if plan.spec.is_cut else max(least, REST_TOKENS)


def sentence(plan: "Plan") -> str:
    """What the minutes of a job chose, and how long that takes."""
    spec, confirm = plan.spec, plan.spec.confirm
    sizes = f"{spec.calibration.samples} windows of {spec.calibration.context_length} tokens"
    if not spec.is_cut:
        sizes += f", {spec.trials} trials"
    if confirm is not None:
        in_full = spec.request(0).pruned_in_full(confirm.finalists, spec.pruning())
        several = "s" * (confirm.finalists > 1)
        sizes += f", {confirm.finalists} finalist{several} on {confirm.windows} windows"
        sizes += f", {in_full} in full" * _is_costly(spec)
    took = plan.own_seconds() * len(spec.models)
    recovery = plan.work.recovery if spec.recovers_in_rest else None
    rest_s = 0 if recovery is None else recovery.time_s
    said = f"{sizes}: {about(took - rest_s)}{', and a recovery in what is left' * bool(rest_s)}"
    if plan.work.pattern.of_file:
        cut = f"{plan.costs.cut_share:.1%} of the weights of its blocks"
        said = f"{plan.work.pattern} cuts {cut}. {said}"
    if plan.work.pattern.goal is not None:
        said = f"What {plan.work.pattern} takes is found once the model is calibrated. {said}"
    if plan.spec.minutes is not None and took > 60 * plan.spec.minutes * 1.05:
        said += f". It is the least, and more than {plan.spec.minutes:g} minutes"
    return f"{said}."


def about(seconds: float) -> str:
    """A time that was planned, in words."""
    if seconds >= 90:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds:.0f} seconds"


def ladder(spec: JobSpec, context: int | None) -> Iterator[Sizes]:
    """The sizes that may be chosen of those that are free, the largest first."""
    before: Sizes | None = None
    for samples, length in reversed(LEVELS):
        calibration: Sizes = {
            "calibration/samples": samples,
            "calibration/context_length": min(length, context or length),
        }
        for confirmation in _confirmations(spec, samples):
            chosen = {**calibration, **confirmation}
            sizes = {name: chosen[name] for name in spec.free_sizes if name in chosen}
            if sizes != before:
                yield sizes
            before = sizes


def _confirmations(spec: JobSpec, samples: int) -> Iterator[Sizes]:
    """How much is confirmed beside so many windows to calibrate on, the most first."""
    if spec.confirm is None:
        yield {}
        return
    finalists, windows = spec.confirm.finalists, spec.confirm.windows
    costly = _is_costly(spec)
    by_masks = costly and not spec.pruning().group  # which tell no finalists of N:M apart
    calibrated = _is_calibrated(spec)
    usual, fewer, least = finalists, finalists if by_masks else 3, 3 if by_masks else 2
    sets: list[tuple[int, int, int | None]] = []
    if calibrated and by_masks:
        sets += [(usual, windows, count) for count in range(finalists, 2, -1)]
    if calibrated or samples >= USUAL_FROM:
        sets.append((usual, windows, None))
    if calibrated or (samples >= FEW_WINDOWS and (costly or samples <= USUAL_FROM)):
        sets.append((fewer, windows, 1))
    if calibrated or samples <= FEW_WINDOWS:
        sets.append((least, FEW_WINDOWS, 1))
    # Text is worth more than a choice, the more so where each to choose from is pruned in full.
    if costly and (calibrated or samples <= (1 if by_masks else 2) * USUAL_FROM):
        sets.append((1, FEW_WINDOWS, 1))
    for count, measured_on, in_full in sets:
        yield {
            "confirm/windows": min(measured_on, windows),
            "confirm/finalists": min(count, finalists),
            "in_full": in_full if by_masks else None,
        }
