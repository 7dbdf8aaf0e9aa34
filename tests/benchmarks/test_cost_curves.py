"""The cost curves: measured point by point, kept, and fitted."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click import ClickException
from click.testing import CliRunner

Benchmark = Callable[..., dict[str, list[str]]]


@pytest.fixture
def cost_curves() -> Any:
    """The script, as a module."""
    return import_module("cost_curves")


@pytest.fixture
def at_once(cost_curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are measured in this process, which has imported all that they need."""

    def run_point(task: str, point: Any, bundle: Path) -> Any:
        return import_module("cost_point").TASKS[task](point, bundle)

    monkeypatch.setattr(cost_curves, "run_point", run_point)


@pytest.mark.thorough
@pytest.mark.usefixtures("at_once")
def test_curves(benchmark: Benchmark, tmp_path: Path) -> None:
    """Every point has a row, every curve an exponent and a plot; a second run measures nothing."""
    kept = tmp_path / "kept.jsonl"
    words = ("cost_curves", "--quick", "--out", kept, "--plots", tmp_path)
    table = benchmark(*words)
    before = kept.read_text()
    points = [json.loads(line) for line in before.splitlines()]

    for position in ("8", "16", "0.0021", "128", "256"):  # trials and rows, models, tokens
        assert all(float(cell) > 0 for cell in table[position][:5])
    for curve in (
        "trials: search", "rows: search", "models: calibrate", "models: search",
        "tokens: calibrate",
    ):  # fmt: skip
        for quantity in ("wall seconds", "CPU seconds", "peak memory", "growth of memory"):
            assert table[f"{curve}, {quantity}"][2] in ("yes", "NO")
    for name in ("trials", "rows", "models", "tokens"):
        assert (tmp_path / f"cost-{name}.png").read_bytes().startswith(b"\x89PNG")
    # The first point of all curves is one; three more of each task.
    assert [p["task"] for p in points].count("calibrate") == 4
    assert [p["task"] for p in points].count("search") == 4
    assert benchmark(*words) == table
    assert kept.read_text() == before


@pytest.mark.thorough
def test_point(cost_curves: Any, tmp_path: Path) -> None:
    """A point's process says what its work cost, and writes the bundle."""
    bundle = tmp_path / "b.safetensors"
    cost = cost_curves.run_point("calibrate", cost_curves.QUICK, bundle)

    assert cost["bundle_bytes"] == bundle.stat().st_size
    assert cost["peak_bytes"] >= cost["before_bytes"] > cost["model_bytes"] > 0
    assert cost["seconds"] > 0
    assert cost["cpu_seconds"] > 0


def test_broken_point(cost_curves: Any, tmp_path: Path) -> None:
    """A point that fails is named, with what its process said last and a way out."""
    expected = r"rest \(size tiny.*exit code 1: KeyError: 'rest'.*Leave this out"

    with pytest.raises(ClickException, match=expected):
        cost_curves.run_point("rest", cost_curves.QUICK, tmp_path / "b.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize(
    ("script", "words", "way_out"),
    [("cost_curves", ["--curve", "models-gpu"], "Leave it out"), ("gpu", [], "--device cpu")],
)
def test_no_card(script: str, words: list[str], way_out: str) -> None:
    """Without a CUDA device, what needs one is refused with the way out."""
    done = CliRunner().invoke(import_module(script).main, words)

    assert done.exit_code == 2
    assert "torch sees none" in done.stderr
    assert way_out in done.stderr


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent(cost_curves: Any, power: float) -> None:
    """The exponent of a power law is its power, whatever its factor."""
    at = [3, 10, 50, 1000]

    assert cost_curves.exponent(at, [7 * x**power for x in at]) == pytest.approx(power)


def test_parameters() -> None:
    """A shape knows how many weights its model has."""
    llama = import_module("random_llama")
    model = llama.random_llama("tiny-deep", dtype="bfloat16", device="cpu", seed=0)

    assert llama.SHAPES["tiny-deep"].parameters == sum(p.numel() for p in model.model.parameters())
    assert model.dtype == torch.bfloat16
    assert len(model.linears) == 4 * 7


def test_torn_line(tmp_path: Path) -> None:
    """A line of the kept results that is not JSON is named, with the way out."""
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"a": 1}\n{"a":\n')
    results = import_module("kept_results").KeptResults(kept)

    with pytest.raises(ClickException, match=r"kept\.jsonl, line 2 is not JSON.*Delete that line"):
        results.find({"a": 1})
