"""The benchmark of what searches cost runs from end to end, small."""

import json
from importlib import import_module

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.thorough

SMALL = [
    "--samples", "4", "--context-length", "16", "--confirm-windows", "2", "--report-windows", "2",
    "--evaluations", "4", "--trials", "9", "--finalists", "1",
    "--threads", "1",
]  # fmt: skip


def test_every_search_has_a_row_in_each_table(model_folder, tmp_path):
    methods = ("hill-climb", "cmaes", "tpe", "pho")
    asked = [word for method in methods for word in ("--method", method)]
    kept = tmp_path / "cost.json"
    words = ["--model", str(model_folder), *SMALL, *asked, "--json", str(kept)]
    done = CliRunner().invoke(import_module("search_cost").main, words, catch_exceptions=False)
    printed = done.stdout
    found = json.loads(kept.read_text())
    runs = {r["method"]: r for r in found["runs"]}
    firsts = [line.split()[0] for line in printed.splitlines() if line.strip()]

    assert done.exit_code == 0, done.output
    assert {m: firsts.count(m) for m in methods} == dict.fromkeys(methods[:3], 3) | {"pho": 2}
    assert {m: r["evaluations"] for m, r in runs.items()} == {
        "hill-climb": 10, "cmaes": 10, "tpe": 10, "pho": 9,  # six baselines and four more
    }  # fmt: skip
    assert {*found["ratios"]} == set(methods[:3])
    assert 1 < runs["pho"]["confirmed"] <= 7.5  # 1 finalist, 6 baselines, and half of the dense
    for name in ("dense", "ria-layer", "wall", "sha256", "kernel_sizes", "torch", "cores"):
        assert name in printed + kept.read_text()
