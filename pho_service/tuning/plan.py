"""
A search in plain values: its plan, what a rating gives, and a candidate that was rated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pho_service.errors import InvalidInput
from pho_service.spec.baselines import search_baselines
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern
from pho_service.spec.samplers import SAMPLERS, SearchOptions
from pho_service.spec.seed import check_seed
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Steps

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

CORRECTS = "corrects"  # user attribute of a trial: the trial whose allocation it corrects
SECOND_OPINION = "second_opinion"  # and its rating by the other weighting that proposes finalists

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    Rating of one candidate.

    Attributes:
        value: The objective, finite; None if the rating failed.
        attributes: JSON values to record with the trial.
        failure: Why it failed.
    """

    value: float | None
    attributes: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


Evaluate = Callable[[Sequence[Candidate]], list[Outcome]]


@dataclass(frozen=True, kw_only=True)
class SearchPlan(SearchOptions):
    """
    A search, complete but for the function that rates.

    Attributes:
        pattern: What is pruned.
        space: The box; fitted to the pattern.
        steps: What every candidate goes through; method and spread of its allocation are those
            of the space.
        sampler: A name of :data:`pho_service.spec.samplers.SAMPLERS`, or a sampler of Optuna. That
            is used as it is, seed and state included, and recorded by the name of its class: with
            the study alone nobody can repeat the search.
        direction: Whether low or high values are good.
        fisher: Whether the plain second-order score is among the baselines.
        warm_start: Points of the space that were found elsewhere: the trials after the baselines.
            The sampler begins around the best of them.
    """

    pattern: Pattern
    space: SearchSpace
    steps: Steps = field(default_factory=Steps)
    sampler: "str | BaseSampler" = "cmaes"
    direction: Direction = "minimize"
    fisher: bool = True
    warm_start: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.steps.check_pattern(self.pattern)
        for method in self.space.allocations:
            allocation = replace(self.steps.allocation, method=method)
            replace(self.steps, allocation=allocation).check_pattern(self.pattern)
        check_sampler(self.sampler)
        first = len(self.baselines()) + len(self.warm_start)
        if self.trials < first:
            warm = " and what the search starts from" if self.warm_start else ""
            raise InvalidInput(
                f"trials={self.trials} is too few: the first {first} are the baselines{warm}. Give "
                "more, 200 say."
            )
        check_seed(self.seed)

    @property
    def sampler_name(self) -> str:
        """The name of the sampler; of an object, that of its class."""
        return self.sampler if isinstance(self.sampler, str) else type(self.sampler).__name__

    @property
    def generation(self) -> int:
        """How many candidates the sampler gives before it is told their values."""
        return SAMPLERS[self.sampler] if isinstance(self.sampler, str) else 1

    def baselines(self) -> list[Candidate]:
        """The first trials."""
        return search_baselines(
            self.pattern,
            kernel_size=self.space.kernel_sizes[0],
            fisher=self.fisher,
            steps=self.steps,
            allocations=self.space.allocations,
        )


def check_sampler(sampler: object) -> None:
    """
    Raises:
        InvalidInput: A sampler is neither a known name nor one of Optuna's objects.
    """
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return
    if not isinstance(sampler, str):
        from optuna.samplers import BaseSampler  # a name needs no Optuna

        if isinstance(sampler, BaseSampler):
            return
    raise InvalidInput(
        f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}, nor a sampler of Optuna."
    )


@dataclass(frozen=True, kw_only=True)
class RatedCandidate:
    """
    A finished trial.

    Attributes:
        number: Number of the trial.
        candidate: What was rated.
        params: Its place in the search space.
        value: Its rating by the objective.
        second_opinion: Its rating by the weighting that also proposes finalists, lower is better;
            None if there is none.
    """

    number: int
    candidate: Candidate
    params: dict[str, Any]
    value: float
    second_opinion: float | None = None
