"""What is measured of models beside each other, and what cannot be."""

import itertools
from pathlib import Path

import pytest

import pho_service as pho
from pho_service.errors import InvalidInput
from pho_service.models.packed import pack
from pho_service.pipeline import bench as measuring
from pho_service.pipeline.bench import LOADS, BenchSettings, bench

FEW = BenchSettings(batch=2, prompt=8, new_tokens=3, rounds=2)


def test_bench(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model runs once to warm up and in every round, in one order and then in the other."""
    packed = tmp_path / "packed.pho"
    pack(model_folder, packed)
    clock = itertools.count()
    order: list[str] = []
    run = measuring._run

    def recorded(model: measuring.LanguageModel, settings: BenchSettings) -> tuple[float, float]:
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


def test_tokens(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading ends with the first token, and writing with as many more as are asked for."""
    model = measuring.load_model(str(model_folder), device="cpu")
    lengths: list[int] = []
    clock = itertools.count()
    monkeypatch.setattr(measuring, "_now", lambda _: float(next(clock)))
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args or (kwargs["input_ids"],))[0].shape[1]),
        with_kwargs=True,
    )
    prefill, decode = measuring._run(model, BenchSettings(prompt=8, new_tokens=4))

    assert lengths == [8, 1, 1, 1, 1]
    assert (prefill, decode) == (1, 4)


def test_refused(model_folder: Path) -> None:
    """A model twice, or a prompt that is longer than a model reads, is refused."""
    with pytest.raises(InvalidInput, match="given twice"):
        bench([str(model_folder)] * 2, FEW, device="cpu")
    with pytest.raises(InvalidInput, match="more than"):
        bench([str(model_folder)], BenchSettings(prompt=10**6), device="cpu")
    with pytest.raises(InvalidInput, match="rounds=0 is not at least 1"):
        pho.bench(model_folder, rounds=0)
    with pytest.raises(InvalidInput, match="no model is given"):
        pho.bench([])
