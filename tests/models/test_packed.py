"""A packed folder gives back every bit; what is cut short, damaged or foreign is refused."""

import gc
import os
from zipfile import ZipFile

import pytest
import zstandard
from transformers import AutoModelForCausalLM

import pho_service as pho
from pho_service.errors import InvalidInput, ModelError, OutputError
from pho_service.models import packed as module
from pho_service.models.loading import load_model
from pho_service.models.packed import as_folder, pack, unpack


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def packed(model_folder, tmp_path):
    pack(model_folder, tmp_path / "packed.pho")
    return tmp_path / "packed.pho"


def rewritten(packed, change):
    bad = packed.with_name("bad.pho")
    with ZipFile(packed) as good, ZipFile(bad, "w") as archive:
        archive.comment = good.comment
        for name in good.namelist():
            archive.writestr(*change(name, good.read(name)))
    return bad


def test_the_files_come_back_to_the_bit(model_folder, tmp_path):
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


def test_load(model_folder, packed, monkeypatch):
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


def refused_as_damaged(path):
    back = path.parent / "back"
    with pytest.raises(ModelError, match=rf"{path.name} is damaged or cut short: .*Get the file"):
        unpack(path, back)
    with pytest.raises(ModelError, match="damaged or cut short"):
        pho.load_packed(path, device="cpu")
    return not back.exists()


def without_size(data):
    content = zstandard.ZstdDecompressor().decompress(data)
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data + b"more",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),  # the checksum is the end
        lambda _: b"{}",
        without_size,
    ],
)
def test_a_file_that_is_cut_short_and_a_whole_one_with_a_damaged_entry_are_refused(packed, damage):
    bad = rewritten(packed, lambda name, data: (name, damage(data) if "model" in name else data))
    assert refused_as_damaged(bad)
    whole = packed.read_bytes()
    for share in (0.02, 0.5, 0.999):
        packed.write_bytes(whole[: int(len(whole) * share)])
        assert refused_as_damaged(packed)


def test_no_room(packed, tmp_path, monkeypatch):
    """What declares more than the disk has free is refused before anything is written."""
    bomb = zstandard.ZstdCompressor().compress(bytes(2**22))
    large = rewritten(packed, lambda name, data: (name, bomb if "config" in name else data))
    free = module.shutil.disk_usage(tmp_path)._replace(free=2**22)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr(module, "_write", None)
    with pytest.raises(OutputError, match=r"has room for 4\.0 MiB"):
        unpack(large, tmp_path / "back")
    with pytest.raises(OutputError, match="PHO_CACHE_DIR"):
        pho.load_packed(large, device="cpu")

    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "name",
    ["../out.json", "/out.json", "a/../../out.json", "C:\\a", ".bashrc", "sub/.git/hooks/x"],
)
def test_no_name_leads_out_of_the_folder(packed, tmp_path, name):
    bad = rewritten(
        packed, lambda old, data: (f"{name}.zst" if old == "config.json.zst" else old, data)
    )
    with pytest.raises(ModelError, match="leads elsewhere"):
        unpack(bad, tmp_path / "back")


def test_another_archive_and_no_archive_are_told_apart(tmp_path):
    path = tmp_path / "other.pho"
    with ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ModelError, match="`pho pack` of this version did not write it"):
        unpack(path, tmp_path / "back")
    with pytest.raises(ModelError, match="does not exist"):
        unpack(tmp_path / "none.pho", tmp_path / "back")
    with pytest.raises(ModelError, match="is not a packed model"):
        pho.load_packed(tmp_path)


def test_refused(model_folder, packed, tmp_path):
    """What is no model folder is not packed, nor what is packed, and nothing half is left."""
    with pytest.raises(InvalidInput, match="packed already"):
        pack(packed, tmp_path / "again.pho")
    with pytest.raises(InvalidInput, match=r"does not end in \.pho"):
        pack(model_folder, tmp_path / "again")
    with pytest.raises(InvalidInput, match="would lie in"):
        pack(model_folder, model_folder / "packed.pho")
    with pytest.raises(OutputError, match="is in use"):
        unpack(packed, model_folder)
    (tmp_path / "elsewhere").write_text("of somebody else")
    (model_folder / "notes.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match=r"notes\.txt is a link that leads out of the folder"):
        pack(model_folder, tmp_path / "again.pho")
    (model_folder / "notes.txt").unlink()
    (model_folder / "config.json").unlink()
    with pytest.raises(InvalidInput, match="not a model folder"):
        pack(model_folder, tmp_path / "again.pho")

    assert not (tmp_path / "again.pho").exists()


def test_an_interrupted_packing_leaves_the_old_file_as_it_was_and_nothing_beside_it(
    model_folder, packed, tmp_path, monkeypatch
):
    before, there = packed.read_bytes(), {*tmp_path.iterdir()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ZipFile, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(model_folder, packed)

    assert packed.read_bytes() == before
    assert {*tmp_path.iterdir()} == there


def test_a_small_file_that_would_fill_a_disk_is_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BESIDE", 2**20)
    monkeypatch.setattr(module, "_SMALL", 2**22)
    for name, size, words in (
        ("README.md", 2**20 + 1, "README.md has 1.0 MiB, and a file beside the weights may have"),
        ("model-2.safetensors", 2**29, "would be unpacked to 512.0 MiB, more than 1000 times"),
    ):
        bad = tmp_path / "bad.pho"
        with ZipFile(packed) as good, ZipFile(bad, "w") as archive:
            archive.comment = good.comment
            archive.writestr(f"{name}.zst", zstandard.ZstdCompressor().compress(bytes(size)))
        with pytest.raises(ModelError, match=words):
            unpack(bad, tmp_path / "out")

        assert not (tmp_path / "out").exists()


def test_what_could_not_be_unpacked_is_not_packed(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BESIDE", 100)
    with pytest.raises(ModelError, match=r"config\.json has .* Leave it out of the model's folder"):
        pack(model_folder, tmp_path / "big.pho")

    assert [*tmp_path.glob("*.pho")] == []
