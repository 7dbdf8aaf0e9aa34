"""
The search of one island: watched, counted, and ended by the limits of its job.
"""

import time
from collections.abc import Sequence

import optuna

from pho_service.errors import PhoError
from pho_service.progress import Fence
from pho_service.spec.candidate import Candidate
from pho_service.spec.job import JobSpec
from pho_service.tuning.plan import Evaluate, Outcome, SearchPlan
from pho_service.tuning.search import run_search
from storage.jobs import JobStore
from storage.records import Claim
from workers.board import show_search
from workers.watch import HandBack, Watch


class TrialsFailed(PhoError):
    """
    More trials failed than the job allows.

    Attributes:
        candidate: That failed last: method and coefficients.
    """

    def __init__(self, message: str, *, candidate: Candidate) -> None:
        super().__init__(message)
        self.candidate = candidate.to_dict()


class _TimeIsUp(Exception):
    """A search has used up its time; what it has found so far counts."""


class IslandSearch:
    """The search of one island, or of one of several patterns: watched and counted."""

    def __init__(
        self, store: JobStore, claim: Claim, spec: JobSpec, watch: Watch, fence: Fence
    ) -> None:
        self._store, self._claim, self._spec, self._watch = store, claim, spec, watch
        self._fence = fence
        self._began = time.monotonic()
        self._best = claim.stage.best_value
        self._failed = self._done = 0
        self._fresh = False

    @property
    def _elapsed_s(self) -> float:
        return self._claim.stage.elapsed_s + time.monotonic() - self._began

    def __call__(self, study: optuna.Study, plan: SearchPlan, rate: Evaluate) -> bool:
        """Bring the study to the plan's trials; True if its time was up before."""
        show_search(study, self._spec)
        self._done = 0
        self._failed = sum(
            t.state is optuna.trial.TrialState.FAIL for t in study.get_trials(deepcopy=False)
        )
        evaluate = self._evaluate(plan, rate)
        try:
            run_search(study, plan, evaluate, self._advance, fence=self._fence)
        except _TimeIsUp:
            return True
        return False

    def _evaluate(self, plan: SearchPlan, rate: Evaluate) -> Evaluate:
        better = min if plan.direction == "minimize" else max

        def evaluate(candidates: Sequence[Candidate]) -> list[Outcome]:
            # Proxies rate a generation at once, in milliseconds; a perplexity takes seconds.
            slow = self._spec.objective.name == "perplexity"
            outcomes = []
            for some in [[each] for each in candidates] if slow else [candidates]:
                self._watch.look()
                limit = self._spec.timeout_s
                if limit is not None and self._done and self._elapsed_s > limit:
                    raise _TimeIsUp
                outcomes += rate(some)
            values = [o.value for o in outcomes if o.value is not None]
            known = [] if self._best is None else [self._best]
            self._best = better([*known, *values], default=None)
            self._check_failures(candidates, outcomes)
            self._fresh = True
            return outcomes

        return evaluate

    def _check_failures(self, candidates: Sequence[Candidate], outcomes: Sequence[Outcome]) -> None:
        failed = [i for i, outcome in enumerate(outcomes) if outcome.value is None]
        self._failed += len(failed)
        if failed and self._failed > self._spec.max_failed_trials:
            last, about = failed[-1], self._claim.stage.about
            at = "" if about is None else f" at {about}"
            raise TrialsFailed(
                f"{self._failed} trials{at} failed, more than max_failed_trials="
                f"{self._spec.max_failed_trials}. The last: {outcomes[last].failure}",
                candidate=candidates[last],
            )

    def _advance(self, count: int) -> None:
        self._done += count
        if not self._fresh:  # a trial of an earlier attempt
            return
        self._fresh = False
        state = self._store.progress(
            self._claim, done=self._done, elapsed_s=self._elapsed_s, best_value=self._best
        )
        if not state.may_work:
            raise HandBack
        self._watch.look_for_others()
