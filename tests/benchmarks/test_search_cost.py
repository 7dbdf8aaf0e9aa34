"""The benchmark of what searches cost runs from end to end, small."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.thorough

SMALL = [
    "--samples", "4", "--context-length", "16", "--confirm-windows", "2", "--report-windows", "2",
    "--evaluations", "4", "--trials", "9", "--finalists", "1",
    "--threads", "1",
]  # fmt: skip


def run(model: Path, *options: str) -> str:
    """What the script prints."""
    main = import_module("search_cost").main
    words = ["--model", str(model), *SMALL, *options]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Where the numbers go."""
    return tmp_path / "cost.json"


def test_all_rows(model_folder: Path, kept: Path) -> None:
    """Every search that was asked for has a row in each table, and its ratio to PHO."""
    methods = ("hill-climb", "cmaes", "tpe", "pho")
    asked = [word for method in methods for word in ("--method", method)]
    printed = run(model_folder, *asked, "--json", str(kept))
    found: dict[str, Any] = json.loads(kept.read_text())
    runs = {r["method"]: r for r in found["runs"]}
    firsts = [line.split()[0] for line in printed.splitlines() if line.strip()]

    assert {m: firsts.count(m) for m in methods} == dict.fromkeys(methods[:3], 3) | {"pho": 2}
    assert {m: r["evaluations"] for m, r in runs.items()} == {
        "hill-climb": 10, "cmaes": 10, "tpe": 10, "pho": 9,  # six baselines and four more
    }  # fmt: skip
    assert {*found["ratios"]} == set(methods[:3])
    assert 1 < runs["pho"]["confirmed"] <= 7.5  # 1 finalist, 6 baselines, and half of the dense
    for name in ("dense", "ria-layer", "wall", "sha256", "kernel_sizes", "torch", "cores"):
        assert name in printed + kept.read_text()


def test_ratios(model_folder: Path, kept: Path) -> None:
    """The ratios are those of the seconds; calibration and confirmation are PHO's cost, too."""
    run(model_folder, "--json", str(kept))
    found = json.loads(kept.read_text())
    climb, pho = found["runs"]
    calibration = found["calibration"]["wall_s"]
    whole = calibration + pho["whole"]["wall_s"]
    ratio = found["ratios"]["hill-climb"]

    assert (climb["method"], pho["method"]) == ("hill-climb", "pho")
    assert pho["whole"]["wall_s"] >= pho["search"]["wall_s"] + pho["confirmation"]["wall_s"] > 0
    assert ratio["evaluation"] == pytest.approx(
        (climb["search"]["wall_s"] / 10) / (pho["search"]["wall_s"] / 9)
    )
    assert ratio["end_to_end"] == pytest.approx((calibration + climb["whole"]["wall_s"]) / whole)
    assert ratio["without_calibration"] == pytest.approx(climb["whole"]["wall_s"] / whole)
    assert 0 < climb["baselines_s"] < climb["search"]["wall_s"]
