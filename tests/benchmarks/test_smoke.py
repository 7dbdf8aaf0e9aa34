"""Each benchmark runs from end to end on a tiny model and prints its rows, so that none can rot."""

import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

SMALL = "--samples 4 --context-length 16"
GPU = "--samples 4 --context-length 32 --windows 2 --trials 12 --out gpu.json"
# A row that a benchmark prints, and the words that keep it small.
ON_MODELS = {
    "proxy_ranking": (
        "0.7 layer fisher, 1",
        f"--model {{model}} --cell '0.7 layer fisher' --seeds 1 --candidates 8 --windows 2 {SMALL}",
    ),
    "quality": (
        "`crepe` : Wanda",
        "--model {model} --pattern 0.5 --method wanda --method crepe --seeds 0,1 --samples 4 "
        "--trials 9 --finalists 1 --confirm-windows 1 --report-windows 1 --other {report} "
        "--other-windows 1 --cache cache --out kept.jsonl",
    ),
    "minutes": (
        "model 0.5 alps 0.3",
        "--model {model} --pattern 0.5 --method alps --method 'sparsegpt, recovered' --minutes 0.3 "
        "--other {report} --out kept.jsonl",
    ),
    "search_cost": (
        "pho",
        f"--model {{model}} {SMALL} --confirm-windows 2 --report-windows 2 --evaluations 4 "
        "--trials 9 --finalists 1 --threads 1 --method hill-climb --method tpe --method pho-proxy "
        "--method pho",
    ),
    "transfer": (
        "model-bos 0.5 layer",
        f"--model {{model}} --model {{bos}} --pattern 0.5 --trials 14 --seeds 2 {SMALL} "
        "--confirm-windows 2 --report-windows 2 --third-steps 2 --json kept.json",
    ),
}
OF_SERVICES = {
    "service_throughput": ("1", "--workers 1 --jobs 2 --trials 8"),
    "service_overhead": ("0", "--tiny --trials 8 --rounds 1"),
    "attack": ("odd bodies", "--only 'odd bodies' --only smuggling --only 'index of weights'"),
}


@pytest.mark.parametrize("name", ON_MODELS)
def test_on_a_tiny_model(benchmark, model_folder, bos_folder, texts, name):
    row, words = ON_MODELS[name]
    places = {"model": model_folder, "bos": bos_folder, "report": texts["report"]}

    assert benchmark(name, *shlex.split(words.format(**places)))[row]


def test_the_quality_of_a_cut(benchmark, model_folder, texts):
    words = (
        "--pattern structured:20% --method structured --seeds 0 --samples 4 --finalists 1 "
        "--confirm-windows 1 --report-windows 1 --other-windows 1"
    )
    table = benchmark(
        "quality", "--model", model_folder, *words.split(), "--other", texts["report"],
        "--cache", "cache", "--out", "kept.jsonl",
    )  # fmt: skip
    cells = map(json.loads, Path("kept.jsonl").read_text().splitlines())
    (cell,) = [cell for cell in cells if "cut" in cell]

    assert {"docs", str(texts["report"])} == {*cell["perplexity"]}
    assert cell["sparsity"] > 0.1
    assert table["`structured`"]


@pytest.mark.parametrize("name", OF_SERVICES)
def test_of_a_service(benchmark, database_url, monkeypatch, name):
    row, words = OF_SERVICES[name]
    if name != "attack":  # which starts its own
        monkeypatch.setenv("PHO_DATABASE_URL", database_url)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    assert benchmark(name, *shlex.split(words))[row]


@pytest.mark.parametrize("shape", ["tiny-streamed", "tiny-mixtral"])
def test_gpu_on_the_cpu_to_try_it_out(benchmark, shape):
    table = benchmark("gpu", "--device", "cpu", "--shape", shape, *GPU.split())
    printed = benchmark("gpu", "--tables", "gpu.json")

    assert printed["calibrate"][0] == table["calibrate"][0]


@pytest.mark.usefixtures("pretended_gpu")
def test_gpu_on_a_pretended_one(benchmark):
    benchmark("gpu", "--shape", "tiny", *GPU.split())
    written = json.loads(Path("gpu.json").read_text())["tiny"]

    assert written["checks"]["bits of masks that differ from the CPU's"][0] == 0
    assert written["parts"][-1]["title"] == "recover, training kept"


def test_papers(benchmark, model_folder, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / "pho"))
    table = benchmark(
        "paper", model_folder, "--quick", "--context-length", 32, "--pattern", "0.5",
        "--method", "alps", "--text", texts["calibration"], "--report-text", texts["report"],
        "--out", "paper.jsonl",
    )  # fmt: skip

    assert table["published, LLaMA-2-7B"]


def test_load(capfd, database_url, monkeypatch):
    monkeypatch.setenv("PHO_DATABASE_URL", database_url)
    with pytest.raises(SystemExit) as done:
        import_module("load").main(seconds=5, clients=3)
    table = "".join(capfd.readouterr())

    assert done.value.code == 0, table
    assert "Aggregated" in table


def test_scale(benchmark):
    table = benchmark("scale", "--workers", 2, "--seconds", 5, "--stage-s", 0.2, "--processes", 1)

    assert table["2"][1] == "10.0"


def test_soak(benchmark):
    table = benchmark(
        "soak", "--minutes", 0.1, "--every", 1, "--workers", 1, "--outside", 0, "--people", 1,
        "--only", "not divisible", "--only", "changing text",
    )  # fmt: skip

    assert table["every accepted job ends"][1] == "0"
