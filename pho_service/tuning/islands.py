"""
The studies of one search: one of the command line's, several of a job with islands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna

from pho_service.tuning.correction import Correction
from pho_service.tuning.plan import CORRECTS, RatedCandidate, SearchPlan
from pho_service.tuning.search import ranked, rated_trials, searched


@dataclass(frozen=True)
class Islands:
    """
    The studies of one search, whose trials have numbers of their own among all of them.

    Trial 3 of the second of four islands is number 3 * 4 + 1. With one study the numbers are its.

    Attributes:
        studies: Studies of each island.
        plans: Plans of each island; they differ in their seeds.
    """

    studies: Sequence[optuna.Study]
    plans: Sequence[SearchPlan]

    @property
    def plan(self) -> SearchPlan:
        """The plan of the first, whose seed is the one that was asked for."""
        return self.plans[0]

    def ranked(self) -> list[RatedCandidate]:
        """
        The finished trials of all islands, best first; equal values by number.

        The baselines are the same in each island: only those of the first count.

        Raises:
            StudyError: All trials of an island failed.
        """
        rated = [
            replace(each, number=each.number * len(self.studies) + island)
            for island, (study, plan) in enumerate(zip(self.studies, self.plans, strict=True))
            for each in ranked(study, plan)
            if island == 0 or each.candidate.method == "crepe"
        ]
        sign = 1 if self.plan.direction == "minimize" else -1
        return sorted(rated, key=lambda r: (sign * r.value, r.number))

    def corrected(self, correction: Correction | None) -> list[RatedCandidate]:
        """The candidate that a correction found; none if it found none."""
        number = None if correction is None else correction.trial
        return [each for each in self.corrections() if each.number == number]

    def corrections(self) -> list[RatedCandidate]:
        """The corrected candidates of all islands, by island and number."""
        return [
            replace(each, number=each.number * len(self.studies) + island)
            for island, (study, plan) in enumerate(zip(self.studies, self.plans, strict=True))
            for each in rated_trials(
                [t for t in study.get_trials(deepcopy=False) if CORRECTS in t.user_attrs], plan
            )
        ]

    def place(self, number: int) -> tuple[optuna.Study, int]:
        """The study that a trial is in, and its number there."""
        there, island = divmod(number, len(self.studies))
        return self.studies[island], there

    def of_island(self, number: int) -> int:
        """The island that a trial is in, from 0."""
        return number % len(self.studies)

    def attributes(self, number: int) -> Mapping[str, Any]:
        """The user attributes of a trial."""
        study, there = self.place(number)
        (trial,) = (t for t in study.get_trials(deepcopy=False) if t.number == there)
        attributes: Mapping[str, Any] = trial.user_attrs
        return attributes

    @property
    def finished(self) -> int:
        """How many trials were rated, the baselines in each island."""
        return sum(
            len(searched(study, plan)) for study, plan in zip(self.studies, self.plans, strict=True)
        )

    @property
    def asked(self) -> int:
        """How many trials the plans ask for."""
        return sum(plan.trials for plan in self.plans)
