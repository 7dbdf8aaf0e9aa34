"""
Ratings that another search has made of the same candidates.

A proxy rates score and allocation. Searches that differ in other steps alone, as those of
``crepe-plus`` and ``best`` may, ask for the same candidates with the same values. The second one
takes them from the study of the first, and only its finalists are measured again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import optuna

from pho_service.spec.candidate import Candidate
from pho_service.tuning.finalists import What
from pho_service.tuning.plan import CORRECTS, Evaluate, Outcome, SearchPlan
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.result import CHOSEN
from storage.studies import keep_record, marked_alike, record_of

_MARK = "ratings_sha256"  # record of a study: what the values of its trials depend on
_NOTED = (*get_args(What), CHOSEN)  # what may be noted of a trial later
_STUDIES = 3  # most that are read, the newest first


class KnownRatings:
    """
    What other studies of the same storage hold; a search by perplexity, or in memory, has none.

    Args:
        study: Study of the search. It is marked, for the next one to find.
        request: What is asked.
        plan: Plan of the search.
        bundles: The keys of what it rates on.

    Attributes:
        taken: How many ratings were taken.
    """

    def __init__(
        self,
        study: optuna.Study,
        request: SearchRequest,
        plan: SearchPlan,
        bundles: Sequence[str],
    ) -> None:
        self.taken = 0
        self._known: dict[str, Outcome] = {}
        if request.objective.name == "perplexity":
            return  # which depends on all steps
        mark = _mark(request, plan, bundles)
        for name in reversed(marked_alike(study, _MARK, mark)[-_STUDIES:]):
            if len(study.get_trials(deepcopy=False)) < plan.trials:
                self._read(optuna.load_study(study_name=name, storage=study._storage), plan)
        if _MARK not in record_of(study):
            keep_record(study, _MARK, mark)

    def before(self, evaluate: Evaluate) -> Evaluate:
        """A function that asks ``evaluate`` for what is not known, and for nothing else."""
        if not self._known:
            return evaluate

        def rate(candidates: Sequence[Candidate]) -> list[Outcome]:
            found = [self._known.get(_key(candidate)) for candidate in candidates]
            missing = [c for c, known in zip(candidates, found, strict=True) if known is None]
            rated = iter(evaluate(missing) if missing else [])
            self.taken += len(candidates) - len(missing)
            return [next(rated) if known is None else known for known in found]

        return rate

    def _read(self, other: optuna.Study, plan: SearchPlan) -> None:
        for trial in other.get_trials(deepcopy=False):
            if trial.value is None or not {"method", "coefficients"} <= trial.user_attrs.keys():
                continue
            if CORRECTS in trial.user_attrs:
                continue  # not of a search
            candidate = Candidate.from_dict(trial.user_attrs, plan.pattern)
            own = {*candidate.to_dict(), *_NOTED}
            attributes = {n: value for n, value in trial.user_attrs.items() if n not in own}
            self._known.setdefault(
                _key(candidate), Outcome(value=trial.value, attributes=attributes)
            )


def _mark(request: SearchRequest, plan: SearchPlan, bundles: Sequence[str]) -> str:
    """A hash of all that a rating depends on, the candidate aside."""
    parts = [
        [*bundles], str(plan.pattern), plan.pattern.scope, request.objective.label,
        plan.steps.rated.linears.to_dict(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(candidate: Candidate) -> str:
    """Return what a proxy sees of a candidate."""
    return json.dumps(replace(candidate, steps=candidate.steps.rated).to_dict(), sort_keys=True)
