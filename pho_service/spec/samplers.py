"""
The samplers that a search can take its candidates from, and what else every search is told.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from pho_service.spec.document import STRICT, Shown, Whole
from pho_service.spec.seed import Seed

Sampler = Literal["cmaes", "tpe", "random", "qmc", "gp", "hill-climb"]

# How many candidates each sampler gives before it wants to know their values.
SAMPLERS: dict[str, int] = {
    **dict.fromkeys(get_args(Sampler), 1),
    **{"cmaes": 8, "random": 8, "qmc": 8},
}
MAX_TRIALS = 10_000  # of an island; the dashboard draws every trial
MAX_CORRECTIONS = 1_000  # each takes as long as the model takes for some windows
_LENGTHS = ("trials", "corrections")
CORRECTED_TOKENS = 1024  # of the calibration text, on which pruned models are compared with it


Trials = Annotated[
    Whole,
    Shown(rank=1),
    Field(
        ge=1,
        le=MAX_TRIALS,
        description="Number of trials of each island, baselines included; a hill climb may end "
        "earlier.",
    ),
]
SamplerSeed = Annotated[Seed, Shown(rank=2), Field(description="Seed of the sampler.")]
Corrections = Annotated[
    Whole,
    Field(
        ge=0,
        le=MAX_CORRECTIONS,
        description="Number of allocations that are compared with the dense model on calibration "
        "windows after the search, to correct the best one where the proxy is wrong; 0 leaves it "
        "as it is.",
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
    corrections: Corrections = 0

    def identity(self) -> dict[str, Any]:
        """
        Return what makes it another search: the seed, and what differs from its default.

        The numbers of trials and of corrections do not: a longer search goes on with a shorter one.
        """
        values = options_of(self)
        defaults = {each.name: each.default for each in fields(SearchOptions)}
        return {
            name: value
            for name, value in values.items()
            if name == "seed" or (name not in _LENGTHS and value != defaults[name])
        }


def corrected_windows(context_length: int) -> int:
    """How many calibration windows pruned models are compared with the dense one on, at most."""
    return max(1, CORRECTED_TOKENS // context_length)


def options_of(source: object) -> dict[str, Any]:
    """Return the :class:`SearchOptions` of a document, a request or a plan by their names."""
    return {each.name: getattr(source, each.name) for each in fields(SearchOptions)}
