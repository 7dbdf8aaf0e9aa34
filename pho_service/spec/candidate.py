"""
What a search rates and a model is pruned with: score, pattern and steps together.
"""

from dataclasses import dataclass

from pho_service.spec.pattern import Pattern
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
