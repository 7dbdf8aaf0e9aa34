"""
What a warm start was worth: the trials that it saved against the same search without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna

from pho_service.spec.numbers import number
from pho_service.tuning.plan import Evaluate, RatedCandidate, SearchPlan
from pho_service.tuning.search import run_search
from storage.studies import quiet_optuna


@dataclass(frozen=True, kw_only=True)
class Saving:
    """
    Attributes:
        value: The best of the cold search, by the objective.
        cold: Trials that it took there, baselines included.
        warm: Trials that the warm search took to a value as good; None if it never was.
    """

    value: float
    cold: int
    warm: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        cold = f"the same search without it came to {number(self.value)} after {self.cold} trials"
        if self.warm is None:
            return f"{cold}; the warm one never did"
        saved = self.cold - self.warm
        return f"{cold}, the warm one after {self.warm}: " + (
            f"{saved} saved" if saved >= 0 else f"{-saved} lost"
        )


def measure_saving(
    plan: SearchPlan,
    rated: Sequence[RatedCandidate],
    evaluate: Evaluate,
    advance: Callable[[int], None] = lambda _: None,
) -> Saving:
    """
    Run a search again without its warm start, in memory.

    Args:
        plan: Plan of the warm search.
        rated: Its trials.
        evaluate: What it was rated by.
        advance: Called with the number of trials that became finished.
    """
    with quiet_optuna():
        study = optuna.create_study(direction=plan.direction)
    cold = run_search(study, replace(plan, warm_start=()), evaluate, advance)
    best = cold[0].value
    return Saving(
        value=best,
        cold=trials_until(cold, best, plan.direction) or len(cold),
        warm=trials_until(rated, best, plan.direction),
    )


def trials_until(rated: Sequence[RatedCandidate], goal: float, direction: str) -> int | None:
    """Trials until a value is as good as ``goal``; None if none is."""
    sign = 1 if direction == "minimize" else -1
    numbers = [r.number + 1 for r in rated if sign * r.value <= sign * goal]
    return min(numbers, default=None)
