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

from pho_service.host.faults import faults_told
from pho_service.host.task_names import harness_folder
from pho_service.pipeline.confirmation import Chosen, choose_finalists
from pho_service.pipeline.correction import correct_best
from pho_service.pipeline.deployable import priced
from pho_service.pipeline.known_ratings import KnownRatings
from pho_service.pipeline.objectives import objective_function
from pho_service.pipeline.references import with_perplexities
from pho_service.pipeline.search import finish, of_objective
from pho_service.pipeline.winner import reconstruct_winner
from pho_service.spec.candidate import Candidate
from pho_service.spec.job import JobSpec
from pho_service.spec.steps import Steps
from pho_service.tuning.correction import Correction
from pho_service.tuning.finalists import Measurements, keep
from pho_service.tuning.islands import Islands
from pho_service.tuning.plan import Evaluate, RatedCandidate
from pho_service.tuning.result import SearchResult, describe_study, mark_chosen
from storage.jobs import JobStore
from storage.records import Claim, Job, NewStage
from storage.states import StageKind
from storage.studies import open_storage, open_study, study_name
from workers.board import of_layers, show_result, show_search
from workers.calibrations import calibrate_part, calibrated
from workers.inputs import Inputs
from workers.island_search import IslandSearch
from workers.judges import judged_by, measured_stage, raced, unjudged
from workers.points import finish_points, first_points, point_stage
from workers.pruning import prune_stage
from workers.seal import Seal
from workers.stored import (
    after_perplexity,
    after_search,
    corrected,
    doubts,
    judged,
    measured_before,
    measured_finalist,
    measurements,
    provenance,
    wanted_finalists,
)
from workers.subjects import bundle_of, bundles_of, subject_of
from workers.tasks import after_result, tasks_stage
from workers.transfers import transfer_stage
from workers.warm_start import started, warmed
from workers.watch import Turns, Watch

logger = logging.getLogger(__name__)


class Stages:
    """
    Does stages, one at a time.

    Args:
        store: Store of the jobs.
        inputs: Inputs of this worker.
        stopping: Set when the worker is to stop: the stage is put down.
        turns: How searches share the worker.
    """

    def __init__(
        self, store: JobStore, inputs: Inputs, stopping: threading.Event, turns: Turns
    ) -> None:
        self.store = store
        self.inputs = inputs
        self.stopping = stopping
        self.turns = turns

    def run(self, claim: Claim) -> None:
        """
        Do a stage, and store what it gave.

        Raises:
            HandBack: It was put down; nothing is lost.
            LostClaim: Another worker has it.
            DeviceLost: The GPU failed; another process may do it.
            PhoError: The user can act on it; another attempt does not help.
            Exception: Anything else; another attempt may help.
        """
        with faults_told():
            self._run(claim)

    def _run(self, claim: Claim) -> None:
        watch = Watch(self.store, claim, self.stopping, self.turns)
        of_their_own = {
            StageKind.TRANSFER: transfer_stage,
            StageKind.POINT: point_stage,
            StageKind.TASKS: tasks_stage,
            StageKind.PRUNE: prune_stage,
        }
        if claim.stage.kind in of_their_own:
            of_their_own[claim.stage.kind](self.store, self.inputs, claim, watch)
            return
        run = {
            StageKind.CALIBRATE: self._calibrate,
            StageKind.SEARCH: self._search,
            StageKind.CONFIRM: self._confirm,
            StageKind.PERPLEXITY: self._perplexity,
            StageKind.FINISH: self._finish,
        }[claim.stage.kind]
        run(claim, JobSpec.model_validate(claim.job.spec), watch)

    def _calibrate(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        whole = claim.stage.part_of
        mine = spec.of_model(claim.stage.number if whole is None else whole)
        if whole is not None:
            calibrate_part(self.store, self.inputs, claim, mine, watch)
            return
        began = time.monotonic()
        if mine.tasks is not None and harness_folder() is not None:
            self.inputs.tasks(mine)  # what is not there fails before the search
        # Reads all texts: one that is missing fails before the search.
        found = calibrated(self.store, self.inputs, claim, mine, watch)
        if found is None:
            return
        bundle, seal = found
        self._check_again(mine, seal)
        for pattern in spec.points:
            bundle.choose(spec.plan(0).steps.linears, pattern)
        self.store.complete(
            claim,
            {
                "provenance": bundle.provenance,
                "inputs": seal.to_dict(),
                "seconds": round(time.monotonic() - began, 3),
            },
            then=first_points(spec)
            if spec.several
            else [NewStage(kind=StageKind.SEARCH, number=i) for i in range(spec.islands)],
            spec=warmed(self.store.database, claim.job, spec, bundle.provenance.get("model", {})),
        )

    def _search(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        island = claim.stage.number
        rate = self._rating(claim.job, spec, island, watch)
        search = IslandSearch(self.store, claim, spec, watch)
        with open_storage(self.store.database.studies_url) as storage:
            name = study_name(claim.job.name, island)
            study = open_study(storage, name, direction=spec.plan(island).direction)
            origin, plan = provenance(claim.job), spec.plan(island)
            describe_study(study, spec.request(island), plan, origin)
            known = KnownRatings(study, spec.request(island), plan, [str(origin["key"])])
            rate = known.before(rate)
            show_search(study, spec)
            while True:
                search.run(storage, study, spec.plan(island), rate)
                if spec.objective.name == "perplexity":
                    self._check_again(spec, Seal.of_job(claim.job, 0))
                if self.store.complete(
                    claim,
                    {
                        "trials": search.done,
                        "out_of_time": search.out_of_time,
                        **({"rated_before": known.taken} if known.taken else {}),
                    },
                    then=after_search(claim.job, spec),
                    trials=None if search.out_of_time else spec.trials,
                ):
                    return
                spec = JobSpec.model_validate(self.store.get(claim.job.id).spec)  # extended

    def _rating(self, job: Job, spec: JobSpec, island: int, watch: Watch) -> Evaluate:
        """What the candidates of a search are rated by."""
        objective, plan = spec.request(island).objective, spec.plan(island)
        bundles = bundles_of(self.inputs, job, spec, watch)
        model = text = calibration = None
        if objective.name == "perplexity":
            subject = subject_of(self.inputs, job, spec, plan.steps, bundles[spec.model])
            model, text, calibration = subject.model, subject.text, subject.calibration
        return objective_function(
            objective, plan, bundles, model, text, str(self.inputs.device), calibration
        )

    def _confirm(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        watch.look()
        job = claim.job
        chosen = Chosen(finalists=[], evaluations=0.0)
        correction = self._correction(claim, spec, watch)
        doubt, judges = None, []
        if spec.confirm is not None and spec.objective.name == "perplexity":
            with self._islands(job, spec) as (_, islands):
                rated = islands.ranked()
                judges = unjudged(islands.plan, rated, {r.number for r in rated})
        elif spec.confirm is not None:
            wanted, doubt = wanted_finalists(
                job,
                spec,
                lambda: bundles_of(self.inputs, job, spec, watch),
                str(self.inputs.device),
            )
            with self._islands(job, spec) as (storage, islands):
                before = measured_before(job)
                rated = [*islands.ranked(), *islands.corrections()]
                chosen = choose_finalists(
                    islands,
                    rated,
                    wanted,
                    [r for r in rated if r.number in before],
                    lambda: subject_of(
                        self.inputs,
                        job,
                        spec,
                        islands.plan.steps,
                        bundle_of(self.inputs, job, spec, watch),
                    ),
                    stream=spec.stream,
                    entered=islands.corrected(correction),
                    run=watch.run(self.inputs.device, storage),
                )
                judges = unjudged(islands.plan, rated, {r.number for r in chosen.finalists})
        compared = chosen.divergences
        if compared.by_number:
            self._check_again(spec, Seal.of_job(job, 0))
        self.store.complete(
            claim,
            {
                "finalists": [rated.number for rated in chosen.finalists],
                "divergences": {str(number): d for number, d in compared.by_number.items()},
                "divergence_tokens": compared.tokens,
                **({} if correction is None else {"correction": correction.to_dict()}),
                "evaluations": chosen.evaluations,
                **({"doubt": doubt} if doubt else {}),
            },
            add=[*map(measured_finalist, chosen.finalists), *judges],
            then=[NewStage(kind=StageKind.FINISH)],
        )

    def _correction(self, claim: Claim, spec: JobSpec, watch: Watch) -> Correction | None:
        """What corrections of the best by the proxy come to; None if none are asked for."""
        if not spec.corrections:
            return None
        seal = Seal.of_job(claim.job, 0)
        with self._islands(claim.job, spec) as (storage, islands):
            found = correct_best(
                islands,
                islands.ranked(),
                spec.objective,
                self.inputs.model(spec, seal),
                bundle_of(self.inputs, claim.job, spec, watch),
                self.inputs.calibration_text(spec, seal).calibration,
                run=watch.run(self.inputs.device, storage),
            )
        self._check_again(spec, seal)
        return found

    def _perplexity(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        given = (claim.stage.params or {})["candidate"]
        candidate = given and Candidate.from_dict(given, spec.pruning())
        steps = candidate.steps if candidate else Steps()
        subject = subject_of(
            self.inputs, claim.job, spec, steps, bundle_of(self.inputs, claim.job, spec, watch)
        )
        with self._islands(claim.job, spec) as (_, islands):
            known = raced(claim.stage, islands, subject.text.key)
        with watch.progress("Measuring", len(subject.text.windows)) as advance:
            result = measured_stage(subject, candidate, claim.stage.number, advance, known)
        seal = Seal.of_job(claim.job, 0)
        self._check_again(spec, seal)
        self.store.complete(
            claim,
            {**result, "weights_sha256": seal.weights_sha256},
            then=after_perplexity(claim.job),
        )

    def _finish(self, claim: Claim, spec: JobSpec, watch: Watch) -> None:
        if spec.several:
            finish_points(self.store, claim, spec)
            return
        job = claim.job
        bundles = bundles_of(self.inputs, job, spec, watch)
        searches = [stage.result or {} for stage in job.of_kind(StageKind.SEARCH)]
        out_of_time = any(search["out_of_time"] for search in searches)
        with self._islands(job, spec) as (storage, islands):
            rated = islands.ranked()
            found = self._measurements(job, spec, [*rated, *islands.corrections()])
            correction = corrected(job)
            result = finish(
                spec.request(0),
                islands,
                provenance(job),
                rated,
                found,
                correction=correction,
                out_of_time=out_of_time,
            )
            steps = spec.request(0).steps
            if steps.reconstruction.wanted or steps.gives_up_orders:
                result = self._looked_at_again(
                    claim, spec, watch, result, islands.studies[0], storage
                )
            result = with_perplexities(result, judged_by(job, islands.plan, rated, found))
            configuration = result.configuration
            if out_of_time:
                limit = {"timeout_s": spec.timeout_s, "finished": islands.finished}
                search = {**configuration.search, **limit}
                configuration = configuration.model_copy(update={"search": search})
            layers = of_layers(bundles, configuration.candidate(), str(self.inputs.device))
            measured = found.best_first([*rated, *islands.corrections()])
            for island, study in enumerate(islands.studies):
                here = [(p, r) for p, r in measured if islands.of_island(r.number) == island]
                with self.store.fence(claim, storage):
                    mark_chosen(study, configuration, result.study_name, result.trial)
                    for perplexity, each in here:
                        keep(islands, "perplexity", each, perplexity)
                    show_result(study, spec, configuration)
        warnings = [*result.warnings, *started(spec, configuration)]
        more: dict[str, Any] = {"layers": layers}
        if spec.validation is not None:
            ranks = judged(job, spec, bundles, str(self.inputs.device))
            more["validation"] = {name: asdict(quality) for name, quality in ranks.items()}
            warnings += doubts(job)
        self.store.succeed(
            claim,
            best=configuration.model_dump(mode="json"),
            warnings=warnings,
            result=more,
            then=after_result(spec),
        )

    def _looked_at_again(
        self,
        claim: Claim,
        spec: JobSpec,
        watch: Watch,
        result: SearchResult,
        study: optuna.Study,
        storage: RDBStorage,
    ) -> SearchResult:
        """
        The result with what orders that fold cost it, and with the reconstruction that is asked
        for, if it makes it better.
        """
        steps, subject = spec.request(0).steps, None
        if spec.confirm is not None:
            bundle = bundle_of(self.inputs, claim.job, spec, watch)
            subject = subject_of(self.inputs, claim.job, spec, steps, bundle)

        run = watch.run(self.inputs.device, storage)
        found = result
        if subject is not None:
            found = priced(found, study, subject, run)
        if steps.reconstruction.wanted:
            settings = steps.reconstruction
            found = reconstruct_winner(found, settings, study, subject, run)
        if subject is not None:
            self._check_again(spec, Seal.of_job(claim.job, 0))
        return found

    def _measurements(
        self, job: Job, spec: JobSpec, rated: Sequence[RatedCandidate]
    ) -> Measurements:
        """What was confirmed, and how; and what was compared before."""
        if spec.objective.name != "perplexity":
            return measurements(job, rated)
        text = self.inputs.confirmation_text(spec, Seal.of_job(job, 0))
        return of_objective(rated, text.measured_on())

    @contextmanager
    def _islands(self, job: Job, spec: JobSpec) -> Iterator[tuple[RDBStorage, Islands]]:
        """The studies of a job whose searches are over, and their storage."""
        islands = range(spec.islands)
        with open_storage(self.store.database.studies_url) as storage:
            studies = [
                optuna.load_study(study_name=study_name(job.name, island), storage=storage)
                for island in islands
            ]
            yield storage, Islands(studies, [spec.plan(island) for island in islands])

    def _check_again(self, spec: JobSpec, seal: Seal) -> None:
        """
        Compare the model once more, if its files have changed: they were read all the time.

        Not only a streamed model's: on a CPU, weights in their stored type are the file's own
        pages, and change with it when somebody writes into it.
        """
        self.inputs.model(spec, seal)
