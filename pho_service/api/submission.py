"""
How a document becomes a job: what it must keep to here, and the stages that it begins with.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from uuid import UUID

from pho_service.api.service import Service
from pho_service.errors import InvalidInput
from pho_service.host.access import Access
from pho_service.host.settings import Settings
from pho_service.host.task_names import check_tasks
from pho_service.planning.headers import config_at_hand, longest_context
from pho_service.spec.fields import FieldError, check_field
from pho_service.spec.job import JobSpec
from pho_service.spec.job_size import check_size
from pho_service.spec.transfer import TransferSpec
from storage.jobs import JobStore
from storage.records import Job, NewStage
from storage.states import StageKind


def checks(spec: JobSpec, service: Service) -> Iterator[Callable[[], None]]:
    """
    What a job must keep to on this service, one by one; each raises FieldError if it does not.

    Args:
        spec: A search.
        service: What it is submitted to.
    """
    yield from spec.access_checks(service.access)
    yield partial(check_size, spec, service.limits)
    yield partial(_check_context, spec, service.access)
    if spec.notify is not None:
        yield partial(check_field, "notify", service.webhooks.check, spec.notify)
    if spec.tasks is not None:
        yield partial(_check_tasks, spec.tasks, spec.tasks_dir, service.access)


def _check_tasks(tasks: Sequence[str], tasks_dir: str | None, access: Access) -> None:
    """See that the tasks are known, if their folder is allowed, which is checked by itself."""
    try:
        folder = None if tasks_dir is None else Path(access.task_folder(tasks_dir))
    except InvalidInput:
        return
    try:
        check_tasks(tasks, folder)
    except InvalidInput as error:
        raise FieldError("/tasks", str(error)) from error


def _check_context(spec: JobSpec, access: Access) -> None:
    """See that no window is longer than a model reads, as far as this machine knows."""
    asked = spec.calibration.context_length
    for name in spec.models:
        longest = longest_window(name, access, spec.revision)
        if longest is not None and asked > longest:
            raise FieldError(
                "/calibration/context_length",
                f"{asked} is more than {name} can read: {longest}. Give {longest} or less.",
            )


def longest_window(name: str, access: Access, revision: str | None = None) -> int | None:
    """
    The tokens of the longest window that a model reads, by its configuration.

    Args:
        name: As a job has it.
        access: The rules of this machine.
        revision: Revision of a hub model.

    Returns:
        None if the model is not on this machine, is not allowed, or does not say.
    """
    try:
        config = config_at_hand(name, access.model(name), revision=revision)
    except InvalidInput:
        return None
    return None if config is None else longest_context(config)


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
        spec: The document to be stored.
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
    job, _ = store.submit(
        spec.model_dump(mode="json"),
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
