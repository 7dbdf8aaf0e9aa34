"""
What a job is, in a service: a function that is run from the top by whoever has one of its pieces.

What other workers have done is read; the worker's own piece is done; what is not done yet is put
into the queue, and the function ends there. With the last piece it comes to its own end.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import optuna
from optuna.storages import RDBStorage
from pydantic import TypeAdapter

from pho_service.errors import DeviceLost, PhoError
from pho_service.host.machine import faults_told
from pho_service.pipeline.curve import (
    DENSE_MEASURED,
    CurvePoint,
    CurvePoints,
    find_points,
    point_warnings,
    target_found,
)
from pho_service.pipeline.minutes import Clock, Rest
from pho_service.pipeline.search import (
    IslandsAsked,
    Journal,
    Piece,
    conduct,
    conduct_pieces,
    origin_of,
)
from pho_service.planning.minutes import sentence
from pho_service.progress import Run
from pho_service.spec.calibration import SHARDS
from pho_service.spec.job import JobSpec
from pho_service.spec.minutes import AFTER_CALIBRATION
from pho_service.spec.results import (
    Calibration,
    Finished,
    Gathered,
    StoredModel,
    TasksMeasured,
    Transfer,
)
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.result import SearchResult
from pho_service.tuning.search import pareto_study
from storage.claims import JobResult, LibraryAddition
from storage.jobs import JobStore
from storage.records import (
    RESTING,
    SIZING,
    Claim,
    LostClaim,
    NewStage,
    StageKind,
    StageState,
)
from storage.studies import kept, open_storage, open_study, pareto_study_name, study_name
from workers.inputs import WorkerInputs
from workers.pieces import (
    DENSE,
    PARTS,
    PRUNED,
    WHOLES,
    IslandSearch,
    calibrate_piece,
    check_report,
    check_tasks,
    failed,
    gather_shard,
    of_layers,
    prune_piece,
    remove_if_deleted,
    rest_piece,
    shards_of,
    show_curve,
    show_result,
    started,
    tasks_piece,
    transfer_piece,
    warmed,
)
from workers.watch import Turns, Watch
from workers.work import SealedWork

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Later(Exception):
    """The job goes on once other pieces are done; those that nobody knows of yet are new."""

    def __init__(self, new: Sequence[NewStage]) -> None:
        super().__init__(new)
        self.new = new


class StoredJournal(Journal):
    """Reads what the stages of a job hold. Does the piece of one of them, and no other."""

    def __init__(self, claim: Claim, run: Run) -> None:
        super().__init__(run)
        self.claim = claim
        self.result: dict[str, Any] | None = None
        self.job_result: JobResult | None = None
        self.library: list[LibraryAddition] = []
        self.spec: Mapping[str, Any] | None = None

    def each(
        self,
        name: str,
        pieces: Sequence[Piece],
        do: Callable[[Piece, Run], T],
        kind: type[T],
        *,
        title: str | None = None,
    ) -> list[T]:
        del title
        values: TypeAdapter[T] = TypeAdapter(kind)
        stages = self.claim.job.stages
        stage_by_number = {stage.number: stage for stage in stages if stage.kind == name}
        results: list[T] = []
        new: list[NewStage] = []
        for piece in pieces:
            stage = stage_by_number.get(piece.number)
            if stage is None:
                new.append(
                    NewStage(
                        kind=StageKind(name), number=piece.number, params=piece.about,
                        lock=piece.lock,
                    )
                )  # fmt: skip
            elif stage.id == self.claim.stage.id:
                if self.result is None:
                    self.result = values.dump_python(do(piece, self.run), mode="json")
                results.append(values.validate_python(self.result))
            elif stage.state is StageState.DONE:
                results.append(values.validate_python(stage.result))
        if len(results) < len(pieces):
            raise Later(new)
        return results


class Conductor:
    """Does stages, one at a time."""

    def __init__(
        self, store: JobStore, inputs: WorkerInputs, stopping: threading.Event, turns: Turns
    ) -> None:
        self.store, self.inputs = store, inputs
        self.stopping, self.turns = stopping, turns

    def run(self, claim: Claim) -> None:
        """Do a stage, and store what it gave and what follows."""
        self.turns.begin(claim.job)
        watch = Watch(self.store, claim, self.stopping, self.turns)
        with faults_told(), ExitStack() as stack:
            job = _Job(self.store, self.inputs, claim, watch, stack)
            while True:
                try:
                    job.conduct()
                except Later as later:
                    done = job.complete(then=later.new)
                else:
                    done = job.complete(ended=True)
                if done:
                    return
                job.read_again()


class _Job:
    """One job, with one of its stages claimed."""

    _work: SealedWork  # once it is calibrated

    def __init__(
        self,
        store: JobStore,
        inputs: WorkerInputs,
        claim: Claim,
        watch: Watch,
        stack: ExitStack,
    ) -> None:
        self._store, self._inputs, self._watch, self._stack = store, inputs, watch, stack
        self._began = time.monotonic()
        run = Run(
            device=str(inputs.device),
            progress=watch.progress,
            look=watch.look_between,
            gives_way=watch.gives_way,
            fence=self._fence,
        )
        self._journal = StoredJournal(claim, run)

    @property
    def _claim(self) -> Claim:
        return self._journal.claim

    @cached_property
    def _storage(self) -> RDBStorage:
        """The studies, opened when they are needed."""
        return self._stack.enter_context(open_storage(self._store.database.studies_url))

    def _fence(self) -> AbstractContextManager[None]:
        return self._store.fence(self._claim, self._storage)

    def read_again(self) -> None:
        """See what others have done meanwhile; a search that was extended goes on."""
        before, job = self._claim, self._store.get(self._claim.job.id)
        (stage,) = (other for other in job.stages if other.id == before.stage.id)
        self._journal.claim = Claim(job=job, stage=stage)
        if before.job.trials != job.trials:
            self._journal.result = None

    def complete(self, *, then: Sequence[NewStage] = (), ended: bool = False) -> bool:
        """Store what the claimed stage gave; False if the job has moved meanwhile."""
        journal, job = self._journal, self._claim.job
        assert journal.result is not None, f"nobody needs {self._claim.stage.kind} of job {job.id}"
        library = journal.library
        if self._claim.stage.kind is StageKind.TRANSFER:
            journal.result = check_report(journal.result, job)
            library = _of_transfer(job.spec["configuration"], journal.result)
        try:
            return self._store.complete(
                self._claim, journal.result, then=then, ended=ended, job_result=journal.job_result,
                library=library, spec=journal.spec, seen=job,
            )  # fmt: skip
        except LostClaim:
            if self._claim.stage.kind in _WRITE:
                remove_if_deleted(self._store, self._inputs, job)
            raise

    def conduct(self) -> None:
        """Go through the job from the top."""
        job, each, once = self._claim.job, self._journal.each, self._journal.once
        if job.spec.get("kind") == "transfer":
            transfer_spec = TransferSpec.model_validate(job.spec)
            targets = [transfer_spec.target(number) for number in range(len(transfer_spec.models))]
            each("transfer", _of_models(targets), self._transfer, Transfer)
            return
        spec = JobSpec.model_validate(job.spec)
        spec = self._sized(spec)
        made = self._calibrated(spec)
        spec = self._warmed(self._sized_again(spec), made)
        if spec.minutes is not None:
            run = self._journal.run
            clock = cache(lambda: self._clock(spec))  # measured before the model is pruned
            self._journal.run = replace(
                run,
                in_full=lambda count: clock().in_full_left(count),
                passes=lambda count: clock().passes_left(count),
                another=lambda before: clock().another_left(before),
                prunes_on=lambda pruned: clock().prunes_on_left(pruned),
                trains_on=lambda trained: clock().trains_on(trained),
            )
        self._work = SealedWork(self._inputs, job, spec, made, self._journal.run)
        self._search(spec, made)
        spec = self._rested(spec)
        self._work = SealedWork(self._inputs, job, spec, made, self._journal.run)
        if spec.tasks is not None:
            both = [Piece(number=DENSE), Piece(number=PRUNED)]
            for measured in each("tasks", both, self._tasks, TasksMeasured):
                check_tasks(measured.questions_sha256, job)
        if spec.prune or job.pruning is not None:
            once("prune", lambda _: prune_piece(self._work, self._claim, self._watch), StoredModel)

    def _search(self, spec: JobSpec, made: Sequence[Calibration]) -> None:
        """Find the configuration, or those of several patterns."""
        if spec.several:
            points = self._points()
            self._journal.once("finish", lambda _: self._finish_points(points), Finished)
        elif spec.is_cut:
            self._conduct_cut(spec, made)
        else:
            islands = range(spec.islands)
            conduct(
                IslandsAsked(
                    requests=[spec.request(number) for number in islands],
                    plans=[spec.plan(number) for number in islands],
                    studies=self._study,
                    origin=origin_of([one.provenance for one in made]),
                    timeout_s=spec.timeout_s,
                ),
                self._work,
                self._journal,
                self._island_search(spec),
                self._finish,
                Finished,
            )

    def _conduct_cut(self, spec: JobSpec, made: Sequence[Calibration]) -> None:
        """Rate the splits of a share, cut the best of them, and take the one that is best then."""
        from pho_service.pipeline.cuts import CutPieces  # slow to import

        study, provenance = self._study(0), origin_of([one.provenance for one in made])
        steps = CutPieces(spec.request(0), self._work, study, provenance)
        conduct_pieces(steps, 1, self._journal, self._finish, Finished)

    # The pieces.

    def _transfer(self, piece: Piece, run: Run) -> Transfer:
        """Measure on one model. What a user can act on is its result, and ends no other."""
        spec = TransferSpec.model_validate(self._claim.job.spec)
        try:
            with faults_told():
                return transfer_piece(spec, self._inputs, piece.number, self._watch, run)
        except DeviceLost:
            raise  # no fault of this model
        except PhoError as error:
            logger.warning("a model of job %s failed: %s", self._claim.job.id, error)
            return failed(spec.models[piece.number], error)

    def _calibrated(self, spec: JobSpec) -> list[Calibration]:
        """Calibrate each model; a large one in parts, that are added up then."""
        inputs, each = self._inputs, self._journal.each
        models = [spec.of_model(number) for number in range(len(spec.models))]

        def begin(piece: Piece, run: Run) -> Calibration:
            return calibrate_piece(inputs, models[piece.number], spec, None, run)

        def gather(piece: Piece, run: Run) -> Gathered:
            model, shard = divmod(piece.number - PARTS, SHARDS)
            return gather_shard(inputs, models[model], first[model], shard, run)

        def add_up(piece: Piece, run: Run) -> Calibration:
            model = piece.number - WHOLES
            return calibrate_piece(inputs, models[model], spec, first[model], run)

        model_pieces = _of_models(models)
        first = each("calibrate", model_pieces, begin, Calibration)
        each("calibrate", shards_of(first), gather, Gathered)
        wholes = [
            replace(piece, number=WHOLES + piece.number)
            for piece, one in zip(model_pieces, first, strict=True)
            if one.shards
        ]
        added = iter(each("calibrate", wholes, add_up, Calibration))
        return [next(added) if one.shards else one for one in first]

    def _sized(self, spec: JobSpec) -> JobSpec:
        """With what its minutes choose on the worker that begins, but for what can wait."""
        first = [path for path in spec.free_sizes if path not in AFTER_CALIBRATION]
        if not first:
            return spec

        def choose(_: Piece, run: Run) -> dict[str, Any]:
            with run.progress("Choosing how much to calibrate on", 1) as advance:
                clock, model = self._clock(spec), self._inputs.model(spec)
                clock.fit_text(
                    model,
                    self._inputs.calibration_source(spec.calibration),
                    [self._inputs.file(text) for text in spec.texts_measured_on],
                    spec.free_sizes,
                )
                advance(1)
            logger.info("sizes of job %s: %s", self._claim.job.id, sentence(clock.plan))
            return {path: clock.plan.spec.sizes[path] for path in first}

        (sizes,) = self._journal.each("calibrate", [Piece(number=SIZING)], choose, dict)
        return self._changed(spec.sized(sizes))

    def _sized_again(self, spec: JobSpec) -> JobSpec:
        """With what the minutes choose once the calibration lies behind."""
        if not spec.free_sizes:
            return spec
        return self._changed(self._clock(spec).plan.spec)

    def _rested(self, spec: JobSpec) -> JobSpec:
        """With the minutes that the search has left for its recovery; or without one."""
        if spec.recovery is None or not spec.recovers_in_rest:
            return spec
        resting = [Piece(number=RESTING)]
        (rest,) = self._journal.each(
            "finish", resting, lambda *_: rest_piece(self._work, self._clock(spec)), Rest
        )
        recovery = spec.recovery.model_copy(update={"minutes": rest.minutes})
        update = {"recovery": None if rest.minutes is None else recovery}
        return self._changed(spec.model_copy(update=update))

    def _clock(self, spec: JobSpec) -> Clock:
        """The minutes of the job, by what its stages have worked and what this machine does."""
        # What a stage has worked counts once it has ended: this one has worked since it was begun.
        worked = sum(stage.worked_s for stage in self._claim.job.stages)
        model = self._inputs.model(spec.of_model(0))
        path = self._inputs.access.model(spec.model)
        return Clock.of(model, spec, lambda: worked + time.monotonic() - self._began, path)

    def _changed(self, spec: JobSpec) -> JobSpec:
        """A document that is stored with the result of the claimed stage."""
        self._journal.spec = spec.model_dump(mode="json")
        return spec

    def _warmed(self, spec: JobSpec, made: Sequence[Calibration]) -> JobSpec:
        """With what the library has to begin with, which the job's document then says."""
        model = made[0].provenance.get("model", {})
        document = warmed(self._store.database, self._claim.job, spec, model)
        if document is None:
            return spec
        return self._changed(JobSpec.model_validate(document))

    def _study(self, number: int) -> optuna.Study:
        """The record of an island, or of a pattern."""
        direction = self._work.spec.request(0).objective.direction
        name = study_name(self._claim.job.name, number)
        return open_study(self._storage, name, direction=direction)

    def _island_search(self, spec: JobSpec) -> IslandSearch:
        return IslandSearch(self._store, self._claim, spec, self._watch, self._fence)

    def _points(self) -> list[CurvePoint]:
        """A point for each pattern, as `pho curve` finds them; or those that a target asks for."""
        spec, run, claim = self._work.spec, self._work.run, self._claim

        def find(request: SearchRequest, title: str) -> CurvePoint:
            # The study holds whatever another attempt has done.
            one = spec.of_pattern(request.pattern)
            points = claim.job.of_kind(StageKind.POINT)
            other = next((self._study(stage.number) for stage in points if stage.result), None)
            study = self._study(claim.stage.number)
            finder = CurvePoints(
                self._work.opened(),
                lambda _: study,
                pareto=pareto_of_job(self._store, claim, self._storage),
                dense=None if other is None else kept(other, DENSE_MEASURED, {}),
                search=self._island_search(one),
                run=run,
                target=spec.target,
                before=[_POINT.validate_python(stage.result) for stage in points if stage.result],
            )
            point = finder.find(request, title)
            with run.fence():
                show_result(study, one, point.configuration)
            self._work.check()
            if spec.target is None and not spec.is_cut:  # a cut is of one model's blocks
                self._journal.library = [
                    LibraryAddition(point.configuration.model_dump(mode="json"))
                ]
            return point

        requests = [spec.of_pattern(pattern).request(0) for pattern in spec.points]
        return find_points(find, requests, spec.target, self._journal)

    def _finish_points(self, points: Sequence[CurvePoint]) -> Finished:
        """A target has an answer, patterns have one each; TargetMissed if there is no answer."""
        best, warnings, target = None, point_warnings(points), self._work.spec.target
        if target is not None:
            result = target_found(target, points).result
            best, warnings = result.configuration.model_dump(mode="json"), result.warnings
        self._work.forget_blocks()
        self._journal.job_result = JobResult(best=best, warnings=warnings)
        return Finished()

    def _finish(self, result: SearchResult) -> Finished:
        configuration, work, spec = result.configuration, self._work, self._work.spec
        layers = {}
        if configuration.cut is None:
            candidate = configuration.candidate()
            layers = of_layers(work.bundles, candidate, str(self._inputs.device))
        for number in range(spec.islands):
            with self._fence():
                show_result(self._study(number), spec, configuration)
        self._journal.job_result = JobResult(
            best=configuration.model_dump(mode="json"),
            warnings=[*result.warnings, *started(spec, configuration)],
        )
        validation = None if result.validation is None else dict(result.validation)
        work.forget_blocks()
        return Finished(layers=layers, validation=validation)

    def _tasks(self, piece: Piece, _: Run) -> TasksMeasured:
        check = partial(check_tasks, job=self._store.get(self._claim.job.id))
        return tasks_piece(self._work, piece.number, check)


_POINT = TypeAdapter(CurvePoint)
# Kinds of pieces that may leave files of their job in the artifact store.
_WRITE = (StageKind.POINT, StageKind.FINISH, StageKind.TASKS, StageKind.PRUNE)


def _of_models(specs: Sequence[JobSpec]) -> list[Piece]:
    """A piece for each model; those that may share a bundle are done one after the other."""
    return [Piece(number=n, lock=spec.calibration_key) for n, spec in enumerate(specs)]


def _of_transfer(
    configuration: Mapping[str, Any], result: Mapping[str, Any]
) -> list[LibraryAddition]:
    """What the library gets of a model that a configuration was taken to."""
    if "error" in result:
        return []
    measured = {name: value for name, value in result.items() if name != "own"}
    additions = [] if result["own"] is None else [LibraryAddition(result["own"])]
    return [LibraryAddition(configuration, measured), *additions]


def pareto_of_job(store: JobStore, claim: Claim, storage: RDBStorage) -> optuna.Study | None:
    """Make or open a job's study of sparsity and objective; None of a job with one point."""
    # The fence makes it whole or not at all, and never for a job that was deleted. Workers that
    # write to it at once wait for each other: Optuna locks the row of a study that trials are added
    # to, until the fence is left.
    spec = JobSpec.model_validate(claim.job.spec)
    if len(spec.points) == 1:
        return None
    request = spec.request(0)
    name = pareto_study_name(claim.job.name)
    with store.fence(claim, storage):
        study = pareto_study(name, request.objective.direction, request.rated_by, storage)
        show_curve(study, spec)
    return study
