"""
Every error as ``application/problem+json`` (RFC 9457).
"""

import dataclasses
import difflib
import json
import logging
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route

from pho_service.api.answers import Problem
from pho_service.errors import OutputError, shown
from pho_service.host.logs import request_id
from pho_service.spec.document import broken_rule
from pho_service.spec.fields import FieldError
from pho_service.spec.job import JobSpec
from storage.configurations import NoSuchConfiguration
from storage.keys import QuotaExceeded
from storage.records import (
    IdempotencyKeyReused,
    JobState,
    NoSuchJob,
    StateConflict,
    TooManyJobs,
    TooManyTrials,
)
from storage.studies import DatabaseFull, DatabaseGone, StorageError
from storage.texts import NoSuchText, TextInUse, TooManyTexts

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 5
TOO_MANY_JOBS = {
    "unfinished": "You have as many unfinished jobs as one key may have. Wait, or cancel some; the "
    "operator sets PHO_MAX_UNFINISHED_JOBS.",
    "urgent": "You have as many unfinished jobs with a priority above 0 as one key may have. Give "
    "a priority of 0 or less, or wait; the operator sets PHO_MAX_URGENT_JOBS.",
    "finished": "You have as many jobs that are over as one key may have. Delete some; the "
    "operator sets PHO_MAX_FINISHED_JOBS.",
}
MOST_ERRORS = 100  # of a document: an answer is not many times as large as what it answers


class Conflict(Exception):
    """A job is not one that this can be asked of, or not yet."""

    def __init__(self, code: str, detail: str, state: JobState) -> None:
        super().__init__(detail)
        self.code = code
        self.state = state


class NoSuchIsland(Exception):
    """A job has not so many islands."""

    def __init__(self, count: int) -> None:
        super().__init__(f"The job has {count} islands, numbered from 0.")


class AmbiguousId(LookupError):
    """The ids of several jobs begin alike."""


class TooManyConfigurations(Exception):
    """A key has as many entries in the library as one may import."""


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """An answer that says what went wrong."""
    document = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id(),
        **more,
    )
    return JSONResponse(
        document.model_dump(mode="json", exclude_none=True),
        status_code=status,
        headers=headers,
        media_type="application/problem+json",
    )


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that an operation may answer, for the OpenAPI document."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in sorted({401, 403, 429, 503, *statuses})
    }


def documented_file(
    about: str, *statuses: int, kind: str = "application/json", schema: Any = None
) -> dict[int | str, dict[str, Any]]:
    """An answer that is a file, of JSON by default, and the errors; for the OpenAPI document."""
    content = {kind: {"schema": schema or {"type": "object"}}}
    return {200: {"description": about, "content": content}, **documented(*statuses)}


def json_file(document: Mapping[str, Any]) -> Response:
    """A document as the command line writes it into a file."""
    return Response(json.dumps(document, indent=2) + "\n", media_type="application/json")


def wrong_parameter(name: str, rule: str) -> RequestValidationError:
    """A parameter of the query breaks a rule that its type does not say."""
    return RequestValidationError([{"loc": ("query", name), "msg": rule, "type": "value_error"}])


def add_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Turn every exception into a problem."""
    # None of them in a thread: those may all wait for the database that an error is about.

    async def _plain(_request: Request, error: Exception) -> JSONResponse:
        return next(PLAIN[kind] for kind in type(error).__mro__ if kind in PLAIN)(error)

    for kind in PLAIN:
        app.add_exception_handler(kind, _plain)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        errors = [field_problem(dict(e), _body_model(request)) for e in faults[:MOST_ERRORS]]
        first = errors[0]
        place = first.get("pointer") or first.get("parameter") or "the body"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return problem(422, "invalid_request", f"{place}: {first['detail']}{more}", errors=errors)

    @app.exception_handler(NoSuchJob)
    async def _missing(request: Request, error: NoSuchJob) -> JSONResponse:
        in_api = request.url.path.startswith("/v1/")
        way_out = (
            "`pho jobs` or GET /v1/jobs lists them." if in_api else "It may have been deleted."
        )
        given = str(error)
        begins = "this id" if len(given) == 36 else f"an id that begins with {shown(given, 40)}"
        return problem(404, "no_such_job", f"No job has {begins}. {way_out}")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # what FastAPI says of bodies that json cannot even read
            errors = [{"pointer": "", "detail": "the body cannot be read as JSON"}]
            return problem(
                422, "invalid_request", "The body cannot be read as JSON.", errors=errors
            )
        phrase = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        code = "body_too_large" if error.status_code == 413 else phrase
        headers = dict(error.headers) if error.headers else {}
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods(request, routes)))
        return problem(error.status_code, code, str(error.detail), headers=headers)


def _at(error: Any, code: str, pointer: str) -> JSONResponse:
    """One place of a document is wrong."""
    errors = [{"pointer": pointer, "detail": str(error)}]
    return problem(422, code, f"{pointer or 'the body'}: {error}", errors=errors)


def _no_store(error: Exception) -> JSONResponse:
    logger.warning("the artifact store fails: %s", error)
    return problem(503, "artifact_store_unavailable", sentence(str(error)))


def _no_quota(error: QuotaExceeded) -> JSONResponse:
    detail = sentence(str(error))
    if error.free_at is None:
        return problem(422, "job_too_large", detail, errors=[{"pointer": "", "detail": detail}])
    wait_s = (error.free_at - datetime.now(UTC)).total_seconds()
    headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return problem(429, "quota_exceeded", detail, headers=headers)


def database_gone(error: Exception) -> JSONResponse:
    """The answer while the database is away."""
    if isinstance(error, DatabaseFull):
        logger.error("the database's disk is full: %s", error)
        return problem(
            503,
            "database_full",
            "The disk of the database is full, and nothing of this was stored. What was stored "
            "before is kept; try again when there is space on it.",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
    logger.warning("the database is away: %s", error)
    return problem(
        503,
        "database_unavailable",
        "The database cannot be reached. What was stored is kept; try again soon.",
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def sentence(text: str) -> str:
    file = "." in text.partition(" ")[0]  # its name stays as it is
    return text if file else text[:1].upper() + text[1:]


_SOON = {"Retry-After": "60"}
# The errors whose answer depends on nothing of the request.
PLAIN: dict[type[Exception], Callable[[Any], JSONResponse]] = {
    FieldError: lambda error: _at(error, error.code, error.pointer),
    TooManyTrials: lambda error: _at(error, "invalid_request", "/trials"),
    NoSuchText: lambda _: problem(
        404, "no_such_text", "No text of this key has this id. GET /v1/texts lists them."
    ),
    TooManyTexts: lambda error: problem(429, "too_many_texts", str(error), headers=_SOON),
    TextInUse: lambda _: problem(
        409, "text_in_use", "A job that is not over names this text. Cancel it, or wait for it."
    ),
    AmbiguousId: lambda error: problem(404, "ambiguous_id", str(error)),
    NoSuchIsland: lambda error: problem(404, "no_such_island", str(error)),
    NoSuchConfiguration: lambda _: problem(
        404, "no_such_configuration",
        "No configuration has this id. `pho configurations` or GET /v1/configurations lists them.",
    ),
    Conflict: lambda error: problem(409, error.code, str(error), state=error.state),
    StateConflict: lambda error: problem(
        409, "state_conflict", sentence(str(error)), state=error.state
    ),
    IdempotencyKeyReused: lambda _: problem(
        422, "idempotency_key_reused",
        "This Idempotency-Key came with another document before. Use a new one.",
        errors=[{"parameter": "Idempotency-Key", "detail": "was used for another job"}],
    ),
    TooManyJobs: lambda error: problem(
        429, f"too_many_{error.which}_jobs".replace("unfinished_", ""), TOO_MANY_JOBS[error.which],
        headers=_SOON,
    ),
    TooManyConfigurations: lambda error: problem(
        429, "too_many_configurations",
        f"You have {error} configurations in the library, the most of one key. Delete some; the "
        "operator sets PHO_MAX_CONFIGURATIONS.",
        headers=_SOON,
    ),
    QuotaExceeded: _no_quota,
    OutputError: _no_store,
    DatabaseGone: database_gone,
    StorageError: database_gone,
}  # fmt: skip


def _methods(request: Request, routes: Sequence[BaseRoute]) -> set[str]:
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.path_regex.match(request.url.path):
            methods |= route.methods or set()
    return methods


def _body_model(request: Request) -> type[BaseModel]:
    """The document that an operation takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    return model if isinstance(model, type) and issubclass(model, BaseModel) else JobSpec


def field_problem(error: dict[str, Any], body: type[BaseModel]) -> dict[str, Any]:
    """What pydantic says of a request, in our words."""
    source, *path = error["loc"]
    if error["type"] == "tuple_type":
        error = {**error, "msg": "Input should be a valid list"}  # as JSON calls it
    detail = broken_rule(error)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        name, part = str(path[-1]), _part_at(body, path[:-1]) if source == "body" else None
        allowed = list(_fields(part))
        near = _places(part, name) or difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(allowed)}"
        detail = f"unknown field; {hint}" if allowed else "unknown field"
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        detail = f"the body is not JSON: {reason} at character {path[0] if path else 0}"
        return {"pointer": "", "detail": detail}
    if error["type"] == "model_attributes_type" and not path:
        return {
            "pointer": "",
            "detail": "the body is not a JSON object: send one with Content-Type: application/json",
        }
    if source == "body":
        steps = (str(p).replace("~", "~0").replace("/", "~1") for p in path)
        return {"pointer": "".join(f"/{p}" for p in steps), "detail": detail}
    return {"parameter": str(path[0]) if path else str(source), "detail": detail}


def _part_at(document: Any, path: list[Any]) -> Any:
    """The part at ``path`` of a document; None if there is no such part."""
    for name in path:
        document = next(iter(_parts(_fields(document).get(str(name)))), None)
    return document


def _places(document: Any, name: str) -> list[str]:
    """Where parts of a document have a field of this name: ``steps.linears.ignore``."""
    return [
        f"{field}.{place}"
        for field, annotation in _fields(document).items()
        for part in _parts(annotation)
        for place in ([name] if name in _fields(part) else _places(part, name))
    ]


def _parts(annotation: Any) -> list[Any]:
    inner = [part for argument in typing.get_args(annotation) for part in _parts(argument)]
    return [annotation] if _fields(annotation) else inner


def _fields(document: Any) -> dict[str, Any]:
    """The types of the fields of a document or of a dataclass in it; other types have none."""
    if not isinstance(document, type):
        return {}
    if dataclasses.is_dataclass(document) and not hasattr(document, "model_fields"):
        return typing.get_type_hints(document)
    return {name: field.annotation for name, field in getattr(document, "model_fields", {}).items()}
