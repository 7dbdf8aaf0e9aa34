"""What is measured of models beside each other, and which linears the 2:4 kernels are given."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pho_service as pho
from pho_service.errors import InvalidInput
from pho_service.models.loading import load_model
from pho_service.models.packed import pack
from pho_service.pipeline import bench as measuring
from pho_service.pipeline.bench import LOADS, bench, check_gpu, convert_
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.work import Work
from pho_service.pruning.masks import broken_groups
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.steps import Steps
from pho_service.spec.verbs import BenchSettings

FEW = BenchSettings(batch=2, prompt=8, new_tokens=3, rounds=2)


def test_bench(model_folder, tmp_path, monkeypatch):
    """Every model runs once to warm up and in every round, in one order and then in the other."""
    packed = tmp_path / "packed.pho"
    pack(model_folder, packed)
    clock = itertools.count()
    order = []
    run = measuring._run

    def recorded(model, settings):
        order.append(model.name)
        return run(model, settings)

    monkeypatch.setattr(measuring, "_run", recorded)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    a, b = str(model_folder), str(packed)
    found = pho.bench([a, b], batch=2, prompt=8, new_tokens=3, rounds=2, device="cpu")
    first, second = found.sides

    assert order == [a, b, b, a, a, b]
    assert first.load_s == second.load_s == [1.0] * LOADS
    assert first.prefill_s == [1.0, 1.0]
    assert second.decode_s == [3.0, 3.0]  # three more tokens
    assert found.tokens_per_s(second) == (16, 2)
    assert found.ratios(second) == ([1, 1], [1, 1])
    assert second.bytes == packed.stat().st_size < first.bytes
    assert str(found).startswith("8 tokens read and 3 written, batch 2, 2 rounds\nmodel")


def test_tokens(model_folder, monkeypatch):
    """Reading ends with the first token, and writing with as many more as are asked for."""
    model = measuring.load_model(str(model_folder), device="cpu")
    lengths = []
    clock = itertools.count()
    monkeypatch.setattr(measuring, "_now", lambda _: float(next(clock)))
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args or (kwargs["input_ids"],))[0].shape[1]),
        with_kwargs=True,
    )
    prefill, decode = measuring._run(model, BenchSettings(prompt=8, new_tokens=4))

    assert lengths == [8, 1, 1, 1, 1]
    assert (prefill, decode) == (1, 4)


def test_a_prompt_is_no_longer_than_a_model_reads(model_folder):
    asked = BenchSettings(prompt=10**6, new_tokens=3, rounds=1)
    found = bench([str(model_folder)], asked, device="cpu")
    longest = load_model(str(model_folder), device="cpu").longest

    assert longest is not None
    assert found.settings == replace(asked, prompt=longest - 3)


def test_refused(model_folder):
    """A model twice, or no room for a prompt beside the new tokens, is refused."""
    with pytest.raises(InvalidInput, match="given twice"):
        bench([str(model_folder)] * 2, FEW, device="cpu")
    with pytest.raises(InvalidInput, match="leaves no room for a prompt"):
        bench([str(model_folder)], BenchSettings(new_tokens=10**6), device="cpu")
    with pytest.raises(InvalidInput, match="rounds=0 is not at least 1"):
        pho.bench(model_folder, rounds=0)
    with pytest.raises(InvalidInput, match="no model is given"):
        pho.bench([])


DOWN = "model.layers.1.mlp.down_proj"
GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture
def loaded(model, bundle, tmp_path, monkeypatch):
    """A folder at 2:4, one linear at 3:4 and one dense; in bfloat16."""
    linears = Linears(ignore=(GATE,), sparsities={DOWN: "3:4"})
    wanda = replace(reference_methods(Pattern.parse("2:4"))["wanda"], steps=Steps(linears=linears))
    prune_job(Work.of(bundle, model), Configuration.of(wanda), tmp_path / "pruned")
    monkeypatch.setattr(measuring, "check_gpu", lambda _: None)
    return load_model(str(tmp_path / "pruned"), device="cpu", dtype="bfloat16")


def refusing(weight):
    """What torch's conversion does: refuses some shapes, and gives a tensor for the others."""
    if weight.shape[0] == 16:
        raise RuntimeError("dense.size(0) must be larger\nthan 32")
    return weight.clone()


def test_which_linears(loaded, monkeypatch):
    """Only groups that hold as they stand are converted; each other linear has its reason."""
    monkeypatch.setattr(measuring, "to_semi_structured", refusing)
    before = {name: linear.weight.clone() for name, linear in loaded.linears.items()}
    small = [name for name, weight in before.items() if weight.shape[0] == 16]
    done = convert_(loaded, Path(loaded.name))

    assert {*done.left} == {DOWN, GATE, *small}
    assert [*done.converted] == [name for name in loaded.linears if name not in done.left]
    assert done.left[DOWN] == "it was pruned at 3:4, and GPUs have kernels for 2:4"
    assert done.left[GATE] == "it was left dense"
    assert {done.left[name] for name in small} == {
        "torch refuses it: dense.size(0) must be larger than 32"
    }
    assert small
    assert all(torch.equal(loaded.linears[n].weight, w) for n, w in before.items())


def test_without_a_recipe(loaded, monkeypatch):
    """A folder that PHO did not prune is taken by its zeros."""
    monkeypatch.setattr(measuring, "to_semi_structured", torch.clone)
    (Path(loaded.name) / "pruning.json").unlink()
    done = convert_(loaded, Path(loaded.name))

    assert {*done.left.values()} == {"not every group of 4 neighbours has 2 zeros"}
    assert {*done.left} == {DOWN, GATE}


def test_groups_are_those_of_neighbours_counted_row_by_row():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(5, 12, generator=generator) * (torch.rand(5, 12, generator=generator) < 0.6)
    slow = sum(
        sum(float(value) != 0 for value in row[start : start + 4]) > 2
        for row in weight
        for start in range(0, 12, 4)
    )

    assert broken_groups(weight) == slow > 0
    assert broken_groups(weight[:, :10]) == 5 * 3


def test_no_gpu(model_folder, monkeypatch):
    """Without a GPU, on the CPU, on an old GPU and in float32 it is refused with a way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match=r"torch sees no GPU.*pho\.load_model"):
        pho.load_semi_structured(model_folder)
    with pytest.raises(InvalidInput, match="needs a GPU, and the device is cpu"):
        check_gpu(torch.device("cpu"))
    old = {
        "get_device_capability": lambda _: (7, 5), "get_device_name": lambda _: "Old",
    }  # fmt: skip
    for name, answer in old.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    with pytest.raises(InvalidInput, match=r"Old has compute capability 7\.5, but 2:4 needs 8\.0"):
        check_gpu(torch.device("cuda", 0))
    monkeypatch.setattr(measuring, "check_gpu", lambda _: None)
    with pytest.raises(InvalidInput, match="is in float32"):
        convert_(load_model(str(model_folder), device="cpu"), model_folder)
