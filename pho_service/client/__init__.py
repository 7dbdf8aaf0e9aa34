"""
A Python client of the service.

    from pho_service.client import Client

    with Client() as client:
        job = client.submit({"model": "org/name", "pattern": "2:4"})
        job = client.wait(job.id)
        configuration = client.best(job.id)
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import httpx_sse
from tenacity import Retrying, retry_if_exception_type, stop_before_delay
from tenacity.wait import wait_exponential

from pho_service.api.answers import (
    ArtifactList,
    ConfigurationMatch,
    ConfigurationMatches,
    Job,
    JobPage,
    PlanAnswer,
    Trial,
    TrialPage,
    Worker,
    WorkerList,
)
from pho_service.client.connection import Connection, no_pho, path_id, read
from pho_service.errors import InvalidInput, ServiceUnavailable
from pho_service.host.download import bar, pull
from pho_service.library.files import LibraryFile, TransferFile, parse_library_file
from pho_service.progress import empty_bars
from pho_service.spec.configuration import Configuration

_OUTAGE_S = 300.0  # that waiting for a job bears
_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """
    Something that happened to a job.

    Attributes:
        id: Give it to :meth:`Client.events` to go on after it.
        kind: ``state``, ``stage``, ``progress`` or ``retry``.
        data: JSON values.
    """

    id: int
    kind: str
    data: dict[str, Any]


class Client:
    """
    Talks to one service. Errors are ServiceError; an outage is ServiceUnavailable.

    Where the service says that it is asked too often, the request is sent again when it may be.

    Args:
        url: URL of the service; ``PHO_API_URL`` by default, or this machine.
        key: ``PHO_API_KEY`` by default.
        timeout_s: Time limit of one request.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout_s: float = 30.0
    ) -> None:
        self._service = Connection(url, key, timeout_s)

    @property
    def url(self) -> str:
        """Address of the service."""
        return self._service.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._service.close()

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """
        Submit a job document; docs/service.md describes it.

        Args:
            spec: At least ``model``, and ``pattern``, ``patterns`` or ``target``.
            idempotency_key: The same twice makes one job. By default a fresh
                one, so that a request that is repeated after an outage makes no second job.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        try:
            answer = self._service.request("POST", "/jobs", json=dict(spec), headers=headers)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"the job document cannot be sent as JSON: {error}.") from error
        return read(Job, answer)

    def job(self, job_id: uuid.UUID | str) -> Job:
        """A job with its progress."""
        return read(Job, self._service.request("GET", self._service.job_path(job_id)))

    def jobs(
        self,
        states: Sequence[str] = (),
        *,
        models: Sequence[str] = (),
        patterns: Sequence[str] = (),
        name: str | None = None,
        sort: str | None = None,
    ) -> Iterator[Job]:
        """
        All jobs for which everything holds that is given, page by page.

        Args:
            states: They are in one of these.
            models: They are for one of these.
            patterns: They have one of these; ``target`` has those that look for one.
            name: It is in their name, or their id begins with it.
            sort: As ``GET /v1/jobs`` takes it, such as ``rise`` or ``-gain``; None is newest first.
        """
        params: dict[str, Any] = {"state": [*states], "model": [*models], "pattern": [*patterns]}
        params |= {key: value for key, value in (("name", name), ("sort", sort)) if value}
        while True:
            answer = self._service.request("GET", "/jobs", params=params)
            page = read(JobPage, answer)
            yield from page.jobs
            if page.next_page_token is None:
                return
            params["page_token"] = page.next_page_token

    def trials(self, job_id: uuid.UUID | str, *, island: int = 0) -> Iterator[Trial]:
        """The trials of an island by number, page by page."""
        params: dict[str, Any] = {"island": island}
        while True:
            answer = self._service.request(
                "GET", self._service.job_path(job_id, "/trials"), params=params
            )
            page = read(TrialPage, answer)
            yield from page.trials
            if page.next_page_token is None:
                return
            params["page_token"] = page.next_page_token

    def best(self, job_id: uuid.UUID | str, *, pattern: str | None = None) -> Configuration:
        """
        The best configuration of a job that has one.

        Args:
            job_id: Which.
            pattern: One of a job with several; of a target, None is the answer.
        """
        path = self._service.job_path(job_id, "/best")
        return read(Configuration, self._service.request("GET", path, params=_at(pattern)))

    def report(self, job_id: uuid.UUID | str) -> str:
        """A job as one page of HTML that needs no network; of any job in any state."""
        answer = self._service.request("GET", self._service.job_path(job_id, "/report"))
        if "PHO report</title>" not in answer.text:
            raise no_pho()
        return answer.text

    def events(self, job_id: uuid.UUID | str, *, after: int = 0) -> Iterator[Event]:
        """What happens to a job, from the event after ``after`` to the end of the job."""
        headers = {"Last-Event-ID": str(after)} if after else {}
        path = self._service.job_path(job_id, "/events")
        try:
            with ExitStack() as stack:
                source = self._service.stream(stack, path, headers)
                for event in source.iter_sse():
                    try:
                        found = Event(id=int(event.id), kind=event.event, data=event.json())
                    except ValueError as error:
                        raise no_pho() from error
                    yield found
        except httpx_sse.SSEError as error:
            raise no_pho() from error
        except httpx.TransportError as error:
            raise self._service.unreachable(error) from error

    def cancel(self, job_id: uuid.UUID | str) -> Job:
        """Cancel a job for good."""
        return self._verb(job_id, "cancel")

    def pause(self, job_id: uuid.UUID | str) -> Job:
        """Pause a job."""
        return self._verb(job_id, "pause")

    def resume(self, job_id: uuid.UUID | str) -> Job:
        """Continue a job that is paused or has failed."""
        return self._verb(job_id, "resume")

    def prune(self, job_id: uuid.UUID | str, *, pattern: str | None = None) -> Job:
        """
        Have the pruned model of a search written; asked again, nothing is done twice.

        Args:
            job_id: Which.
            pattern: One of a job with several; of a target, None is the answer.
        """
        return self._verb(job_id, "prune", params=_at(pattern))

    def artifacts(self, job_id: uuid.UUID | str) -> ArtifactList:
        """The files of a job's pruned model."""
        return read(
            ArtifactList, self._service.request("GET", self._service.job_path(job_id, "/artifacts"))
        )

    def pull(
        self, job_id: uuid.UUID | str, folder: str | Path, *, show_progress: bool = False
    ) -> Path:
        """
        Download the pruned model of a job, and check every file by its hash.

        A download that was cut goes on, now or when this is called again: what is there already
        is in ``.NAME.pull`` beside the folder until it is whole.

        Args:
            job_id: Which.
            folder: New or empty.
            show_progress: Draw a bar on stderr.

        Raises:
            OutputError: The folder is in use, or cannot be written.
            ServiceError: There is no pruned model, or a file is not what the service says it is.
        """
        files = self.artifacts(job_id).files
        path = self._service.job_path(job_id, "/artifacts")
        with bar("Downloading", sum(f.bytes for f in files), shown=show_progress) as advance:
            return pull(files, Path(folder), partial(self._service.part, path), advance)

    def extend(self, job_id: uuid.UUID | str, *, trials: int) -> Job:
        """Give each island of a search more trials."""
        return self._verb(job_id, "extend", {"trials": trials})

    def transfer(
        self,
        job_id: uuid.UUID | str,
        models: Sequence[str],
        *,
        pattern: str | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Job:
        """
        Measure what a job has found on other models; gives the job that does it.

        Args:
            job_id: Id of the search.
            models: Hub ids, or paths that the workers see.
            pattern: Pattern of a job with several, as for :meth:`best`.
            idempotency_key: As for :meth:`submit`.
            options: Other fields of the document: ``report``, ``search``, ``notify`` and the like.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        document = {"models": [*models], **options}
        answer = self._service.request(
            "POST",
            self._service.job_path(job_id, ":transfer"),
            json=document,
            headers=headers,
            params=_at(pattern),
        )
        return read(Job, answer)

    def transferred(self, job_id: uuid.UUID | str) -> TransferFile:
        """What a transfer has measured so far."""
        return read(
            TransferFile, self._service.request("GET", self._service.job_path(job_id, "/transfer"))
        )

    def delete(self, job_id: uuid.UUID | str) -> None:
        """Delete a job that is over or paused."""
        self._service.request("DELETE", self._service.job_path(job_id))

    def configurations(
        self,
        *,
        pattern: str | None = None,
        scope: str | None = None,
        family: str | None = None,
        parameters: int | None = None,
        limit: int = 10,
    ) -> list[ConfigurationMatch]:
        """The configurations of the library that are likely to be good, best first."""
        asked = {"pattern": pattern, "scope": scope, "family": family, "parameters": parameters}
        params: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
        answer = self._service.request("GET", "/configurations", params={**params, "limit": limit})
        return read(ConfigurationMatches, answer).configurations

    def import_configuration(self, file: LibraryFile) -> ConfigurationMatch:
        """Add a configuration that was found elsewhere to the library."""
        document = file.to_dict("import")
        return read(
            ConfigurationMatch, self._service.request("POST", "/configurations", json=document)
        )

    def export_configuration(self, configuration_id: uuid.UUID | str) -> LibraryFile:
        """A configuration of the library, with what it was worth elsewhere."""
        path = f"/configurations/{path_id(configuration_id, 'a configuration', 'configurations')}"
        answer = self._service.request("GET", path)
        try:
            return parse_library_file(answer.json(), f"{self.url}/v1{path}")
        except ValueError as error:
            raise no_pho() from error

    def delete_configuration(self, configuration_id: uuid.UUID | str) -> None:
        """Take a configuration out of the library."""
        path = path_id(configuration_id, "a configuration", "configurations")
        self._service.request("DELETE", f"/configurations/{path}")

    def plan(
        self,
        spec: Mapping[str, Any],
        *,
        card: str | None = None,
        device_memory: int | None = None,
        main_memory: int | None = None,
    ) -> PlanAnswer:
        """
        What a job would take, before it is submitted.

        Args:
            spec: The document of the job.
            card: ``H100``, ``A100``, ``cpu`` and others; the service's default if None.
            device_memory: Bytes of that card, if it has others than usual.
            main_memory: Bytes of main memory.
        """
        asked = {"card": card, "device_memory": device_memory, "main_memory": main_memory}
        params = {name: value for name, value in asked.items() if value is not None}
        return read(
            PlanAnswer, self._service.request("POST", "/plan", json=dict(spec), params=params)
        )

    def workers(self) -> list[Worker]:
        """The workers that reported lately."""
        return read(WorkerList, self._service.request("GET", "/workers")).workers

    def wait(
        self,
        job_id: uuid.UUID | str,
        *,
        timeout_s: float | None = None,
        show_progress: bool = True,
    ) -> Job:
        """
        Wait until a job is over. Outages of up to five minutes are waited out.

        Args:
            job_id: Which.
            timeout_s: Give up after so long.
            show_progress: Draw bars on stderr.

        Raises:
            TimeoutError: The job is not over after ``timeout_s``; it goes on.
            ServiceError: The service says no, or is away for too long.
        """
        patience_s = _OUTAGE_S if timeout_s is None else min(_OUTAGE_S, timeout_s)
        patient = Retrying(
            retry=retry_if_exception_type(ServiceUnavailable),
            wait=wait_exponential(multiplier=0.5, max=10),
            stop=stop_before_delay(patience_s),
            reraise=True,
        )
        began = time.monotonic()
        with empty_bars(shown=show_progress) as bars:
            search = bars.add_task("queued", total=None)
            confirmation = bars.add_task("perplexities", total=None, visible=False)
            while True:
                job = patient(self.job, job_id)
                done = job.progress
                completed, total = done.trials_done, done.trials
                if job.kind == "transfer":
                    completed, total = done.models_done, done.models
                elif job.stage == "calibrate" and done.shards:
                    completed, total = done.shards_done, done.shards
                elif job.stage != "search" and done.step is not None:
                    completed, total = done.step.done, done.step.steps
                bars.update(
                    search,
                    completed=completed,
                    total=total,
                    description=f"{job.state}, {job.stage or 'waiting'}",
                )  # fmt: skip
                if done.points:
                    bars.update(
                        confirmation, completed=done.points_done, total=done.points,
                        description="patterns", visible=True,
                    )  # fmt: skip
                if done.perplexities:
                    bars.update(
                        confirmation, completed=done.perplexities_done, total=done.perplexities,
                        visible=True,
                    )  # fmt: skip
                if job.state.is_over:
                    return job
                if timeout_s is not None and time.monotonic() - began > timeout_s:
                    raise TimeoutError(f"job {job_id} is {job.state} after {timeout_s:g} s.")
                time.sleep(_POLL_S)

    def _verb(
        self,
        job_id: uuid.UUID | str,
        verb: str,
        document: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
    ) -> Job:
        path = self._service.job_path(job_id, f":{verb}")
        return read(Job, self._service.request("POST", path, json=document, params=params))


def _at(pattern: str | None) -> dict[str, str]:
    """A query that names one of several patterns."""
    return {} if pattern is None else {"pattern": pattern}
