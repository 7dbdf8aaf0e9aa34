"""
What a search rates candidates by.
"""

from dataclasses import dataclass
from typing import Literal

from pho_service.errors import InvalidInput

OBJECTIVES = ("activation-reconstruction", "gini", "perplexity")
WEIGHTINGS = ("blend", "fisher", "relative", "absolute")
OVER = ("mean", "worst")  # how several models count in one search


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    What a search rates candidates by.

    Attributes:
        name: ``activation-reconstruction`` (the default), ``gini`` or ``perplexity``.
        weighting: How the errors of layers and rows are added up; only
            for activation reconstruction.
        over: How several models count, each relative to what RIA has on it: their ``mean``, or
            the ``worst``; only for activation reconstruction. None: there is one model.
    """

    name: str = "activation-reconstruction"
    weighting: str = "blend"
    over: str | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise InvalidInput(f"objective {self.name!r} is not one of {', '.join(OBJECTIVES)}.")
        if self.over is not None and self.over not in OVER:
            raise InvalidInput(f"over={self.over!r} is not one of {', '.join(OVER)}.")
        if self.over is not None and self.name != "activation-reconstruction":
            raise InvalidInput(
                f"the objective {self.name} has no common scale for several models. Search over "
                "them by activation-reconstruction."
            )
        if self.weighting not in WEIGHTINGS:
            raise InvalidInput(
                f"weighting {self.weighting!r} is not one of {', '.join(WEIGHTINGS)}."
            )

    @property
    def label(self) -> str:
        """``activation-reconstruction/blend``, ``gini`` or ``perplexity``; how models count."""
        if self.name != "activation-reconstruction":
            return self.name
        several = "" if self.over is None else f", {self.over} over models relative to RIA"
        return f"{self.name}/{self.weighting}{several}"

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Gini is maximised: higher went with lower perplexity in our measurements."""
        return "maximize" if self.name == "gini" else "minimize"
