"""
A search in plain values: what is asked, its plan, and a candidate that was rated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pho_service.errors import InvalidInput, field_name
from pho_service.spec.baselines import search_baselines
from pho_service.spec.document import check_seed
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.objective import SAMPLERS, Objective, SearchOptions, options_of
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Candidate, Steps
from pho_service.spec.structure import ESTIMATE

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


# User attribute of a trial: its rating by the other weighting that proposes finalists.
SECOND_OPINION = "second_opinion"
CHOSEN = "chosen"  # user attribute of a study, and of its trials: whether it is that one

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Rating of one candidate."""

    value: float | None  # The objective, finite; None if the rating failed
    attributes: dict[str, Any] = field(default_factory=dict)  # JSON values to record with the trial
    failure: str | None = None  # Why it failed
    raised: Exception | None = None  # By a function of the user's, to be raised again


Evaluate = Callable[[Sequence[Candidate]], list[Outcome]]


@dataclass(frozen=True, kw_only=True)
class SearchPlan(SearchOptions):
    """A search, complete but for the function that rates."""

    pattern: Pattern
    space: SearchSpace  # The box; fitted to the pattern
    # What every candidate goes through; method and spread of its allocation are those of the space.
    steps: Steps = field(default_factory=Steps)
    # A name of :data:`pho_service.spec.objective.SAMPLERS`, or a sampler of Optuna. That is used as
    # it is, seed and state included, and recorded by the name of its class: with the study alone
    # nobody can repeat the search.
    sampler: "str | BaseSampler" = "cmaes"
    direction: Direction = "minimize"  # Whether low or high values are good
    fisher: bool = True  # Whether the plain second-order score is among the baselines
    # Points of the space that were found elsewhere: the trials after the baselines. The sampler
    # begins around the best of them.
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
        """Number of candidates that the sampler gives before it is told their values."""
        return SAMPLERS[self.sampler] if isinstance(self.sampler, str) else 1

    def baselines(self) -> list[Candidate]:
        return search_baselines(
            self.pattern,
            kernel_size=self.space.kernel_sizes[0],
            fisher=self.fisher,
            steps=self.steps,
            allocations=self.space.allocations,
        )


def check_sampler(sampler: object) -> None:
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
    """A finished trial."""

    number: int  # Number of the trial
    candidate: Candidate
    params: dict[str, Any]  # Its place in the search space
    value: float  # Its rating by the objective
    # Its rating by the weighting that also proposes finalists, lower is better; None if there is
    # none.
    second_opinion: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchRequest(SearchOptions):
    """A user's request for a search, besides the model and the texts."""

    pattern: Pattern
    objective: Objective = field(default_factory=Objective)
    # Fields of the search space that differ from its defaults.
    bounds: Mapping[str, Any] = field(default_factory=dict)
    # What every candidate goes through beside the score. Its allocation is the only one of the
    # search unless ``bounds`` name ``allocations``; its reconstruction is only for the winner.
    steps: Steps = field(default_factory=Steps)
    # Where candidates come from: a name, or a sampler of Optuna; see
    # :class:`~pho_service.tuning.plan.SearchPlan`.
    sampler: "str | BaseSampler" = "cmaes"
    finalists: int = 5  # How many found candidates are looked at again, beside the baselines
    # Found elsewhere, in this pattern: they are rated first, and the sampler begins around the best
    # of them.
    warm_start: tuple[Candidate, ...] = ()
    # How the proxy is validated before the confirmation, which looks at more finalists if it does
    # not rank; None leaves that out.
    validation: ValidationSpec | None = None

    def __post_init__(self) -> None:
        for name in ("finalists", "in_full"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name}={value} is below 1.")

    @property
    def rated_by(self) -> str:
        """The name of what candidates are rated by, or the splits of a share."""
        return ESTIMATE if self.pattern.structured else self.objective.label

    def plan(self, kernel_sizes: tuple[int, ...]) -> SearchPlan:
        allocation = self.steps.allocation
        defaults = {
            "kernel_sizes": kernel_sizes,
            "allocations": (allocation.method,),
            "allocation_spread": (allocation.spread, allocation.spread),
        }
        space = SearchSpace(**{**defaults, **self.bounds})
        missing = sorted(set(space.kernel_sizes) - set(kernel_sizes))
        if missing:
            raise InvalidInput(
                f"search space kernel_sizes: {missing[0]} is not in the bundle, which has "
                f"{', '.join(map(str, kernel_sizes))}. Calibrate with "
                f"{field_name('calibration/kernel_sizes')}."
            )
        return SearchPlan(
            pattern=self.pattern,
            space=space.fitted(self.pattern),
            steps=self.steps.before_reconstruction,
            sampler=self.sampler,
            **options_of(self),
            direction=self.objective.direction,
            fisher=space.gradient_exponent[1] > 0,
            warm_start=self._warm(space.fitted(self.pattern)),
        )

    def _warm(self, space: SearchSpace) -> tuple[dict[str, Any], ...]:
        """The points to start from, each once; baselines are in every search anyway."""
        points: list[dict[str, Any]] = []
        for candidate in self.warm_start:
            pattern, searched = candidate.pattern, candidate.method == "crepe"
            other_scope = pattern.scope is not self.pattern.scope
            if str(pattern) != str(self.pattern) or (searched and other_scope):
                raise InvalidInput(
                    f"a configuration to start from is for {pattern} in scope "
                    f"{pattern.scope.value}, but the search is for {self.pattern} in scope "
                    f"{self.pattern.scope.value}. Leave it out, or search in its pattern and scope."
                )
            point = space.nearest(candidate)
            if searched and point not in points:
                points.append(point)
        return tuple(points)
