"""Masks on disk: what is written is read, one bit a weight, and what is damaged is refused."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pho_service.errors import ModelError, OutputError
from pho_service.models.mask_file import (
    MASK_FORMAT,
    LayerMask,
    read_masks,
    weight_sha256,
    write_masks,
)
from pho_service.pruning.masks import pack, unpack


def random_mask(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.fixture
def masks():
    """Three linears of odd sizes, not in alphabetical order; one has an order of its own."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    return {
        "blocks.1.up": LayerMask(keep=random_mask(5, 12, seed=1), order=order),
        "blocks.0.up": LayerMask(keep=random_mask(3, 7, seed=2)),
        "blocks.0.down": LayerMask(keep=random_mask(8, 16, seed=3).T),  # not contiguous
    }


@pytest.fixture
def file(masks, tmp_path):
    path = tmp_path / "m.safetensors"
    write_masks(masks, path, metadata={"model": {"name": "tiny"}})
    return path


def test_all_of_them_comes_back_in_its_order(masks, file):
    again = read_masks(file)

    assert again.names == list(masks)
    assert again.metadata == {"model": {"name": "tiny"}}
    for name, mask in masks.items():
        found = again.mask(name)
        assert found.keep.dtype is torch.bool
        assert torch.equal(found.keep, mask.keep)
        assert again.shapes[name] == tuple(mask.keep.shape)
        if mask.order is None:
            assert found.order is None
        else:
            assert found.order is not None
            assert found.order.dtype is torch.int64
            assert torch.equal(found.order, mask.order)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 11), (16, 16)])
def test_pack(shape):
    """Bit i of the packed mask, counted from the highest bit of byte 0, is weight i."""
    mask = random_mask(*shape)
    packed = pack(mask)
    text = "".join(f"{byte:08b}" for byte in packed.tolist())
    count = mask.numel()

    assert packed.dtype is torch.uint8
    assert len(packed) == -(-count // 8)
    assert text[:count] == "".join(str(int(bit)) for bit in mask.flatten())
    assert set(text[count:]) <= {"0"}
    assert torch.equal(unpack(packed, shape), mask)


def test_hashes(masks, tmp_path):
    """The hashes that writing gives are those of the bits in the file, and reading gives them."""
    path = tmp_path / "m.safetensors"
    hashes = write_masks(masks, path, metadata={})
    again = read_masks(path)

    for name, tensor in load_file(path).items():
        if name.endswith(".keep"):
            expected = hashlib.sha256(bytes(tensor.tolist())).hexdigest()
            assert hashes[name.removesuffix(".keep")] == expected
    assert {name: again.sha256(name) for name in again.names} == hashes


def test_a_mask_may_be_overwritten_as_soon_as_the_next_one_is_asked_for(tmp_path):
    buffer = torch.empty(4, 8, dtype=torch.bool)

    def reused():
        for seed in range(3):
            yield str(seed), LayerMask(keep=buffer.copy_(random_mask(4, 8, seed=seed)))

    write_masks(reused(), tmp_path / "m", metadata={})
    again = read_masks(tmp_path / "m")

    assert all(torch.equal(again.mask(str(i)).keep, random_mask(4, 8, seed=i)) for i in range(3))


def test_the_file_has_one_bit_a_weight_and_little_more(tmp_path):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    keep = random_mask(1024, 1024)
    write_masks({name: LayerMask(keep=keep) for name in names}, tmp_path / "m", metadata={})
    bits = (tmp_path / "m").stat().st_size * 8

    assert 1 <= bits / (len(names) * keep.numel()) < 1.002


def test_a_weights_hash_is_that_of_its_bytes_row_by_row_however_it_lies_in_memory():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    expected = hashlib.sha256(struct.pack("<6f", 1, 2, 3, 4, 5, 6)).hexdigest()

    assert weight_sha256(weight) == expected
    assert weight_sha256(weight.T.contiguous().T) == expected
    assert weight_sha256(weight.bfloat16()) != expected


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (LayerMask(keep=torch.ones(2, 4)), "not a mask"),
        (LayerMask(keep=torch.ones(0, 4, dtype=torch.bool)), "not a mask"),
        (LayerMask(keep=random_mask(2, 3), order=torch.tensor([0, 1, 1])), "not a permutation"),
        (LayerMask(keep=random_mask(2, 3), order=torch.tensor([0.0, 1, 2])), "not a permutation"),
    ],
)
def test_what_is_no_mask_leaves_no_file(mask, said, tmp_path):
    with pytest.raises(ValueError, match=f"odd: .*{said}"):
        write_masks({"odd": mask}, tmp_path / "m", metadata={})
    assert not (tmp_path / "m").exists()


def test_two_masks_of_one_linear_none_at_all_and_a_place_that_is_not_there_are_refused(tmp_path):
    pair = ("a", LayerMask(keep=random_mask(2, 2)))

    with pytest.raises(ValueError, match="a has two masks"):
        write_masks([pair, pair], tmp_path / "m", metadata={})
    with pytest.raises(ValueError, match="no masks"):
        write_masks([], tmp_path / "m", metadata={})
    with pytest.raises(OutputError, match="was not written"):
        write_masks([pair], tmp_path / "no-folder" / "m", metadata={})


def document_of(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()[MASK_FORMAT])


def rewrite(file, document, changes=None):
    """Other metadata and other tensors; None takes one away."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in (changes or {}).items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(tensors, file, metadata={MASK_FORMAT: text})


def cut_off(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


HEADERS = [
    "", '{"version": 1, "layers": 3}', '{"version": 1, "layers": [{"name": "a"}]}',
    '{"version": 1, "layers": [{"name": "a", "shape": [true, 1]}]}',
    '{"version": 1, "layers": [{"name": "a", "shape": [-1, -8]}]}',
    '{"version": 1, "layers": [{"name": "a", "shape": [1, 99999999999999999999]}]}',
]  # fmt: skip
TENSORS = [
    ("blocks.0.up.keep", None),
    ("blocks.0.up.keep", torch.zeros(3)),
    ("blocks.0.up.keep", torch.zeros(3, 1, dtype=torch.uint8)),
    ("blocks.1.up.order", torch.arange(11, dtype=torch.int32)),
    ("blocks.2.up.keep", torch.zeros(3, dtype=torch.uint8)),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((cut_off(share), "damaged or truncated.*pho prune") for share in (0.0, 0.1, 0.999)),
        (lambda file: save_file({"a": torch.zeros(2)}, file, metadata={"format": "pt"}),
         "holds no masks"),
        (lambda file: file.unlink(), r"m\.safetensors do not exist"),
        *((lambda file, header=header: rewrite(file, header), "is damaged") for header in HEADERS),
        *((lambda file, change=change: rewrite(file, document_of(file), dict([change])),
           f"is damaged: {change[0]}") for change in TENSORS),
    ],
)  # fmt: skip
def test_what_is_cut_off_another_file_or_describes_other_tensors_is_refused(file, damage, message):
    damage(file)

    with pytest.raises(ModelError, match=message):
        read_masks(file)


def test_an_order_that_is_no_permutation_is_refused_when_it_is_read(file):
    order = torch.zeros(12, dtype=torch.int32)
    rewrite(file, document_of(file), {"blocks.1.up.order": order})
    masks = read_masks(file)

    assert masks.mask("blocks.0.up").order is None
    with pytest.raises(ModelError, match=r"blocks\.1\.up\.order is not a permutation of 12"):
        masks.mask("blocks.1.up")


@pytest.mark.parametrize("columns", [8, 13])
def test_a_gpu_packs_into_the_same_bits(pretended_gpu, columns):
    keep = random_mask(5, columns)
    expected = pack(keep)
    with pretended_gpu.counting() as counts:
        found = pack(keep.to("cuda"))

    assert torch.equal(found, expected)
    assert found.device.type == "cpu"
    assert counts.d2h_bytes == len(expected)
