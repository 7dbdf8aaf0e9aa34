"""The benchmark of transfers runs from end to end, small."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

Benchmark = Callable[..., dict[str, list[str]]]

SMALL = (
    "--pattern", "0.5", "--trials", 14, "--seeds", 2, "--samples", 4, "--context-length", 16,
    "--confirm-windows", 2, "--report-windows", 2, "--json", "kept.json",
)  # fmt: skip


def test_all_cells(benchmark, model_folder, bos_folder):
    """
    Each model has the other's best, its own and the joint one, and its saved trials.

    On a third, which is trained for it, all of them are measured, and nothing else changes.
    """
    table = benchmark(
        "transfer", "--model", model_folder, "--model", bos_folder, *SMALL, "--third-steps", 2
    )
    kept = json.loads(Path("kept.json").read_text())
    *both, third = kept["transfer"]
    taken = ["of model", "of model-bos", "joint"]
    about = kept["conditions"]["third_model"]

    for cell, other in zip(both, ("model-bos", "model"), strict=True):
        methods = ["dense", "wanda", "ria", "own", f"of {other}", "joint"]
        assert list(cell["perplexities"]) == methods
        assert set(cell["regret"]) == {f"of {other}", "joint"}
    assert [cell["model"] for cell in kept["warm_start"]] == ["model", "model-bos"]
    assert [len(c["cold"]) for c in kept["warm_start"]] == [2, 2]
    assert all(7 <= count <= 14 for c in kept["warm_start"] for count in c["cold"])
    assert set(table) >= {"model 0.5 layer", "model-bos 0.5 layer"}
    assert third["model"] == "small-llama"
    assert list(third["perplexities"]) == ["dense", "wanda", "ria", "own", *taken]
    assert list(third["regret"]) == list(third["proxy_regret"]) == taken
    assert about["steps"] == 2
    assert about["report_perplexity"] == pytest.approx(third["perplexities"]["dense"], abs=1e-3)
