"""`pho curve` and `pho search --within`: several sparsities in one question."""

import json
from pathlib import Path

import optuna
import pytest

TARGET = ("--step", 0.25, "--lowest", 0.45, "--highest", 0.95)


@pytest.fixture
def small(model_folder, texts):
    """The tiny model, and options that make a search on it take less than a second."""
    words = [
        model_folder, "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
        "--samples", 4, "--context-length", 32, "--kernel-sizes", 3, "--rows-per-layer", 4,
        "--confirm-windows", 3, "--trials", 9, "--preset", "score", "--device", "cpu",
    ]  # fmt: skip
    return [str(word) for word in words]


def values(pareto):
    """Of all trials."""
    return [trial.values for trial in pareto.get_trials()]


def test_points_are_what_pho_search_finds_measured_once(pho, small):
    run = ("curve", *small, "--patterns", "2:4,0.6,0.3", "--json")
    first = pho(*run)
    assert first.exit_code == 0, first.stderr
    document = json.loads(first.stdout)
    again = json.loads(pho(*run).stdout)
    alone = pho(
        "search", *small, "--pattern", "0.6", "--finalists", 2, "--study", "sqlite:///other.db"
    )
    compared = pho(
        "compare", *small[:1], "--pattern", "0.6", "--text", small[2], "--samples", 4,
        "--context-length", 32, "--report-text", small[4], "--report-windows", 3, "--json",
        "--method", "wanda", "--kernel-sizes", 3, "--rows-per-layer", 4,
    )  # fmt: skip
    points = {point["pattern"]: point for point in document["points"]}
    rows = {row["method"]: row["perplexity"] for row in json.loads(compared.stdout)["rows"]}

    assert alone.exit_code == 0, alone.stderr
    assert [*points] == ["0.3", "2:4", "0.6"]
    assert points["0.6"]["configuration"] == json.loads(Path("config.json").read_text())
    assert document["dense"] == pytest.approx(rows["dense"], rel=1e-6)
    assert points["0.6"]["wanda"] == pytest.approx(rows["wanda"], rel=1e-6)
    assert points["0.3"]["rise_error"] > 0
    assert points["0.3"]["rise"] == points["0.3"]["perplexity"] / document["dense"] - 1
    assert document["calibration"].pop("seconds") > 0
    assert again["calibration"].pop("seconds") is None
    assert again == document
    assert json.loads(Path("curve/2-4.json").read_text()) == points["2:4"]["configuration"]
    assert '<svg class="chart"' in Path("curve/curve.html").read_text()


def test_one_study_has_the_trials_of_all_points_once(pho, small):
    run = ("curve", *small, "--patterns", "0.3,0.6")
    shown = pho(*run)
    pho(*run)
    summaries = optuna.get_all_study_summaries("sqlite:///study.db")
    (name,) = (each.study_name for each in summaries if len(each.directions) == 2)
    pareto = optuna.load_study(study_name=name, storage="sqlite:///study.db")
    best = [
        [sparsity, min(value for s, value in values(pareto) if s == sparsity)]
        for sparsity in (0.3, 0.6)
    ]

    assert name in shown.stdout
    assert len(pareto.trials) == 18
    assert sorted(trial.values for trial in pareto.best_trials) == best


def test_sparsities_are_bisected_up_to_the_highest(pho, small):
    run = ("search", *small, "--within", "15%", *TARGET, "--json")
    first = pho(*run)
    assert first.exit_code == 0, first.stderr
    found = json.loads(first.stdout)
    again = json.loads(pho(*run).stdout)
    written = json.loads(Path("config.json").read_text())
    points = [(point["sparsity"], point["perplexity"]) for point in found["points"]]
    told = written["search"]["target"]

    assert [sparsity for sparsity, _ in points] == [0.7, 0.95]
    assert found["limit"] == pytest.approx(found["dense"] * 1.15)
    assert all(perplexity <= found["limit"] for _, perplexity in points)
    assert written == found["configuration"]
    assert [(p["sparsity"], p["perplexity"]) for p in told["points"]] == points
    assert (written["pattern"], told["perplexity_rise"]) == ("0.95", 0.15)
    assert again == found
    assert "0.95 is the highest sparsity that was tried" in first.stderr
