"""
Hill climbing: what people do by hand, one step and one rating at a time.

It is here to be compared with: `--objective perplexity --sampler hill-climb`
is how coefficients are searched without a proxy.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from pho_service.tuning.distributions import fixed, from_unit, listed, searchable, to_unit

# Parts of a range. Fractions, so that a step back leads exactly to where the climb came from.
FIRST_STEP = Fraction(1, 4)
LAST_STEP = Fraction(1, 32)

Params = dict[str, Any]
Key = tuple[tuple[str, Any], ...]


class HillClimbSampler(BaseSampler):
    """
    Coordinate steps of a shrinking size, from a given point until none is better.

    The climb stands at its best point. It tries a step up and a step down along
    each coordinate in turn, cut off at the ends of the range; the first that is
    better is taken, and tried once more. When every one of them has failed since
    the last success, the step is halved, from :data:`FIRST_STEP` of the range to
    :data:`LAST_STEP`; then the climb is over. For listed values (kernel sizes)
    the neighbours in the list are tried, whatever the step.

    Nothing is drawn at random, and the study's trials are all that it knows:
    each time, the climb is walked again from its start to the first point that
    has no value yet. So no point is rated twice, and a climb goes on in another
    process. A failed trial is worse than any value. Equal is not better.

    Optuna gives a sampler no way to end a study from outside of ``optimize``.
    Whoever asks must look at :meth:`is_exhausted`; asked on, a climb that is
    over gives its best point again.

    Args:
        seed: Seed of values outside of the climb's space, which are drawn at random.
        search_space: The space from the first trial on. Without it, the space
            is what all finished trials have in common, and the first trial is
            drawn at random.
        start: Where the climb begins: values by name, each outside of its range
            moved to the nearer end. What is missing begins in the middle, or at
            the first of a list.
        effective: The part of a point that makes a difference. Points that
            agree in it are one and the same, and are rated once.
    """

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
        """Whether the climb is over: no step is better than the best point."""
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

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a value outside of the climb's space at random."""
        self._raise_error_if_multi_objective(study)
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _space(self, study: optuna.Study) -> dict[str, BaseDistribution]:
        if self._given_space is not None:
            return self._given_space
        return searchable(self._intersection.calculate(study))

    def _key(self, params: Mapping[str, Any]) -> Key:
        """The same for points that are the same candidate."""
        return tuple(sorted(self._effective({**self._fixed, **params}).items()))

    def _losses(self, study: optuna.Study, names: Mapping[str, Any]) -> dict[Key, float]:
        """What is known of each point: low is good, a failure infinite."""
        sign = -1 if study.direction is optuna.study.StudyDirection.MAXIMIZE else 1
        losses: dict[Key, float] = {}
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and names.keys() <= trial.params.keys():
                value = trial.value if trial.state is TrialState.COMPLETE else None
                loss = math.inf if value is None else sign * value
                key = self._key({name: trial.params[name] for name in names})
                losses[key] = min(loss, losses.get(key, loss))
        return losses

    def _walk(self, study: optuna.Study, space: Mapping[str, BaseDistribution]) -> "_Place":
        """Climb over the known points, up to the first that is not."""
        losses = self._losses(study, space)
        axes = [_Axis(name, distribution) for name, distribution in space.items()]
        place = {axis.name: axis.position(self._start.get(axis.name)) for axis in axes}

        def params(place: Mapping[str, Fraction]) -> Params:
            return {axis.name: axis.value(place[axis.name]) for axis in axes}

        best = losses.get(self._key(params(place)))
        if best is None:
            return _Place(params=params(place), is_over=False)
        moves = [(axis, direction) for axis in axes for direction in (1, -1)]
        step, turn, failures = FIRST_STEP, 0, 0
        while moves and step >= LAST_STEP:
            axis, direction = moves[turn]
            there = {**place, axis.name: axis.moved(place[axis.name], direction * step)}
            loss = losses.get(self._key(params(there)))
            if loss is None:
                return _Place(params=params(there), is_over=False)
            if loss < best:
                place, best, failures = there, loss, 0
                continue
            turn, failures = (turn + 1) % len(moves), failures + 1
            if failures == len(moves):
                step, failures = step / 2, 0
        return _Place(params=params(place), is_over=True)


@dataclass(frozen=True)
class _Place:
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
        """At a position."""
        if self._values is not None:
            return self._values[int(position)]
        return from_unit(self._range, float(position))

    def moved(self, position: Fraction, step: Fraction) -> Fraction:
        """A step further, at most to the end; in a list to the neighbour."""
        if self._values is not None:
            step = Fraction(1 if step > 0 else -1)
        return min(max(position + step, Fraction(0)), self._end)
