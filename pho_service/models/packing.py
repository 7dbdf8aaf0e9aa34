"""
Write a model folder as a packed file: see :mod:`pho_service.models.packed_file` for what is in it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import zstandard

from pho_service.errors import InvalidInput, ModelError
from pho_service.host.files import new_file, new_folder
from pho_service.host.plain import shown
from pho_service.models.byte_planes import Layout, chunks, difference, layout_of
from pho_service.models.packed_file import (
    CONTENTS,
    FORMAT,
    IN_A_FOLDER,
    SUFFIX,
    VERSION,
    is_packed,
)
from pho_service.models.safetensors_layout import Span, read_header, spans_of
from pho_service.progress import Progress, silent

# Weights have no repetitions. With next to no table to look for them in, zstd only gives frequent
# bytes short codes, which is faster, and makes exponents a tenth smaller than its usual levels do.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, hash_log=6, min_match=7)


@dataclass(frozen=True, kw_only=True)
class Size:
    """
    Result of a packing.

    Attributes:
        before: Bytes of the folder's files.
        after: Bytes of what was written for them.
    """

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """Share of the bytes that is left."""
        return self.after / self.before


def pack(folder: Path, out: Path, *, progress: Progress = silent) -> Size:
    """
    Pack a model folder, tensor by tensor.

    The same folder gives the same bytes. An old file is replaced only when the new one is whole.

    Args:
        folder: With safetensors. Hidden files and folders are left out.
        out: One file if its name ends in ``.pho``; otherwise a new folder, in which small files
            stay as they are.
        progress: Is told of each tensor.

    Raises:
        InvalidInput: ``folder`` is not a model folder, or packed already, or ``out`` is in it.
        ModelError: A file of it is damaged.
        OutputError: ``out`` cannot be written, or is in use.
    """
    folder, out = folder.expanduser(), out.expanduser()
    files = _files(folder)
    if out.resolve().is_relative_to(folder.resolve()):
        raise InvalidInput(f"{out} would lie in {folder}, which is packed. Give another place.")
    weights = [name for name in files if name.endswith(".safetensors")]
    others = [name for name in files if name not in weights]
    before = sum((folder / name).stat().st_size for name in files)
    if out.suffix == SUFFIX:
        with new_file(out) as partial:
            _write_archive(folder, weights, others, partial, progress)
        return Size(before=before, after=out.stat().st_size)
    with new_folder(out) as partial:
        for name in others:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        _write_archive(folder, weights, [], partial / IN_A_FOLDER, progress)
    return Size(before=before, after=sum(p.stat().st_size for p in out.rglob("*") if p.is_file()))


def _files(folder: Path) -> list[str]:
    """The names of a model folder's files: weights first, since masks are stored like them."""
    if is_packed(folder):
        raise InvalidInput(f"{folder} is packed already. Unpack it with `pho unpack`.")
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder. Give a model folder, as `pho prune` writes.")
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = [p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts)]
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise InvalidInput(
            f"{folder} has no config.json or no safetensors, so it is not a model folder that can "
            "be packed. Give one as `pho prune` writes, or as a hub has them."
        )
    return sorted(names, key=lambda name: (name.count("/"), name))


def _write_archive(
    folder: Path, weights: list[str], others: list[str], out: Path, progress: Progress
) -> None:
    """Write the archive of some files of a folder."""
    with ZipFile(out, "w") as archive:
        for name in others:
            with (folder / name).open("rb") as file, _entry(archive, name, ZIP_DEFLATED) as entry:
                shutil.copyfileobj(file, entry)
        contents: dict[str, list[dict[str, str]]] = {}
        with ExitStack() as stack:
            sources = [_Source.of(n, stack.enter_context((folder / n).open("rb"))) for n in weights]
            places = {p.span.name: p for source in reversed(sources) for p in source.places}
            with progress("Packing", sum(len(source.places) for source in sources)) as advance:
                for source in sources:
                    with _entry(archive, f"{source.name}/header", ZIP_DEFLATED) as entry:
                        entry.write(source.header)
                    records = contents[source.name] = []
                    for place in source.places:
                        records.append(_write_tensor(archive, place, _like(place.span, places)))
                        advance(1)
        document = {"format": FORMAT, "version": VERSION, "weights": contents}
        with _entry(archive, CONTENTS, ZIP_DEFLATED) as entry:
            entry.write(json.dumps(document).encode())


@contextmanager
def _entry(archive: ZipFile, name: str, compression: int) -> Iterator[IO[bytes]]:
    """A new entry, without the time, so that the same folder gives the same bytes."""
    info = ZipInfo(name)
    info.compress_type = compression
    info.external_attr = 0o644 << 16
    with archive.open(info, "w", force_zip64=True) as entry:
        yield entry


@dataclass(frozen=True, kw_only=True)
class _Place:
    """
    A tensor, and the open file that it lies in.

    Attributes:
        file: A safetensors file.
        start: Offset of the tensor's bytes in it.
        span: The tensor.
        entry: The beginning of the names of its streams.
    """

    file: BinaryIO
    start: int
    span: Span
    entry: str

    @property
    def layout(self) -> Layout:
        """How its values are cut."""
        return layout_of(self.span.dtype)

    def chunks(self) -> Iterator[bytes]:
        """
        The tensor's bytes, some million values at a time.

        Raises:
            ModelError: The file is cut short.
        """
        size = self.layout.size
        self.file.seek(self.start)
        for count in chunks(self.span.bytes // size):
            data = self.file.read(count * size)
            if len(data) < count * size:
                raise ModelError(
                    f"{shown(self.span.name)} is cut short in its file. Get the model again, or "
                    "prune it again."
                )
            yield data

    def bits(self) -> bytes:
        """Which of its values are not zero: the first stream."""
        return b"".join(self.layout.split(data)[0] for data in self.chunks())


@dataclass(frozen=True, kw_only=True)
class _Source:
    """
    A safetensors file that is packed.

    Attributes:
        name: Below the folder.
        header: Its beginning.
        places: Its tensors, in the order of their bytes.
    """

    name: str
    header: bytes
    places: list[_Place]

    @classmethod
    def of(cls, name: str, file: BinaryIO) -> "_Source":
        """Read the header of an open file."""
        header = read_header(file, name)
        places = [
            _Place(file=file, start=len(header) + span.start, span=span, entry=f"{name}/{index}")
            for index, span in enumerate(spans_of(header, name))
        ]
        return cls(name=name, header=header, places=places)


def _like(mask: Span, places: dict[str, _Place]) -> _Place | None:
    """The weight that a tensor has one bit for each value of, as a pruned folder's masks do."""
    name, _, kind = mask.name.rpartition(".")
    weight = places.get(f"{name}.weight")
    if kind != "keep" or weight is None:
        return None
    values = weight.span.bytes // weight.layout.size
    return weight if mask.bytes == -(-values // 8) else None


def _write_tensor(archive: ZipFile, place: _Place, like: _Place | None) -> dict[str, str]:
    """Write a tensor's streams; returns what is to be known of it."""
    digest = hashlib.sha256()
    numbers = range(place.layout.streams)
    compressors = [
        zstandard.ZstdCompressor(compression_params=_PARAMETERS).compressobj() for _ in numbers
    ]
    streams = [BytesIO() for _ in numbers]  # an archive takes one entry at a time
    known = like.bits() if like else b""
    done = 0
    for data in place.chunks():
        digest.update(data)
        taken = difference(data, known[done : done + len(data)]).tobytes() if like else data
        done += len(data)
        for part, compressor, stream in zip(
            place.layout.split(taken), compressors, streams, strict=True
        ):
            stream.write(compressor.compress(part))
    for number in numbers:
        streams[number].write(compressors[number].flush())
        with _entry(archive, f"{place.entry}/{number}", ZIP_STORED) as entry:
            entry.write(streams[number].getbuffer())
    return {"sha256": digest.hexdigest(), **({"like": like.entry} if like else {})}
