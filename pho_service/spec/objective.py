"""
What a search rates candidates by.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Shown, check_choice

ObjectiveName = Literal["activation-reconstruction", "gini", "perplexity"]
Weighting = Literal["blend", "geometric", "fisher", "relative", "absolute"]
Over = Literal["mean", "worst"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
OVER: tuple[Over, ...] = get_args(Over)  # how several models count in one search
_SECOND: dict[Weighting, Weighting] = {"blend": "geometric", "geometric": "blend"}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    What a search rates candidates by.
    """

    __pydantic_config__ = STRICT

    name: Annotated[
        ObjectiveName,
        Shown(option="--objective", label="Objective"),
        Field(description="Measure that candidates are rated by."),
    ] = "activation-reconstruction"
    weighting: Annotated[
        Weighting,
        Field(description="How activation reconstruction adds up the errors of layers and rows."),
    ] = "blend"
    over: Annotated[
        Over | None,
        Field(
            description="How several models count, each relative to what RIA has on it: their "
            "mean, which is the default for several, or the worst. null with one model."
        ),
    ] = None

    def __post_init__(self) -> None:
        check_choice("objective", self.name, OBJECTIVES)
        if self.over is not None:
            check_choice("over", self.over, OVER)
        if self.over is not None and self.name != "activation-reconstruction":
            raise InvalidInput(
                f"the objective {self.name} has no common scale for several models. Search over "
                "them by activation-reconstruction."
            )
        check_choice("weighting", self.weighting, WEIGHTINGS)

    def over_models(self, count: int) -> Self:
        """
        The objective of a search on so many models.

        Raises:
            InvalidInput: It has no common scale for several.
        """
        return self if count == 1 or self.over is not None else replace(self, over="mean")

    @property
    def label(self) -> str:
        """``activation-reconstruction/blend``, ``gini`` or ``perplexity``; how models count."""
        if self.name != "activation-reconstruction":
            return self.name
        several = "" if self.over is None else f", {self.over} over models relative to RIA"
        return f"{self.name}/{self.weighting}{several}"

    @property
    def second_weighting(self) -> Weighting | None:
        """
        The weighting that proposes finalists in turn with the objective's own; None for others.

        Where two weightings rank alike on some models and far apart on others, nobody knows which
        is right on a new one: see docs/proxy.md.
        """
        if self.name != "activation-reconstruction":
            return None
        return _SECOND.get(self.weighting)

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """What is good: low values, or high ones."""
        return "maximize" if is_maximised(self.name) else "minimize"


def is_maximised(name: str | None) -> bool:
    """Whether high values are good: of Gini they went with lower perplexity in our measurements."""
    return name == "gini"
