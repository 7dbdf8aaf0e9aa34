"""
A Python client of the service: requests, refusals in words, and waiting where it is asked to.
"""

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import httpx_sse
from httpx_sse import EventSource, connect_sse
from pydantic import BaseModel, ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_before_delay,
)
from tenacity.wait import wait_exponential

from pho_service.api.answers import (
    NO_WORKER,
    ArtifactList,
    ConfigurationMatch,
    ConfigurationMatches,
    Job,
    JobPage,
    PlanAnswer,
    Problem,
    Submitted,
    TextPage,
    Trial,
    TrialPage,
    UploadedText,
    Worker,
    WorkerList,
)
from pho_service.errors import InvalidInput, ServiceError, ServiceUnavailable
from pho_service.host.artifacts import ID_BEGINS, sha256_of
from pho_service.host.download import File, pull
from pho_service.host.settings import read_settings
from pho_service.library import LibraryFile, TransferFile, parse_library_file
from pho_service.progress import empty_bars, watched
from pho_service.spec.configuration import Configuration
from pho_service.spec.fields import TEXT_FILES, named_texts

Answer = TypeVar("Answer", bound=BaseModel)
Page = TypeVar("Page", JobPage, TrialPage, TextPage)

_PATIENCE_S = 120.0  # with a service that is asked too often
_JOB_ID = re.compile(r"[0-9a-fA-F-]{4,36}")  # or the beginning of one
_OUTAGE_S = 300.0  # that waiting for a job bears
_POLL_S = 1.0
_CHUNK = 2**20
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Event:
    """
    Something that happened to a job.

    Attributes:
        id: Give it to :meth:`Client.events` to go on after it.
        kind: ``state``, ``stage``, ``progress``, ``retry`` or ``put_down``.
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
        settings = read_settings(api_url=url, api_key=key)
        secret = settings.api_key.get_secret_value() if settings.api_key else None
        if secret and not (secret.isascii() and secret.isprintable()):
            raise InvalidInput(
                "the key has characters that no key has. Copy it again from where `pho keys "
                "create` printed it."
            )
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self.url = settings.api_url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=f"{self.url}/v1",
                headers=headers,
                timeout=timeout_s,
                transport=httpx.HTTPTransport(retries=2),
            )
        except httpx.InvalidURL as error:
            raise InvalidInput(
                f"the service's URL {self.url!r} is not understood: {error}. Write "
                "http://127.0.0.1:8000, say."
            ) from error

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

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Submitted:
        """
        Submit a job document; docs/service.md describes it. The answer has the job's ``id``.

        Text files that it names and that lie here are uploaded, if the service is on another
        machine or does not see them.

        Args:
            spec: At least ``model``, and ``pattern``, ``patterns`` or ``target``.
            idempotency_key: The same twice makes one job. By default a fresh
                one, so that a request that is repeated after an outage makes no second job.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return _read(Submitted, self._with_texts("/jobs", spec, headers=headers))

    def fork(
        self,
        job_id: uuid.UUID | str,
        *,
        idempotency_key: str | None = None,
        **changes: Any,
    ) -> Submitted:
        """
        Submit a job like another one, which begins with its trials inside the search space.

        Args:
            job_id: Id of a search at one pattern.
            idempotency_key: As for :meth:`submit`.
            changes: Fields of the document that change: ``search_space={"row_share": [0.2, 0.4]}``,
                ``trials=100`` and the like; of parts only what changes in them.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        path = self._job_path(job_id, ":fork")
        return _read(Submitted, self._with_texts(path, changes, headers=headers))

    def upload(self, file: str | Path, *, progress: bool | None = None) -> UploadedText:
        """
        Upload a text file, unless the service has it; jobs name it by the ``id`` of the answer.

        Args:
            file: .txt, .jsonl or .parquet.
            progress: Draw a bar on stderr; None draws it in terminals and notebooks.

        Raises:
            InvalidInput: There is no such file, or it is larger than the service takes.
            ServiceError: The service does not take it, and says why.
        """
        path = Path(file).expanduser()
        if not path.is_file() or path.suffix not in TEXT_FILES:
            raise InvalidInput(f"{file} is not a text file: give {', '.join(TEXT_FILES)}.")
        digest, size = sha256_of(path), path.stat().st_size
        with suppress(ServiceError):  # an outage is told by the next request
            return self._get(UploadedText, f"/texts/{ID_BEGINS}{digest}{path.suffix}")
        most = self._get(TextPage, "/texts", page_size=1).most_bytes
        if size > most:
            raise InvalidInput(
                f"{file} has {size} bytes, and the service takes {most}. Put it where the service "
                "sees it, and name it from there; its operator sets PHO_MAX_UPLOAD_BYTES."
            )
        name = re.sub(r"[^\w .()+,=@~-]", "_", path.stem)[-200:] + path.suffix
        with empty_bars(shown=watched(progress), of_bytes=True) as bars:
            task = bars.add_task(f"Uploading {path.name}", total=size)

            def content() -> Iterator[bytes]:
                with path.open("rb") as opened:
                    while chunk := opened.read(_CHUNK):
                        yield chunk
                        bars.advance(task, len(chunk))

            answer = _retrying()(
                lambda: self._request_once(
                    "POST",
                    "/texts",
                    params={"name": name, "sha256": digest},
                    content=content(),
                    headers={"Content-Length": str(size)},
                )
            )
        return _read(UploadedText, answer)

    def texts(self) -> Iterator[UploadedText]:
        """The texts that were uploaded with this key, newest first."""
        for page in self._pages(TextPage, "/texts", {}):
            yield from page.texts

    def delete_text(self, text_id: str) -> None:
        """Delete an uploaded text that no unfinished job names."""
        self._request("DELETE", f"/texts/{quote(text_id, safe=':')}")

    def job(self, job_id: uuid.UUID | str) -> Job:
        """A job with its progress."""
        return self._get(Job, self._job_path(job_id))

    def jobs(
        self,
        states: Sequence[str] = (),
        *,
        models: Sequence[str] = (),
        patterns: Sequence[str] = (),
        labels: Sequence[str] = (),
        name: str | None = None,
        sort: str | None = None,
    ) -> Iterator[Job]:
        """
        All jobs for which everything holds that is given, page by page.

        Args:
            states: They are in one of these.
            models: They are for one of these.
            patterns: They have one of these; ``target`` has those that look for one.
            labels: They have all of these: ``team=a``, or ``team`` with any value.
            name: It is in their name, or their id begins with it.
            sort: As ``GET /v1/jobs`` takes it, such as ``rise`` or ``-gain``; None is newest first.
        """
        params: dict[str, Any] = {"state": [*states], "model": [*models], "pattern": [*patterns]}
        params |= {"label": [*labels], "name": name or None, "sort": sort or None}
        for page in self._pages(JobPage, "/jobs", params):
            yield from page.jobs

    def trials(self, job_id: uuid.UUID | str, *, island: int = 0) -> Iterator[Trial]:
        """The trials of an island by number, page by page."""
        path = self._job_path(job_id, "/trials")
        for page in self._pages(TrialPage, path, {"island": island}):
            yield from page.trials

    def best(self, job_id: uuid.UUID | str, *, pattern: str | None = None) -> Configuration:
        """
        The best configuration of a job that has one.

        Args:
            job_id: Which.
            pattern: One of a job with several; of a target, None is the answer.
        """
        path = self._job_path(job_id, "/best")
        return self._get(Configuration, path, pattern=pattern)

    def report(self, job_id: uuid.UUID | str) -> str:
        """A job as one page of HTML that needs no network; of any job in any state."""
        answer = self._request("GET", self._job_path(job_id, "/report"))
        if "PHO report</title>" not in answer.text:
            raise _no_pho()
        return answer.text

    def events(self, job_id: uuid.UUID | str, *, after: int = 0) -> Iterator[Event]:
        """What happens to a job, from the event after ``after`` to the end of the job."""
        headers = {"Last-Event-ID": str(after)} if after else {}
        path = self._job_path(job_id, "/events")
        try:
            with ExitStack() as stack:
                source = _retrying()(self._stream, stack, path, headers)
                for event in source.iter_sse():
                    if not event.data:  # the service's sign of life, which httpx-sse gives an id
                        continue
                    try:
                        parsed = Event(id=int(event.id), kind=event.event, data=event.json())
                    except ValueError as error:
                        raise _no_pho() from error
                    yield parsed
        except httpx_sse.SSEError as error:
            raise _no_pho() from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

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
        return self._get(ArtifactList, self._job_path(job_id, "/artifacts"))

    def pull(
        self, job_id: uuid.UUID | str, folder: str | Path, *, progress: bool | None = None
    ) -> Path:
        """
        Download the pruned model of a job, and check every file by its hash.

        A download that was cut goes on, now or when this is called again: what is there already
        is in ``.NAME.pull`` beside the folder until it is whole.

        Args:
            job_id: Which.
            folder: New or empty.
            progress: Draw bars on stderr; None draws them in terminals and notebooks.

        Raises:
            OutputError: The folder is in use, or cannot be written.
            ServiceError: There is no pruned model, or a file is not what the service says it is.
        """
        files = self.artifacts(job_id).files
        path = self._job_path(job_id, "/artifacts")
        with empty_bars(shown=watched(progress), of_bytes=True) as bars:
            task = bars.add_task("Downloading", total=sum(file.bytes for file in files))
            part = partial(self._part, path)
            return pull(files, Path(folder), part, partial(bars.advance, task))

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
        path = self._job_path(job_id, ":transfer")
        return _read(Job, self._with_texts(path, document, headers=headers, params=_at(pattern)))

    def transferred(self, job_id: uuid.UUID | str) -> TransferFile:
        """What a transfer has measured so far."""
        return self._get(TransferFile, self._job_path(job_id, "/transfer"))

    def delete(self, job_id: uuid.UUID | str) -> None:
        """Delete a job that is over or paused."""
        self._request("DELETE", self._job_path(job_id))

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
        matches = self._get(
            ConfigurationMatches, "/configurations", pattern=pattern, scope=scope, family=family,
            parameters=parameters, limit=limit,
        )  # fmt: skip
        return matches.configurations

    def import_configuration(self, file: LibraryFile) -> ConfigurationMatch:
        """Add a configuration that was found elsewhere to the library."""
        document = file.to_dict("import")
        return _read(ConfigurationMatch, self._request("POST", "/configurations", json=document))

    def export_configuration(self, configuration_id: uuid.UUID | str) -> LibraryFile:
        """A configuration of the library, with what it was worth elsewhere."""
        path = f"/configurations/{_path_id(configuration_id)}"
        answer = self._request("GET", path)
        try:
            return parse_library_file(answer.json(), f"{self.url}/v1{path}")
        except ValueError as error:
            raise _no_pho() from error

    def delete_configuration(self, configuration_id: uuid.UUID | str) -> None:
        """Take a configuration out of the library."""
        path = _path_id(configuration_id)
        self._request("DELETE", f"/configurations/{path}")

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
        options = {"card": card, "device_memory": device_memory, "main_memory": main_memory}
        params = {name: value for name, value in options.items() if value is not None}
        return _read(PlanAnswer, self._request("POST", "/plan", json=dict(spec), params=params))

    def workers(self) -> list[Worker]:
        """The workers that reported lately."""
        return self._get(WorkerList, "/workers").workers

    def drain(self, worker_id: uuid.UUID | str, *, now: bool = False) -> Worker:
        """
        Have a worker take no more stages, and end.

        Args:
            worker_id: Which, as :meth:`workers` gives it.
            now: Hand back the stage that it has in hand, instead of finishing it first.
        """
        path = f"/workers/{worker_id}:drain"
        return _read(Worker, self._request("POST", path, params={"now": now}))

    def wait(
        self,
        job_id: uuid.UUID | str,
        *,
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> Job:
        """
        Wait until a job is over; after a first answer, outages of up to five minutes, too.

        Args:
            job_id: Which.
            timeout_s: Give up after so long.
            progress: Draw bars on stderr; None draws them in terminals and notebooks.

        Raises:
            TimeoutError: The job is not over after ``timeout_s``; it goes on.
            ServiceError: The service says no, or is away for too long.
        """
        patience_s = _OUTAGE_S if timeout_s is None else min(_OUTAGE_S, timeout_s)
        began = time.monotonic()
        job = self.job(job_id)  # at once: whoever asks the wrong place learns it now
        with empty_bars(shown=watched(progress)) as bars:
            search = bars.add_task("queued", total=None)
            confirmation = bars.add_task("perplexities", total=None, visible=False)
            patient = Retrying(
                retry=retry_if_exception_type(ServiceUnavailable),
                wait=wait_exponential(multiplier=0.5, max=10),
                stop=stop_before_delay(patience_s),
                before_sleep=lambda _: bars.update(search, description="waiting for the service"),
                reraise=True,
            )
            while True:
                done = job.progress
                alone = NO_WORKER in job.warnings
                bars.tasks[search].total = None if alone else done.total  # None tells no time left
                at = "no worker is connected" if alone else job.stage or "waiting"
                bars.update(
                    search,
                    completed=done.done,
                    description=job.state if job.state.is_over else f"{job.state}, {at}",
                )
                for part in map(done.of, ("point", "perplexity")):
                    if part.total:
                        bars.update(
                            confirmation, completed=part.done, total=part.total,
                            description=part.unit, visible=True,
                        )  # fmt: skip
                if job.state.is_over:
                    return job
                if timeout_s is not None and time.monotonic() - began > timeout_s:
                    raise TimeoutError(f"job {job_id} is {job.state} after {timeout_s:g} s.")
                time.sleep(_POLL_S)
                job = patient(self.job, job_id)

    def _with_texts(self, path: str, document: Mapping[str, Any], **more: Any) -> httpx.Response:
        """Send a document; texts of this machine that the service does not see are uploaded."""
        here: dict[str, str] = {}
        try:
            here |= {
                pointer: name
                for pointer, name in named_texts(document)
                if name.endswith(TEXT_FILES) and Path(name).expanduser().is_file()
            }
            if self._http.base_url.host not in _THIS_MACHINE:
                document, here = self._uploaded(document, here), {}
            while True:
                try:
                    return self._request("POST", path, json=dict(document), **more)
                except ServiceError as error:  # which may be about the first of several
                    unseen = {at: here.pop(at) for at in error.pointers if at in here}
                    if not unseen:
                        raise
                document = self._uploaded(document, unseen)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"the job document cannot be sent as JSON: {error}.") from error

    def _uploaded(self, document: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
        """A document with uploaded texts at some places."""
        changed = deepcopy(dict(document))
        for pointer, name in texts.items():
            *above, last = pointer.split("/")[1:]
            part: Any = changed
            for step in above:
                part = part[int(step) if isinstance(part, list) else step]
            part[int(last) if isinstance(part, list) else last] = self.upload(name).id
        return changed

    def _get(self, kind: type[Answer], path: str, **params: Any) -> Answer:
        query = {name: value for name, value in params.items() if value is not None}
        return _read(kind, self._request("GET", path, params=query))

    def _pages(self, kind: type[Page], path: str, params: dict[str, Any]) -> Iterator[Page]:
        while True:
            page = self._get(kind, path, **params)
            yield page
            if page.next_page_token is None:
                return
            params = {**params, "page_token": page.next_page_token}

    def _verb(
        self,
        job_id: uuid.UUID | str,
        verb: str,
        document: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
    ) -> Job:
        path = self._job_path(job_id, f":{verb}")
        return _read(Job, self._request("POST", path, json=document, params=params))

    def _job_path(self, job_id: uuid.UUID | str, rest: str = "") -> str:
        """The path of a job, or of what is below it; the beginning of its id is enough."""
        name = str(job_id)
        if not _JOB_ID.fullmatch(name):
            raise _no_id(name)
        return f"/jobs/{name}{rest}"

    @contextmanager
    def _part(self, path: str, file: File, first: int) -> Iterator[tuple[bool, Iterator[bytes]]]:
        """The bytes of a file from the first that is missing; whether they begin there."""
        etag = f'"{file.sha256}"'
        headers = {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={first}-", "If-Range": etag} if first else {}
        try:
            url = f"{path}/{quote(file.name)}"
            with self._http.stream("GET", url, headers=headers) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refused(answer)
                yield answer.status_code == 206, answer.iter_raw()
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _stream(self, stack: ExitStack, path: str, headers: dict[str, str]) -> EventSource:
        """A stream of events, which is open until the stack ends."""
        request = connect_sse(self._http, "GET", path, headers=headers, timeout=None)
        with ExitStack() as refused:
            source = refused.enter_context(request)
            if not source.response.is_success:
                source.response.read()
                raise _refused(source.response)
            stack.push(refused.pop_all())
        return source

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        return _retrying()(self._request_once, method, path, **more)

    def _request_once(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not answer.is_success:
            raise _refused(answer)
        return answer

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnavailable:
        """The error of a service that is away."""
        return ServiceUnavailable(
            f"the service at {self.url} cannot be reached: {error}. Start it with `pho serve`, or "
            "set PHO_API_URL."
        )


def _at(pattern: str | None) -> dict[str, str]:
    """A query that names one of several patterns."""
    return {} if pattern is None else {"pattern": pattern}


def _retrying() -> Retrying:
    """Again, when it may be, what was refused because it came too soon: nothing was done of it."""
    return Retrying(
        retry=retry_if_exception(lambda error: getattr(error, "code", "") == "too_many_requests"),
        wait=_as_told,
        stop=stop_before_delay(_PATIENCE_S),
        sleep=time.sleep,
        reraise=True,
    )


def _as_told(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    wait_s = error.retry_after_s if isinstance(error, ServiceError) else None
    return 1.0 if wait_s is None else wait_s


def _read(kind: type[Answer], answer: httpx.Response) -> Answer:
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise _no_pho() from error


def _no_pho() -> ServiceError:
    """The error of an answer that is somebody else's."""
    return ServiceError(
        "the answer is not one that PHO gives: something else listens there, or a service of "
        "another version. Check PHO_API_URL.",
        code="unknown",
    )


def _path_id(name: uuid.UUID | str) -> str:
    try:
        return str(uuid.UUID(str(name)))
    except ValueError:
        raise _no_id(str(name), "a configuration", "configurations") from None


def _no_id(name: str, thing: str = "a job", verb: str = "jobs") -> InvalidInput:
    return InvalidInput(f"{name!r} is not {thing}'s id. `pho {verb}` shows the ids of all.")


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
    wait_s = answer.headers.get("Retry-After", "")
    return kind(
        "\n".join(lines),
        status=problem.status,
        code=problem.code,
        pointers=[e.pointer for e in problem.errors or () if e.pointer],
        retry_after_s=float(wait_s) if wait_s.isdecimal() and len(wait_s) < 10 else None,
    )
