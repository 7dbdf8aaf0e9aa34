"""
The objective of a search, and the samplers that it takes candidates from.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, FieldShown, Seed, Whole, check_choice
from pho_service.spec.pattern import Pattern

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
        FieldShown(option="--objective", label="Objective"),
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
        """The objective of a search on so many models."""
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
        """The direction of good values: low ones, or high ones."""
        return "maximize" if is_maximised(self.name) else "minimize"


def is_maximised(name: str | None) -> bool:
    """Return whether high values are good: of Gini they went with lower perplexity here."""
    return name == "gini"


Sampler = Literal["cmaes", "tpe", "random", "qmc", "gp", "hill-climb"]

# How many candidates each sampler gives before it wants to know their values.
SAMPLERS: dict[str, int] = {
    **dict.fromkeys(get_args(Sampler), 1),
    **{"cmaes": 8, "random": 8, "qmc": 8},
}
MAX_TRIALS = 10_000  # of an island; the dashboard draws every trial
_LENGTHS = ("trials", "in_full")


Trials = Annotated[
    Whole,
    Field(
        ge=1,
        le=MAX_TRIALS,
        description="Number of trials of each island, baselines included; a hill climb may end "
        "earlier.",
    ),
]
SamplerSeed = Annotated[Seed, Field(description="Seed of the sampler.")]
InFull = Annotated[
    Annotated[Whole, Field(ge=1, le=100)] | None,
    Field(
        description="Number of finalists that are pruned in full, where pruning runs a text "
        "through the model; the others are compared by their masks alone. By default 2 with a "
        "share, and all at N:M, where masks alone do not tell.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """
    The options of a search that are plain values, from the document to the plan.

    A new one is in requests, plans, transfers, studies, config.json and in the arguments of Python
    by being here, and in jobs, the form and the options of all verbs by a field of the same name.
    """

    __pydantic_config__ = STRICT

    trials: Trials = 200
    seed: SamplerSeed = 0
    in_full: InFull = None

    def pruned_in_full(self, finalists: int, pattern: Pattern) -> int:
        """How many of the finalists are, where pruning runs a text through the model."""
        return min(finalists, self.in_full or (finalists if pattern.group else 2))

    def identity(self) -> dict[str, Any]:
        """
        Return what makes it another search: the seed, and what differs from its default.

        How many trials and finalists do not: a longer search goes on with a shorter.
        """
        values = options_of(self)
        defaults = {option.name: option.default for option in fields(SearchOptions)}
        return {
            name: value
            for name, value in values.items()
            if name == "seed" or (name not in _LENGTHS and value != defaults[name])
        }


def options_of(source: object) -> dict[str, Any]:
    """Return the :class:`SearchOptions` of a document, a request or a plan by their names."""
    return {option.name: getattr(source, option.name) for option in fields(SearchOptions)}
