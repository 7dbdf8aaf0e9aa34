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
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import httpx_sse
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay
from tenacity.wait import wait_exponential

from pho_service.configuration import Configuration
from pho_service.documents import (
    OVER,
    Job,
    JobPage,
    Problem,
    State,
    Trial,
    TrialPage,
    Worker,
    WorkerList,
)
from pho_service.errors import ServiceError, ServiceUnavailable
from pho_service.settings import read_settings

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

    Args:
        url: Of the service; ``PHO_API_URL`` by default, else this machine.
        key: ``PHO_API_KEY`` by default.
        timeout_s: Of one request.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout_s: float = 30.0
    ) -> None:
        settings = read_settings(api_url=url, api_key=key)
        secret = settings.api_key.get_secret_value() if settings.api_key else None
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self.url = settings.api_url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.url}/v1", headers=headers, timeout=timeout_s,
            transport=httpx.HTTPTransport(retries=2),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """
        Submit a job document; docs/service.md describes it.

        Args:
            spec: At least ``model`` and ``pattern``.
            idempotency_key: The same twice makes one job. By default a fresh
                one, so that a request that is repeated after an outage makes no second job.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        answer = self._request("POST", "/jobs", json=dict(spec), headers=headers)
        return Job.model_validate_json(answer.content)

    def job(self, job_id: uuid.UUID | str) -> Job:
        """A job with its progress."""
        return Job.model_validate_json(self._request("GET", f"/jobs/{job_id}").content)

    def jobs(self, states: Sequence[State] = ()) -> Iterator[Job]:
        """All jobs, newest first, page by page."""
        params: dict[str, Any] = {"state": [*states]}
        while True:
            answer = self._request("GET", "/jobs", params=params)
            page = JobPage.model_validate_json(answer.content)
            yield from page.jobs
            if page.next_page_token is None:
                return
            params["page_token"] = page.next_page_token

    def trials(self, job_id: uuid.UUID | str, *, island: int = 0) -> Iterator[Trial]:
        """The trials of an island by number, page by page."""
        params: dict[str, Any] = {"island": island}
        while True:
            answer = self._request("GET", f"/jobs/{job_id}/trials", params=params)
            page = TrialPage.model_validate_json(answer.content)
            yield from page.trials
            if page.next_page_token is None:
                return
            params["page_token"] = page.next_page_token

    def best(self, job_id: uuid.UUID | str) -> Configuration:
        """The best configuration of a job that has one."""
        answer = self._request("GET", f"/jobs/{job_id}/best")
        return Configuration.model_validate(answer.json())

    def events(self, job_id: uuid.UUID | str, *, after: int = 0) -> Iterator[Event]:
        """What happens to a job, from the event after ``after`` to the end of the job."""
        headers = {"Last-Event-ID": str(after)} if after else {}
        try:
            with httpx_sse.connect_sse(
                self._http, "GET", f"/jobs/{job_id}/events", headers=headers, timeout=None
            ) as source:
                if source.response.is_error:
                    source.response.read()
                    raise _refused(source.response)
                for event in source.iter_sse():
                    yield Event(id=int(event.id), kind=event.event, data=event.json())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def cancel(self, job_id: uuid.UUID | str) -> Job:
        """Stop a job for good."""
        return self._verb(job_id, "cancel")

    def pause(self, job_id: uuid.UUID | str) -> Job:
        """Put a job down."""
        return self._verb(job_id, "pause")

    def resume(self, job_id: uuid.UUID | str) -> Job:
        """Go on with a job that is paused or has failed."""
        return self._verb(job_id, "resume")

    def extend(self, job_id: uuid.UUID | str, *, trials: int) -> Job:
        """Give each island of a search more trials."""
        return self._verb(job_id, "extend", {"trials": trials})

    def delete(self, job_id: uuid.UUID | str) -> None:
        """Delete a job that is over or paused."""
        self._request("DELETE", f"/jobs/{job_id}")

    def workers(self) -> list[Worker]:
        """The workers that reported lately."""
        return WorkerList.model_validate_json(self._request("GET", "/workers").content).workers

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
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        patient = Retrying(
            retry=retry_if_exception_type(ServiceUnavailable),
            wait=wait_exponential(multiplier=0.5, max=10),
            stop=stop_after_delay(_OUTAGE_S),
            reraise=True,
        )
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        began = time.monotonic()
        with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as bars:
            search = bars.add_task("queued", total=None)
            confirmation = bars.add_task("perplexities", total=None, visible=False)
            while True:
                job = patient(self.job, job_id)
                done = job.progress
                bars.update(
                    search, completed=done.trials_done, total=done.trials,
                    description=f"{job.state}, {job.stage or 'waiting'}",
                )  # fmt: skip
                if done.perplexities:
                    bars.update(
                        confirmation, completed=done.perplexities_done, total=done.perplexities,
                        visible=True,
                    )  # fmt: skip
                if job.state in OVER:
                    return job
                if timeout_s is not None and time.monotonic() - began > timeout_s:
                    raise TimeoutError(f"job {job_id} is {job.state} after {timeout_s:g} s.")
                time.sleep(_POLL_S)

    def _verb(
        self, job_id: uuid.UUID | str, verb: str, document: dict[str, Any] | None = None
    ) -> Job:
        answer = self._request("POST", f"/jobs/{job_id}:{verb}", json=document)
        return Job.model_validate_json(answer.content)

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise _refused(answer)
        return answer

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"the service at {self.url} cannot be reached: {error}. Start it with `pho serve`, or "
            "set PHO_API_URL."
        )


def _refused(answer: httpx.Response) -> ServiceError:
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:  # a proxy's page, or no service of ours
        problem = Problem(
            title="", status=answer.status_code, detail=f"HTTP {answer.status_code}", code="unknown"
        )
    lines = [problem.detail]
    if len(problem.errors or ()) > 1:
        lines = [f"{e.pointer or e.parameter}: {e.detail}" for e in problem.errors or ()]
    kind = ServiceUnavailable if problem.status in (502, 503, 504) else ServiceError
    return kind("\n".join(lines), status=problem.status, code=problem.code)
