"""
People who submit small jobs of many kinds without pause, and change their minds.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
from invariants import Invariants
from tenacity import Retrying, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_random

from pho_service.api.answers import Job
from pho_service.client import Client
from pho_service.errors import ServiceError, ServiceUnavailable
from storage.records import JobState

PATIENCE_S = 300.0  # for the service to come back
MORE = 10  # trials of an extension
UNFINISHED = 8  # of one person; then no more are submitted

Said = Literal["no", "perhaps", "yes"]  # perhaps: the service died before it answered
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Document:
    """
    What is submitted again and again.

    Attributes:
        spec: A job document.
        fixed: The answer does not depend on other jobs.
        extended: Some are given more trials.
        fails: It does so undisturbed, too.
        changing: A file that it names is replaced meanwhile: it may fail for that reason, or give
            what either of the contents gives.
    """

    spec: Mapping[str, Any]
    fixed: bool = True
    extended: bool = False
    fails: bool = False
    changing: bool = False


def documents(
    spec: dict[str, Any], other: str, short: str, *, model: str, text: str
) -> dict[str, Document]:
    """
    Jobs of many kinds, by their names.

    Args:
        spec: A job on a tiny model, without a confirmation.
        other: Another tiny model.
        short: A text that is too short to calibrate on.
        model: One whose weights are replaced now and then.
        text: One that is replaced now and then.
    """
    few = {**spec, "trials": 14, "max_attempts": 20}  # more workers than are killed in one stage
    confirmed = {**few, "confirm": {"finalists": 2, "windows": 2}}
    calibration = spec["calibration"]
    point = {
        "coefficients": {
            "row": 0.5, "column": 0.5, "neighbourhood": 0.1, "kernel_size": 3,
            "activation_exponent": 1.0, "gradient_exponent": 0.5,
        }
    }  # fmt: skip
    return {
        "plain": Document(spec=few, extended=True),
        "confirmed": Document(spec=confirmed, extended=True),
        "islands": Document(spec={**few, "islands": 3, "priority": 1}, extended=True),
        "2:4": Document(spec={**confirmed, "pattern": "2:4", "preset": "crepe-plus"}),
        "best": Document(spec={**confirmed, "pattern": "0.6", "preset": "best"}),
        "cut": Document(
            spec={
                "model": spec["model"],
                "calibration": calibration,
                "confirm": confirmed["confirm"],
                "pattern": "structured:20%",
                "max_attempts": few["max_attempts"],
            }
        ),
        "tpe": Document(spec={**few, "scope": "row", "sampler": "tpe", "seed": 7}),
        "hill climb": Document(
            spec={**confirmed, "sampler": "hill-climb", "objective": {"name": "perplexity"}}
        ),
        "validated": Document(spec={**confirmed, "validation": {"candidates": 8}}),
        "two models": Document(spec={**few, "more_models": [other]}),
        "warm point": Document(spec={**few, "warm_start": {"found": [point]}}),
        "warm": Document(spec={**few, "warm_start": {}}, fixed=False),
        "other seed": Document(
            spec={**few, "calibration": {**calibration, "seed": 1}, "priority": -1}
        ),
        "text too short": Document(
            spec={**few, "calibration": {**calibration, "text": short}}, fails=True
        ),
        "not divisible": Document(spec={**few, "pattern": "3:5"}, fails=True),
        "changing model": Document(spec={**confirmed, "model": model}, changing=True),
        "changing text": Document(
            spec={**confirmed, "calibration": {**calibration, "text": text}}, changing=True
        ),
        "changing confirmation": Document(
            spec={**few, "confirm": {**confirmed["confirm"], "text": text}}, changing=True
        ),
    }


WRONG: tuple[dict[str, Any], ...] = (
    {"pattern": "4:2"},
    {"pattern": "0.5", "scope": "everything"},
    {"trials": 0},
    {"trials": "many"},
    {"unknown": 1},
    {"model": "/etc/passwd"},
    {"model": "../outside"},
    {"calibration": {"text": "/etc/passwd"}},
    {"islands": 2, "sampler": "hill-climb"},
    {"name": "\x00"},
)


@dataclass(kw_only=True)
class Sent:
    """
    A job that the service took, and what was asked of it since.

    Attributes:
        name: Of its document; of a transfer, that of its source with "transfer of" before.
        key: The idempotency key.
        state: The last that was seen.
    """

    id: uuid.UUID
    name: str
    key: str
    trials: int
    state: str = "queued"
    cancelled: Said = "no"
    deleted: Said = "no"
    extended: Said = "no"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to it by itself, as far as was seen."""
        return JobState(self.state).is_over


@dataclass(kw_only=True)
class Person:
    """
    Somebody with a key of their own.

    Args:
        url: Of the service.
        key: That lets in, and shows this person's jobs.
        seed: Of what is done, and in which order.
    """

    url: str
    key: str
    seed: int
    documents: dict[str, Document]
    invariants: Invariants
    jobs: dict[uuid.UUID, Sent] = field(default_factory=dict)
    requests: int = 0
    outages: int = 0
    unknown: int = 0  # submissions that nobody answered in time

    def __post_init__(self) -> None:
        self.client = Client(self.url, self.key)
        self._raw = httpx.Client(
            base_url=f"{self.url}/v1", headers={"Authorization": f"Bearer {self.key}"}, timeout=30
        )
        self._chance = random.Random(self.seed)  # noqa: S311 - no secret

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self._raw.close()

    def work(self, over: threading.Event) -> None:
        """Do one thing after the other until it is over."""
        actions: dict[Callable[[], None], int] = {
            self._submit: 40,
            self._look: 15,
            self._send_wrong: 4,
            self._cancel: 3,
            self._pause: 5,
            self._resume: 6,
            self._extend: 4,
            self._transfer: 4,
            self._delete: 4,
        }
        while not over.wait(self._chance.uniform(0, 0.4)):
            (action,) = self._chance.choices([*actions], [*actions.values()])
            try:
                action()
            except ServiceUnavailable as error:
                self.invariants.check("the service comes back", False, str(error))
            except ServiceError as error:
                self._deserved(error)

    def submit(self, name: str, *, more: int = 0) -> Sent:
        """Submit one of the documents, with ``more`` trials than it says."""
        document = {**self.documents[name].spec, "name": name}
        document["trials"] += more
        key = uuid.uuid4().hex
        job = self.patient(lambda: self.client.submit(document, idempotency_key=key))
        sent = self._sent(job.id, name, key, trials=document["trials"])
        again = self.patient(lambda: self.client.submit(document, idempotency_key=key))
        self.invariants.check(
            "the same Idempotency-Key makes one job", again.id == job.id, f"{job.id}, {again.id}"
        )
        return sent

    def transfer(self, source: Sent, target: str) -> Sent:
        """Measure what a job has found on another model."""
        key = uuid.uuid4().hex
        job = self.patient(lambda: self.client.transfer(source.id, [target], idempotency_key=key))
        return self._sent(job.id, f"transfer of {source.name} {source.trials}", key)

    def refresh(self) -> None:
        """See in which state each job is."""
        found = {job.id: job for job in self.patient(lambda: [*self.client.jobs()])}
        for sent in self.jobs.values():
            if sent.id in found:
                sent.state = found[sent.id].state
            elif sent.deleted == "perhaps":
                sent.deleted = "yes"

    def finish(self, deadline: float) -> None:
        """Resume what is paused, and wait until all jobs are over; until a moment at most."""
        while time.monotonic() < deadline:
            self.refresh()
            # A deletion that nobody answered may not have been done: then it is to be resumed.
            left = [
                s
                for s in self.jobs.values()
                if s.deleted != "yes" and not JobState(s.state).is_over
            ]
            if not left:
                return
            for sent in left:
                if sent.state in ("paused", "pausing"):
                    self._ask(sent, "resume")
            time.sleep(1)

    def answer(self, job: Job) -> str:
        """What a job gave, without its id."""
        if job.state == "failed":
            assert job.error is not None
            return f"{job.error.type} in {job.error.stage}: {job.error.message}"
        part = "transfer" if job.kind == "transfer" else "best"
        text = self.patient(lambda: self._get(f"/jobs/{job.id}/{part}").text)
        return text.replace(job.id.hex[:12], "ID")  # in the names of its studies

    def patient(self, request: Callable[[], T]) -> T:
        """What a request that may be repeated gives, once the service is there."""
        for attempt in Retrying(
            retry=retry_if_exception_type(ServiceUnavailable),
            wait=wait_random(0.2, 1.0),
            stop=stop_after_delay(PATIENCE_S),
            reraise=True,
        ):
            with attempt:
                self.requests += 1
                try:
                    return request()
                except ServiceUnavailable:
                    self.outages += 1
                    raise
        raise AssertionError

    def _get(self, path: str) -> httpx.Response:
        try:
            answer = self._raw.get(path)
        except httpx.TransportError as error:
            raise ServiceUnavailable(str(error)) from error
        if answer.status_code == 503:
            raise ServiceUnavailable(answer.text)
        answer.raise_for_status()
        return answer

    def _sent(self, job_id: uuid.UUID, name: str, key: str, *, trials: int = 0) -> Sent:
        sent = Sent(id=job_id, name=name, key=key, trials=trials)
        self.jobs[job_id] = sent
        return sent

    def _there(self) -> list[Sent]:
        return [s for s in self.jobs.values() if s.deleted == "no"]

    def _any(self, *states: str) -> Sent | None:
        found = [s for s in self._there() if s.state in states]
        return self._chance.choice(found) if found else None

    def _submit(self) -> None:
        if sum(not s.is_over for s in self._there()) < UNFINISHED:
            self.submit(self._chance.choice([*self.documents]))
        else:
            self.refresh()

    def _look(self) -> None:
        """Whatever can be looked at."""
        sent = self._any("queued", "running", "paused", "succeeded", "failed", "cancelled")
        if sent is None:
            return
        looks: list[Callable[[], object]] = [
            lambda: self.client.job(sent.id),
            lambda: [*self.client.trials(sent.id)],
            lambda: self._get(f"/jobs/{sent.id}/report"),
            lambda: self.client.configurations(pattern="0.5", family="llama"),
            self.client.workers,
            self.refresh,
        ]
        try:
            self.patient(self._chance.choice(looks))
        except ServiceUnavailable:
            raise
        except ServiceError as error:  # trials of a transfer, say
            self._deserved(error, 409)

    def _send_wrong(self) -> None:
        """A document that breaks a rule."""
        wrong = self._chance.choice(WRONG)
        document = {**next(iter(self.documents.values())).spec, **wrong}
        try:
            self.patient(lambda: self.client.submit(document))
        except ServiceError as error:
            self._deserved(error, 422)
        else:
            self.invariants.check("wrong documents are refused", False, str(wrong))

    def _cancel(self) -> None:
        sent = self._any("queued", "running", "paused")
        if sent is not None:
            sent.cancelled = self._ask(sent, "cancel")

    def _pause(self) -> None:
        sent = self._any("queued", "running")
        if sent is not None and self._ask(sent, "pause") == "yes":
            sent.state = "paused"

    def _resume(self) -> None:
        sent = self._any("paused")
        if sent is not None:
            self._ask(sent, "resume")

    def _extend(self) -> None:
        """Once for each job, so that what it is to give is known."""
        sent = self._any("queued", "running", "paused", "succeeded")
        if sent is None or sent.extended != "no" or sent.name not in self.documents:
            return
        document = self.documents[sent.name]
        if document.extended and sent.trials == document.spec["trials"]:
            sent.extended = self._ask(sent, "extend", trials=MORE)
            sent.state = "running" if sent.state == "succeeded" else sent.state

    def _transfer(self) -> None:
        sent = self._any("succeeded")
        if sent is not None and sent.name == "confirmed" and "two models" in self.documents:
            try:
                self.transfer(sent, str(self.documents["two models"].spec["more_models"][0]))
            except ServiceError as error:
                self._deserved(error, 404, 409)  # extended just now

    def _delete(self) -> None:
        sent = self._any("cancelled", "succeeded", "failed", "paused")
        if sent is None:
            return
        try:
            self.requests += 1
            self.client.delete(sent.id)
        except ServiceUnavailable:
            sent.deleted = "perhaps"
        except ServiceError as error:
            self._deserved(error, 409)
        else:
            sent.deleted = "yes"

    def _ask(self, sent: Sent, verb: str, **more: Any) -> Said:
        """Ask once: what nobody answers may have been done, or not."""
        try:
            self.requests += 1
            job = getattr(self.client, verb)(sent.id, **more)
        except ServiceUnavailable:
            self.outages += 1
            return "perhaps"
        except ServiceError as error:
            self._deserved(error, 409)
            return "no"
        sent.state = job.state
        return "yes"

    def _deserved(self, error: ServiceError, *statuses: int) -> None:
        self.invariants.check(
            "refusals are those that the request deserves", error.status in statuses, str(error)
        )
