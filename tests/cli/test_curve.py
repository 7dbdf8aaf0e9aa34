"""`pho curve` and `pho search --within`: several sparsities in one question."""

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from click.testing import Result

Pho = Callable[..., Result]
TARGET = ("--step", 0.25, "--lowest", 0.45, "--highest", 0.95)


@pytest.fixture
def small(model_folder: Path, texts: dict[str, Path]) -> list[str]:
    """The tiny model, and options that make a search on it take less than a second."""
    words = [
        model_folder, "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
        "--samples", 4, "--context-length", 32, "--kernel-sizes", 3, "--rows-per-layer", 4,
        "--confirm-windows", 3, "--trials", 9, "--preset", "score", "--device", "cpu",
    ]  # fmt: skip
    return [str(word) for word in words]


def values(pareto: optuna.Study) -> list[list[float]]:
    """Of all trials."""
    return [trial.values for trial in pareto.get_trials()]


def test_curve(pho: Pho, small: list[str]) -> None:
    """
    Points stand by sparsity beside dense, Wanda and RIA on the same windows; each point is what
    `pho search` finds there; a second run measures nothing and says the same.
    """
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
    assert points["0.3"]["rise"] == points["0.3"]["perplexity"] / document["dense"] - 1
    assert document["calibration"].pop("seconds") > 0
    assert again["calibration"].pop("seconds") is None
    assert again == document
    assert json.loads(Path("curve/2-4.json").read_text()) == points["2:4"]["configuration"]
    assert '<svg class="chart"' in Path("curve/curve.html").read_text()


def test_pareto_front(pho: Pho, small: list[str]) -> None:
    """One study has the trials of all points, once, and its front is the best of each sparsity."""
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patterns", "0.5,3:5"], "in_features=32 is not a multiple of M=5"),
        (["--patterns", "0.5,0.50"], "the pattern 0.5 is given twice"),
    ],
    ids=[
        "width",
        "twice",
    ],
)
def test_refused(pho: Pho, small: list[str], words: list[str], said: str) -> None:
    """What is wrong is said in words before anything is calibrated."""
    result = pho("curve", *small, *words)

    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(Path.cwd().parent.glob("cache/bundles/*"))


def test_a_bundle_has_no_perplexities(pho: Pho) -> None:
    result = pho("curve", "tiny.safetensors", "--patterns", "0.5", "--text", "a.txt")

    assert result.exit_code == 2
    assert "tiny.safetensors is a bundle" in result.stderr


def test_target(pho: Pho, small: list[str]) -> None:
    """
    Sparsities are bisected up to the highest, and all are shown; started again, the same is said,
    and the configuration says how it was found. (A random model gains by pruning.)
    """
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pattern", "0.5", "--within", "5%"], "Give one of them"),
        (["--pattern", "0.5", "--step", "0.1"], "--step is for --within alone"),
        (["--within", "5"], "would be 500 %"),
        (["--within", "much"], "is not a rise"),
        (["--within", "5%", "--no-confirm"], "--no-confirm cannot be used with --within"),
    ],
    ids=[
        "both",
        "step",
        "no-percent",
        "word",
        "confirm",
    ],
)
def test_target_refused(pho: Pho, small: list[str], words: list[str], said: str) -> None:
    """A target that breaks a rule is refused in words before the model is loaded."""
    result = pho("search", *small, *words)

    assert result.exit_code == 2
    assert said in result.stderr
