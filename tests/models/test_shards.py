"""A calibration in shards gives the same bits, whoever gathers them."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from pho_service.models.architecture import prunable_linears, unfuse_experts
from pho_service.models.calibration import (
    calibration_text,
    cut,
    measure,
    measure_shard,
    sums_of,
    sums_record,
)
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.scratch import Memo
from pho_service.pruning.statistics import Collector, gather
from pho_service.spec.calibration import CalibrationSettings

SETTINGS = CalibrationSettings(
    samples=13, context_length=24, projection_rows=16, fisher_samples=5, kernel_sizes=(3,)
)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr("pho_service.spec.calibration.SHARDED_FROM", 1)


@pytest.fixture
def text(model, texts):
    return calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)


def tensors(statistics):
    for entry in statistics.inputs:
        yield from (entry.activation_norm, entry.root)
    yield from statistics.fisher.values()


def test_by_whoever(model, text, tmp_path):
    """Gathered in any order, by way of files, and in part by the one who adds up: the same bits."""
    alone = measure(model, text, SETTINGS)
    memo = Memo(folder=tmp_path, key="k")
    for number in (7, 0, 3, 5, 2):
        memo.keep(f"{number}", sums_record(measure_shard(model, text, SETTINGS, number)))

    def stored_sums(number):
        record = memo.read(f"{number}")
        return record and sums_of(record)

    together = measure(model, text, SETTINGS, stored_sums=stored_sums)
    assert together.input_of == alone.input_of
    assert list(together.fisher) == list(alone.fisher)
    assert all(map(torch.equal, tensors(together), tensors(alone)))


@pytest.mark.parametrize("device_map", [pytest.param(None, marks=pytest.mark.thorough), "auto"])
def test_added_up_from_files_on_one_gpu_or_on_two_that_a_model_lies_on_shards_give_the_same_bits(
    model_folder, texts, pretended_gpus, device_map
):
    model = load_model(str(model_folder), device="cuda", device_map=device_map)
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    alone = measure(model, text, SETTINGS)
    used = [card.allocated > 0 for card in pretended_gpus]
    parts = [measure_shard(model, text, SETTINGS, number) for number in range(8)]
    on_cpu = [
        replace(
            part,
            squares=[each.cpu() for each in part.squares],
            moments=[each.cpu() for each in part.moments],
            fisher={name: each.cpu() for name, each in part.fisher.items()},
        )
        for part in parts
    ]
    together = measure(model, text, SETTINGS, stored_sums=on_cpu.__getitem__)

    assert used == [True, device_map == "auto"]
    assert all(map(torch.equal, tensors(together), tensors(alone)))


def test_signs_apart(model, text):
    """The same window in every shard does not count for more: its signs are drawn anew in each."""
    windows = text.calibration[:1].expand(8, -1)
    same = replace(text, calibration=windows)
    settings = replace(SETTINGS, samples=8, projection_rows=2**14)  # hardly two tokens in a row
    statistics = measure(model, same, settings)

    for entry in statistics.inputs:
        energy = entry.activation_norm.square().sum() / windows.shape[1]
        assert 0.9 < entry.root.square().sum() / energy < 1.1  # 8 with the same signs


@pytest.mark.parametrize("windows", [1, 8, 13])
def test_cut(text, windows):
    """Each window is in one shard, those that are run backward first, and shards are alike."""
    numbered = torch.arange(windows)[:, None].expand(-1, 24)
    shards = cut(replace(text, calibration=numbered), SETTINGS, stream=False)

    backward = [s.windows[: s.fisher_windows, 0] for s in shards]
    assert sorted(torch.cat([s.windows[:, 0] for s in shards]).tolist()) == list(range(windows))
    assert sorted(torch.cat(backward).tolist()) == list(range(min(5, windows)))
    assert len(shards) == min(8, windows)
    assert len({s.seed for s in shards}) == len(shards)
    for sizes in ([len(s.windows) for s in shards], [s.fisher_windows for s in shards]):
        assert max(sizes) - min(sizes) <= 1


def test_small_streamed_and_gram_ones_are_not_cut(monkeypatch):
    monkeypatch.undo()
    default = CalibrationSettings()

    assert default.shards(stream=False) == 8
    assert replace(default, samples=63).shards(stream=False) == 1
    assert replace(default, samples=2, context_length=2**16).shards(stream=False) == 2
    assert replace(default, projection_rows=0).shards(stream=False) == 1
    assert default.shards(stream=True) == 1


@pytest.fixture
def mixtral():
    """A random Mixtral of eight experts, two of which each token is routed to."""
    config = MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = MixtralForCausalLM(config).float().eval()
    unfuse_experts(found)
    return found


def test_an_expert_has_what_it_got_in_the_other_shards(mixtral):
    linears = prunable_linears(mixtral)
    windows = torch.randint(256, (6, 4), generator=torch.Generator().manual_seed(1))
    known = {"fisher_windows": 6, "projection_rows": 8, "seed": 0}
    whole = gather(mixtral, linears, windows, **known).statistics(windows)
    total = Collector(linears, 8, 0)
    unseen = set()
    for window in windows.split(1):
        sums = gather(mixtral, linears, window, **{**known, "fisher_windows": 1}).sums()
        unseen |= linears.keys() - sums.input_of.keys()
        total.add(sums)
    total.finish_inputs(sequences=6, tokens=windows.numel())
    added = total.finish()

    assert unseen
    for name, fisher in whole.fisher.items():
        torch.testing.assert_close(added.fisher[name], fisher)
        torch.testing.assert_close(added.activation_norm(name), whole.activation_norm(name))


def test_what_is_cut_has_the_same_statistics_but_for_rounding_and_signs_and_another_name(
    model, text, texts, monkeypatch
):
    cut_up = measure(model, text, SETTINGS)
    monkeypatch.setattr("pho_service.spec.calibration.SHARDED_FROM", 10**9)
    uncut = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    whole = measure(model, uncut, SETTINGS)

    assert uncut.bundle_key != text.bundle_key
    assert cut_up.input_of == whole.input_of
    for name, fisher in whole.fisher.items():
        torch.testing.assert_close(cut_up.fisher[name], fisher)
    for mine, theirs in zip(cut_up.inputs, whole.inputs, strict=True):
        torch.testing.assert_close(mine.activation_norm, theirs.activation_norm)


def test_damaged(model, text, tmp_path):
    """What is not the sums of this shard of this calibration is not read."""
    memo = Memo(folder=tmp_path, key="k")
    memo.keep("1", sums_record(measure_shard(model, text, SETTINGS, 1)))
    path = memo.path("1")
    whole = path.read_bytes()
    memo.path("2").write_bytes(whole)

    assert memo.read("1") is not None
    assert memo.read("2") is None
    assert memo.read("3") is None
    assert replace(memo, key="other").read("1") is None
    path.write_bytes(whole[:-8])
    assert memo.read("1") is None
