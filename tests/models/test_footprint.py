"""What a model takes in each stage, from shapes alone: no weights are there."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pho_service.models.architecture import footprint_of
from pho_service.planning.stage_memory import (
    CalibrationRun,
    Footprint,
    Place,
    calibration_peak,
    choose_run,
    confirmation_peak,
    pruning_peak,
    saving_peak,
)
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.steps import Steps

GPU = Place(on_gpu=True)
STREAMED = Place(on_gpu=True, stream=True)
GB = 10**9
BEST = Steps(permutation="error", repruning="swaps", update="least-squares", shrinkage=1.0)


def empty(config: LlamaConfig) -> PreTrainedModel:
    """A model whose weights are nowhere."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def llama(width: int, inner: int, blocks: int, heads: int, groups: int, words: int) -> Footprint:
    """The footprint of a LLaMA in bfloat16; two blocks are made, and counted as often as it has."""
    model = empty(
        LlamaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=2,
            num_attention_heads=heads, num_key_value_heads=groups,
        )
    )  # fmt: skip
    few = footprint_of(model)
    return replace(few, blocks=few.blocks[:1] * blocks)


@pytest.fixture(scope="module")
def seven() -> Footprint:
    """LLaMA-2-7B."""
    return llama(4096, 11008, 32, 32, 32, 32000)


@pytest.fixture(scope="module")
def seventy() -> Footprint:
    """Llama-3-70B."""
    return llama(8192, 28672, 80, 64, 8, 128256)


def test_no_weights(tiny_llama: LlamaForCausalLM) -> None:
    """A model without weights has the footprint of one with them; a dtype that is asked counts."""
    loaded = footprint_of(tiny_llama)
    model = empty(tiny_llama.config)
    bare = footprint_of(model, dtype=torch.float32)

    assert bare == loaded
    assert loaded.weights == sum(p.nbytes for p in tiny_llama.parameters())
    assert footprint_of(model).weights == loaded.weights // 2


def test_seven(seven: Footprint) -> None:
    """A 7B in bfloat16 has 13.5 GB; on 80 GB four windows of 2,048 tokens are run at once."""
    settings = CalibrationSettings()
    plan = choose_run(
        seven, settings, GPU, windows=128, fisher_windows=32,
        device_limit=int(79e9), device_size=int(85e9),
    )  # fmt: skip

    assert seven.weights == pytest.approx(13.48 * GB, rel=1e-3)
    assert plan.run == CalibrationRun(windows=4, forward_windows=4)
    assert plan.fits


def test_less_memory(seven: Footprint) -> None:
    """With less memory fewer windows are run backward, those forward only stay; then recompute."""
    runs = []
    for limit in (64 * GB, 40 * GB, 24 * GB, GB):
        plan = choose_run(
            seven, CalibrationSettings(), GPU, windows=128, fisher_windows=32, device_limit=limit
        )
        runs.append((plan.run.windows, plan.run.forward_windows, plan.run.recompute, plan.fits))

    assert runs == [
        (4, 4, False, True),
        (2, 4, False, True),
        (1, 4, True, True),
        (1, 1, True, False),
    ]


def test_card_decides(seven: Footprint) -> None:
    """How many windows are run at once hardly depends on who else uses a large card."""
    runs = {
        choose_run(
            seven, CalibrationSettings(), GPU, windows=128, fisher_windows=32,
            device_limit=free, device_size=int(85e9),
        ).run
        for free in (84 * GB, 74 * GB, 66 * GB)
    }  # fmt: skip

    assert len(runs) == 1


def test_seventy(seventy: Footprint) -> None:
    """A 70B streamed through 80 GB takes less than 64 GB of main memory, from end to end."""
    settings = CalibrationSettings()
    plan = choose_run(
        seventy, settings, STREAMED, windows=128, fisher_windows=32,
        device_limit=79 * GB, host_limit=64 * GB,
    )  # fmt: skip
    in_memory = calibration_peak(
        seventy, settings, STREAMED, replace(plan.run, spill=False, states_on_device=False),
        windows=128, fisher_windows=32,
    )  # fmt: skip

    assert plan.fits
    assert plan.run.spill
    assert in_memory.host > 90 * GB  # what it was, and why the inputs of blocks are on disk
    assert plan.peak.host < 16 * GB
    assert plan.peak.disk > 85 * GB


def test_stages(seven: Footprint, seventy: Footprint) -> None:
    """Each stage of a 7B fits 80 GB, of a streamed 70B as well; the disk is counted."""
    peaks = [
        confirmation_peak(seven, GPU, tokens=2048, windows=166, at_once=8),
        pruning_peak(seven, GPU, BEST, windows=128, tokens=2048, keep_dense=True),
        saving_peak(seven, GPU, stored_itemsize=2),
        confirmation_peak(seventy, STREAMED, tokens=2048, windows=166),
        pruning_peak(seventy, STREAMED, BEST, windows=128, tokens=2048, keep_dense=True),
        saving_peak(seventy, STREAMED, stored_itemsize=2),
    ]

    assert all(peak.device < 79 * GB and peak.host < 64 * GB for peak in peaks)
    assert [peak.disk > 0 for peak in peaks] == [False, False, True, False, True, True]


def test_shrinkage(seven: Footprint) -> None:
    """Second moments are shrunk in a copy of one of them, the widest at most."""
    peaks = [
        pruning_peak(seven, GPU, steps, windows=128, tokens=2048, keep_dense=False)
        for steps in (replace(BEST, shrinkage=0.0), BEST)
    ]

    assert peaks[1].device - peaks[0].device == 4 * 11008**2


def test_removed_weights(seven: Footprint) -> None:
    """What a candidate removes is on the card or in main memory, and is half at 50 %."""
    on_card = confirmation_peak(seven, GPU, tokens=2048, windows=1)
    beside = confirmation_peak(seven, GPU, tokens=2048, windows=1, removed_on_device=False)

    assert on_card.device - beside.device == beside.host - on_card.host
    assert beside.host == pytest.approx(seven.prunable, rel=1e-6)  # two bytes of every other one


def test_on_a_cpu_all_is_main_memory(seven: Footprint) -> None:
    peak = calibration_peak(
        seven, CalibrationSettings(), Place(on_gpu=False), CalibrationRun(),
        windows=128, fisher_windows=32,
    )  # fmt: skip

    assert peak.device == 0
    assert peak.host > seven.weights
