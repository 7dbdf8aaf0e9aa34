"""
The artifact store: a folder, or an object store behind an fsspec URL, that the service shares.

Bundles are in it (:mod:`workers.inputs`), and the pruned models of jobs, which the API hands out:
``pruned/JOB/KEY/`` has the files of one, ``KEY`` naming the configuration that it was pruned with.
``texts/SHA256.jsonl`` is a text that was uploaded, named by its content, whoever has it.
``store-id`` tells the stores of several machines apart: the API makes it, and workers look whether
they see the same.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from pho_service.errors import ChangedInput, InvalidInput, OutputError, TextError
from pho_service.host.settings import Settings

if TYPE_CHECKING:
    import fsspec

_ID = "store-id"


def open_store(url: str) -> "tuple[fsspec.AbstractFileSystem, str]":
    """The file system of an artifact store, and its root there."""
    import fsspec  # which who only asks a service has not

    try:
        files, root = fsspec.core.url_to_fs(
            str(Path(url).expanduser()) if "://" not in url else url
        )
    except (ImportError, ValueError) as error:
        raise InvalidInput(
            f"PHO_ARTIFACTS={url!r} cannot be used: {error}. Give a folder, or the URL of an "
            "object store whose fsspec package is installed (s3fs, gcsfs)."
        ) from error
    return files, root


def is_local(files: "fsspec.AbstractFileSystem") -> bool:
    """Whether a file system is that of this machine."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(files, LocalFileSystem)


def store_url(settings: Settings) -> str:
    """Where a service keeps its artifacts: in its data folder, if nothing else is set."""
    return settings.artifacts or str(settings.data_dir.expanduser().resolve() / "artifacts")


class PrunedStore:
    """The files of pruned models."""

    def __init__(self, url: str, cache_dir: Path) -> None:
        self._files, self._root = open_store(url)
        self._is_local = is_local(self._files)
        self._cache_dir = cache_dir

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(store_url(settings), settings.cache_dir.expanduser().resolve())

    def id(self, *, new: bool = False) -> str:
        """The id that tells this store from others; empty if it has none and no new one is made."""
        place = f"{self._root}/{_ID}"
        try:
            if not self._files.exists(place):
                if not new:
                    return ""
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(place, uuid.uuid4().hex.encode())
            return bytes(self._files.cat_file(place)).decode("ascii", "replace").strip()
        except OSError as error:
            raise OutputError(
                f"PHO_ARTIFACTS={self._root}: {_ID} cannot be read or written there: "
                f"{error.strerror or error}. See that the artifact store is mounted, and that the "
                "API may write to it."
            ) from error

    def sizes(self) -> dict[str, int]:
        """Bytes of the bundles, the pruned models and the rest; in a folder, what is free, too."""
        sizes = {"bundles": 0, "pruned": 0, "texts": 0, "other": 0}
        try:
            files = self._files.find(self._root, detail=True)
            for place, about in files.items():
                first = place.removeprefix(self._root).strip("/").partition("/")[0]
                sizes[first if first in sizes else "other"] += about["size"] or 0
            if self._is_local and Path(self._root).is_dir():  # which the first artifact makes
                sizes["free"] = shutil.disk_usage(self._root).free
        except OSError as error:
            raise OutputError(
                f"the artifact store {self._root} cannot be measured: {error.strerror or error}."
            ) from error
        return sizes

    def free(self) -> int | None:
        """Bytes that are free where the store is a folder."""
        try:
            return shutil.disk_usage(self._root).free if self._is_local else None
        except OSError:  # it is made with what is first stored
            return None

    def workplace(self, job_id: uuid.UUID, key: str) -> Path:
        """Where a worker puts a model together; after :meth:`keep` it is in the store."""
        parent = Path(self._of_job(job_id)) if self._is_local else self._cached(job_id)
        return parent / key

    def keep(self, job_id: uuid.UUID, key: str, names: list[str]) -> None:
        """Put a model that was put together into the store, and remove all others of its job."""
        folder = self.workplace(job_id, key)
        place = f"{self._of_job(job_id)}/{key}"
        try:
            if not self._is_local:
                for name in names:
                    self._files.makedirs(f"{place}/{name}".rpartition("/")[0], exist_ok=True)
                    self._files.put_file(str(folder / name), f"{place}/{name}")
                shutil.rmtree(self._cached(job_id), ignore_errors=True)
            for path in self._files.ls(self._of_job(job_id), detail=False):
                if path.rstrip("/").rpartition("/")[2] != key:
                    self._files.rm(path, recursive=True)
        except OSError as error:
            raise OutputError(
                f"the pruned model cannot be put into the artifact store {place}: "
                f"{error.strerror or error}. See that there is room, and that it can be reached; "
                "then resume the job."
            ) from error

    def open(self, job_id: uuid.UUID, key: str, name: str) -> BinaryIO:
        """A file of a model, to be read."""
        folder, place = f"{self._root}/pruned", f"{job_id}/{key}/{name}"
        try:
            if self._is_local:
                return os.fdopen(_open_real(folder, place), "rb")
            return cast(BinaryIO, self._files.open(f"{folder}/{place}", "rb"))
        except OSError as error:
            raise OutputError(
                f"{name} cannot be read from the artifact store: {error.strerror or error}. "
                "PHO_ARTIFACTS must name the same store for the API and for all workers."
            ) from error

    def remove(self, job_id: uuid.UUID) -> None:
        if not self._is_local:
            shutil.rmtree(self._cached(job_id), ignore_errors=True)
        try:
            with suppress(FileNotFoundError):
                self._files.rm(self._of_job(job_id), recursive=True)
        except OSError as error:
            raise OutputError(
                f"the pruned model of job {job_id} cannot be deleted from the artifact store: "
                f"{error.strerror or error}."
            ) from error

    def _of_job(self, job_id: uuid.UUID) -> str:
        return f"{self._root}/pruned/{job_id}"

    def _cached(self, job_id: uuid.UUID) -> Path:
        return self._cache_dir / "pruned" / str(job_id)


TEXT_ID = re.compile(r"sha256:[0-9a-f]{64}\.(txt|jsonl|parquet)")
ID_BEGINS = "sha256:"  # then the name of its file
TEXTS = "texts"  # their folder


class TextFiles:
    """The files of uploaded texts. Each is what its name says, or not there."""

    def __init__(self, url: str, cache_dir: Path) -> None:
        self._url, self._cache_dir = url, cache_dir

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(store_url(settings), settings.cache_dir.expanduser().resolve())

    @cached_property
    def _store(self) -> "tuple[fsspec.AbstractFileSystem, str]":
        try:
            files, root = open_store(self._url)
        except InvalidInput as error:  # which is said once a text is asked for
            raise OutputError(str(error)) from error
        return files, f"{root}/{TEXTS}"

    @property
    def _is_local(self) -> bool:
        return is_local(self._store[0])

    @property
    def folder(self) -> Path:
        """Where the files of texts lie on this machine."""
        return Path(self._store[1]) if self._is_local else self._cache_dir / TEXTS

    @contextmanager
    def receiving(self) -> Iterator[BinaryIO]:
        """A file that an upload is written into; nothing of it stays unless it is put."""
        with _text_store_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".{uuid.uuid4().hex}.part"
            file = part.open("xb")
        try:
            with file:
                yield file
        finally:
            part.unlink(missing_ok=True)

    def put(self, part: Path, text_id: str) -> None:
        """Put an upload that is whole into its place, unless the same is there."""
        place, (files, root) = self.place(text_id), self._store
        with _text_store_errors():
            if not self._is_local:
                files.makedirs(root, exist_ok=True)
                files.put_file(str(part), f"{root}/{place.name}")
            elif not place.is_file():
                part.replace(place)

    def place(self, text_id: str) -> Path:
        """Where the file of a text lies on this machine, once it is fetched."""
        return self.folder / text_id.removeprefix(ID_BEGINS)

    def fetch(self, text_id: str) -> Path:
        """The file of a text on this machine, copied from an object store if it is kept there."""
        place = self.place(text_id)
        if place.is_file():
            return place
        (files, root), name = self._store, place.name
        if not files.exists(f"{root}/{name}"):
            raise TextError(
                f"the uploaded text {text_id} is not in the artifact store: it was deleted, or the "
                "API has another store. Upload it again, which gives the same id; then resume."
            )
        with self.receiving() as file, _text_store_errors():
            part = Path(file.name)
            files.get_file(f"{root}/{name}", str(part))
            if f"{ID_BEGINS}{sha256_of(part)}{place.suffix}" != text_id:
                raise ChangedInput(f"the uploaded text {text_id} is not what its id says.")
            part.replace(place)
        return place

    def remove(self, text_id: str) -> None:
        with _text_store_errors(), suppress(FileNotFoundError):
            place, (files, root) = self.place(text_id), self._store
            place.unlink(missing_ok=True)
            if not self._is_local:
                files.rm(f"{root}/{place.name}")

    def clean(self) -> None:
        """Delete the parts of uploads that were cut off some time ago."""
        for part in self.folder.glob(".*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink()


_ABANDONED_S = 2 * 3600.0  # longer than any upload


@contextmanager
def _text_store_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(
            f"the artifact store of texts cannot be used: {error.strerror or error}. See that "
            "there is room, and that it can be reached."
        ) from error


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _open_real(folder: str, place: str) -> int:
    """Open a file below a folder; a link could lead to any file of the API's machine."""
    if os.path.realpath(f"{folder}/{place}") != f"{os.path.realpath(folder)}/{place}":
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return os.open(f"{folder}/{place}", os.O_RDONLY | os.O_NOFOLLOW)
