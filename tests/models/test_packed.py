"""A packed folder gives back every bit; what is cut short, damaged or foreign is refused."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
import zstandard
from transformers import AutoModelForCausalLM

import pho_service as pho
from pho_service.errors import InvalidInput, ModelError, OutputError
from pho_service.models import packed as module
from pho_service.models.loading import load_model
from pho_service.models.packed import as_folder, pack, unpack


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def packed(model_folder: Path, tmp_path: Path) -> Path:
    """A packed model."""
    pack(model_folder, tmp_path / "packed.pho")
    return tmp_path / "packed.pho"


def rewritten(packed: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> Path:
    """The same archive with other entries."""
    bad = packed.with_name("bad.pho")
    with ZipFile(packed) as good, ZipFile(bad, "w") as archive:
        archive.comment = good.comment
        for name in good.namelist():
            archive.writestr(*change(name, good.read(name)))
    return bad


def test_every_bit(model_folder: Path, tmp_path: Path) -> None:
    """The files come back as they were, and the same folder gives the same bytes."""
    (model_folder / "pruning").mkdir()
    (model_folder / "pruning" / "noise.safetensors").write_bytes(os.urandom(2**22 + 3))
    (model_folder / "empty.txt").touch()
    before = contents(model_folder)
    (model_folder / ".hidden").mkdir()
    (model_folder / ".hidden" / "file").touch()
    size = pack(model_folder, tmp_path / "packed.pho")
    pack(model_folder, tmp_path / "again.pho")
    files = unpack(tmp_path / "packed.pho", tmp_path / "back")

    assert contents(tmp_path / "back") == before
    assert files == len(before)
    assert size.before == sum(map(len, before.values()))
    assert size.after == (tmp_path / "packed.pho").stat().st_size
    assert (tmp_path / "again.pho").read_bytes() == (tmp_path / "packed.pho").read_bytes()


def test_load(model_folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model is the model; its folder is there once, as long as the model is."""
    monkeypatch.setenv("PHO_CACHE_DIR", str(packed.parent / "cache"))
    loaded = pho.load_packed(packed, device="cpu")
    plain = load_model(str(model_folder), device="cpu")
    streamed = load_model(str(packed), device="cpu", stream=True)
    expected = AutoModelForCausalLM.from_pretrained(model_folder).generation_config

    assert loaded.weights_sha256 == plain.weights_sha256 == streamed.weights_sha256
    assert loaded.stored_dtype is plain.stored_dtype
    assert loaded.tokenizer("the cat").input_ids == plain.tokenizer("the cat").input_ids
    assert loaded.model.generation_config.to_dict() == expected.to_dict()
    with as_folder(packed) as folder:
        assert contents(folder) == contents(model_folder)
    scratch = packed.parent / "cache" / "scratch"
    assert len([*scratch.iterdir()]) == 1
    del loaded, streamed
    gc.collect()
    assert not [*scratch.iterdir()]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_cut_short(packed: Path, tmp_path: Path, share: float) -> None:
    """A download that ended early is refused in words, and nothing is written."""
    data = packed.read_bytes()
    packed.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"packed\.pho is damaged or cut short: .*Get the file"):
        unpack(packed, tmp_path / "back")
    with pytest.raises(ModelError, match="damaged or cut short"):
        pho.load_packed(packed, device="cpu")

    assert not (tmp_path / "back").exists()


def _shortened(data: bytes) -> bytes:
    return data[:-9]


def _longer(data: bytes) -> bytes:
    return data + b"more"


def _other_content(data: bytes) -> bytes:
    return data[:-4] + bytes(byte ^ 1 for byte in data[-4:])  # the checksum is the end


def _without_size(data: bytes) -> bytes:
    content = zstandard.ZstdDecompressor().decompress(data)
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


def _not_zstd(_data: bytes) -> bytes:
    return b"{}"


@pytest.mark.parametrize("damage", [_shortened, _longer, _other_content, _without_size, _not_zstd])
def test_damaged_entry(packed: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """Though the archive is whole, an entry that is not what was packed is refused."""
    bad = rewritten(packed, lambda name, data: (name, damage(data) if "model" in name else data))
    with pytest.raises(ModelError, match=r"bad\.pho is damaged or cut short: .*Get the file"):
        unpack(bad, tmp_path / "back")
    with pytest.raises(ModelError, match="damaged or cut short"):
        pho.load_packed(bad, device="cpu")

    assert not (tmp_path / "back").exists()


def test_no_room(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What declares more than the disk has free is refused before anything is written."""
    bomb = zstandard.ZstdCompressor().compress(bytes(2**22))
    large = rewritten(packed, lambda name, data: (name, bomb if "config" in name else data))
    free = module.shutil.disk_usage(tmp_path)._replace(free=2**22)  # type: ignore[attr-defined]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_write", None)
    with pytest.raises(OutputError, match="has room for 4 MiB"):
        unpack(large, tmp_path / "back")
    with pytest.raises(OutputError, match="PHO_CACHE_DIR"):
        pho.load_packed(large, device="cpu")

    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../out.json", "/out.json", "a/../../out.json", "C:\\a"])
def test_names_that_lead_out(packed: Path, tmp_path: Path, name: str) -> None:
    """No name leads out of the folder that is written to."""
    bad = rewritten(
        packed, lambda old, data: (f"{name}.zst" if old == "config.json.zst" else old, data)
    )
    with pytest.raises(ModelError, match="leads elsewhere"):
        unpack(bad, tmp_path / "back")


def test_another_archive_and_no_archive_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "other.pho"
    with ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ModelError, match="`pho pack` of this version did not write it"):
        unpack(path, tmp_path / "back")
    with pytest.raises(ModelError, match="does not exist"):
        unpack(tmp_path / "none.pho", tmp_path / "back")
    with pytest.raises(ModelError, match="is not a packed model"):
        pho.load_packed(tmp_path)


def test_refused(model_folder: Path, packed: Path, tmp_path: Path) -> None:
    """What is no model folder is not packed, nor what is packed, and nothing half is left."""
    with pytest.raises(InvalidInput, match="packed already"):
        pack(packed, tmp_path / "again.pho")
    with pytest.raises(InvalidInput, match=r"does not end in \.pho"):
        pack(model_folder, tmp_path / "again")
    with pytest.raises(InvalidInput, match="would lie in"):
        pack(model_folder, model_folder / "packed.pho")
    with pytest.raises(OutputError, match="is in use"):
        unpack(packed, model_folder)
    (model_folder / "config.json").unlink()
    with pytest.raises(InvalidInput, match="not a model folder"):
        pack(model_folder, tmp_path / "again.pho")

    assert not (tmp_path / "again.pho").exists()


def test_an_interrupted_packing_leaves_the_old_file_as_it_was_and_nothing_beside_it(
    model_folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, there = packed.read_bytes(), {*tmp_path.iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ZipFile, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(model_folder, packed)

    assert packed.read_bytes() == before
    assert {*tmp_path.iterdir()} == there
