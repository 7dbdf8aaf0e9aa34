"""
How much one job may ask for, and how much it asks for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pho_service.host.settings import Settings
from pho_service.spec.configuration import WIDER
from pho_service.spec.fields import FieldError
from pho_service.spec.objective import corrected_windows

if TYPE_CHECKING:
    from pho_service.spec.job import JobSpec


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """
    The most of one job.

    Attributes:
        trials: Number of trials of all its islands, or of the searches on all its models.
        tokens: That models are run over, as the documents count them.
    """

    trials: int
    tokens: int

    @classmethod
    def of(cls, settings: Settings) -> "JobLimits":
        """Read the settings."""
        return cls(trials=settings.max_trials, tokens=settings.max_tokens)

    def check_trials(self, pointer: str, count: int, times: int, things: str) -> None:
        """Check ``count`` trials on each of so many islands or models."""
        if count * times > self.trials:
            raise FieldError(
                pointer,
                f"{count} trials on {times} {things} are {count * times}, but one job may have "
                f"{self.trials} here. Ask for fewer, or let the operator raise PHO_MAX_TRIALS.",
                code="job_too_large",
            )

    def check_tokens(self, pointer: str, count: int) -> None:
        if count > self.tokens:
            raise FieldError(
                pointer,
                f"the job asks for {count} tokens to run models over, but one job may have "
                f"{self.tokens} here. Ask for fewer or shorter windows, or let the operator raise "
                "PHO_MAX_TOKENS.",
                code="job_too_large",
            )


# How much a job asks for, beside what the service allows.
def check_size(spec: "JobSpec", limits: JobLimits, *, more_trials: int = 0) -> None:
    """
    Count what a job asks for: trials, and tokens of the calibrations, of every candidate that gets
    a perplexity, and of a reconstruction's passes. Baselines and the dense model are not counted.
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
