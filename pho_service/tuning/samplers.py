"""
Sources of candidates: Optuna's samplers, a CMA-ES that stays in memory, a hill climb.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import optuna
from cmaes import CatCMAwM
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from pho_service.errors import InvalidInput
from pho_service.spec.objective import SAMPLERS, SearchOptions
from pho_service.spec.space import RIA


def searchable(space: Mapping[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """The distributions that have more than one value, by name."""
    return {name: d for name, d in sorted(space.items()) if not d.single()}


def fixed(space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The only values of the distributions that have but one, by name."""
    return {
        name: d.choices[0] if isinstance(d, CategoricalDistribution) else d.low
        for name, d in space.items()
        if d.single()
        and isinstance(d, (CategoricalDistribution, FloatDistribution, IntDistribution))
    }


def listed(distribution: BaseDistribution) -> list[Any] | None:
    """All values of a distribution, or None if they are too many to list."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + i * distribution.step for i in range(count)]
    if isinstance(distribution, IntDistribution) and not distribution.log:
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return list(values) if len(values) <= 1000 else None
    return None


def ascending(values: Sequence[Any]) -> bool:
    """Return whether values are numbers, each above the one before."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return numbers and all(a < b for a, b in itertools.pairwise(values))


def from_unit(distribution: FloatDistribution | IntDistribution, unit: float) -> float | int:
    """Map 0..1 onto a range, evenly in the logarithm where the distribution says so."""
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        value = math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
    else:
        value = low + unit * (high - low)
    value = min(max(value, low), high)
    if isinstance(distribution, IntDistribution):
        steps = round((value - low) / distribution.step)
        return int(distribution.low + steps * distribution.step)
    return value


def to_unit(distribution: FloatDistribution | IntDistribution, value: float) -> float:
    """Where a value lies in its range, 0 to 1; one outside of it at the nearer end."""
    low, high = float(distribution.low), float(distribution.high)
    value = min(max(value, low), high)
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


# Steps of a hill climb, as parts of a range. Fractions, so that a step back leads exactly to where
# the climb came from.
FIRST_STEP = Fraction(1, 4)
LAST_STEP = Fraction(1, 32)

Params = dict[str, Any]
Key = tuple[tuple[str, Any], ...]


class _InASpace(BaseSampler):
    """Works in a space of its own; what is outside of it is drawn at random."""

    _independent: RandomSampler

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a value outside of that space at random."""
        self._raise_error_if_multi_objective(study)
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


class HillClimbSampler(_InASpace):
    """Coordinate steps of a shrinking size, from a given point until none is better."""

    # The climb stands at its best point. It tries a step up and a step down along each coordinate
    # in turn, cut off at the ends of the range; the first that is better is taken, and tried once
    # more. When every one of them has failed since the last success, the step is halved, from
    # :data:`FIRST_STEP` of the range to :data:`LAST_STEP`; then the climb is over. For listed
    # values (kernel sizes) the neighbours in the list are tried, whatever the step.
    #
    # Nothing is drawn at random, and the study's trials are all that it knows: each time, the climb
    # is walked again from its start to the first point that has no value yet. So no point is rated
    # twice, and a climb goes on in another process. A failed trial is worse than any value. Equal
    # is not better.
    #
    # Optuna gives a sampler no way to end a study from outside of ``optimize``. Whoever asks must
    # look at :meth:`is_exhausted`; asked on, a climb that is over gives its best point again.

    def __init__(
        self,
        *,
        seed: int | None = None,
        search_space: Mapping[str, BaseDistribution] | None = None,
        start: Mapping[str, Any] | None = None,
        effective: Callable[[Params], Params] = dict,
    ) -> None:
        self._independent = RandomSampler(seed=seed)
        self._given_space = None if search_space is None else searchable(search_space)
        self._fixed = fixed(search_space or {})
        self._start = start or {}
        self._effective = effective
        self._intersection = IntersectionSearchSpace()

    def reseed_rng(self) -> None:
        """Draw from fresh entropy; Optuna calls this for parallel workers."""
        self._independent.reseed_rng()

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Return whether the climb is over: no step is better than the best point."""
        return self._walk(study, self._space(study)).is_over

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The space of the climb: everything that has more than one value."""
        del trial
        return self._space(study)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> Params:
        """The next point of the climb; the best one if it is over."""
        del trial
        self._raise_error_if_multi_objective(study)
        return self._walk(study, search_space).params

    def _space(self, study: optuna.Study) -> dict[str, BaseDistribution]:
        if self._given_space is not None:
            return self._given_space
        return searchable(self._intersection.calculate(study))

    def _key(self, params: Mapping[str, Any]) -> Key:
        return tuple(sorted(self._effective({**self._fixed, **params}).items()))

    def _losses(self, study: optuna.Study, names: Mapping[str, Any]) -> dict[Key, float]:
        """The loss of each point that was rated: low is good, a failure infinite."""
        sign = -1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else 1
        losses: dict[Key, float] = {}
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and names.keys() <= trial.params.keys():
                value = trial.value if trial.state is TrialState.COMPLETE else None
                loss = math.inf if value is None else sign * value
                key = self._key({name: trial.params[name] for name in names})
                losses[key] = min(loss, losses.get(key, loss))
        return losses

    def _walk(self, study: optuna.Study, space: Mapping[str, BaseDistribution]) -> "_Climb":
        """Climb over the known points, up to the first that is not."""
        losses = self._losses(study, space)
        axes = [_Axis(name, distribution) for name, distribution in space.items()]
        place = {axis.name: axis.position(self._start.get(axis.name)) for axis in axes}

        def params(place: Mapping[str, Fraction]) -> Params:
            return {axis.name: axis.value(place[axis.name]) for axis in axes}

        best = losses.get(self._key(params(place)))
        if best is None:
            return _Climb(params=params(place), is_over=False)
        moves = [(axis, direction) for axis in axes for direction in (1, -1)]
        step, turn, failures = FIRST_STEP, 0, 0
        while moves and step >= LAST_STEP:
            axis, direction = moves[turn]
            neighbour = {**place, axis.name: axis.moved(place[axis.name], direction * step)}
            loss = losses.get(self._key(params(neighbour)))
            if loss is None:
                return _Climb(params=params(neighbour), is_over=False)
            if loss < best:
                place, best, failures = neighbour, loss, 0
                continue
            turn, failures = (turn + 1) % len(moves), failures + 1
            if failures == len(moves):
                step, failures = step / 2, 0
        return _Climb(params=params(place), is_over=True)


@dataclass(frozen=True)
class _Climb:
    """Where a climb is: the next point to be rated, or its end."""

    params: Params
    is_over: bool


class _Axis:
    """A coordinate: a range from 0 to 1, or the indices of a list."""

    def __init__(self, name: str, distribution: BaseDistribution) -> None:
        self.name = name
        self._distribution = distribution
        self._values = listed(distribution)
        self._end = Fraction(1 if self._values is None else len(self._values) - 1)

    @property
    def _range(self) -> FloatDistribution | IntDistribution:
        assert isinstance(self._distribution, (FloatDistribution, IntDistribution))
        return self._distribution

    def position(self, value: Any) -> Fraction:
        """Return the position of a value; None is a range's middle, and the first of a list."""
        if self._values is not None:
            return Fraction(self._values.index(value) if value in self._values else 0)
        unit = 0.5 if value is None else to_unit(self._range, value)
        return Fraction(unit).limit_denominator(10**9)  # a third is a third: short numbers stay so

    def value(self, position: Fraction) -> Any:
        if self._values is not None:
            return self._values[int(position)]
        return from_unit(self._range, float(position))

    def moved(self, position: Fraction, step: Fraction) -> Fraction:
        """A step further, at most to the end; in a list to the neighbour."""
        if self._values is not None:
            step = Fraction(1 if step > 0 else -1)
        return min(max(position + step, Fraction(0)), self._end)


POPULATION = SAMPLERS["cmaes"]  # small populations win at budgets of 100 to 400 trials


def make_sampler(
    name: str,
    options: SearchOptions,
    *,
    search_space: Mapping[str, BaseDistribution],
    start: Mapping[str, Any] | None = None,
    effective: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> BaseSampler:
    """Build a sampler that gives the same candidates for the same seed and the same values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "cmaes":
            return CmaSampler(seed=options.seed, search_space=search_space, start=start)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=options.seed)
        if name == "random":
            return RandomSampler(seed=options.seed)
        if name == "qmc":
            return optuna.samplers.QMCSampler(
                seed=options.seed, scramble=True, warn_independent_sampling=False
            )
        if name == "gp":
            return optuna.samplers.GPSampler(seed=options.seed, deterministic_objective=True)
        if name == "hill-climb":
            return HillClimbSampler(
                seed=options.seed,
                search_space=search_space,
                start=start or RIA,
                effective=effective,
            )
    raise InvalidInput(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}.")


def is_exhausted(sampler: BaseSampler, study: optuna.Study) -> bool:
    """Return whether a sampler has no candidate left: a hill climb ends by itself."""
    return isinstance(sampler, HillClimbSampler) and sampler.is_exhausted(study)


class CmaSampler(_InASpace):
    """
    CMA-ES for mixed spaces, held in memory: 0.2 ms a trial, and no state in the database.

    A generation is ``population_size`` trials that were asked for and told,
    in the order in which they are told. Failed trials count as the worst.

    Source:
        Hamano et al. 2025, arXiv:2504.07884 (CatCMA with margin), in the
        implementation of the cmaes package.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        population_size: int = POPULATION,
        search_space: Mapping[str, BaseDistribution] | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self._start = start
        self._seed = np.random.SeedSequence(seed).generate_state(1)[0].item()
        self._independent = RandomSampler(seed=seed)
        self._population_size = population_size
        self._given_space = None if search_space is None else searchable(search_space)
        self._intersection = IntersectionSearchSpace()
        self._encoding: _Encoding | None = None
        self._optimizer: CatCMAwM | None = None
        self._asked: dict[int, CatCMAwM.Solution] = {}
        self._told: list[tuple[CatCMAwM.Solution, float]] = []

    def adopt(self, number: int, params: Mapping[str, Any]) -> None:
        """Take another point for the one that it drew: another machine's arithmetic gave that."""
        assert self._encoding is not None
        self._asked[number] = self._encoding.solution(params)

    def reseed_rng(self) -> None:
        """Draw from fresh entropy; Optuna calls this for parallel workers."""
        self._independent.reseed_rng()
        self._seed = np.random.SeedSequence().generate_state(1)[0].item()
        if self._optimizer is not None:
            self._optimizer.reseed_rng(self._seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The space that the CMA-ES works in: everything that has more than one value."""
        del trial
        if self._given_space is not None:
            return self._given_space
        return searchable(self._intersection.calculate(study))

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Ask the CMA-ES for one candidate."""
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        encoding = _Encoding(search_space)
        if self._encoding is None or encoding.space != self._encoding.space:
            self._optimizer = encoding.optimizer(self._population_size, self._seed, self._start)
            self._told, self._asked = [], {}
            self._encoding = encoding  # last: another thread of a study looks at it first
        assert self._optimizer is not None
        solution = self._optimizer.ask()
        self._asked[trial.number] = solution
        return encoding.params(solution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tell the CMA-ES, a generation at a time."""
        solution = self._asked.pop(trial.number, None)
        if solution is None or self._optimizer is None:
            return
        loss = np.inf
        if state is TrialState.COMPLETE and values is not None:
            maximise = study.direction is optuna.study.StudyDirection.MAXIMIZE
            loss = -values[0] if maximise else values[0]
        self._told.append((solution, loss))
        if len(self._told) == self._population_size:
            # Ranks instead of values: a CMA-ES needs no more, and the penalty that CatCMAwM
            # takes from the spread of values stays a number where values are equal or infinite.
            order = np.argsort([loss for _, loss in self._told], kind="stable")
            self._optimizer.tell([(self._told[i][0], float(r)) for r, i in enumerate(order)])
            self._told = []


class _Encoding:
    """A space as the three kinds of variables that CatCMAwM has: real, ordered, unordered."""

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.space = dict(space)
        self.real: list[str] = []
        self.ordered: dict[str, list[Any]] = {}
        self.unordered: dict[str, list[Any]] = {}
        for name, distribution in space.items():
            values = listed(distribution)
            if values is None:
                self.real.append(name)
            elif len(values) > 2 and ascending(values):
                self.ordered[name] = values
            else:
                self.unordered[name] = values

    def optimizer(
        self, population_size: int, seed: int, start: Mapping[str, Any] | None = None
    ) -> CatCMAwM:
        """A fresh CMA-ES; real variables run from 0 to 1, ordered ones count from 0."""
        # It begins in the middle of the space, or around ``start``.
        return CatCMAwM(
            x_space=[[0.0, 1.0]] * len(self.real) or None,
            z_space=[list(range(len(values))) for values in self.ordered.values()] or None,
            c_space=[len(values) for values in self.unordered.values()] or None,
            population_size=population_size,
            seed=seed,
            **({} if start is None else self._around(start)),
        )

    def _around(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """Mean and spread of the first generation around a point."""
        mean = self._vector(start)
        # CatCMAwM's spread is a sixth and a fifth of the way from the middle to an end.
        spread = [1 / 24] * len(self.real) + [(len(v) - 1) / 20 for v in self.ordered.values()]
        chances = self._one_hot(start) / 2
        for row, values in zip(chances, self.unordered.values(), strict=True):
            row[: len(values)] += 0.5 / len(values)
        return {
            "mean": mean if mean.size else None,
            "cov": np.diag(np.square(spread)) if mean.size else None,
            "cat_param": chances if self.unordered else None,
        }

    def _vector(self, params: Mapping[str, Any]) -> Any:
        """Where a point lies among the real and the ordered variables, which come in this order."""
        ranges = [self.space[name] for name in self.real]
        units = [to_unit(d, params[n]) for n, d in zip(self.real, ranges, strict=True)]  # type: ignore[arg-type]
        indices = [values.index(params[name]) for name, values in self.ordered.items()]
        return np.array([*units, *indices], dtype=float)

    def _one_hot(self, params: Mapping[str, Any]) -> Any:
        """(unordered variables, most values of one): 1 for the value that a point has."""
        one_hot = np.zeros((len(self.unordered), max(map(len, self.unordered.values()), default=0)))
        for row, (name, values) in zip(one_hot, self.unordered.items(), strict=True):
            row[values.index(params[name])] = 1
        return one_hot

    def solution(self, params: Mapping[str, Any]) -> CatCMAwM.Solution:
        """The solution that a point is the form of; as if the CMA-ES had drawn it in the space."""
        vector = self._vector(params)
        real, ordered = np.split(vector, [len(self.real)])
        return CatCMAwM.Solution(
            x=real if self.real else None,
            z=ordered if self.ordered else None,
            c=self._one_hot(params).astype(bool) if self.unordered else None,
            _v_raw=vector if vector.size else None,
        )

    def params(self, solution: CatCMAwM.Solution) -> dict[str, Any]:
        """Optuna's form of a solution."""
        params: dict[str, Any] = {}
        for name, unit in zip(self.real, _array(solution.x), strict=True):
            distribution = self.space[name]
            assert isinstance(distribution, (FloatDistribution, IntDistribution))
            params[name] = from_unit(distribution, float(unit))
        for (name, values), index in zip(self.ordered.items(), _array(solution.z), strict=True):
            params[name] = values[int(index)]
        for (name, values), chosen in zip(self.unordered.items(), _array(solution.c), strict=True):
            params[name] = values[int(np.argmax(chosen[: len(values)]))]
        return params


def _array(values: Any) -> Any:
    return () if values is None else values
