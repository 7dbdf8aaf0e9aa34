"""
What a search rates and a model is pruned with: score, pattern and steps together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.score import Coefficients
from pho_service.spec.steps import Steps


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """
    Something a search can rate and a model can be pruned with.

    Attributes:
        method: ``crepe``, or the name of the baseline that it stands for.
        coefficients: The score.
        pattern: What is removed, and where it is counted.
        steps: What happens beside the score.
    """

    method: str
    coefficients: Coefficients
    pattern: Pattern
    steps: Steps = Steps()

    def __post_init__(self) -> None:
        self.steps.check_pattern(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """
        The candidate as JSON values, without the share that its pattern removes.

        All candidates of a search have that in common; only their scopes differ.
        """
        return {
            "method": self.method,
            "scope": self.pattern.scope.value,
            "coefficients": self.coefficients.to_dict(),
            "steps": self.steps.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], pattern: Pattern) -> Self:
        """
        Read what :meth:`to_dict` gave, among other keys.

        Args:
            values: JSON values.
            pattern: That of the search; it is counted in the scope of the candidate.

        Raises:
            InvalidInput: A value breaks a rule.
        """
        return cls(
            method=values["method"],
            coefficients=Coefficients(**values["coefficients"]),
            pattern=pattern.within(Scope(values["scope"])),
            steps=Steps.from_dict(values["steps"]),
        )
