"""
A model folder made smaller without losing a bit: a zip archive of zstd streams.

Format version 1. ``packed.json`` says ``format``, ``version``, and of each safetensors file in
``weights`` its tensors' hashes. For a file F the archive has ``F/header``, the beginning of the
file as it is, and for tensor number I, in the order of their bytes, ``F/I/0``, ``F/I/1``, ...:
the streams of :mod:`pho_service.models.byte_planes`, each compressed by zstd. A pruned folder's
masks say again which weights are zero. Those bits are stored as the difference from the first
stream of the weight that they are of, which is nearly always nothing: ``like`` names its entry.
All other files are ordinary entries.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import zstandard
from numpy.typing import NDArray

from pho_service.errors import ModelError
from pho_service.host.files import new_folder
from pho_service.host.model_folder import is_plain
from pho_service.host.plain import shown
from pho_service.models.byte_planes import chunks, difference, layout_of
from pho_service.models.safetensors_layout import MAX_HEADER, Span, read_header, spans_of
from pho_service.progress import Progress, silent

FORMAT = "pho-packed"
VERSION = 1
SUFFIX = ".pho"
IN_A_FOLDER = "weights.pho"  # of a packed folder, whose other files lie beside it as they were
CONTENTS = "packed.json"
_MAX_CONTENTS = 2**28  # bytes; 100,000 tensors have about 15 million
_DENSEST = 2**15  # bytes that zstd makes of one at most: a block of 128 KiB has at least 4
_WAY_OUT = "Get the file again, or pack the model again with `pho pack`."


def is_packed(path: Path) -> bool:
    """Whether a path is a packed file or folder, by its name alone."""
    return archive_of(path).is_file()


def archive_of(path: Path) -> Path:
    """The archive of a packed file or folder."""
    return path if path.suffix == SUFFIX and not path.is_dir() else path / IN_A_FOLDER


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """
    A tensor in an archive.

    Attributes:
        span: The tensor in its safetensors file.
        entry: The beginning of the names of its streams.
        sha256: SHA-256 of its bytes.
        like: The entry of the weight that its bits are stored as the difference from; or None.
    """

    span: Span
    entry: str
    sha256: str
    like: str | None = None


class PackedFile:
    """
    An open archive, from which one tensor at a time is read.

    Attributes:
        path: Path of the archive.
        weights: Its safetensors files, with their tensors in the order of their bytes.
        others: The names of its other files.

    Raises:
        ModelError: It is not there, is cut short or damaged, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()  # one tensor at a time, whoever asks
        if not path.is_file():
            raise ModelError(f"{path} does not exist. Give what `pho pack` wrote with --out.")
        with self._damage():
            self._archive = ZipFile(path)
        try:
            with self._damage():
                self._headers: dict[str, bytes] = {}
                self.weights = {
                    self._checked(name): self._tensors(name, records)
                    for name, records in self._contents()["weights"].items()
                }
                inside = tuple(f"{name}/" for name in self.weights)
                names = [name for name in self._archive.namelist() if name != CONTENTS]
                self.others = [self._checked(n) for n in names if not n.startswith(inside)]
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def _contents(self) -> dict[str, Any]:
        if CONTENTS not in self._archive.namelist():
            raise ModelError(f"{self.path} is a zip archive, but `pho pack` did not write it.")
        document = json.loads(self._read(CONTENTS, _MAX_CONTENTS))
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise ModelError(
                f"{self.path} has the format {shown(document.get('format'))} "
                f"{shown(document.get('version'))}, but this PHO reads {FORMAT} {VERSION}. "
                "Install the PHO that packed it."
            )
        return dict(document)

    def _checked(self, name: str) -> str:
        """A name that stays below the folder that it is written to."""
        if not all(is_plain(part) for part in name.split("/")):
            raise ModelError(f"{self.path} names a file {shown(name)!r}, which leads elsewhere.")
        return name

    def _read(self, entry: str, most: int) -> bytes:
        """A whole entry, which must not be longer than ``most`` bytes."""
        if self._archive.getinfo(entry).file_size > most:
            raise ValueError(f"{shown(entry)} is too large")
        return self._archive.read(entry)

    def _tensors(self, name: str, records: list[dict[str, str]]) -> list[StoredTensor]:
        self._headers[name] = header = self._read(f"{name}/header", MAX_HEADER + 8)
        read_header(BytesIO(header), name)
        return [
            StoredTensor(
                span=span,
                entry=f"{name}/{index}",
                sha256=str(record["sha256"]),
                like=record.get("like"),
            )
            for index, (span, record) in enumerate(
                zip(spans_of(header, name), records, strict=True)
            )
        ]

    def chunks(self, tensor: StoredTensor) -> Iterator[NDArray[Any]]:
        """
        Give a tensor's values, some million at a time; the last one comes before they are checked.

        Raises:
            ModelError: They are not those that were packed, which is told after the last one.
        """
        layout, span, digest = layout_of(tensor.span.dtype), tensor.span, hashlib.sha256()
        done = 0
        with self._damage(), ExitStack() as stack:
            known = self._bits(tensor.like, span.bytes) if tensor.like else b""
            count = span.bytes // layout.size
            if -(-count // 8) > _DENSEST * self._archive.getinfo(f"{tensor.entry}/0").file_size:
                raise ValueError(f"{shown(span.name)} is larger than its bytes can tell")
            streams = [
                stack.enter_context(self._stream(f"{tensor.entry}/{number}"))
                for number in range(layout.streams)
            ]
            for values in chunks(count):
                joined = layout.join(values, lambda number, size: _exactly(streams[number], size))
                if tensor.like:
                    joined = difference(joined, known[done : done + len(joined)])
                    done += len(joined)
                digest.update(joined.data)
                yield joined
        if digest.hexdigest() != tensor.sha256:
            raise ModelError(
                f"{self.path} is damaged: {shown(span.name)} is not what was packed, by its hash. "
                f"{_WAY_OUT}"
            )

    def _bits(self, entry: str, size: int) -> bytes:
        with self._stream(f"{entry}/0") as stream:
            return _exactly(stream, size)

    @contextmanager
    def _stream(self, entry: str) -> Iterator[IO[bytes]]:
        with (
            self._archive.open(entry) as packed,
            zstandard.ZstdDecompressor().stream_reader(packed) as stream,
        ):
            yield stream

    def bytes_of(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """
        Read a whole tensor.

        Returns:
            (bytes,), as they lie in its file.

        Raises:
            ModelError: They are not those that were packed.
        """
        with self._lock:
            whole = np.empty(tensor.span.bytes, np.uint8)
            done = 0
            for values in self.chunks(tensor):
                part = values.view(np.uint8)
                whole[done : done + len(part)] = part
                done += len(part)
        return whole

    def write_weights(self, name: str, folder: Path, advance: Any = lambda _: None) -> None:
        """
        Make a safetensors file again, bit for bit.

        Args:
            name: A key of ``weights``.
            folder: Where it is written, by its name.
            advance: Is told of each tensor.

        Raises:
            ModelError: A tensor is not the one that was packed.
        """
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(self._headers[name])
            for tensor in self.weights[name]:
                for values in self.chunks(tensor):
                    file.write(values.data)
                advance(1)

    def write_others(self, folder: Path) -> None:
        """Write the files that are not safetensors to a folder."""
        with self._damage():
            for name in self.others:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._archive.open(name) as entry, path.open("wb") as file:
                    shutil.copyfileobj(entry, file)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Turn what zip, zstd and JSON say of a damaged file into a ModelError."""
        try:
            yield
        except (
            BadZipFile, zstandard.ZstdError, zlib.error, EOFError, KeyError, TypeError,
            ValueError, AttributeError, NotImplementedError, RecursionError,
        ) as error:  # fmt: skip
            raise ModelError(
                f"{self.path} is damaged or cut short: {shown(str(error), 300)}. {_WAY_OUT}"
            ) from error


def _exactly(stream: IO[bytes], size: int) -> bytes:
    """So many bytes of a stream."""
    parts = []
    while size:
        part = stream.read(size)
        if not part:
            raise EOFError("a tensor ends too early")
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unpack(path: Path, out: Path, *, progress: Progress = silent) -> int:
    """
    Make a packed model's folder again, every file bit for bit.

    Args:
        path: A packed file or folder.
        out: A new or empty folder.
        progress: Is told of each tensor.

    Returns:
        How many tensors there are.

    Raises:
        ModelError: It is cut short or damaged; then nothing is written.
        OutputError: The folder is in use, or cannot be written.
    """
    path = path.expanduser()
    with PackedFile(archive_of(path)) as packed, new_folder(out) as partial:
        _write_small(path, packed, partial)
        tensors = sum(len(each) for each in packed.weights.values())
        with progress("Unpacking", tensors) as advance:
            for name in packed.weights:
                packed.write_weights(name, partial, advance)
    return tensors


@contextmanager
def small_files(path: Path, *names: str) -> Iterator[Path]:
    """
    Give a folder with a packed model's files apart from its weights, for as long as it is needed.

    Args:
        path: A packed file or folder; any other folder is given as it is.
        names: Safetensors files that are wanted beside, if they are there.

    Raises:
        ModelError: It is cut short or damaged.
    """
    if not is_packed(path):
        yield path
        return
    with PackedFile(archive_of(path)) as packed, TemporaryDirectory(prefix="pho-") as outer:
        folder = Path(outer) / path.name  # messages tell of it
        folder.mkdir()
        _write_small(path, packed, folder)
        for name in packed.weights.keys() & {*names}:
            packed.write_weights(name, folder)
        yield folder


def _write_small(path: Path, packed: PackedFile, folder: Path) -> None:
    """Write the files beside the weights, which lie in the archive or beside it."""
    packed.write_others(folder)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file != packed.path:
                copy = folder / file.relative_to(path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
