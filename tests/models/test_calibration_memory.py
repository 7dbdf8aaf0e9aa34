"""Calibration within a memory: what is planned, what it gives, and what it really takes."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pho_service.errors import InvalidInput, OutOfMemory, OutputError
from pho_service.models.calibration import calibrate, calibration_text, measure, plan_calibration
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.planning.stage_memory import CalibrationPlan, CalibrationRun, Peak
from pho_service.pruning.hardware import available_memory, memory_in_use
from pho_service.spec.calibration import CalibrationSettings

SETTINGS = CalibrationSettings(samples=4, context_length=24, projection_rows=8)


def crowded(model, monkeypatch, most):
    """Run four windows at once, out of memory on more than some; how many it is given each time."""
    given = []

    def look(_module, args):
        given.append(len(args[0]))
        if given[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.model.get_input_embeddings().register_forward_pre_hook(look)
    run = CalibrationRun(windows=4, forward_windows=4)
    plan = CalibrationPlan(run=run, peak=Peak(device=0, host=0), fits=True)
    monkeypatch.setattr("pho_service.models.calibration.plan_calibration", lambda *_, **__: plan)
    return given


def test_windows_that_do_not_fit_after_all_are_run_half_as_many_at_once_then_it_is_an_error(
    model, texts, monkeypatch
):
    plan = plan_calibration(model, SETTINGS, windows=4, fisher_windows=1)
    assert (plan.run, plan.fits) == (CalibrationRun(), True)  # a CPU without a limit keeps all
    assert plan.peak.device == 0
    assert plan.peak.host > sum(p.nbytes for p in model.model.parameters())
    settings = replace(SETTINGS, fisher_samples=4)
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
    alone = measure(model, text, settings)
    given = crowded(model, monkeypatch, 2)
    halved = measure(model, text, settings)

    assert given == [4, 2, 2]
    for name, fisher in alone.fisher.items():
        torch.testing.assert_close(halved.fisher[name], fisher)
    few = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    given = crowded(model, monkeypatch, 0)
    message = r"of 24 tokens ran out of memory: CUDA.*or .*stream=True"
    with pytest.raises(OutOfMemory, match=message):
        measure(model, few, SETTINGS)
    assert given == [1, 1]  # the one window that is run backward, twice


def test_on_a_gpu_whose_memory_another_program_takes_in_the_midst_of_a_run_half_as_many_are_run(
    model_folder, texts, pretended_gpu, monkeypatch, caplog
):
    model = load_model(str(model_folder), device="cuda")
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)

    def fill(_module, _args):
        handle.remove()
        pretended_gpu.fault = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def empty():
        pretended_gpu.fault = None

    handle = model.model.get_output_embeddings().register_forward_pre_hook(fill)
    monkeypatch.setattr("pho_service.models.calibration.let_go_of_memory", empty)
    statistics = measure(model, text, SETTINGS)

    assert set(statistics.fisher) == set(model.linears)
    assert "memory ran out: calibrating in smaller pieces" in caplog.text


def test_a_run_is_halved_in_its_windows_first_then_in_what_it_keeps_of_them():
    whole = CalibrationRun(windows=2, forward_windows=4)
    half = CalibrationRun(windows=1, forward_windows=2)
    single, least = CalibrationRun(), CalibrationRun(recompute=True)

    assert [run.halved() for run in (whole, half, single, least)] == [half, single, least, None]
    assert replace(least, states_on_device=True, spill=True).halved() == replace(least, spill=True)


@pytest.mark.parametrize("stream", [False, True])
def test_too_little(model_folder, texts, *, stream):
    """A limit that nothing fits into is refused before anything is run, with what is needed."""
    model = load_model(str(model_folder), device="cpu", stream=stream)
    settings = replace(SETTINGS, memory_bytes=2**20)
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), settings)
    model.model.forward = None  # whoever runs it fails

    with pytest.raises(
        InvalidInput,
        match=r"windows of 24 tokens needs up to \d.* but may take 1\.0 MiB\. Allow it",
    ):
        calibrate(model, text, settings)


def larger_model(folder):
    """A model whose activations can be told from what else a process holds: 24 MB of weights."""
    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=4, dtype=torch.float32,
    )  # fmt: skip
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM(config).save_pretrained(folder)


def test_windows_that_are_too_long_are_named_with_a_length_that_fits(model_folder):
    larger_model(model_folder)
    model = load_model(str(model_folder), device="cpu")

    weights = sum(p.nbytes for p in model.model.parameters())

    def plan(context_length, limit):
        settings = replace(SETTINGS, context_length=context_length, memory_bytes=limit)
        return plan_calibration(model, settings, windows=4, fisher_windows=1)

    limit = plan(256, None).peak.host - weights + memory_in_use(model.device) + 2**20
    with pytest.raises(InvalidInput) as refusal:
        plan(4096, limit)
    (shorter,) = re.findall(r"context_length=(\d+)", str(refusal.value))

    assert plan(int(shorter), limit).fits
    with pytest.raises(InvalidInput):
        plan(2 * int(shorter), limit)


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000", 1000 - (900 - 600)), ("100", 0), ("max", None)]
)
def test_of_a_containers_memory_what_its_files_pages_take_can_be_had(
    monkeypatch, tmp_path, limit, expected
):
    monkeypatch.setattr("pho_service.pruning.hardware.CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 250\nfile 600\n")

    assert available_memory() == expected or (expected is None and available_memory() > 10**6)


@pytest.fixture
def streamed(model_folder):
    return load_model(str(model_folder), device="cpu", stream=True)


def test_inputs_of_a_streamed_models_blocks_beyond_the_limit_are_on_disk_and_give_the_same_bits(
    streamed, texts, own_cache, monkeypatch
):
    text = calibration_text(streamed, TextSource(path=str(texts["calibration"])), SETTINGS)
    expected = calibrate(streamed, text, SETTINGS)
    assert not own_cache.exists()  # few of them stay in memory
    monkeypatch.setattr("pho_service.planning.stage_memory.HELD", 0)
    actual = calibrate(streamed, text, SETTINGS)

    assert list((own_cache / "scratch").iterdir()) == []  # its files have no names
    for a, b in zip(actual.layers, expected.layers, strict=True):
        assert torch.equal(a.fisher, b.fisher)


def test_a_disk_that_is_too_small_for_them_is_refused_before_anything_is_run(
    streamed, texts, monkeypatch
):
    text = calibration_text(streamed, TextSource(path=str(texts["calibration"])), SETTINGS)
    monkeypatch.setattr("pho_service.planning.stage_memory.HELD", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    streamed.model.forward = None  # whoever runs it fails

    with pytest.raises(OutputError, match=r"room for 1000.0 B, but .*PHO_CACHE_DIR"):
        calibrate(streamed, text, SETTINGS)
