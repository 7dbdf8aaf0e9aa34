"""
Jobs with several patterns: a stage searches and confirms one of them, as `pho curve` does.

The patterns of a curve are independent of each other, so that several workers may be at it; those
of a target come one after the other, each by what was measured before.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pho_service.pipeline.curve import CurvePoint, CurvePoints, point_warnings
from pho_service.pipeline.rating import Subject
from pho_service.pipeline.target import next_sparsity, target_found
from pho_service.spec.candidate import Candidate
from pho_service.spec.job import JobSpec
from pho_service.spec.pattern import Pattern
from pho_service.tuning.pareto import pareto_study
from pho_service.tuning.request import SearchRequest
from storage.jobs import JobStore
from storage.pruned import PATTERN
from storage.records import Claim, Job, NewStage, Stage
from storage.states import StageKind
from storage.studies import open_storage, open_study, pareto_study_name, study_name
from workers.board import show_curve, show_result, show_search
from workers.inputs import Inputs
from workers.island_search import TrialsFailed
from workers.seal import Seal
from workers.subjects import bundle_of, subject_of
from workers.tasks import after_result
from workers.watch import LOOK_EVERY_S, HandBack, Watch


def first_points(spec: JobSpec) -> list[NewStage]:
    """The stages that follow the calibration: one for each pattern, or the first of a target."""
    if spec.target is not None:
        return _next_of_target(spec, [])
    return [_stage(number, pattern) for number, pattern in enumerate(spec.points)]


def pattern_of(stage: Stage, spec: JobSpec) -> Pattern:
    """Return what the stage of a point searches."""
    named = {str(each): each for each in spec.points}
    return named[str(stage.about)]


def points_of(job: Job) -> list[CurvePoint]:
    """What the points of a job have found so far."""
    return [CurvePoint.from_dict(s.result) for s in job.of_kind(StageKind.POINT) if s.result]


def point_stage(store: JobStore, inputs: Inputs, claim: Claim, watch: Watch) -> None:
    """
    Search one pattern, confirm what was found, and measure the published methods beside it.

    The study holds whatever was rated and measured before, in another attempt, too. What was found
    is stored, and what follows it. Its trials are added to the job's Pareto study.

    Raises:
        HandBack: It was put down.
        LostClaim: Another worker has it.
        ChangedInput: The model, or a text, is not the one that the job began with.
        TrialsFailed: More trials failed than the job allows.
    """
    spec = JobSpec.model_validate(claim.job.spec)
    mine, seal = spec.of_pattern(pattern_of(claim.stage, spec)), Seal.of_job(claim.job, 0)
    bundle = bundle_of(inputs, claim.job, spec, watch)
    subject = replace(
        subject_of(inputs, claim.job, spec, mine.request(0).steps, bundle),
        calibration=inputs.calibration_text(spec, seal).calibration,  # for corrections, too
    )
    point = _found(store, claim, mine, subject, str(inputs.device), watch)
    inputs.model(spec, seal)  # its files were read all the time
    result = point.to_dict()
    add = []
    if spec.target is not None:
        add = _next_of_target(spec, [*points_of(claim.job), point])
    store.complete(
        claim,
        result,
        add=add,
        then=[NewStage(kind=StageKind.FINISH)],
        configuration=result["configuration"] if spec.target is None else None,
    )


def _found(
    store: JobStore, claim: Claim, spec: JobSpec, subject: Subject, device: str, watch: Watch
) -> CurvePoint:
    """What there is at the pattern of a stage, which the document has alone."""
    known = points_of(claim.job)
    name = study_name(claim.job.name, claim.stage.number)
    request = spec.request(0)
    with open_storage(store.database.studies_url) as storage:
        study = open_study(storage, name, direction=request.objective.direction)
        show_search(study, spec)

        @contextmanager
        def record(_: SearchRequest) -> Iterator[optuna.Study]:
            yield study

        points = CurvePoints(
            subject,
            record,
            pareto=pareto_of_job(store, claim, storage),
            run=watch.run(device, storage),
            dense=known[0].dense if known else None,
            callbacks=[_Told(store, claim, spec, study, watch)],
        )
        point = points.find(request, str(request.pattern))
        with store.fence(claim, storage):
            show_result(study, spec, point.result.configuration)
    return point


def pareto_of_job(store: JobStore, claim: Claim, storage: RDBStorage) -> optuna.Study | None:
    """
    Make or open a job's study of sparsity and objective; None of a job that has one point alone.

    The fence makes it whole or not at all, and never for a job that was deleted. Workers that
    write to it at once wait for each other: Optuna locks the row of a study that trials are added
    to, until the fence is left.

    Args:
        store: Store of the job.
        claim: Claim of one of its points.
        storage: Storage of the studies.

    Raises:
        LostClaim: Another worker has the stage.
    """
    spec = JobSpec.model_validate(claim.job.spec)
    if len(spec.points) == 1:
        return None
    objective = spec.request(0).objective
    name = pareto_study_name(claim.job.name)
    with store.fence(claim, storage):
        study = pareto_study(name, objective.direction, objective.label, storage)
        show_curve(study, spec)
    return study


def finish_points(store: JobStore, claim: Claim, spec: JobSpec) -> None:
    """
    End a job whose points are all measured: a target has an answer, patterns have one each.

    Raises:
        TargetMissed: The lowest sparsity is outside of the target already.
    """
    points = points_of(claim.job)
    best, warnings = None, point_warnings(points)
    if spec.target is not None:
        found = target_found(spec.target, points)
        best = found.result.configuration.model_dump(mode="json")
        warnings = found.result.warnings
    store.succeed(
        claim,
        best=best,
        warnings=warnings,
        result={},
        then=after_result(spec),
    )


class _Told:
    """Called after each new trial: says how far the search is, and counts what has failed."""

    def __init__(
        self, store: JobStore, claim: Claim, spec: JobSpec, study: optuna.Study, watch: Watch
    ) -> None:
        self._store, self._claim, self._spec, self._watch = store, claim, spec, watch
        self._began = self._told = time.monotonic()
        trials = study.get_trials(deepcopy=False)
        self._failed = sum(trial.state is TrialState.FAIL for trial in trials)
        values = [trial.value for trial in trials if trial.value is not None]
        self._better: Any = min if spec.request(0).objective.direction == "minimize" else max
        self._best = self._better(values, default=None)

    def __call__(self, _: optuna.Study, trial: FrozenTrial) -> None:
        if trial.value is None:
            self._failed += 1
            self._check(trial)
        else:
            known = [] if self._best is None else [self._best]
            self._best = self._better([*known, trial.value])
        done, now = trial.number + 1, time.monotonic()
        if done < self._spec.trials and now - self._told < LOOK_EVERY_S:
            return
        self._told = now
        state = self._store.progress(
            self._claim,
            done=done,
            elapsed_s=self._claim.stage.elapsed_s + now - self._began,
            best_value=self._best,
        )
        if not state.may_work:
            raise HandBack
        self._watch.look_for_others()

    def _check(self, trial: FrozenTrial) -> None:
        most = self._spec.max_failed_trials
        if self._failed > most:
            raise TrialsFailed(
                f"{self._failed} trials at {self._spec.pattern} failed, more than "
                f"max_failed_trials={most}. The last: {trial.user_attrs.get('failure')}",
                candidate=Candidate.from_dict(trial.user_attrs, self._spec.pruning()),
            )


def _next_of_target(spec: JobSpec, points: list[CurvePoint]) -> list[NewStage]:
    """The point that a target asks for next; none at its end."""
    assert spec.target is not None
    sparsity = next_sparsity(spec.target, points)
    named = {each.sparsity: each for each in spec.points}
    return [] if sparsity is None else [_stage(len(points), named[sparsity])]


def _stage(number: int, pattern: Pattern) -> NewStage:
    return NewStage(kind=StageKind.POINT, number=number, params={PATTERN: str(pattern)})
