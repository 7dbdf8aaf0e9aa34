"""
``/v1/jobs/{id}:prune`` and ``/v1/jobs/{id}/artifacts``: the pruned model of a job, file by file.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from tarfile import BLOCKSIZE, GNU_FORMAT, TarInfo
from typing import Annotated, BinaryIO
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter

from pho_service.api.answers import Artifact, ArtifactList, Job
from pho_service.api.jobs import JobId, OnePattern
from pho_service.api.problems import documented, documented_file, problem
from pho_service.api.service import CallerParam, Service, ServiceParam
from pho_service.api.view import JobView
from pho_service.spec.results import StoredModel
from storage import records as stored
from storage.jobs import REMOVED, ask_to_prune, note_removed
from storage.records import JobState

router = APIRouter(prefix="/v1/jobs", tags=["artifacts"])

_WRITTEN = TypeAdapter(StoredModel)
_CHUNK = 2**20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BYTES = {"type": "string", "format": "binary"}
_PART = {"application/octet-stream": {"schema": _BYTES}}


@router.post(
    "/{job_id:job}:prune",
    status_code=202,
    response_model=Job,
    responses=documented(404, 409, 422),
)
def prune(
    job_id: JobId, service: ServiceParam, caller: CallerParam, pattern: OnePattern = None
) -> Job:
    """
    Write the pruned model of a search that has succeeded. A second request changes nothing.

    In a job with several patterns it is the model of one pattern, and replaces that of another.
    """
    job = write_pruned(service, job_id, visible_to=caller.visible_to, pattern=pattern)
    return JobView(job).answer


def write_pruned(
    service: Service, job_id: UUID, *, visible_to: UUID | None, pattern: str | None = None
) -> stored.JobRecord:
    """The job, whose pruned model is written or on its way."""
    view = JobView(service.jobs.get(job_id, visible_to=visible_to))
    view.check_search()
    if len(view.document.models) > 1:
        raise view.conflict(
            "several_models",
            "The job is a search for several models, and one is pruned at a time. Prune each of "
            "them with the result: `pho prune MODEL --config config.json`.",
        )
    name = None if pattern is None else view.pattern_named(pattern)
    pruning, spec = view.record.pruning, view.spec
    if view.record.state is JobState.SUCCEEDED:
        view.configuration(name)  # refuses where one must be named
        if pruning is not None and pruning.about != name:
            service.pruned.remove(job_id)  # of another pattern
    tokens = spec.tokens_to_prune(service.timed_tokens(spec))
    return ask_to_prune(
        service.database, job_id, visible_to=visible_to, pattern=name, tokens=tokens
    )


@router.get(
    "/{job_id:job}/artifacts", response_model=ArtifactList, responses=documented(404, 409, 422)
)
def artifacts(job_id: JobId, service: ServiceParam, caller: CallerParam) -> ArtifactList:
    """List the files of a job's pruned model with sizes and SHA-256."""
    return listed(JobView(service.jobs.get(job_id, visible_to=caller.visible_to)))


def listed(view: JobView) -> ArtifactList:
    """The files of a job's pruned model, by name."""
    place = f"/v1/jobs/{view.record.id}/artifacts"
    files = [
        Artifact(**file, href=f"{place}/{quote(file['name'])}") for file in _written(view).files
    ]
    return ArtifactList(
        job_id=view.record.id,
        files=files,
        bytes=sum(file.bytes for file in files),
        archive=f"{place}.tar",
    )


def _written(view: JobView) -> StoredModel:
    """The pruned model, as the stage that wrote it has stored it."""
    view.check_search()
    job, pruning = view.record, view.record.pruning
    if pruning is None or pruning.result is None:
        way_out = "It is on its way." if pruning else f"POST /v1/jobs/{job.id}:prune."
        raise view.conflict(
            "not_pruned", f"The job is {job.state} and has no pruned model. {way_out}"
        )
    if REMOVED in pruning.result:
        raise view.conflict(
            "pruned_model_removed",
            f"The files of the pruned model were deleted at {pruning.result[REMOVED]}: the service "
            f"keeps them for a time. POST /v1/jobs/{job.id}:prune writes them again.",
        )
    return _WRITTEN.validate_python(pruning.result)


@router.get(
    "/{job_id:job}/artifacts.tar",
    responses=documented_file(
        "The archive.", 404, 409, 422, kind="application/x-tar", schema=_BYTES
    ),
    response_class=Response,
)
def archive(job_id: JobId, service: ServiceParam, caller: CallerParam) -> Response:
    """Download a job's pruned model as one tar: a folder with its files, not compressed."""
    written = _written(JobView(service.jobs.get(job_id, visible_to=caller.visible_to)))
    folder = f"pruned-{str(job_id)[:8]}"
    sizes = {file["name"]: int(file["bytes"]) for file in written.files}
    heads = {name: _tar_head(f"{folder}/{name}", size) for name, size in sizes.items()}
    length = sum(len(heads[name]) + size + -size % BLOCKSIZE for name, size in sizes.items())
    for name in [*sizes][:1]:  # a store that cannot be read is told before anything is sent
        service.pruned.open(job_id, written.key, name).close()

    def content() -> Iterator[bytes]:
        for name, size in sizes.items():
            yield heads[name]
            yield from _read(service.pruned.open(job_id, written.key, name), 0, size)
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
    info = TarInfo(name)
    info.size = size
    return info.tobuf(GNU_FORMAT)


@router.get(
    "/{job_id:job}/artifacts/{name:path}",
    responses={
        200: {"description": "The file.", "content": _PART},
        206: {"description": "The part that Range asks for.", "content": _PART},
        304: {"description": "The file that If-None-Match names."},
        **documented(404, 409, 416, 422),
    },
    response_class=Response,
)
def download(
    job_id: JobId,
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
    written = _written(JobView(service.jobs.get(job_id, visible_to=caller.visible_to)))
    file = next((file for file in written.files if file["name"] == name), None)
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
    content = service.pruned.open(job_id, written.key, name)
    return StreamingResponse(
        _read(content, first, end),
        status_code=200 if part is None else 206,
        headers={**headers, "Content-Length": str(end - first)},
        media_type="application/octet-stream",
    )


def _range(header: str | None, size: int) -> range | None:
    """The bytes that a Range asks for; None for all, as of anything but a single range."""
    match = _RANGE.fullmatch((header or "").replace(" ", ""))
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
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
