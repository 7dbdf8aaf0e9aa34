"""
How the client talks to a service: requests, refusals in words, and waiting where it is asked to.
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from httpx_sse import EventSource, connect_sse
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay

from pho_service.api.answers import JobPage, Problem
from pho_service.errors import InvalidInput, ServiceError, ServiceUnavailable
from pho_service.host.download import File
from pho_service.host.settings import read_settings

_PATIENCE_S = 120.0  # with a service that is asked too often

_SHORT_ID = re.compile(r"[0-9a-fA-F-]{4,35}")  # the beginning of an id
_MOST_NAMED = 3  # jobs whose ids begin alike


class Connection:
    """
    Requests to one service. Errors are ServiceError; an outage is ServiceUnavailable.

    Args:
        url, key, timeout_s: As of :class:`~pho_service.client.Client`.
    """

    def __init__(self, url: str | None, key: str | None, timeout_s: float) -> None:
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

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def job_path(self, given: uuid.UUID | str, rest: str = "") -> str:
        """
        The path of a job, or of what is below it.

        Args:
            given: Its id; the beginning of it is enough if no other job's id begins so.
            rest: What follows the id.

        Raises:
            InvalidInput: It is none, no job's id begins so, or those of several do.
        """
        begins = str(given)
        if not _SHORT_ID.fullmatch(begins) or len(begins.replace("-", "")) == 32:
            return f"/jobs/{path_id(given)}{rest}"
        params = {"id": begins, "page_size": _MOST_NAMED + 1}
        found = read(JobPage, self.request("GET", "/jobs", params=params)).jobs
        if not found:
            raise InvalidInput(
                f"no job's id begins with {begins!r}. `pho jobs` shows the ids of all."
            )
        if len(found) > 1:
            named = ", ".join(f"{job.id} ({job.name})" for job in found[:_MOST_NAMED])
            more = ", and more" if len(found) > _MOST_NAMED else ""
            raise InvalidInput(
                f"the ids of several jobs begin with {begins!r}: {named}{more}. Give more of it."
            )
        return f"/jobs/{found[0].id}{rest}"

    @contextmanager
    def part(self, path: str, file: File, first: int) -> Iterator[tuple[bool, Iterator[bytes]]]:
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
            raise self.unreachable(error) from error

    def stream(self, stack: ExitStack, path: str, headers: dict[str, str]) -> EventSource:
        """A stream of events, which is open until the stack ends."""
        return _retrying()(self._stream_once, stack, path, headers)

    def _stream_once(self, stack: ExitStack, path: str, headers: dict[str, str]) -> EventSource:
        request = connect_sse(self._http, "GET", path, headers=headers, timeout=None)
        with ExitStack() as refused:
            source = refused.enter_context(request)
            if not source.response.is_success:
                source.response.read()
                raise _refused(source.response)
            stack.push(refused.pop_all())
        return source

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """
        The answer to a request.

        Args:
            method: HTTP method.
            path: Below ``/v1``.
            more: As of ``httpx.Client.request``.

        Raises:
            ServiceError: The service says no, or cannot be reached.
        """
        return _retrying()(self._request_once, method, path, **more)

    def _request_once(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise self.unreachable(error) from error
        if not answer.is_success:
            raise _refused(answer)
        return answer

    def unreachable(self, error: httpx.TransportError) -> ServiceUnavailable:
        """What is raised where the service is away."""
        return ServiceUnavailable(
            f"the service at {self.url} cannot be reached: {error}. Start it with `pho serve`, or "
            "set PHO_API_URL."
        )


def _retrying() -> Retrying:
    """Again, when it may be, what was refused because it came too soon: nothing was done of it."""
    return Retrying(
        retry=retry_if_exception(_is_too_soon),
        wait=_as_told,
        stop=stop_before_delay(_PATIENCE_S),
        sleep=time.sleep,
        reraise=True,
    )


def _is_too_soon(error: BaseException) -> bool:
    return isinstance(error, ServiceError) and error.code == "too_many_requests"


def _as_told(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    told = error.retry_after_s if isinstance(error, ServiceError) else None
    return 1.0 if told is None else told


Answer = TypeVar("Answer", bound=BaseModel)


def read(kind: type[Answer], answer: httpx.Response) -> Answer:
    """
    Return what an answer says.

    Raises:
        ServiceError: It is not what PHO answers.
    """
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise no_pho() from error


def no_pho() -> ServiceError:
    """What is raised where somebody else answers."""
    return ServiceError(
        "the answer is not one that PHO gives: something else listens there, or a service of "
        "another version. Check PHO_API_URL.",
        code="unknown",
    )


def path_id(given: uuid.UUID | str, thing: str = "a job", verb: str = "jobs") -> str:
    """
    An id for a path.

    Raises:
        InvalidInput: It is none; says which verb lists those that there are.
    """
    try:
        return str(uuid.UUID(str(given)))
    except ValueError:
        raise InvalidInput(
            f"{str(given)!r} is not {thing}'s id. `pho {verb}` shows the ids of all."
        ) from None


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
    told = answer.headers.get("Retry-After", "")
    return kind(
        "\n".join(lines),
        status=problem.status,
        code=problem.code,
        retry_after_s=float(told) if told.isdecimal() and len(told) < 10 else None,
    )
