"""
How much a job asks for, beside what the service allows.
"""

from typing import TYPE_CHECKING

from pho_service.spec.limits import JobLimits
from pho_service.spec.quality import WIDER
from pho_service.spec.samplers import corrected_windows

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec


def check_size(spec: "JobSpec", limits: JobLimits, *, more_trials: int = 0) -> None:
    """
    Count what a job asks for: trials, and tokens of the calibrations, of every candidate that gets
    a perplexity, and of a reconstruction's passes. Baselines and the dense model are not counted.

    Args:
        spec: The job.
        limits: Limits of the service.
        more_trials: Trials of an extension, for each island.

    Raises:
        FieldError: It is too much; names the field and the limit.
    """
    trials, points = spec.trials + more_trials, spec.most_points
    things = "patterns" if spec.several else "islands"
    limits.check_trials("/trials", trials, spec.islands * points, things)
    tokens = spec.calibration.tokens * len(spec.models)
    limits.check_tokens("/calibration/samples", tokens)
    if spec.confirm is not None:
        measured = spec.confirm.candidates
        if spec.validation is not None:
            measured = WIDER * measured + spec.validation.candidates
        measured += trials * spec.islands if spec.objective.name == "perplexity" else 0
        tokens += points * measured * spec.confirm.windows * spec.calibration.context_length
        trained = spec.request(0).steps.reconstruction
        tokens += points * trained.passes * spec.calibration.tokens if trained.wanted else 0
        limits.check_tokens("/confirm/windows", tokens)
    length = spec.calibration.context_length
    tokens += points * spec.corrections * corrected_windows(length) * length
    limits.check_tokens("/corrections", tokens)
