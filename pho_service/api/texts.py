"""
``/v1/texts``: upload texts, list and delete them. They are named by what is in them.
"""

import asyncio
import codecs
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParam
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from pho_service.api.answers import TextPage, UploadedText
from pho_service.api.jobs import PageSize, PageToken, decode
from pho_service.api.problems import documented, problem
from pho_service.api.service import CallerParam, Service, ServiceParam
from pho_service.errors import InvalidInput
from pho_service.host.artifacts import ID_BEGINS, TEXT_ID
from storage.texts import NoSuchText, StoredText, TextInUse, TextLimits

router = APIRouter(prefix="/v1/texts", tags=["texts"])

AT_ONCE = 2  # uploads of one key to one process
MOST_TEXTS = 1000  # of one key
STALLED_S = 15.0  # without a byte, after which an upload is given up
LONGEST_S = 3600.0  # of an upload
_LINE = 2**16  # bytes of a first line that is looked at
_PARQUET = b"PAR1"  # at both ends of a file

FileName = Annotated[
    str,
    Query(
        pattern=r"^[\w .()+,=@~-]{1,200}\.(txt|jsonl|parquet)$",
        description="Name of the file; its ending says how it is read.",
    ),
]
Sha256 = Annotated[
    str | None,
    Query(pattern="^[0-9a-f]{64}$", description="What is uploaded is refused if it has another."),
]
TextId = Annotated[
    str,
    PathParam(description="Id of the text.", json_schema_extra={"pattern": f"^{TEXT_ID.pattern}$"}),
]


class _Stalled(Exception):
    """The rest of an upload does not come."""


class _Content:
    """What is uploaded: its hash and size, and whether it is of the kind that it says."""

    def __init__(self, suffix: str, file: BinaryIO) -> None:
        self._suffix, self._file = suffix, file
        self._sha256, self._decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
        self._begin, self._end, self.size = b"", b"", 0

    def add(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._sha256.update(chunk)
        self.size += len(chunk)
        self._begin += chunk[: _LINE - len(self._begin)]
        self._end = (self._end + chunk)[-len(_PARQUET) :]
        if self._suffix != ".parquet":
            self._decode(chunk)

    def finish(self) -> str:
        """Its id, once all of it is on the disk."""
        if not self.size:
            raise InvalidInput("it is empty")
        if self._suffix == ".parquet":
            if not (self._begin.startswith(_PARQUET) and self._end == _PARQUET):
                raise InvalidInput("it is not a parquet file, or not all of one")
        else:
            self._decode(b"", final=True)
        if self._suffix == ".jsonl":
            self._check_line()
        self._file.flush()
        os.fsync(self._file.fileno())
        return f"{ID_BEGINS}{self._sha256.hexdigest()}{self._suffix}"

    def _decode(self, chunk: bytes, *, final: bool = False) -> None:
        try:
            self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise InvalidInput("it is not UTF-8 text") from error

    def _check_line(self) -> None:
        line, newline, _ = self._begin.lstrip().partition(b"\n")
        if not newline and self.size > _LINE:
            return  # whoever reads it looks at all lines
        with suppress(ValueError, RecursionError):
            if isinstance(json.loads(line), dict):
                return
        raise InvalidInput("its first line is not a JSON object")


@router.post(
    "",
    status_code=201,
    response_model=UploadedText,
    responses={200: {"description": "It was there already."}, **documented(408, 413, 422)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def upload(
    request: Request,
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
    name: FileName,
    sha256: Sha256 = None,
) -> UploadedText | Response:
    """
    Upload a text: the body is the file. Jobs name it by the `id` that is answered.

    The same content twice is one text. It belongs to the key: no other one sees it or may name it.
    """
    owner = caller.key_id
    if service.uploading[owner] >= AT_ONCE:
        said = f"{AT_ONCE} uploads of this key are under way. Wait for one of them."
        return problem(429, "too_many_uploads", said, headers={"Retry-After": "5"})
    service.uploading[owner] += 1
    try:
        return await _received(request, service, owner, response, name, sha256)
    except _Stalled:
        said = f"{name} stopped coming, and nothing of it is kept. Send it again."
        return problem(408, "upload_stalled", said, headers={"Connection": "close"})
    except InvalidInput as error:
        said = f"{name} was not taken: {error}."
        return problem(422, "invalid_text", said, errors=[{"pointer": "", "detail": str(error)}])
    finally:
        service.uploading[owner] -= 1


async def _received(
    request: Request,
    service: Service,
    owner: UUID | None,
    response: Response,
    name: str,
    sha256: str | None,
) -> UploadedText:
    files = service.text_files
    with ExitStack() as stack:
        file = await run_in_threadpool(stack.enter_context, files.receiving())
        content = _Content(Path(name).suffix, file)
        async for chunk in _chunks(request):
            await run_in_threadpool(content.add, chunk)
        text_id = await run_in_threadpool(content.finish)
        if sha256 is not None and f"{ID_BEGINS}{sha256}{Path(name).suffix}" != text_id:
            raise InvalidInput(f"its SHA-256 is {text_id[7:71]}, not {sha256}: send it again")
        limits = TextLimits(count=MOST_TEXTS, bytes=service.settings.max_uploaded_bytes)
        put = partial(files.put, Path(file.name), text_id)
        stored, new = await run_in_threadpool(
            service.texts.add, text_id, name, content.size, owner_id=owner, limits=limits, put=put
        )
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/v1/texts/{stored.id}"
    return _shown(stored)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body, as it comes; whoever sends nothing for seconds, or leaves, is given up."""
    body, end = request.stream(), time.monotonic() + LONGEST_S
    try:
        while True:
            async with asyncio.timeout(min(STALLED_S, end - time.monotonic())):
                chunk = await anext(body)
            yield chunk
    except StopAsyncIteration:
        return
    except (TimeoutError, ClientDisconnect) as error:
        raise _Stalled from error


def _shown(stored: StoredText) -> UploadedText:
    return UploadedText.model_validate(stored, from_attributes=True)


@router.get("", response_model=TextPage, responses=documented(422))
def list_texts(
    service: ServiceParam,
    caller: CallerParam,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> TextPage:
    """List the texts of this key, newest first, and how large one may be."""
    before = decode(page_token)
    stored = service.texts.page(owner_id=caller.key_id, before=before, limit=page_size + 1)
    more = len(stored) > page_size
    return TextPage(
        texts=[*map(_shown, stored[:page_size])],
        next_page_token=str(stored[page_size - 1].number) if more else None,
        most_bytes=service.settings.max_upload_bytes,
    )


@router.get("/{text_id}", response_model=UploadedText, responses=documented(404, 422))
def show(text_id: TextId, service: ServiceParam, caller: CallerParam) -> UploadedText:
    """Show a text of this key."""
    return _shown(service.texts.find(text_id, owner_id=caller.key_id))


@router.delete(
    "/{text_id}", status_code=204, response_class=Response, responses=documented(404, 409, 422)
)
def delete(text_id: TextId, service: ServiceParam, caller: CallerParam) -> None:
    """Delete a text that no unfinished job of this key names."""
    forget(service, text_id, caller.key_id)


def forget(service: Service, text_id: str, owner: UUID | None) -> None:
    remove = partial(service.text_files.remove, text_id)
    service.texts.delete(text_id, owner_id=owner, remove=remove)


def sweep(service: Service, days: float) -> int:
    """Delete texts that no job has named for so long, and what is left of broken uploads."""
    deleted = 0
    for text_id, owner in service.texts.unused_for(days) if days else ():
        with suppress(NoSuchText, TextInUse):  # another process was faster
            forget(service, text_id, owner)
            deleted += 1
    service.text_files.clean()
    return deleted
