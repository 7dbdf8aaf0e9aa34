"""Each benchmark runs from end to end on a tiny model and prints its rows, so that none can rot."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

Benchmark = Callable[..., dict[str, list[str]]]


@pytest.fixture
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services use the tests' PostgreSQL; what the scripts set besides is forgotten afterwards."""
    monkeypatch.setenv("PHO_DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def numbers(cells: list[str]) -> list[float]:
    """All cells of a row, which have to be numbers."""
    return [float(cell) for cell in cells]


def test_proxy_fidelity(benchmark: Benchmark, model_folder: Path, texts: dict[str, Path]) -> None:
    """A row for each number of rows and second moment, and the full proxy agrees with itself."""
    table = benchmark(
        "proxy_fidelity", model_folder, "--text", texts["calibration"], "--candidates", 6,
        "--samples", 4, "--context-length", 32,
    )  # fmt: skip
    moments = ["Gram", "projection 64", "projection 128", "projection 256"]

    assert numbers(table["all, Gram"])[:4] == [1, 1, 1, 1]
    for height in (16, 32, 64):
        for moment in moments:
            *correlations, size, seconds = numbers(table[f"{height}, {moment}"])
            assert all(-1 <= c <= 1 for c in correlations)
            assert size >= 0
            assert seconds > 0


def test_proxy_ranking(benchmark: Benchmark, model_folder: Path, tmp_path: Path) -> None:
    """A row for each cell with 8 candidates or more; what was measured is not measured again."""
    words = (
        "proxy_ranking", "--model", model_folder, "--cell", "0.7 layer fisher", "--seeds", "1",
        "--candidates", 8, "--samples", 4, "--windows", 2, "--context-length", 16,
    )  # fmt: skip
    results = tmp_path / "proxy-ranking" / "results.jsonl"
    table = benchmark(*words)
    kept = results.read_text()
    low, _, high = table["0.7 layer fisher, 1"][0].partition(" .. ")

    assert float(low) <= float(high)
    assert len(kept.splitlines()) == 8
    assert benchmark(*words) == table
    assert results.read_text() == kept


def test_weightings(benchmark: Benchmark, model_folder: Path) -> None:
    """A perplexity of each pattern by each weighting, with the masks alone or with all steps."""
    words = [
        "weightings", "--model", model_folder, "--pattern", "0.5", "--trials", 8,
        "--samples", 4, "--context-length", 16, "--report-windows", 2, "--preset", "best",
    ]  # fmt: skip
    masks, trained = (
        numbers(benchmark(*words, each)["0.5"]) for each in ("--masks-alone", "--steps")
    )

    assert len(masks) == len(trained) == 2
    assert min(*masks, *trained) > 1
    assert masks != trained


def test_second_opinion(benchmark: Benchmark, model_folder: Path) -> None:
    """Two perplexities of each pattern: of finalists by one weighting, and by two."""
    table = benchmark(
        "second_opinion", "--model", model_folder, "--pattern", "0.5", "--trials", 12,
        "--samples", 4, "--context-length", 16, "--confirm-windows", 2, "--report-windows", 2,
        "--finalists", 1,
    )  # fmt: skip
    by_one, by_two = numbers(table["0.5"])

    assert by_one == by_two > 1  # one finalist is the objective's own


def test_corrections(benchmark: Benchmark, model_folder: Path) -> None:
    """A row before and one after the corrections, the second no farther from the dense model."""
    table = benchmark(
        "corrections", "--model", model_folder, "--pattern", "0.6", "--corrections", 1,
        "--trials", 8, "--samples", 4, "--context-length", 16, "--report-windows", 2,
    )  # fmt: skip

    before, after = numbers(table["0.6, 0"]), numbers(table["corrected, 0"])
    assert 0 < after[0] <= before[0]
    assert all(perplexity > 1 for perplexity in (*before[1:], *after[1:]))


def test_confirmation(benchmark: Benchmark, model_folder: Path, tmp_path: Path) -> None:
    """Races are replayed over losses that were measured once."""
    kept = tmp_path / "losses.json"
    words = (
        "confirmation", "--model", model_folder, "--scope", "layer", "--trials", 8,
        "--finalists", 2, "--samples", 4, "--context-length", 16, "--windows", 3,
        "--seeds", 4, "--losses", kept,
    )  # fmt: skip
    table = benchmark(*words)
    same, mean, most, regret = numbers(table["4"])

    assert 0 <= same <= 4
    assert 1 < mean <= most <= 8 + 1 / 3  # the finalists, and a window of the dense model
    assert regret >= 0
    assert len(json.loads(kept.read_text())["losses"]) == 8


def test_step_times(benchmark: Benchmark) -> None:
    """A row for each step, with the seconds at each width."""
    table = benchmark("step_times", "--width", 32, "--width", 64)

    assert table["step"] == ["32", "64"]
    for step in (
        "allocation owl", "allocation fisher", "allocation curves", "permutation score",
        "permutation error", "re-pruning dsnot", "re-pruning swaps", "re-pruning swaps, 2:4",
        "re-pruning admm", "update admm", "update alps", "inverse", "update obs",
        "least squares on top", "update sparsegpt",
        "update sparsegpt, 2:4",
    ):  # fmt: skip
        assert all(seconds >= 0 for seconds in numbers(table[step]))


def test_mask_errors(benchmark: Benchmark, model_folder: Path) -> None:
    """A row for each method, whose error is compared with that of ALPS; rows may be weighted."""
    table = benchmark(
        "mask_errors", "--model", model_folder, "--pattern", "0.5", "--pattern", "2:4",
        "--scope", "layer", "--samples", 2, "--context-length", 16,
    )  # fmt: skip

    assert table["method"] == ["0.5 layer", "2:4"]
    assert all(cell.startswith("+0.0% +0.0% ") for cell in table["alps"])
    assert table["admm, least squares"] != table["sparsegpt"]
    assert table["the same, shrunk"] != table["admm, least squares"]
    assert table["the same with row weights"][0]
    assert table["the same, permuted"][0] == "-"


def test_assignments(benchmark: Benchmark) -> None:
    """A row for each width: seconds, and the gain where all pairs were looked at too."""
    table = benchmark(
        "assignments", "--width", 1024, "--width", 1040, "--rows", 8, "--all-pairs", 1024,
        "--permuted", 1024,
    )  # fmt: skip

    assert table["1024"][3] == table["1024"][6] == "100.00%"
    assert all(seconds > 0 for seconds in numbers([cell for cell in table["1040"] if cell]))
    assert len(table["exponent"]) > 1


def test_quality(benchmark: Benchmark, model_folder: Path, texts: dict[str, Path]) -> None:
    """
    A mean over the seeds for each method on both texts; a second run measures nothing anew.

    A ratio is the mean of the ratios of cells with the same seed, with their standard deviation.
    """
    kept = Path("kept.jsonl")
    words = (
        "quality", "--model", model_folder, "--pattern", "0.5", "--method", "wanda", "--method",
        "crepe", "--seeds", "0,1", "--samples", 4, "--trials", 9, "--finalists", 1,
        "--confirm-windows", 1, "--report-windows", 1, "--other", texts["report"],
        "--other-windows", 1, "--cache", "cache", "--out", kept,
    )  # fmt: skip
    table = benchmark(*words)
    before = kept.read_text()
    cells = {(c["method"], c.get("seed")): c for c in map(json.loads, before.splitlines())}

    assert all(cell.endswith("GiB") for cell in table["Wanda"] + table["`crepe`"])
    assert cells.keys() == {
        ("dense", None),
        *((method, seed) for method in ("calibration", "wanda", "crepe") for seed in (0, 1)),
    }
    assert all(len(c["perplexity"]) == 2 for (m, _), c in cells.items() if m != "calibration")
    crepe, wanda = (
        [cells[method, seed]["perplexity"][str(texts["report"])] for seed in (0, 1)]
        for method in ("crepe", "wanda")
    )
    first, second = (100 * (own / other - 1) for own, other in zip(crepe, wanda, strict=True))
    expected = f"{(first + second) / 2:+.1f} ± {abs(first - second) / 2**0.5:.1f} %"
    assert table["`crepe` : Wanda"] == [expected]
    printed = benchmark(*words, "--markdown")
    assert printed["Wanda"] == table["Wanda"]
    assert kept.read_text() == before

    assert cells["crepe", 0]["preset_steps"]["update"] == "none"
    kept.write_text(before.replace('"update": "none"', '"update": "obs"'))
    missing = benchmark(*words, "--no-measure")  # what a preset meant in another version
    assert "`crepe`" not in missing
    assert missing["Wanda"] == table["Wanda"]


@pytest.mark.parametrize("shape", ["tiny-streamed", "tiny-mixtral"])  # tiny: below
def test_gpu(benchmark: Benchmark, shape: str) -> None:
    """Each part of a job with seconds and peaks, and checks; on the CPU to try it out."""
    table = benchmark(
        "gpu", "--device", "cpu", "--shape", shape, "--samples", 4, "--context-length", 32,
        "--windows", 2, "--trials", 12, "--out", "gpu.json",
    )  # fmt: skip
    written = json.loads(Path("gpu.json").read_text())[shape]
    titles = [part["title"] for part in written["parts"]]

    assert written["card"] == "the CPU, no GPU"
    assert titles[:3] == ["load", "hash the weights", "calibrate"]
    assert {"12 trials", "confirm", "prune and save, best at 2:4"} <= {*titles}
    assert sum("a block" in title for title in titles) == 10
    assert all(part["seconds"] > 0 for part in written["parts"])
    assert float(table["total"][0]) >= max(part["seconds"] for part in written["parts"]) - 0.01
    differing, tensors = written["checks"]["tensors that differ in a second calibration"]
    assert (differing, tensors > 0) == (0, True)
    assert written["checks"]["ratings apart from the CPU's, relative"] == 0
    assert written["planned"]["score"]["fits"]

    printed = benchmark("gpu", "--tables", "gpu.json")
    assert printed["calibrate"][0] == table["calibrate"][0]


@pytest.mark.usefixtures("pretended_gpu")
def test_pretended_gpu(benchmark: Benchmark) -> None:
    """On a GPU the peaks of the card are there, and ratings and masks are those of the CPU."""
    benchmark(
        "gpu", "--shape", "tiny", "--samples", 4, "--context-length", 32, "--windows", 2,
        "--trials", 12, "--out", "gpu.json",
    )  # fmt: skip
    written = json.loads(Path("gpu.json").read_text())["tiny"]

    assert "CPU" not in written["card"]
    assert all(part["allocated"] > 0 for part in written["parts"] if part["tokens"])
    assert written["checks"]["tensors that differ in a second calibration"][0] == 0
    assert written["checks"]["ratings apart from the CPU's, relative"] < 1e-5
    assert written["checks"]["bits of masks that differ from the CPU's"][0] == 0


def test_evaluation_floor(benchmark: Benchmark, tiny_bundle: Path) -> None:
    """The floor, how far each pattern is from it, and what was tried beside."""
    table = benchmark("evaluation_floor", tiny_bundle, "--rounds", 2, "--candidates", 8)
    reading, multiplying, (floor, one) = (
        numbers(table[row]) for row in ("reading", "multiply-adds", "floor: the larger")
    )

    larger = max(*reading, *multiplying)
    assert larger <= floor <= larger + 0.011  # the median of each round's larger one, not this
    assert one == 1
    for pattern in ("0.5, scope row", "0.5, scope layer", "0.5, scope global", "2:4, scope row"):
        milliseconds, ratio = numbers(table[pattern])
        assert milliseconds > 0
        assert ratio > 0
    for lever in ("tf32 products", "bfloat16 products", "half of the rows"):
        assert -1 <= numbers(table[lever])[2] <= 1
    assert len(table["one candidate at a time"]) == 2


@pytest.mark.thorough
@pytest.mark.usefixtures("database")
def test_load(capfd: pytest.CaptureFixture[str]) -> None:
    """Locust's table has a row for each kind of request, and nothing failed."""
    with pytest.raises(SystemExit) as done:
        import_module("load").main(seconds=5, clients=3)
    table = "".join(capfd.readouterr())

    assert done.value.code == 0, table
    for request in ("list", "submit", "Aggregated"):
        assert request in table


@pytest.mark.thorough
@pytest.mark.usefixtures("database")
def test_service_throughput(benchmark: Benchmark) -> None:
    """A row for each number of workers."""
    table = benchmark("service_throughput", "--workers", 1, "--jobs", 2, "--trials", 8)
    seconds, jobs_a_minute, *_ = table["1"]

    assert float(seconds) > 0
    assert float(jobs_a_minute) > 0


@pytest.mark.thorough
@pytest.mark.usefixtures("database")
def test_service_overhead(benchmark: Benchmark) -> None:
    """A row for each round: both sides' seconds and their ratio."""
    table = benchmark("service_overhead", "--tiny", "--trials", 8, "--rounds", 1)

    assert all(number > 0 for number in numbers(table["0"]))
