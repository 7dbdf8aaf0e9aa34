"""Each benchmark runs from end to end on a tiny model and prints its rows, so that none can rot."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from click import ClickException

pytestmark = pytest.mark.thorough

Benchmark = Callable[..., dict[str, list[str]]]


@pytest.fixture
def database(database_url, monkeypatch):
    """Services use the tests' PostgreSQL; what the scripts set besides is forgotten afterwards."""
    monkeypatch.setenv("PHO_DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def numbers(cells):
    """All cells of a row, which have to be numbers."""
    return [float(cell) for cell in cells]


def test_proxy_ranking(benchmark, model_folder, tmp_path):
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


def test_quality(benchmark, model_folder, texts):
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
    missing = benchmark(*words, "--no-measure")  # of another version
    assert "`crepe`" not in missing
    assert missing["Wanda"] == table["Wanda"]


@pytest.mark.parametrize("shape", ["tiny-streamed", "tiny-mixtral"])  # tiny: below
def test_gpu(benchmark, shape):
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
    assert sum("a block" in title for title in titles) == 9
    assert all(part["seconds"] > 0 for part in written["parts"])
    assert float(table["total"][0]) >= max(part["seconds"] for part in written["parts"]) - 0.01
    differing, tensors = written["checks"]["tensors that differ in a second calibration"]
    assert (differing, tensors > 0) == (0, True)
    assert written["checks"]["ratings apart from the CPU's, relative"] == 0
    assert written["planned"]["score"]["fits"]

    printed = benchmark("gpu", "--tables", "gpu.json")
    assert printed["calibrate"][0] == table["calibrate"][0]


@pytest.mark.usefixtures("pretended_gpu")
def test_pretended_gpu(benchmark):
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
    assert written["parts"][-1]["title"] == "recover, training kept"
    gains = [each for name, each in written["checks"].items() if name.startswith("share")]
    for here, there in zip(gains[::2], gains[1::2], strict=True):
        assert here < 0.9
        assert here == pytest.approx(there, abs=0.03)


@pytest.mark.usefixtures("database")
def test_load(capfd):
    """Locust's table has a row for each kind of request, and nothing failed."""
    with pytest.raises(SystemExit) as done:
        import_module("load").main(seconds=5, clients=3)
    table = "".join(capfd.readouterr())

    assert done.value.code == 0, table
    for request in ("list", "submit", "Aggregated"):
        assert request in table


@pytest.mark.usefixtures("database")
def test_a_row_for_each_number_of_workers(benchmark):
    table = benchmark("service_throughput", "--workers", 1, "--jobs", 2, "--trials", 8)
    seconds, jobs_a_minute, *_ = table["1"]

    assert float(seconds) > 0
    assert float(jobs_a_minute) > 0


@pytest.mark.usefixtures("database")
def test_a_row_for_each_round_both_sides_seconds_and_their_ratio(benchmark):
    table = benchmark("service_overhead", "--tiny", "--trials", 8, "--rounds", 1)

    assert all(number > 0 for number in numbers(table["0"]))


def test_a_kept_line_that_is_not_json_is_named(tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"a": 1}\n{"a":\n')
    results = import_module("kept_results").KeptResults(kept)

    with pytest.raises(ClickException, match=r"kept\.jsonl, line 2 is not JSON.*Delete that line"):
        results.find({"a": 1})


def test_scale(benchmark):
    table = benchmark("scale", "--workers", 2, "--seconds", 5, "--stage-s", 0.2, "--processes", 1)

    assert len(table["2"]) == len(table["workers"]) == 9
    assert table["2"][1] == "10.0"
