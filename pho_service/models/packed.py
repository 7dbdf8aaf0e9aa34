"""
A model folder as one smaller file, without losing a bit.

A packed model is a zip archive in which each file is compressed by zstandard: `unzip` and `zstd -d`
open it, too. zstandard's checksum is compared with the content of each file.
"""

import shutil
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from zipfile import BadZipFile, ZipFile, ZipInfo

import zstandard

from pho_service.errors import InvalidInput, ModelError, OutputError, shown
from pho_service.host.files import new_file, new_folder
from pho_service.host.model_files import PACKED_SUFFIX, is_packed, is_plain
from pho_service.models.scratch import scratch_folder
from pho_service.progress import Progress, bars, silent
from pho_service.spec.document import format_bytes

_WRITTEN_BY = b"pho pack 1"  # the comment of the archive
_LEVEL = 3
_CHUNK = 2**22  # bytes that are in memory at a time
_MOST_BESIDE = 2**28  # bytes of a file that holds no weights
# Weights of which one in a thousand is left are hundreds of times smaller; so are small models.
_MOST_RATIO, _SMALL = 1_000, 2**26
_HEADER = 18  # bytes of zstandard's largest header
_WAY_OUT = "Get the file again, or pack the model again with `pho pack`."


@dataclass(frozen=True, kw_only=True)
class Size:
    """Result of a packing."""

    before: int  # Bytes of the folder's files
    after: int  # Bytes of what was written for them

    @property
    def ratio(self) -> float:
        """Share of the bytes that is left."""
        return self.after / self.before


def pack(folder: str | Path, out: str | Path, *, progress: bool | None = None) -> Size:
    """Make a model folder smaller without losing a bit, as `pho pack`."""
    # The same folder gives the same bytes. An old file is replaced only when the new one is whole.
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    names = _files(folder)
    if out.suffix != PACKED_SUFFIX:
        raise InvalidInput(f"{out} does not end in {PACKED_SUFFIX}. Give a name that does.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise InvalidInput(f"{out} would lie in {folder}, which is packed. Give another place.")
    sizes = {name: (folder / name).stat().st_size for name in names}
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    with (
        new_file(out) as partial,
        ZipFile(partial, "w") as archive,
        bars(progress)("Packing", sum(map(_chunks, sizes.values()))) as advance,
    ):
        archive.comment = _WRITTEN_BY
        for name, size in sizes.items():
            info = ZipInfo(f"{name}.zst")  # without the time: the same folder gives the same bytes
            info.external_attr = 0o644 << 16
            with (
                (folder / name).open("rb") as file,
                archive.open(info, "w", force_zip64=True) as entry,
            ):
                try:
                    with compressor.stream_writer(entry, size=size, closefd=False) as stream:
                        while data := file.read(_CHUNK):
                            stream.write(data)
                            advance(1)
                except zstandard.ZstdError as error:
                    raise ModelError(
                        f"{folder / name} has changed while it was packed. Pack the folder again."
                    ) from error
        archive.close()
        _check(sizes, partial.stat().st_size, out)
    return Size(before=sum(sizes.values()), after=out.stat().st_size)


def _files(folder: Path) -> list[str]:
    if is_packed(folder):
        raise InvalidInput(f"{folder} is packed already. Unpack it with `pho unpack`.")
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder. Give a model folder, as `pho prune` writes.")
    root, names = folder.resolve(), []
    home = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache has links
    for path in (path for path in folder.rglob("*") if path.is_file()):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            continue
        if not path.resolve().is_relative_to(home):
            raise InvalidInput(
                f"{path} is a link that leads out of the folder. Put the file itself there, or "
                "leave it out."
            )
        names.append("/".join(parts))
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise InvalidInput(
            f"{folder} has no config.json or no safetensors, so it is not a model folder that can "
            "be packed. Give one as `pho prune` writes, or as a hub has them."
        )
    return sorted(names)


def unpack(packed: str | Path, out: str | Path, *, progress: bool | None = None) -> int:
    """Make a packed model's folder again, bit for bit, as `pho unpack`."""
    packed, out = Path(packed).expanduser(), Path(out).expanduser()
    with _opened(packed) as archive, new_folder(out) as partial:
        sizes = _sizes(archive, packed)
        needed, free = sum(sizes.values()), shutil.disk_usage(partial).free
        if needed > free:
            raise OutputError(
                f"{out} has room for {format_bytes(free)}, but {packed} has {format_bytes(needed)} "
                "in it. Free some space, or give a folder on another disk."
            )
        _write(archive, sizes, partial, bars(progress))
    return len(sizes)


class Unpacked:
    """A packed model's folder in the user's cache, which is removed when this object is."""

    def __init__(self, path: Path) -> None:
        with _opened(path) as archive:
            sizes = _sizes(archive, path)
            place = mkdtemp(prefix="pho-", dir=scratch_folder(sum(sizes.values())))
            weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
            self.folder = Path(place) / path.name  # messages tell of it
            try:
                _write(archive, sizes, self.folder, silent)
            except OSError as error:
                raise OutputError(f"{self.folder} cannot be written: {error.strerror}.") from error


# By path, time and size: a model that is in use is not unpacked again for its masks or its card.
_IN_USE: weakref.WeakValueDictionary[tuple[Path, int, int], Unpacked] = (
    weakref.WeakValueDictionary()
)


def unpacked(path: Path) -> Unpacked:
    """The folder of a packed model, for as long as somebody holds what is returned."""
    stat = path.stat()
    key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
    folder = _IN_USE.get(key) or Unpacked(path)
    _IN_USE[key] = folder
    return folder


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """The folder of a model, packed or not."""
    if not is_packed(path):
        yield path
        return
    holder = unpacked(path)
    yield holder.folder


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    """Turn what zip and zstandard say of a damaged file into a ModelError."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Give what `pho pack --out` wrote.")
    try:
        with ZipFile(path) as archive:
            if archive.comment != _WRITTEN_BY:
                raise ModelError(
                    f"{path} is a zip archive, but `pho pack` of this version did not write it."
                )
            yield archive
    except (
        BadZipFile, zstandard.ZstdError, zlib.error, EOFError, ValueError, RuntimeError,
    ) as error:  # fmt: skip
        raise ModelError(
            f"{path} is damaged or cut short: {shown(str(error), 300)}. {_WAY_OUT}"
        ) from error


def _sizes(archive: ZipFile, path: Path) -> dict[str, int]:
    """The unpacked size of each file, from zstandard's headers, which its reader holds to them."""
    sizes: dict[str, int] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".zst")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name == info.filename or hidden or not all(map(is_plain, name.split("/"))):
            raise ModelError(
                f"{path} names a file {shown(name)!r}, which leads elsewhere or is hidden."
            )
        with archive.open(info) as entry:
            size = zstandard.frame_content_size(entry.read(_HEADER))
        if size < 0 or name in sizes:
            raise ValueError(f"{shown(name)} has no size of its own")
        sizes[name] = size
    _check(sizes, path.stat().st_size, path)
    return sizes


def _check(sizes: dict[str, int], packed: int, path: Path) -> None:
    """Refuse what would fill a disk from a file that is small."""
    for name, size in sizes.items():
        if size > _MOST_BESIDE and not name.endswith(".safetensors"):
            raise ModelError(
                f"{path}: {shown(name)} has {format_bytes(size)}, and a file beside the weights "
                f"may have {format_bytes(_MOST_BESIDE)}. Leave it out of the model's folder."
            )
    whole = sum(sizes.values())
    if whole > _SMALL + _MOST_RATIO * packed:
        raise ModelError(
            f"{path} has {format_bytes(packed)} and would be unpacked to {format_bytes(whole)}, "
            f"more than {_MOST_RATIO} times as much, which the weights of no model are."
        )


def _write(archive: ZipFile, sizes: dict[str, int], folder: Path, progress: Progress) -> None:
    with progress("Unpacking", sum(map(_chunks, sizes.values()))) as advance:
        for name, size in sizes.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            bytes_left = size
            with archive.open(f"{name}.zst") as entry, place.open("wb") as file:
                with zstandard.ZstdDecompressor().stream_reader(entry, closefd=False) as stream:
                    while data := stream.read(_CHUNK):
                        bytes_left -= len(data)
                        if bytes_left < 0:
                            break
                        file.write(data)
                        advance(1)
                # What a reader of a zip archive has read to the end, it compares with its CRC.
                if bytes_left or entry.read(1):
                    raise EOFError(f"{shown(name)} is not as long as it says")


def _chunks(size: int) -> int:
    return -(-size // _CHUNK)
