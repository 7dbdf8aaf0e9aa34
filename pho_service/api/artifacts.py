"""
``/v1/jobs/{id}:prune`` and ``/v1/jobs/{id}/artifacts``: the pruned model of a job, file by file.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from tarfile import BLOCKSIZE, GNU_FORMAT, TarInfo
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from pho_service.api.answers import Artifact, ArtifactList, Job
from pho_service.api.describe import check_search, configuration_of, describe, pattern_named
from pho_service.api.jobs import OnePattern
from pho_service.api.problems import Conflict, documented, documented_file, problem
from pho_service.api.service import CallerParam, Service, ServiceParam
from pho_service.planning.plan import SEARCHING
from pho_service.spec.job import JobSpec
from pho_service.spec.pattern import Pattern
from storage import records as stored
from storage.jobs import REMOVED, ask_to_prune, note_removed
from storage.records import JobState

router = APIRouter(prefix="/v1/jobs", tags=["artifacts"])

_CHUNK = 2**20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BYTES = {"type": "string", "format": "binary"}
_PART = {"application/octet-stream": {"schema": _BYTES}}


@router.post(
    "/{job_id:uuid}:prune",
    status_code=202,
    response_model=Job,
    responses=documented(404, 409, 422),
)
def prune(
    job_id: UUID, service: ServiceParam, caller: CallerParam, pattern: OnePattern = None
) -> Job:
    """
    Write the pruned model of a search that has succeeded. A second request changes nothing.

    In a job with several patterns it is the model of one pattern, and replaces that of another.
    """
    return describe(asked(service, job_id, visible_to=caller.visible_to, pattern=pattern))


def asked(
    service: Service, job_id: UUID, *, visible_to: UUID | None, pattern: str | None = None
) -> stored.JobRecord:
    """The job, whose pruned model is written or on its way."""
    job = service.jobs.get(job_id, visible_to=visible_to)
    check_search(job)
    if job.spec.get("more_models"):
        raise Conflict(
            "several_models",
            "The job is a search for several models, and one is pruned at a time. Prune each of "
            "them with the result: `pho prune MODEL --config config.json`.",
            job.state,
        )
    named = None if pattern is None else pattern_named(job, pattern)
    if job.state is JobState.SUCCEEDED:
        configuration_of(job, named)  # refuses where one must be named
        if job.pruning is not None and job.pruning.about != named:
            service.pruned.remove(job_id)  # of another pattern
    spec = JobSpec.model_validate(job.spec)
    one = spec if named is None else spec.of_pattern(Pattern.parse(named))
    one = one.model_copy(update={"prune": True})
    ask = partial(ask_to_prune, service.database, job_id, visible_to=visible_to, pattern=named)
    return service.charged(ask, spec.tokens_to_prune, [one], without=SEARCHING)


@router.get(
    "/{job_id:uuid}/artifacts", response_model=ArtifactList, responses=documented(404, 409, 422)
)
def artifacts(job_id: UUID, service: ServiceParam, caller: CallerParam) -> ArtifactList:
    """List the files of a job's pruned model with sizes and SHA-256."""
    return listed(service.jobs.get(job_id, visible_to=caller.visible_to))


def listed(job: stored.JobRecord) -> ArtifactList:
    """The files of a job's pruned model, by name."""
    files = [
        Artifact(**file, href=f"/v1/jobs/{job.id}/artifacts/{quote(file['name'])}")
        for file in _pruned(job)["files"]
    ]
    return ArtifactList(
        job_id=job.id,
        files=files,
        bytes=sum(file.bytes for file in files),
        archive=f"/v1/jobs/{job.id}/artifacts.tar",
    )


def _pruned(job: stored.JobRecord) -> dict[str, Any]:
    """What the stage that wrote the pruned model has stored."""
    check_search(job)
    result = job.pruning.result if job.pruning else None
    if result is None:
        on_its_way = "It is on its way." if job.pruning else f"POST /v1/jobs/{job.id}:prune."
        raise Conflict(
            "not_pruned", f"The job is {job.state} and has no pruned model. {on_its_way}", job.state
        )
    if REMOVED in result:
        raise Conflict(
            "pruned_model_removed",
            f"The files of the pruned model were deleted at {result[REMOVED]}: the service keeps "
            f"them for a time. POST /v1/jobs/{job.id}:prune writes them again.",
            job.state,
        )
    return result


@router.get(
    "/{job_id:uuid}/artifacts.tar",
    responses=documented_file(
        "The archive.", 404, 409, 422, kind="application/x-tar", schema=_BYTES
    ),
    response_class=Response,
)
def archive(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Download a job's pruned model as one tar: a folder with its files, not compressed."""
    found = _pruned(service.jobs.get(job_id, visible_to=caller.visible_to))
    folder = f"pruned-{str(job_id)[:8]}"
    sizes = {file["name"]: int(file["bytes"]) for file in found["files"]}
    heads = {name: _tar_head(f"{folder}/{name}", size) for name, size in sizes.items()}
    length = sum(len(heads[name]) + size + -size % BLOCKSIZE for name, size in sizes.items())
    for name in [*sizes][:1]:  # a store that cannot be read is told before anything is sent
        service.pruned.open(job_id, found["key"], name).close()

    def content() -> Iterator[bytes]:
        for name, size in sizes.items():
            yield heads[name]
            yield from _read(service.pruned.open(job_id, found["key"], name), 0, size)
            yield bytes(-size % BLOCKSIZE)
        yield bytes(2 * BLOCKSIZE)  # the end of an archive

    return StreamingResponse(
        content(),
        headers={
            "Content-Disposition": f'attachment; filename="{folder}.tar"',
            "Content-Length": str(length + 2 * BLOCKSIZE),
        },
        media_type="application/x-tar",
    )


def _tar_head(name: str, size: int) -> bytes:
    """Make what stands before a file in an archive."""
    about = TarInfo(name)
    about.size = size
    return about.tobuf(GNU_FORMAT)


@router.get(
    "/{job_id:uuid}/artifacts/{name:path}",
    responses={
        200: {"description": "The file.", "content": _PART},
        206: {"description": "The part that Range asks for.", "content": _PART},
        304: {"description": "The file that If-None-Match names."},
        **documented(404, 409, 416, 422),
    },
    response_class=Response,
)
def download(
    job_id: UUID,
    name: str,
    service: ServiceParam,
    caller: CallerParam,
    wanted: Annotated[
        str | None, Header(alias="Range", description="One range of bytes; others are ignored.")
    ] = None,
    if_range: Annotated[str | None, Header(description="Range counts for this ETag alone.")] = None,
    if_none_match: Annotated[str | None, Header(description="An ETag that is there.")] = None,
) -> Response:
    """Download a file of a job's pruned model, or a range of it. The ETag is its SHA-256."""
    found = _pruned(service.jobs.get(job_id, visible_to=caller.visible_to))
    file = next((each for each in found["files"] if each["name"] == name), None)
    if file is None:
        return problem(
            404,
            "no_such_artifact",
            f"The pruned model has no file of this name. GET /v1/jobs/{job_id}/artifacts lists "
            "all.",
        )
    size, etag = int(file["bytes"]), f'"{file["sha256"]}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    if if_none_match in (etag, "*"):
        return Response(status_code=304, headers=headers)
    part = _range(wanted, size) if if_range in (None, etag) else None
    if part is not None and not part:
        return problem(
            416,
            "range_not_satisfiable",
            f"The file has {size} bytes, and Range asks for none of them.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    first, end = (0, size) if part is None else (part.start, part.stop)
    if part is not None:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    content = service.pruned.open(job_id, found["key"], name)
    return StreamingResponse(
        _read(content, first, end),
        status_code=200 if part is None else 206,
        headers={**headers, "Content-Length": str(end - first)},
        media_type="application/octet-stream",
    )


def _range(wanted: str | None, size: int) -> range | None:
    """The bytes that a Range asks for; None for all, as of anything but a single range."""
    found = _RANGE.fullmatch((wanted or "").replace(" ", ""))
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(size, int(last) + 1 if last else size))


def _read(content: BinaryIO, first: int, end: int) -> Iterator[bytes]:
    """Some bytes of a file, which is closed after them; it may end early, and so the answer."""
    with content:
        content.seek(first)
        while first < end and (chunk := content.read(min(_CHUNK, end - first))):
            first += len(chunk)
            yield chunk


def remove_files(service: Service, job_id: UUID) -> None:
    """Delete the files of a job's pruned model, and note it."""
    service.pruned.remove(job_id)
    note_removed(service.database, job_id, f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}")
