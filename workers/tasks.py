"""
The stages that measure the dense model of a job, and the pruned one, on zero-shot tasks.

Each is a stage of its own, so that two workers may be at it, and a killed one loses only its own.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pho_service.errors import ChangedInput
from pho_service.models.task_files import LoadedTasks
from pho_service.pipeline.prune import blocks_kept, prune_in_place
from pho_service.pipeline.tasks import measure_tasks, tasks_document
from pho_service.spec.configuration import Configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.tasks import TaskScore
from storage.jobs import JobStore
from storage.pruned import chosen
from storage.records import Claim, Job, NewStage
from storage.states import StageKind
from workers.inputs import Inputs
from workers.pruning import configuration_key, store_faults_told
from workers.seal import Seal
from workers.subjects import bundle_of
from workers.watch import Watch

DENSE, PRUNED = 0, 1  # the numbers of the stages


def after_result(spec: JobSpec) -> list[NewStage]:
    """What follows once a job has its result: tasks, and then the files of the pruned model."""
    if spec.tasks is not None:
        return [NewStage(kind=StageKind.TASKS, number=number) for number in (DENSE, PRUNED)]
    return _pruning(spec)


def tasks_stage(store: JobStore, inputs: Inputs, claim: Claim, watch: Watch) -> None:
    """
    Measure one of the two models of a job on its tasks, as `pho evaluate --tasks` does.

    The pruned one is pruned as `pho prune` does it; blocks that a reconstruction has trained are
    kept for another attempt, and for the stage that writes the pruned model.

    Raises:
        HandBack: It was put down.
        LostClaim: Another worker has it.
        InvalidInput, TextError: A task is not there, or its examples cannot be read.
        ChangedInput: The model, a text or the examples are not those that the job began with.
        OutputError: The artifact store is full, or away.
    """
    began = time.monotonic()
    spec = JobSpec.model_validate(claim.job.spec)
    tasks = inputs.tasks(spec)
    questions = tasks.questions_sha256()

    def check(job: Job) -> None:
        others = [stage.result or {} for stage in job.of_kind(StageKind.TASKS)]
        if any(other.get("questions_sha256", questions) != questions for other in others):
            raise ChangedInput(
                f"the examples of {', '.join(tasks.names)} have changed since the other model of "
                "the job was measured on them: the two cannot be compared. Put the former ones "
                "back and resume the job, or submit it again."
            )

    check(store.get(claim.job.id))
    measured = (_dense if claim.stage.number == DENSE else _pruned)(
        inputs, claim.job, spec, tasks, watch
    )
    store.scored(
        claim,
        {
            **measured,
            "questions_sha256": questions,
            "seconds": round(time.monotonic() - began, 3),
        },
        then=_pruning(spec),
        check=check,
    )


def _dense(
    inputs: Inputs, job: Job, spec: JobSpec, tasks: LoadedTasks, watch: Watch
) -> dict[str, Any]:
    seal = Seal.of_job(job, 0)
    model = inputs.model(spec, seal)
    measured = _measured(model, spec, tasks, watch)
    inputs.model(spec, seal)  # its files were read all the time
    return measured


def _pruned(
    inputs: Inputs, job: Job, spec: JobSpec, tasks: LoadedTasks, watch: Watch
) -> dict[str, Any]:
    seal, found = Seal.of_job(job, 0), chosen(job, None)
    configuration = Configuration.model_validate(found)
    calibration = inputs.calibration_text(spec, seal).calibration
    bundle, model = bundle_of(inputs, job, spec, watch), inputs.model(spec, seal)
    folder = inputs.pruned.workplace(job.id, configuration_key(found))
    blocks, dtype = blocks_kept(model, bundle, configuration, folder, calibration), model.dtype
    if blocks is not None:
        with store_faults_told():
            folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        prune_in_place(
            model,
            bundle,
            configuration,
            calibration=calibration,
            done=blocks,
            progress=watch.progress,
        )
        model.model.to(dtype)  # type: ignore[arg-type]  # rounded as it is stored, and read again
        measured = _measured(model, spec, tasks, watch)
    finally:
        inputs.clear()  # the model is not dense any more
    if blocks is not None and not spec.prune:
        blocks.remove()
    return measured


def _measured(model: Any, spec: JobSpec, tasks: LoadedTasks, watch: Watch) -> dict[str, Any]:
    """What a model scored, and how, as JSON values."""
    how: dict[str, Any] = {"bos": spec.calibration.bos, "limit": spec.tasks_limit}
    scores: Sequence[TaskScore] = measure_tasks(model, tasks, **how, progress=watch.progress)
    document = tasks_document(model, scores, **how)
    kept = {name: document[name] for name in ("limit", "bos", "versions")}
    return {"scores": [asdict(score) for score in scores], **kept}


def _pruning(spec: JobSpec) -> list[NewStage]:
    return [NewStage(kind=StageKind.PRUNE)] if spec.prune else []
