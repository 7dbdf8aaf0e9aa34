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


def test_points_are_measured_once_and_one_study_has_the_trials_of_all_once(pho, small):
    run = ("curve", *small, "--patterns", "2:4,0.6,0.3")
    first = pho(*run, "--json")
    assert first.exit_code == 0, first.stderr
    document = json.loads(first.stdout)
    again = json.loads(pho(*run, "--json").stdout)
    shown = pho(*run).stdout
    points = {point["pattern"]: point for point in document["points"]}
    summaries = optuna.get_all_study_summaries("sqlite:///study.db")
    (name,) = (study.study_name for study in summaries if len(study.directions) == 2)
    pareto = optuna.load_study(study_name=name, storage="sqlite:///study.db")
    trials = [trial.values for trial in pareto.get_trials()]
    best = [[0.3, min(value for sparsity, value in trials if sparsity == 0.3)],
            [0.5, min(value for sparsity, value in trials if sparsity == 0.5)],
            [0.6, min(value for sparsity, value in trials if sparsity == 0.6)]]  # fmt: skip

    assert [*points] == ["0.3", "2:4", "0.6"]
    assert points["0.3"]["rise_error"] > 0
    assert points["0.3"]["rise"] == points["0.3"]["perplexity"] / document["dense"] - 1
    assert document["calibration"].pop("seconds") > 0
    assert again["calibration"].pop("seconds") is None
    assert again == document
    assert json.loads(Path("curve/2-4.json").read_text()) == points["2:4"]["configuration"]
    assert '<svg class="chart plot' in Path("curve/curve.html").read_text()
    assert name in shown
    assert len(trials) == 27
    assert sorted(trial.values for trial in pareto.best_trials) == best


@pytest.mark.thorough
def test_sparsities_are_bisected_up_to_the_highest(pho, small):
    run = ("search", *small, "--within", "15%", *TARGET, "--json")
    first = pho(*run)
    assert first.exit_code == 0, first.stderr
    found = json.loads(first.stdout)
    again = json.loads(pho(*run).stdout)
    written = json.loads(Path("config.json").read_text())
    points = [(point["sparsity"], point["perplexity"]) for point in found["points"]]
    target = written["search"]["target"]

    assert [sparsity for sparsity, _ in points] == [0.7, 0.95]
    assert found["limit"] == pytest.approx(found["dense"] * 1.15)
    assert all(perplexity <= found["limit"] for _, perplexity in points)
    assert written == found["configuration"]
    assert [(p["sparsity"], p["perplexity"]) for p in target["points"]] == points
    assert (written["pattern"], target["perplexity_rise"]) == ("0.95", 0.15)
    assert again == found
    assert "0.95 is the highest sparsity that was tried" in first.stderr


@pytest.mark.thorough
def test_cuts_by_their_shares_in_files_that_a_model_is_cut_with(pho, model_folder, texts):
    text = ("--text", texts["calibration"], "--samples", 6, "--context-length", 32)
    run = (model_folder, *text, "--confirm-windows", 3, "--device", "cpu")
    curve = pho("curve", *run, "--patterns", "structured:15%,structured:30%", "--json")
    assert curve.exit_code == 0, curve.stderr
    points = json.loads(curve.stdout)["points"]
    cut = pho("prune", model_folder, "--config", "curve/structured-30.json", *text, "--out", "cut")
    within = pho("search", *run, "--within", "900%", "--structured", "--step", 0.1, "--lowest", 0.2,
                 "--highest", 0.3, "--json")  # fmt: skip
    mixed = pho("curve", *run, "--patterns", "0.5,structured:30%")
    scored = pho("search", *run, "--within", "5%", "--structured", "--preset", "score")

    assert [point["pattern"] for point in points] == ["structured:15%", "structured:30%"]
    assert cut.exit_code == 0, cut.stderr
    assert "of their weights are gone" in cut.stdout
    assert within.exit_code == 0, within.stderr
    assert json.loads(within.stdout)["configuration"]["cut"] == points[1]["configuration"]["cut"]
    assert "Ask for two curves" in " ".join(mixed.stderr.split())
    assert "preset cannot be asked for" in " ".join(scored.stderr.split())
