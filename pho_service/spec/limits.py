"""
How much one job may ask for, as the operator of a service wants it.
"""

from dataclasses import dataclass

from pho_service.host.settings import Settings
from pho_service.spec.fields import FieldError


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
        """
        Check ``count`` trials on each of so many islands or models.

        Raises:
            FieldError: They are too many; names the limit.
        """
        if count * times > self.trials:
            raise FieldError(
                pointer,
                f"{count} trials on {times} {things} are {count * times}, but one job may have "
                f"{self.trials} here. Ask for fewer, or let the operator raise PHO_MAX_TRIALS.",
                code="job_too_large",
            )

    def check_tokens(self, pointer: str, count: int) -> None:
        """
        Raises:
            FieldError: They are too many; names the limit.
        """
        if count > self.tokens:
            raise FieldError(
                pointer,
                f"the job asks for {count} tokens to run models over, but one job may have "
                f"{self.tokens} here. Ask for fewer or shorter windows, or let the operator raise "
                "PHO_MAX_TOKENS.",
                code="job_too_large",
            )
