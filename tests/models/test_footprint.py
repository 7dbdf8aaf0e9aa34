"""What a model takes in each stage, from shapes alone: no weights are there."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pho_service.models.architecture import footprint_of
from pho_service.planning.stage_memory import (
    HEAD_TOKENS,
    LOGITS_AT_ONCE,
    CalibrationRun,
    Place,
    calibration_peak,
    choose_run,
    confirmation_peak,
    pruning_peak,
)
from pho_service.pruning import perplexity
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.steps import Steps

GPU = Place(on_gpu=True)
GB = 10**9
BEST = Steps(permutation="score", repruning="swaps", update="least-squares", shrinkage=1.0)


def empty(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


@pytest.fixture(scope="module")
def seven():
    """LLaMA-2-7B, in the configuration's defaults; a block is made, and counted 32 times."""
    one = footprint_of(empty(LlamaConfig(num_hidden_layers=1)))
    return replace(one, blocks=one.blocks * 32)


def test_a_model_without_weights_has_the_same_footprint(tiny_llama):
    loaded = footprint_of(tiny_llama)
    model = empty(tiny_llama.config)
    bare = footprint_of(model, dtype=torch.float32)

    assert bare == loaded
    assert loaded.weights == sum(p.nbytes for p in tiny_llama.parameters())
    assert footprint_of(model).weights == loaded.weights // 2


def test_seven(seven):
    """A 7B in bfloat16 has 13.5 GB; on 80 GB four windows of 2,048 tokens are run at once."""
    settings = CalibrationSettings()
    plan = choose_run(
        seven, settings, GPU, windows=128, fisher_windows=32,
        device_limit=int(79e9), device_size=int(85e9),
    )  # fmt: skip

    assert seven.weights == pytest.approx(13.48 * GB, rel=1e-3)
    assert plan.run == CalibrationRun(windows=4, forward_windows=4)
    assert plan.fits


def test_with_less_memory_fewer_windows_run_backward_then_they_recompute(seven):
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


def test_second_moments_are_shrunk_in_a_copy_of_the_widest_a_cpu_has_main_memory_alone(seven):
    peaks = [
        pruning_peak(seven, GPU, steps, windows=128, tokens=2048, keep_dense=False)
        for steps in (replace(BEST, shrinkage=0.0), BEST)
    ]
    on_cpu = calibration_peak(
        seven, CalibrationSettings(), Place(on_gpu=False), CalibrationRun(),
        windows=128, fisher_windows=32,
    )  # fmt: skip

    assert peaks[1].device - peaks[0].device == 4 * 11008**2
    assert on_cpu.device == 0
    assert on_cpu.host > seven.weights


def test_removed_weights_are_on_the_card_or_in_main_memory(seven):
    on_card = confirmation_peak(seven, GPU, tokens=2048, windows=1)
    beside = confirmation_peak(seven, GPU, tokens=2048, windows=1, removed_on_device=False)

    assert on_card.device - beside.device == beside.host - on_card.host
    assert beside.host == pytest.approx(seven.prunable, rel=1e-6)  # two bytes of every other one


def test_tokens_and_logits_at_a_time_are_those_that_are_planned():
    assert HEAD_TOKENS == perplexity.HEAD_TOKENS
    assert LOGITS_AT_ONCE == perplexity.CHUNK
