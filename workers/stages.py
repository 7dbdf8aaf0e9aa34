"""
The stages of a job. Each can be done again after a crash, and takes up what is stored.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import optuna
from optuna.storages import RDBStorage
from torch import Tensor

from pho_service.configuration import Confirmation
from pho_service.errors import NumericalError, PhoError
from pho_service.job_spec import JobSpec
from pho_service.jobs.rating import Comparison, comparing_pays, rate_pruned
from pho_service.jobs.search import objective_function
from pho_service.jobs.validate import rate_by_all_proxies
from pho_service.progress import Advance
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.search.result import describe_study, search_result
from pho_service.search.search import (
    Divergences,
    Evaluate,
    Outcome,
    RatedCandidate,
    SearchPlan,
    best_by_divergence,
    finalists,
    measure_once,
    ranked,
    run_search,
)
from pho_service.search.validation import ProxyQuality, qualities, random_candidates, verdict
from pho_service.spec import Candidate, Coefficients, Objective, Scope, Steps
from storage.database import Database
from storage.jobs import Claim, Job, JobStore, NewStage
from storage.states import StageKind
from storage.studies import open_storage, open_study, study_name
from workers.board import confirmed_plot, error_plot, show_result, show_search
from workers.inputs import Inputs

logger = logging.getLogger(__name__)

VALIDATION = 10_000_000  # perplexities of a validation have numbers from here, trials below
LOOK_EVERY_S = 1.0  # between two looks at whether the job may go on


class HandBack(Exception):
    """The stage is put down unfinished: its job may not work now, or the worker stops."""


class TrialsFailed(PhoError):
    """
    More trials failed than the job allows.

    Attributes:
        candidate: That failed last: method and coefficients.
    """

    def __init__(self, message: str, *, candidate: Candidate) -> None:
        super().__init__(message)
        self.candidate = _written(candidate)


class _TimeIsUp(Exception):
    """A search has used up its time; what it has found so far counts."""


class Stages:
    """
    Does stages, one at a time.

    Args:
        store: Of the jobs.
        inputs: Of this worker.
        stopping: Set when the worker is to stop: the stage is put down.
    """

    def __init__(self, store: JobStore, inputs: Inputs, stopping: threading.Event) -> None:
        self.store = store
        self.inputs = inputs
        self.stopping = stopping

    def run(self, claim: Claim) -> None:
        """
        Do a stage, and store what it gave.

        Raises:
            HandBack: It was put down; nothing is lost.
            LostClaim: Another worker has it.
            PhoError: The user can act on it; another attempt does not help.
            Exception: Anything else; another attempt may help.
        """
        run = {
            StageKind.CALIBRATE: self._calibrate,
            StageKind.SEARCH: self._search,
            StageKind.CONFIRM: self._confirm,
            StageKind.PERPLEXITY: self._perplexity,
            StageKind.FINISH: self._finish,
        }[claim.stage.kind]
        run(claim, JobSpec.model_validate(claim.job.spec), _Watch(self.store, claim, self.stopping))

    @property
    def _database(self) -> Database:
        return self.store.database

    def _calibrate(self, claim: Claim, spec: JobSpec, watch: "_Watch") -> None:
        bundle = self.inputs.calibrate(spec, watch.progress)
        for layer in bundle.layers:
            spec.pruning().check_width(layer.in_features, layer.name)
        if spec.confirm is not None:
            self.inputs.confirmation_text(spec)  # fails now rather than after the search
        islands = [NewStage(kind=StageKind.SEARCH, number=i) for i in range(spec.islands)]
        self.store.complete(claim, {"provenance": bundle.provenance}, add=islands)

    def _search(self, claim: Claim, spec: JobSpec, watch: "_Watch") -> None:
        island = claim.stage.number
        bundle = self._bundle(claim.job, spec, watch)
        model = text = calibration = None
        if spec.objective.name == "perplexity":
            model, text = self.inputs.model(spec), self.inputs.confirmation_text(spec)
            calibration = self._calibration(spec, spec.plan(island).steps)
        rate = objective_function(
            spec.request(island).objective,
            bundle,
            model,
            text,
            str(self.inputs.device),
            calibration,
        )
        search = _Search(self.store, claim, spec, watch)
        with open_storage(self._database.studies_url) as storage:
            name = study_name(claim.job.name, island)
            study = open_study(storage, name, direction=spec.plan(island).direction)
            describe_study(study, spec.request(island), spec.plan(island), bundle.provenance)
            show_search(study, spec)
            while True:
                search.run(storage, study, spec.plan(island), rate)
                if self.store.complete(
                    claim,
                    {"trials": search.done, "out_of_time": search.out_of_time},
                    then=[NewStage(kind=StageKind.CONFIRM)],
                    trials=None if search.out_of_time else spec.trials,
                ):
                    return
                spec = JobSpec.model_validate(self.store.get(claim.job.id).spec)  # extended

    def _confirm(self, claim: Claim, spec: JobSpec, watch: "_Watch") -> None:
        watch.look()
        chosen: list[RatedCandidate] = []
        compared = Divergences()
        if spec.confirm is not None and spec.objective.name != "perplexity":
            chosen = finalists(self._rated(claim.job, spec), spec.confirm.candidates)
            compared = self._compared(claim, spec, watch, chosen)
        if compared.by_number:
            chosen = best_by_divergence(chosen, compared.by_number)
        self.store.complete(
            claim,
            {
                "finalists": [rated.number for rated in chosen],
                "divergences": {str(number): d for number, d in compared.by_number.items()},
                "divergence_tokens": compared.tokens,
            },
            add=[
                *(_measurement(rated.number, rated.candidate) for rated in chosen),
                *(_measurement(VALIDATION + i, c) for i, c in enumerate(_random(spec))),
            ],
            then=[NewStage(kind=StageKind.FINISH)],
        )

    def _compared(
        self, claim: Claim, spec: JobSpec, watch: "_Watch", chosen: Sequence[RatedCandidate]
    ) -> Divergences:
        """
        How far candidates are from the dense model; nothing where that saves no perplexity.

        Each is kept in the study of its island at once, so another attempt goes on.
        """
        if not comparing_pays([c.candidate for c in chosen], stream=spec.stream):
            return Divergences()
        model, text = self.inputs.model(spec), self.inputs.confirmation_text(spec)
        bundle = self._bundle(claim.job, spec, watch)
        divergences = {}
        with (
            open_storage(self._database.studies_url) as storage,
            watch.progress("Comparing with the dense model", len(chosen)) as advance,
        ):
            studies = [
                optuna.load_study(study_name=study_name(claim.job.name, island), storage=storage)
                for island in range(spec.islands)
            ]
            compare = Comparison(model, bundle.statistics(), text, advance)
            for rated in chosen:
                watch.look()
                number, island = divmod(rated.number, spec.islands)
                try:
                    divergences[rated.number] = measure_once(
                        studies[island],
                        "divergence",
                        number,
                        rated.candidate,
                        compare,
                        text_sha256=compare.key,
                        fence=lambda: self.store.fence(claim, storage),
                    )
                except NumericalError as error:
                    failed = _written(rated.candidate)
                    raise NumericalError(str(error), layer=error.layer, candidate=failed) from error
        return Divergences(by_number=divergences, tokens=compare.tokens)

    def _perplexity(self, claim: Claim, spec: JobSpec, watch: "_Watch") -> None:
        written = (claim.stage.params or {})["candidate"]
        candidate = Candidate(
            method=written["method"],
            coefficients=Coefficients(**written["coefficients"]),
            pattern=spec.pruning().within(Scope(written["scope"])),
            steps=Steps.from_dict(written.get("steps", {})),
        )
        model = self.inputs.model(spec)
        text = self.inputs.confirmation_text(spec)
        calibration = self._calibration(spec, candidate.steps)
        bundle = self._bundle(claim.job, spec, watch)
        started = time.monotonic()
        with watch.progress("Measuring", len(text.windows)) as advance:
            rating, sparsity = rate_pruned(
                model,
                bundle.statistics(),
                candidate,
                text.windows,
                advance,
                calibration=calibration,
            )
        result = {
            "perplexity": rating.perplexity,
            "sparsity": sparsity,
            "seconds": round(time.monotonic() - started, 3),
            "measured_on": text.measured_on(),
            "text_sha256": text.key,
        }
        self.store.complete(claim, result, then=[NewStage(kind=StageKind.FINISH)])

    def _finish(self, claim: Claim, spec: JobSpec, watch: "_Watch") -> None:
        job = claim.job
        rated = self._rated(job, spec)
        measured, confirmation, compared = self._measured(job, spec, rated)
        searches = [s.result or {} for s in job.of_kind(StageKind.SEARCH)]
        finished = sum(int(s["trials"]) for s in searches)
        out_of_time = any(s["out_of_time"] for s in searches)
        ended = finished < spec.trials * spec.islands and not out_of_time
        result = search_result(
            spec.request(0),
            spec.plan(0),
            _provenance(job),
            study_name(job.name, 0),
            rated,
            measured,
            confirmation,
            compared,
            ended_after=finished if ended else None,
        )
        configuration = result.configuration
        if spec.islands > 1:
            winner = measured[0][1] if measured else rated[0]
            island = winner.number % spec.islands
            configuration = configuration.model_copy(
                update={
                    "search": {
                        **configuration.search,
                        "islands": spec.islands,
                        "island": island,
                        "study": study_name(job.name, island),
                    }
                }
            )
        if out_of_time:
            search = {**configuration.search, "timeout_s": spec.timeout_s, "finished": finished}
            configuration = configuration.model_copy(update={"search": search})
        bundle = self._bundle(job, spec, watch)
        evaluator = ProxyEvaluator(bundle, str(self.inputs.device))
        errors = error_plot(evaluator.layer_errors(configuration.candidate()))
        with open_storage(self._database.studies_url) as storage:
            for island in range(spec.islands):
                study = optuna.load_study(study_name=study_name(job.name, island), storage=storage)
                here = [(p, r) for p, r in measured if r.number % spec.islands == island]
                plots = {"errors": errors, "confirmed": confirmed_plot(configuration, here)}
                with self.store.fence(claim, storage):
                    show_result(study, spec, configuration, here, plots)
        warnings, found = result.warnings, {}
        if spec.validation is not None:
            judged = self._validated(job, spec, bundle)
            found = {"validation": {name: asdict(q) for name, q in judged.items()}}
            doubt = verdict(Objective().label, judged[Objective().label])
            warnings = [*warnings, *([doubt] if doubt else [])]
        self.store.succeed(
            claim, best=configuration.model_dump(mode="json"), warnings=warnings, result=found
        )

    def _validated(self, job: Job, spec: JobSpec, bundle: ProxyBundle) -> dict[str, ProxyQuality]:
        """How well each proxy ranks the random candidates."""
        assert spec.validation is not None
        measured = {s.number: s.result for s in job.of_kind(StageKind.PERPLEXITY) if s.result}
        candidates = _random(spec)
        perplexities = [
            float(measured[VALIDATION + i]["perplexity"]) for i in range(len(candidates))
        ]
        proxies = rate_by_all_proxies(bundle, candidates, device=str(self.inputs.device))
        return qualities(proxies, perplexities, seed=spec.validation.seed)

    def _calibration(self, spec: JobSpec, steps: Steps) -> Tensor | None:
        """The windows of the calibration, for steps that need them."""
        needed = steps.needs_text or spec.stream
        return self.inputs.calibration_text(spec).calibration if needed else None

    def _bundle(self, job: Job, spec: JobSpec, watch: "_Watch") -> ProxyBundle:
        return self.inputs.bundle(spec, str(_provenance(job)["key"]), watch.progress)

    def _rated(self, job: Job, spec: JobSpec) -> list[RatedCandidate]:
        """
        The trials of all islands, best first, with numbers that are theirs alone.

        The baselines are the same in each island: only those of the first count.
        """
        rated = []
        with open_storage(self._database.studies_url) as storage:
            for island in range(spec.islands):
                study = optuna.load_study(study_name=study_name(job.name, island), storage=storage)
                rated += [
                    RatedCandidate(
                        number=r.number * spec.islands + island,
                        candidate=r.candidate,
                        params=r.params,
                        value=r.value,
                    )
                    for r in ranked(study, spec.plan(island))
                    if island == 0 or r.candidate.method == "crepe"
                ]
        sign = 1 if spec.plan(0).direction == "minimize" else -1
        return sorted(rated, key=lambda r: (sign * r.value, r.number))

    def _measured(
        self, job: Job, spec: JobSpec, rated: Sequence[RatedCandidate]
    ) -> tuple[list[tuple[float, RatedCandidate]], Confirmation | None, Divergences]:
        """What was confirmed, best first, and how; and what was compared before."""
        if spec.objective.name == "perplexity":
            text = self.inputs.confirmation_text(spec)
            measured = [(r.value, r) for r in rated]
            how = Confirmation(perplexity=rated[0].value, **text.measured_on())
            return measured, how, Divergences()
        stages = {s.number: s.result for s in job.of_kind(StageKind.PERPLEXITY) if s.result}
        (planned,) = (s.result or {} for s in job.of_kind(StageKind.CONFIRM))
        compared = Divergences(
            by_number={int(n): float(d) for n, d in planned.get("divergences", {}).items()},
            tokens=planned.get("divergence_tokens"),
        )
        chosen = set(planned.get("finalists", ()))
        measured = [(float(stages[r.number]["perplexity"]), r) for r in rated if r.number in chosen]
        measured.sort(key=lambda pair: pair[0])
        if not measured:
            return [], None, compared
        measured_on = {
            **stages[measured[0][1].number]["measured_on"],
            "divergence_tokens": compared.tokens,
        }
        return measured, Confirmation(perplexity=measured[0][0], **measured_on), compared


def _random(spec: JobSpec) -> list[Candidate]:
    """The candidates of a validation; none if it was not asked for."""
    if spec.validation is None:
        return []
    plan = spec.plan(0)
    return random_candidates(
        plan.space, plan.pattern, count=spec.validation.candidates, seed=spec.validation.seed
    )


def _measurement(number: int, candidate: Candidate) -> NewStage:
    """A stage that measures the perplexity of a candidate."""
    params = {"candidate": _written(candidate)}
    return NewStage(kind=StageKind.PERPLEXITY, number=number, params=params)


def _written(candidate: Candidate) -> dict[str, Any]:
    """A candidate of a job as JSON values."""
    return {
        "method": candidate.method,
        "coefficients": candidate.coefficients.to_dict(),
        "scope": candidate.pattern.scope.value,
        "steps": candidate.steps.to_dict(),
    }


def _provenance(job: Job) -> dict[str, Any]:
    """What the calibration wrote down."""
    (calibrated,) = job.of_kind(StageKind.CALIBRATE)
    provenance: dict[str, Any] = (calibrated.result or {})["provenance"]
    return provenance


class _Watch:
    """Looks now and then whether a stage may go on."""

    def __init__(self, store: JobStore, claim: Claim, stopping: threading.Event) -> None:
        self._store = store
        self._claim = claim
        self._stopping = stopping
        self._looked = time.monotonic()

    def look(self, *, now: bool = False) -> None:
        """Raise HandBack if it may not."""
        if self._stopping.is_set():
            raise HandBack
        if now or time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            if not self._store.watch(self._claim).may_work:
                raise HandBack

    @contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Advance]:
        """For long work: each step looks."""
        logger.info("%s", title, extra={"job": str(self._claim.job.id), "steps": steps})
        yield lambda _: self.look()


class _Search:
    """One island's search, watched and counted."""

    def __init__(self, store: JobStore, claim: Claim, spec: JobSpec, watch: _Watch) -> None:
        self._store = store
        self._claim = claim
        self._spec = spec
        self._watch = watch
        self._began = time.monotonic()
        self._best = claim.stage.best_value
        self._failed = 0
        self._fresh = False
        self.done = 0
        self.out_of_time = False

    @property
    def _elapsed_s(self) -> float:
        return self._claim.stage.elapsed_s + time.monotonic() - self._began

    def run(
        self, storage: RDBStorage, study: optuna.Study, plan: SearchPlan, rate: Evaluate
    ) -> None:
        """Bring the study to the plan's trials, or to the end of the time."""
        self.done = 0
        self._failed = sum(
            t.state is optuna.trial.TrialState.FAIL for t in study.get_trials(deepcopy=False)
        )
        try:
            run_search(
                study,
                plan,
                self._evaluate(plan, rate),
                self._advance,
                fence=lambda: self._store.fence(self._claim, storage),
            )
        except _TimeIsUp:
            self.out_of_time = True

    def _evaluate(self, plan: SearchPlan, rate: Evaluate) -> Evaluate:
        better = min if plan.direction == "minimize" else max

        def evaluate(candidates: Sequence[Candidate]) -> list[Outcome]:
            # Proxies rate a generation at once, in milliseconds; a perplexity takes seconds.
            slow = self._spec.objective.name == "perplexity"
            outcomes = []
            for some in [[each] for each in candidates] if slow else [candidates]:
                self._watch.look()
                limit = self._spec.timeout_s
                if limit is not None and self.done and self._elapsed_s > limit:
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
            last = failed[-1]
            raise TrialsFailed(
                f"{self._failed} trials failed, more than max_failed_trials="
                f"{self._spec.max_failed_trials}. The last: {outcomes[last].failure}",
                candidate=candidates[last],
            )

    def _advance(self, count: int) -> None:
        self.done += count
        if not self._fresh:  # a trial of an earlier attempt
            return
        self._fresh = False
        state = self._store.progress(
            self._claim, done=self.done, elapsed_s=self._elapsed_s, best_value=self._best
        )
        if not state.may_work:
            raise HandBack
