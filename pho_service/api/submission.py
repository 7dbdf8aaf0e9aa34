"""
A document on its way to a job: what it must keep to here, what it would take, and its storing.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel

from pho_service.api.answers import PlanAnswer, Worker
from pho_service.api.problems import documented
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.view import JobView
from pho_service.errors import InvalidInput, ModelError, field_name
from pho_service.host.access import Access
from pho_service.host.artifacts import ID_BEGINS
from pho_service.host.data_sets import near_usual
from pho_service.host.machine import hub_answers
from pho_service.host.settings import Settings
from pho_service.host.tasks import check_tasks
from pho_service.planning.costs import Machine, named_machine
from pho_service.planning.plan import check_sizes
from pho_service.planning.shapes import (
    config_at_hand,
    longest_context,
    place_at_hand,
    read_shapes,
)
from pho_service.planning.windows import count_tokens
from pho_service.spec.document import MODEL, PRUNED, TEXT
from pho_service.spec.export import file_bytes
from pho_service.spec.fields import FieldError, check_field, named_texts
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import job_fields, value_at, within
from pho_service.spec.minutes import OF_THE_TEXT
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.search import INHERITED, RATINGS, fork_in_words, heirs, outside
from storage.jobs import Heritage, JobStore, Limits, NewJob
from storage.records import SIZING, JobRecord, NewStage, NoSuchJob, StageKind
from storage.studies import read_record, read_trials
from storage.texts import NoSuchText

router = APIRouter(prefix="/v1/plan", tags=["jobs"])

Card = Literal["H200", "H100", "A100", "A100-40GB", "L40S", "4090", "cpu"]
Memory = Annotated[int | None, Query(ge=10**9, le=2**50, description="Bytes; by default its own.")]


@router.post("", response_model=PlanAnswer, responses=documented(413, 422))
async def plan(
    spec: JobSpec,
    service: ServiceParam,
    caller: CallerParam,
    card: Annotated[
        Card, Query(description="Card of a worker; cpu: the CPU of this machine.")
    ] = "H100",
    device_memory: Memory = None,
    main_memory: Memory = None,
) -> PlanAnswer:
    """Estimate what a job takes, by the headers of its (first) model's files alone."""
    machine = named_machine(card).resized(device_memory, main_memory)
    return await service.planning.run(_checked, spec, service, caller, machine)


def _checked(spec: JobSpec, service: Service, caller: Caller, machine: Machine) -> PlanAnswer:
    spec = fitted(spec, service.access)
    for check in checks(spec, service, caller):
        check()
    return PlanAnswer.model_validate(service.plan(spec, machine).to_dict())


def likely_card(workers: Sequence[Worker]) -> Card:
    """The card of a worker that is connected; ``cpu`` if none has one."""
    device = next((worker.device for worker in workers if worker.device != "cpu"), "cpu")
    cards: tuple[Card, ...] = get_args(Card)
    return next((card for card in cards if card in device), "A100")  # as a worker takes it


def at_hand(spec: JobSpec, service: Service) -> str | None:
    """Where a plan finds the model on this machine; None if it has to ask the hub."""
    path = service.access.model(spec.model)
    place = place_at_hand(path, spec.revision)
    local = Path(path).is_absolute()
    is_here = place is not None and (local or any(place.glob("model*.safetensors")))
    return str(place) if is_here else None


def checks(spec: JobSpec, service: Service, caller: Caller) -> Iterator[Callable[[], object]]:
    """What a job must keep to on this service; each raises FieldError if it does not."""
    yield partial(check_uploads, spec, service, caller)
    yield from spec.access_checks(service.access)
    yield partial(service.check_size, spec)
    yield partial(_check_context, spec, service.access)
    yield partial(_check_shapes, spec, service.access)
    yield partial(_check_windows, spec, service.access)
    if spec.fork_of is not None:
        yield partial(inherit, spec, UUID(spec.fork_of), service, caller)
    if spec.notify is not None:
        yield partial(check_field, "notify", service.webhooks.check, spec.notify)
    if spec.tasks is not None:
        yield partial(_check_tasks, spec.tasks, spec.tasks_dir, service.access)


def uploads(spec: BaseModel) -> dict[str, str]:
    """The uploaded texts that a document names, by pointers to their places."""
    texts = named_texts(spec.model_dump(mode="json"))
    return {pointer: name for pointer, name in texts if name.startswith(ID_BEGINS)}


def check_uploads(spec: BaseModel, service: Service, caller: Caller) -> None:
    """See that the uploaded texts of a document are the caller's."""
    for pointer, name in uploads(spec).items():
        try:
            service.texts.find(name, owner_id=caller.key_id)
        except NoSuchText:
            raise FieldError(
                pointer,
                f"{name} was not uploaded with this key, or is deleted. POST /v1/texts uploads it, "
                "and so does `pho submit --text FILE`.",
                code="no_such_text",
            ) from None


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
    length = spec.calibration.context_length
    for name in spec.models:
        longest = longest_window(name, access, spec.revision)
        if longest is not None and length > longest:
            raise FieldError(
                "/calibration/context_length",
                f"{length} is more than {name} can read: {longest}. Give {longest} or less.",
            )


def _check_shapes(spec: JobSpec, access: Access) -> None:
    """See that cuts, bytes, and what is said of single linears, fit the models on this machine."""
    linears = spec.request(0).steps.linears
    for name in spec.models if linears or spec.is_cut or spec.sized_files else ():
        shapes = None
        with suppress(InvalidInput, ModelError):  # whoever loads it says why
            place = access.model(name)
            if Path(place).is_absolute() and Path(place).is_dir():
                shapes = read_shapes(name, path=place)
        if shapes is None:
            continue
        field = "/patterns" if spec.several else "/pattern"
        try:
            for pattern in spec.points:
                pattern.cut_share(parameters=shapes.parameters, prunable=shapes.prunable)
            field = "/gguf" if any(map(file_bytes, spec.gguf)) else field
            check_sizes(spec, shapes, name)
        except InvalidInput as error:
            raise FieldError(field, str(error)) from error
        if any(linear.count > 1 for linear in shapes.linears):
            continue  # fused experts have other names in a file
        try:
            names = [linear.name for linear in shapes.linears]
            linears.choose(names, spec.points[0], model=name)
        except InvalidInput as error:
            raise FieldError("/steps/linears", str(error)) from error
        except ModuleNotFoundError:
            continue  # regular expressions need a package that workers have


def _check_windows(spec: JobSpec, access: Access) -> None:
    """See that a small text on this machine fills the windows that a job needs of it."""
    how, confirm = spec.calibration, spec.confirm
    if how.text is None or how.more_texts or {*OF_THE_TEXT} & {*spec.free_sizes}:
        return
    with suppress(InvalidInput):  # said by the checks of these fields
        tokens = count_tokens(
            Path(access.model(spec.model)), Path(access.text(how.text)), how.field
        )
        if tokens is None:
            return
        windows = tokens // (how.context_length - 1)  # or one less: BOS may take a place
        fills = f"{how.text} fills {windows} windows of {how.context_length} tokens"
        if not windows:
            raise FieldError("/calibration/text", f"{fills}. Give a longer text.")
        if confirm is not None and confirm.text is None and windows <= how.samples:
            raise FieldError(
                "/calibration/samples",
                f"{fills}, and the calibration takes {how.samples}: none is left to confirm on. "
                f"Give {field_name('confirm/text')}, or fewer {field_name('calibration/samples')}.",
            )


# Parts of a document that values of trials depend on, by the sections that their fields are in.
_RATED_BY = (MODEL, TEXT, PRUNED)
MOST_INHERITED = 3000  # trials of a job that are read for a fork, in some seconds


def inherit(spec: JobSpec, parent_id: UUID, service: Service, caller: Caller) -> Heritage:
    """Return what the studies of a fork begin with."""
    try:
        parent = JobView(service.jobs.get(parent_id, visible_to=caller.visible_to))
    except NoSuchJob:
        rule = "No job that your key sees has this id. Its page and `pho jobs` show it whole."
        raise FieldError("/fork_of", rule, code="no_such_job") from None
    if not parent.is_search:
        rule = "is not a search at one pattern, whose trials another one could begin with"
        raise FieldError("/fork_of", f"job {spec.fork_of} {rule}. Submit the job without it.")
    if spec.warm_start is not None:
        rule = "A fork begins with the trials of its job, and with nothing else: leave it out."
        raise FieldError("/warm_start", rule)
    _check_alike(spec.placed(service.access), parent.spec)
    return _heritage(spec, parent, service)


def _check_alike(spec: JobSpec, parent: JobSpec) -> None:
    """See that all that the values of a parent's trials depend on is as it was."""
    own, old = (each.model_dump(mode="json") for each in (spec, parent))
    on_text = ("confirm/text", "confirm/windows") if spec.objective.name == "perplexity" else ()
    for path, field in job_fields().items():
        values = [value_at(each, path) for each in (old, own)]
        rates = field.shown.section in _RATED_BY or path in on_text or within(path, "objective")
        if rates and not field.is_part and values[0] != values[1]:
            before, now = map(json.dumps, values)
            raise FieldError(
                f"/{path}",
                f"{now} instead of {before}: the trials that a fork begins with were rated with "
                "the latter. Leave it as it was, or clone the job, which begins with no trials.",
            )


def _heritage(spec: JobSpec, parent: JobView, service: Service) -> Heritage:
    """The trials of a job that lie in the search space of its fork, with what they rely on."""
    plan, names = spec.plan(0), parent.study_names
    with service.database.transaction() as connection:
        mark = read_record(connection, names[0], RATINGS)
        trials = [
            (trial.number * len(names) + island, trial)
            for island, name in enumerate(names)
            for trial in read_trials(connection, name, limit=MOST_INHERITED // len(names))
            if trial.value is not None and trial.user_attrs.get("method") == "crepe"
        ]
    trials.sort(key=lambda pair: pair[0])
    inside, job = heirs(trials, plan), parent.record.id
    if not trials or mark is None:
        raise FieldError(
            "/fork_of",
            f"job {job} is {parent.record.state} and has no trial with a value that another search "
            "could begin with. Wait until it has some; or clone it, which needs none.",
        )
    if not inside:
        which = outside([trial for _, trial in trials], plan)
        raise FieldError(
            "/search_space",
            f"none of the {len(trials)} trials of job {job} lies inside: {which}. A fork begins "
            "with one at least. Widen the space, or clone the job, which begins with none.",
        )
    fork = {"job": str(job), "trials": len(inside), "rated": len(trials)}
    return Heritage(
        trials=inside,
        direction=plan.direction,
        islands=spec.islands,
        records={INHERITED: fork, RATINGS: mark},
        sentence=fork_in_words(fork),
    )


def fitted(spec: JobSpec, access: Access) -> JobSpec:
    """A job that says no length with windows that its models read, as far as this machine knows."""
    shortest = shortest_window(spec.models, access, spec.revision)
    return spec.model_copy(update={"calibration": spec.calibration.fitted(shortest)})


def shortest_window(names: Sequence[str], access: Access, revision: str | None) -> int | None:
    """The tokens of the longest window that all of some models read; None if none tells."""
    read = [longest_window(name, access, revision) for name in names]
    return min((length for length in read if length is not None), default=None)


def longest_window(name: str, access: Access, revision: str | None = None) -> int | None:
    """The tokens of the longest window that a model reads, by its configuration."""
    with suppress(InvalidInput):
        return longest_context(config_at_hand(name, access.model(name), revision=revision))
    return None


def enter(
    store: JobStore,
    spec: JobSpec | TransferSpec,
    *,
    submitted: JobSpec | TransferSpec | None = None,
    owner_id: UUID | None = None,
    idempotency_key: str | None = None,
    settings: Settings | None = None,
    tokens: int = 0,
    heritage: Heritage | None = None,
) -> JobRecord:
    """Store a job and queue its first stages; a used idempotency key gives the job of that time."""
    limits = Limits() if settings is None else Limits(
        unfinished=settings.max_unfinished_jobs,
        urgent=settings.max_urgent_jobs,
        finished=settings.max_finished_jobs,
    )  # fmt: skip
    new = NewJob(
        spec=spec.model_dump(mode="json"),
        request=(submitted or spec).model_dump(mode="json"),
        name=spec.title,
        stages=first_stages(spec),
        priority=spec.priority,
        trials=spec.trials if isinstance(spec, JobSpec) else 0,
        max_attempts=spec.max_attempts,
        tokens=tokens,
        idempotency_key=idempotency_key,
        heritage=heritage,
    )
    return store.submit(new, owner_id=owner_id, limits=limits)[0]


def first_stages(spec: JobSpec | TransferSpec) -> list[NewStage]:
    """One for each model; those that may share a bundle run one after the other."""
    if isinstance(spec, JobSpec) and spec.free_sizes:  # the worker that begins decides
        return [NewStage(kind=StageKind.CALIBRATE, number=SIZING)]
    if isinstance(spec, JobSpec):
        kind, specs = StageKind.CALIBRATE, [spec.of_model(i) for i in range(len(spec.models))]
    else:
        kind, specs = StageKind.TRANSFER, [spec.target(i) for i in range(len(spec.models))]
    return [
        NewStage(kind=kind, number=number, lock=one.calibration_key)
        for number, one in enumerate(specs)
    ]


def shorter(spec: JobSpec, job: JobRecord) -> Iterator[str]:
    length = job.spec["calibration"]["context_length"]
    if length != spec.calibration.context_length:
        yield f"Windows have {length} tokens, since {', '.join(spec.models)} reads no more."


def doubts(spec: JobSpec, access: Access) -> Iterator[str]:
    """Tell what a job names that may not be there, before it runs."""
    for name, near in ((model, access.near_model(model)) for model in spec.models):
        if near is not None:
            yield f"{name} is not a folder here, but taken for the hub's. Did you mean {near}?"
    models = [name for name in spec.models if not Path(access.model(name)).is_absolute()]
    parts = spec.calibration.parts.values()
    names = [part.dataset for part in parts if part.dataset is not None]
    sets = [name for name in names if not Path(access.dataset(name)).is_absolute()]
    for name, question in ((name, near_usual(name)) for name in sets):
        if question:
            yield f"{name} is taken for a data set on the hub.{question}"
    away = [*models, *sets]
    if away and not HUB.answers():
        yield (
            f"The Hugging Face hub cannot be reached from this service: {', '.join(away)} can only "
            "be used if the cache of the workers has it."
        )


class HubWatch:
    """Whether the hub answers: one request a minute finds out, others go by what was known."""

    def __init__(self) -> None:
        self._asking, self._asked, self._answers = threading.Lock(), -math.inf, True

    def answers(self) -> bool:
        if time.monotonic() - self._asked > HUB_EVERY_S and self._asking.acquire(blocking=False):
            try:  # a hub that hangs takes seconds
                self._answers, self._asked = hub_answers(), time.monotonic()
            finally:
                self._asking.release()
        return self._answers


HUB, HUB_EVERY_S = HubWatch(), 60.0


def take(spec: JobSpec, service: Service, caller: Caller, idempotency_key: str | None) -> JobRecord:
    """Store the job of a document, if it keeps to the rules of this service."""
    whole = fitted(spec, service.access)
    results = [check() for check in checks(whole, service, caller)]
    heritage = next((result for result in results if isinstance(result, Heritage)), None)
    job = enter(
        service.jobs, whole.placed(service.access), submitted=spec, owner_id=caller.key_id,
        idempotency_key=idempotency_key, settings=service.settings,
        tokens=service.check_size(whole), heritage=heritage,
    )  # fmt: skip
    if texts := {*uploads(spec).values()}:
        service.texts.touch(texts, owner_id=caller.key_id)
    return job
