"""
The pieces of a job that measure its dense model, and the pruned one, on zero-shot tasks.

Each is a piece of its own, so that two workers may be at it, and a killed one loses only its own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pho_service.errors import ChangedInput
from pho_service.models.task_files import LoadedTasks
from pho_service.pipeline.prune import blocks_kept, prune_in_place
from pho_service.pipeline.tasks import measure_tasks, tasks_document
from pho_service.progress import Run
from pho_service.spec.configuration import Configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.tasks import TaskScore
from storage.pruned import chosen
from storage.records import Job
from storage.states import StageKind
from workers.inputs import Inputs
from workers.pruning import configuration_key, store_faults_told

if TYPE_CHECKING:
    from workers.conductor import Opened

DENSE, PRUNED = 0, 1  # the numbers of the pieces


def tasks_piece(
    opened: "Opened",
    inputs: Inputs,
    job: Job,
    number: int,
    run: Run,
    check: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """
    Measure one of the two models of a job on its tasks, as `pho evaluate --tasks` does.

    The pruned one is pruned as `pho prune` does it; blocks that a reconstruction has trained are
    kept for another attempt, and for the piece that writes the pruned model.
    """
    began = time.monotonic()
    tasks = inputs.tasks(opened.spec)
    questions = {"questions_sha256": tasks.questions_sha256()}
    check(questions)
    if number == DENSE:
        measured = _measured(opened.model(), opened.spec, tasks, run)
        opened.check()
    else:
        measured = _pruned(opened, inputs, job, tasks, run)
    return {**measured, **questions, "seconds": round(time.monotonic() - began, 3)}


def check_tasks(mine: Mapping[str, Any], job: Job) -> None:
    """Raise ChangedInput if the other model of the job was measured on other examples."""
    others = [stage.result or {} for stage in job.of_kind(StageKind.TASKS)]
    questions = mine["questions_sha256"]
    if any(other.get("questions_sha256", questions) != questions for other in others):
        raise ChangedInput(
            f"the examples of {', '.join(job.spec['tasks'])} have changed since the other model of "
            "the job was measured on them: the two cannot be compared. Put the former ones "
            "back and resume the job, or submit it again."
        )


def _pruned(
    opened: "Opened", inputs: Inputs, job: Job, tasks: LoadedTasks, run: Run
) -> dict[str, Any]:
    found, calibration = chosen(job, None), opened.calibration()
    configuration = Configuration.model_validate(found)
    bundle, model = opened.bundle(), opened.model()
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
            progress=run.progress,
        )
        model.model.to(dtype)  # type: ignore[arg-type]  # rounded as it is stored, and read again
        measured = _measured(model, opened.spec, tasks, run)
    finally:
        inputs.clear()  # the model is not dense any more
    if blocks is not None and not opened.spec.prune:
        blocks.remove()
    return measured


def _measured(model: Any, spec: JobSpec, tasks: LoadedTasks, run: Run) -> dict[str, Any]:
    """What a model scored, and how, as JSON values."""
    how: dict[str, Any] = {"bos": spec.calibration.bos, "limit": spec.tasks_limit}
    scores: Sequence[TaskScore] = measure_tasks(model, tasks, **how, progress=run.progress)
    document = tasks_document(model, scores, **how)
    kept = {name: document[name] for name in ("limit", "bos", "versions")}
    return {"scores": [asdict(score) for score in scores], **kept}
