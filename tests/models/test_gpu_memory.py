"""Memory of a pretended GPU: what is planned is what is taken, and nobody waits for nothing."""

import gc
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pho_service.models.architecture import decoder_blocks, footprint_of, prunable_linears
from pho_service.models.blockwise import collect_statistics_blockwise
from pho_service.models.loading import load_model
from pho_service.pipeline.rating import rate_pruned
from pho_service.planning.stage_memory import (
    LIBRARIES,
    CalibrationRun,
    Place,
    calibration_peak,
    confirmation_peak,
    pruning_peak,
)
from pho_service.pruning.statistics import gather
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate, Reconstruction, Steps

TOKENS, WINDOWS, FISHER = 128, 8, 4
ON_GPU, STREAMED = Place(on_gpu=True), Place(on_gpu=True, stream=True)
SETTINGS = CalibrationSettings(context_length=TOKENS, projection_rows=32, samples=WINDOWS)
CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, kernel_size=5, gradient_exponent=0.3)
# Widths for which activations weigh as much as in a large model.
CONFIG = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).eval()


@pytest.fixture
def windows():
    return torch.randint(512, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("run", "rows", "dtype"),
    [
        pytest.param(CalibrationRun(), 32, torch.float32, marks=pytest.mark.thorough),
        (CalibrationRun(windows=4, forward_windows=4), 32, torch.bfloat16),
        (CalibrationRun(forward_windows=4, recompute=True), 32, torch.float32),
        pytest.param(CalibrationRun(), 0, torch.bfloat16, marks=pytest.mark.thorough),
    ],
)
def test_a_calibration_takes_what_is_planned_or_down_to_two_thirds_of_it_in_both_dtypes(
    pretended_gpu, windows, dtype, run, rows
):
    model = llama(dtype).to("cuda")
    linears = prunable_linears(model)
    planned = calibration_peak(
        footprint_of(model), replace(SETTINGS, projection_rows=rows), ON_GPU, run,
        windows=WINDOWS, fisher_windows=FISHER,
    )  # fmt: skip
    pretended_gpu.reset_peak()
    gather(
        model, linears, windows, fisher_windows=FISHER, projection_rows=rows, seed=0,
        batch_windows=run.windows, forward_windows=run.forward_windows,
        recompute=[block for _, block in decoder_blocks(model)] if run.recompute else (),
    ).statistics(windows)  # fmt: skip

    assert 1 <= (planned.device - LIBRARIES) / pretended_gpu.peak <= 1.5


@pytest.fixture
def folder(model_folder, dtype):
    (model_folder / "model.safetensors").unlink()
    llama(dtype).save_pretrained(model_folder)
    return model_folder


def streamed_statistics(model, windows, *, on_device, spill=None):
    return collect_statistics_blockwise(
        model, windows, fisher_windows=FISHER, projection_rows=32, seed=0, spill=spill,
        states_on_device=on_device,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "on_device"),
    [(torch.float32, True), pytest.param(torch.bfloat16, False, marks=pytest.mark.thorough)],
)
def test_so_does_a_streamed_one_with_the_hidden_states_on_the_card_and_without(
    pretended_gpu, windows, folder, *, on_device
):
    model = load_model(str(folder), device="cuda", stream=True)
    planned = calibration_peak(
        footprint_of(model.model), SETTINGS, STREAMED,
        CalibrationRun(recompute=True, states_on_device=on_device),
        windows=WINDOWS, fisher_windows=FISHER,
    )  # fmt: skip
    gc.collect()
    pretended_gpu.reset_peak()
    streamed_statistics(model, windows, on_device=on_device)

    assert 1 <= (planned.device - LIBRARIES) / pretended_gpu.peak <= 1.5


@pytest.mark.usefixtures("pretended_gpu")
def test_hidden_states_on_the_card_in_main_memory_and_on_disk_give_the_same_bits(
    windows, model_folder, tmp_path
):
    model = load_model(str(model_folder), device="cuda", stream=True)
    windows = windows[:, :16] % 42
    expected = streamed_statistics(model, windows, on_device=True)
    for spill in (None, tmp_path):
        actual = streamed_statistics(model, windows, on_device=False, spill=spill)
        for a, b in zip(actual.inputs, expected.inputs, strict=True):
            assert torch.equal(a.root, b.root)
        for name, fisher in expected.fisher.items():
            assert torch.equal(actual.fisher[name], fisher)


def waits(card, windows, rows):
    model = llama(torch.bfloat16).to("cuda")
    with card.counting() as counts:
        gather(
            model, prunable_linears(model), windows,
            fisher_windows=len(windows) // 2, projection_rows=rows, seed=0,
        ).statistics(windows)  # fmt: skip
    return counts.by_cause


@pytest.mark.parametrize("rows", [8, pytest.param(0, marks=pytest.mark.thorough)])
def test_waits(pretended_gpu, windows, rows):
    """A calibration waits for its results, and once a window, where transformers looks at it."""
    few, many = (waits(pretended_gpu, windows[:count, :16], rows) for count in (2, 8))

    assert many["d2h"] == few["d2h"]
    assert sum(many.values()) - sum(few.values()) <= 8 - 2


@pytest.mark.parametrize("on_device", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_nor_do_waits_grow_with_windows_times_blocks_wherever_the_hidden_states_are(
    pretended_gpu, windows, model_folder, *, on_device
):
    model = load_model(str(model_folder), device="cuda", stream=True)
    waited = []
    for count in (4, 8):
        with pretended_gpu.counting() as counts:
            streamed_statistics(model, windows[:count, :16] % 42, on_device=on_device)
        waited.append(counts.by_cause)
    few, many = waited

    assert many["d2h"] == few["d2h"]
    assert many["h2d"] == few["h2d"]  # weights alone
    assert sum(many.values()) - sum(few.values()) <= 6 * 4  # its arguments, once a window


SCORED = [("0.5", Steps()), ("2:4", Steps(permutation="score"))]
TRAINED = Steps(reconstruction=Reconstruction(method="block", passes=1))
UPDATED = [("0.5", Steps(update="obs")), ("0.5", TRAINED)]


@pytest.mark.parametrize(
    ("dtype", "stream", "steps"),
    [
        pytest.param(torch.float32, False, SCORED, marks=pytest.mark.thorough),
        (torch.bfloat16, False, UPDATED),
        pytest.param(torch.float32, True, SCORED[:1], marks=pytest.mark.thorough),
        pytest.param(torch.bfloat16, True, SCORED[:1], marks=pytest.mark.thorough),
    ],
)
def test_to_prune_a_model_measure_it_and_make_it_dense_again_takes_what_is_planned_as_well(
    pretended_gpu, windows, folder, steps, *, stream
):
    model = load_model(str(folder), device="cuda", dtype="auto", stream=stream)
    footprint, place = footprint_of(model.model), Place(on_gpu=True, stream=stream)
    few = windows[:4]
    statistics = streamed_statistics(model, few, on_device=True) if stream else None
    statistics = statistics or gather(
        model.model, model.linears, few, fisher_windows=2, projection_rows=32, seed=0
    ).statistics(few)
    for pattern, each in steps:
        candidate = Candidate(
            method="crepe", coefficients=CREPE, pattern=Pattern.parse(pattern), steps=each
        )
        gc.collect()
        pretended_gpu.reset_peak()
        rate_pruned(model, statistics, candidate, windows, calibration=few)
        # One window first, the others at once.
        planned = confirmation_peak(
            footprint, place, tokens=TOKENS, windows=WINDOWS,
            at_once=1 if stream else WINDOWS - 1, states_on_device=stream,
        ).device  # fmt: skip
        if each.needs_text:
            pruning = pruning_peak(
                footprint, place, each, windows=len(few), tokens=TOKENS, states_on_device=True,
                keep_dense=True,
            )  # fmt: skip
            planned = max(planned, pruning.device)

        assert 1 <= (planned - LIBRARIES) / pretended_gpu.peak <= 1.5, (pattern, each)
