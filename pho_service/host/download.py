"""
The download of a pruned model: file by file, going on where it was cut, each checked by its hash.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential

from pho_service.errors import OutputError, ServiceError, ServiceUnavailable, shown
from pho_service.host.files import check_free, new_folder
from pho_service.progress import Advance


class File(Protocol):
    """A file, as the service describes it."""

    name: str  # Path in its folder
    bytes: int  # Its size
    sha256: str  # SHA-256 of its bytes


# A file from its byte number N on: whether it does begin there, and not with the first.
Part = Callable[[File, int], AbstractContextManager[tuple[bool, Iterator[bytes]]]]

_CUTS = 6  # of one file in a row; called again, the download goes on all the same
_SHA256 = re.compile("[0-9a-f]{64}")


def pull(files: Sequence[File], folder: Path, part: Part, advance: Advance) -> Path:
    """Download files into a folder, which is there when all of them are whole and right."""
    check_free(folder)
    _check(files)
    path = folder.expanduser().resolve()
    waiting = path.with_name(f".{path.name}.pull")
    with new_folder(folder) as whole:
        waiting.mkdir(exist_ok=True)
        needed = sum(file.bytes - _size(_place(waiting, file)) for file in files)
        free = shutil.disk_usage(waiting).free
        if needed > free:
            raise OutputError(
                f"{folder} has room for {free} bytes, and {needed} are to be downloaded. Free some "
                "space, or give a folder on another disk."
            )
        for file in files:
            _fetch(file, _place(waiting, file), part, advance)
        for file in files:
            (whole / file.name).parent.mkdir(parents=True, exist_ok=True)
            _place(waiting, file).replace(whole / file.name)
    shutil.rmtree(waiting, ignore_errors=True)
    return path


def _fetch(file: File, place: Path, part: Part, advance: Advance) -> None:
    """Download a file, or what is missing of it, and check it."""
    advance(_size(place))
    retrying = Retrying(
        retry=retry_if_exception_type(ServiceUnavailable),
        wait=wait_exponential(multiplier=0.2, max=10),
        stop=stop_after_attempt(_CUTS),
        reraise=True,
    )
    retrying(partial(_fetch_rest, file, place, part, advance))
    with place.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != file.sha256:
        place.unlink()
        raise ServiceError(
            f"{file.name} was downloaded, and is not what the service says it is: its SHA-256 is "
            f"{sha256}, not {file.sha256}. It was deleted; run it again. If that does not help, "
            "the file in the artifact store is damaged: have the job pruned again.",
            code="wrong_hash",
        )


def _fetch_rest(file: File, place: Path, part: Part, advance: Advance) -> None:
    size = _size(place)
    if size < file.bytes or not place.exists():
        with part(file, size) as (goes_on, chunks):
            if not goes_on:
                advance(-size)
            with place.open("ab" if goes_on else "wb") as out:
                for chunk in chunks:
                    out.write(chunk)
                    advance(len(chunk))
                    if out.tell() > file.bytes:
                        break  # more than was announced, which its hash will not be that of
    if place.stat().st_size < file.bytes:
        raise ServiceUnavailable(
            f"the download of {file.name} was cut after {place.stat().st_size} of {file.bytes} "
            "bytes. Run it again: it goes on from there."
        )


def _place(waiting: Path, file: File) -> Path:
    """Where a file lies until all are there: another content has another place."""
    return waiting / f"{file.sha256[:16]}-{file.name.replace('/', '%2F')}"


def _size(place: Path) -> int:
    return place.stat().st_size if place.exists() else 0


def _check(files: Sequence[File]) -> None:
    """Refuse what a service says of its files if it could not be written below a folder."""
    # The hash is a part of a name, too: that of the file until all are there.
    taken: set[str] = set()
    for file in files:
        path = PurePosixPath(file.name)
        hidden = any(part.startswith(".") for part in path.parts)
        if path.is_absolute() or hidden or "\\" in file.name or not path.parts:
            rule = "names that lead out of the folder or begin with a dot"
        elif not file.name.isprintable() or str(path) in taken:
            rule = "names that are there twice or hold control characters"
        elif file.bytes < 0 or not _SHA256.fullmatch(file.sha256):
            rule = "sizes below 0, and hashes that are not 64 hexadecimal digits"
        else:
            taken.add(str(path))
            continue
        raise ServiceError(
            f"the service lists a file {shown(file.name)!r} of {file.bytes} bytes with the SHA-256 "
            f"{shown(file.sha256[:80])!r}. Refused are {rule}. Nothing was downloaded."
        )
