"""A packed folder gives back every bit; what is cut short, damaged or foreign is refused."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import pho_service as pho
from pho_service.errors import InvalidInput, ModelError, OutputError
from pho_service.models.byte_planes import CHUNK, chunks, layout_of
from pho_service.models.loading import load_model
from pho_service.models.packed_file import unpack
from pho_service.models.packing import pack


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def odd_folder(model_folder: Path) -> Path:
    """A model folder with tensors of odd dtypes and sizes, zeros, masks, and a hidden file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 11, generator=generator).bfloat16()
    keep = torch.rand(37, 11, generator=generator) < 0.5
    weight[~keep] = 0
    bits = torch.zeros(-(-37 * 11 // 8) * 8, dtype=torch.uint8)
    bits[: 37 * 11] = keep.flatten()
    places = 2 ** torch.arange(7, -1, -1)
    odd = {
        "a.weight": weight,
        "a.special": torch.tensor([0.0, -0.0, float("nan"), float("-inf"), 1e-45]),
        "a.half": torch.randn(5, generator=generator).half(),
        "a.order": torch.randperm(9, generator=generator).int(),
        "a.double": torch.randn(3, generator=generator).double(),
        "a.flags": torch.tensor([True, False, True]),
        "a.empty": torch.empty(0, 4),
    }
    save_file(odd, model_folder / "odd.safetensors", metadata={"format": "pt"})
    (model_folder / "pruning").mkdir()
    packed = (bits.view(-1, 8) * places).sum(1).to(torch.uint8)
    # "b" and "odd" have no weight.
    masks = {"a.keep": packed, "b.keep": packed[:5].clone(), "odd.keep": packed.clone()}
    save_file(masks, model_folder / "pruning" / "masks.safetensors")
    (model_folder / "empty.txt").touch()
    return model_folder


@pytest.mark.parametrize("out", ["packed.pho", "packed"])
def test_every_bit(odd_folder: Path, tmp_path: Path, out: str) -> None:
    """A file and a folder give the same files again, and the same folder the same bytes."""
    before = contents(odd_folder)
    size = pack(odd_folder, tmp_path / out)
    pack(odd_folder, tmp_path / f"again-{out}")
    unpack(tmp_path / out, tmp_path / "back")

    assert contents(tmp_path / "back") == before
    assert size.before == sum(map(len, before.values()))
    if out.endswith(".pho"):
        written = (tmp_path / out).read_bytes()
        assert size.after == len(written)
        assert (tmp_path / f"again-{out}").read_bytes() == written


def test_masks_cost_nothing(odd_folder: Path, tmp_path: Path) -> None:
    """A mask that says which weights are zero is stored as no difference from them."""
    pack(odd_folder, tmp_path / "packed.pho")
    with zipfile.ZipFile(tmp_path / "packed.pho") as archive:
        document = json.loads(archive.read("packed.json"))
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    (like, *others) = document["weights"]["pruning/masks.safetensors"]

    assert like["like"].startswith("odd.safetensors/")
    assert not any("like" in other for other in others)
    assert sizes["pruning/masks.safetensors/0/1"] < 12  # the bits took 51


@pytest.mark.parametrize("dtype", ["BF16", "F32", "I32", "U8"])
def test_streams(dtype: str) -> None:
    """Values that are split and joined are the same, whatever their bits."""
    layout = layout_of(dtype)
    data = os.urandom(999 * layout.size) + bytes(100 * layout.size)
    left = [memoryview(stream) for stream in layout.split(data)]

    def read(number: int, size: int) -> bytes:
        taken, left[number] = left[number][:size], left[number][size:]
        return bytes(taken)

    assert layout.join(1099, read).tobytes() == data
    assert not any(left)


def test_chunks() -> None:
    """Values are taken some million at a time, and the last ones are not forgotten."""
    assert [*chunks(2 * CHUNK + 3)] == [CHUNK, CHUNK, 3]
    assert CHUNK % 8 == 0


@pytest.mark.parametrize("out", ["packed.pho", "packed"])
def test_load(model_folder: Path, tmp_path: Path, out: str) -> None:
    """A packed model is the model: weights, dtype, tokenizer and settings of generation."""
    pack(model_folder, tmp_path / out)
    loaded = pho.load_packed(tmp_path / out, device="cpu")
    plain = load_model(str(model_folder), device="cpu")
    text = "the cat"

    assert loaded.weights_sha256 == plain.weights_sha256
    assert loaded.stored_dtype is plain.stored_dtype
    assert loaded.tokenizer(text).input_ids == plain.tokenizer(text).input_ids
    expected = AutoModelForCausalLM.from_pretrained(model_folder).generation_config
    assert loaded.model.generation_config.to_dict() == expected.to_dict()


def test_shards(model_folder: Path, tmp_path: Path) -> None:
    """A model of several files is read by its index, in the dtype that is asked for."""
    plain = load_model(str(model_folder), device="cpu")
    (model_folder / "model.safetensors").unlink()
    plain.model.save_pretrained(model_folder, max_shard_size="20KB")
    pack(model_folder, tmp_path / "packed.pho")
    loaded = pho.load_packed(tmp_path / "packed.pho", device="cpu", dtype="bfloat16")

    assert len([*model_folder.glob("*.safetensors")]) > 1
    assert loaded.weights_sha256 == plain.weights_sha256_as(torch.bfloat16)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_cut_short(model_folder: Path, tmp_path: Path, share: float) -> None:
    """A download that ended early is refused in words, and nothing is written."""
    path = tmp_path / "packed.pho"
    pack(model_folder, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"packed\.pho is damaged or cut short: .*Get the file"):
        unpack(path, tmp_path / "back")
    with pytest.raises(ModelError, match="damaged or cut short"):
        pho.load_packed(path, device="cpu")

    assert not (tmp_path / "back").exists()


def test_other_bytes(model_folder: Path, tmp_path: Path) -> None:
    """A tensor whose bytes are other ones is found by its hash, though the archive is whole."""
    pack(model_folder, tmp_path / "good.pho")
    with (
        zipfile.ZipFile(tmp_path / "good.pho") as good,
        zipfile.ZipFile(tmp_path / "bad.pho", "w") as bad,
    ):
        for info in good.infolist():
            content = good.read(info)
            if info.filename == "packed.json":
                document = json.loads(content)
                document["weights"]["model.safetensors"][3]["sha256"] = "0" * 64
                content = json.dumps(document).encode()
            bad.writestr(info.filename, content)
    with pytest.raises(ModelError, match="is not what was packed, by its hash"):
        unpack(tmp_path / "bad.pho", tmp_path / "back")
    with pytest.raises(ModelError, match="is not what was packed, by its hash"):
        pho.load_packed(tmp_path / "bad.pho", device="cpu")

    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../out.json", "/out.json", "a/../../out.json"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    """A name in an archive cannot lead out of the folder that it is written to."""
    with zipfile.ZipFile(tmp_path / "bad.pho", "w") as archive:
        archive.writestr("packed.json", '{"format": "pho-packed", "version": 1, "weights": {}}')
        archive.writestr(name, "{}")
    with pytest.raises(ModelError, match="leads elsewhere"):
        unpack(tmp_path / "bad.pho", tmp_path / "sub" / "back")


def test_foreign(tmp_path: Path) -> None:
    """Another archive, another version, and no archive are told apart."""
    path = tmp_path / "other.pho"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ModelError, match="but `pho pack` did not write it"):
        unpack(path, tmp_path / "back")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("packed.json", '{"format": "pho-packed", "version": 2}')
    with pytest.raises(ModelError, match="this PHO reads pho-packed 1"):
        unpack(path, tmp_path / "back")
    with pytest.raises(ModelError, match="does not exist"):
        unpack(tmp_path / "none.pho", tmp_path / "back")
    with pytest.raises(ModelError, match="is not a packed model"):
        pho.load_packed(tmp_path)


def test_refused(model_folder: Path, tmp_path: Path) -> None:
    """What is no model folder is not packed, and what is packed is neither packed nor streamed."""
    path = tmp_path / "packed.pho"
    pack(model_folder, path)
    with pytest.raises(InvalidInput, match="packed already"):
        pack(path, tmp_path / "again.pho")
    with pytest.raises(InvalidInput, match="would lie in"):
        pack(model_folder, model_folder / "packed.pho")
    with pytest.raises(InvalidInput, match="cannot be streamed: its weights are packed"):
        load_model(str(path), device="cpu", stream=True)
    with pytest.raises(OutputError, match="is in use"):
        unpack(path, model_folder)
    (model_folder / "config.json").unlink()
    with pytest.raises(InvalidInput, match="not a model folder"):
        pack(model_folder, tmp_path / "again.pho")
