"""
How a document becomes a job: with the stages that it begins with.
"""

from uuid import UUID

from pho_service.host.settings import Settings
from pho_service.spec.job import JobSpec
from pho_service.spec.transfer import TransferSpec
from storage.jobs import JobStore
from storage.records import Job, NewStage
from storage.states import StageKind


def enter(
    store: JobStore,
    spec: JobSpec | TransferSpec,
    *,
    asked: JobSpec | TransferSpec | None = None,
    owner_id: UUID | None = None,
    idempotency_key: str | None = None,
    settings: Settings | None = None,
) -> Job:
    """
    Store a job and put its first stages into the queue; it is the one of that time if the
    idempotency key was used before.

    Args:
        store: Store of the jobs.
        spec: The document to be stored; that of a search with what its preset means now.
        asked: The document as it came, if that is another one: by it the key is recognised.
        owner_id, idempotency_key: As :meth:`JobStore.submit`.
        settings: Settings of the service, for how many jobs an owner may have.

    Raises:
        IdempotencyKeyReused, TooManyJobs: As :meth:`JobStore.submit`.
    """
    first, *more = first_stages(spec)
    limits = {} if settings is None else {
        "max_unfinished": settings.max_unfinished_jobs,
        "max_urgent": settings.max_urgent_jobs,
        "max_finished": settings.max_finished_jobs,
    }  # fmt: skip
    settled = spec.settled() if isinstance(spec, JobSpec) else spec
    job, _ = store.submit(
        settled.model_dump(mode="json"),
        asked=(asked or spec).model_dump(mode="json"),
        name=spec.title,
        first=first,
        more=more,
        priority=spec.priority,
        trials=spec.trials if isinstance(spec, JobSpec) else 0,
        max_attempts=spec.max_attempts,
        owner_id=owner_id,
        idempotency_key=idempotency_key,
        **limits,
    )
    return job


def first_stages(spec: JobSpec | TransferSpec) -> list[NewStage]:
    """One for each model; those that may share a bundle run one after the other."""
    if isinstance(spec, JobSpec):
        kind, each = StageKind.CALIBRATE, [spec.of_model(i) for i in range(len(spec.models))]
    else:
        kind, each = StageKind.TRANSFER, [spec.target(i) for i in range(len(spec.models))]
    return [
        NewStage(kind=kind, number=number, lock=one.calibration_key)
        for number, one in enumerate(each)
    ]
