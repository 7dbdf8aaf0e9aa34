"""The table of papers on a tiny model: all of its rows, published ones below, and nothing twice."""

import json
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.thorough

pytest.importorskip("lm_eval", reason="it is not installed: see extra eval")

Benchmark = Callable[..., dict[str, list[str]]]

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [small, large]
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_methods_and_presets_with_perplexity_seconds_and_tasks_a_second_run_measures_nothing(
    benchmark, model_folder, texts, tmp_path,
    monkeypatch,
):  # fmt: skip
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / "pho"))
    (tmp_path / "words.yaml").write_text(TASK)
    questions = [{"question": "the model", "answer": 0}, {"question": "a text", "answer": 1}]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, questions)))
    kept = tmp_path / "paper.jsonl"
    words = (
        "paper", model_folder, "--quick", "--context-length", 32, "--pattern", "0.5", "--pattern",
        "2:4", "--method", "alps", "--method", "crepe", "--text", texts["calibration"],
        "--report-text", texts["report"], "--tasks", "words", "--tasks-dir", tmp_path,
        "--out", kept,
    )  # fmt: skip
    table = benchmark(*words)
    before = kept.read_text()
    cells = {(c["pattern"], c["method"]): c for c in map(json.loads, before.splitlines())}

    assert cells.keys() == {
        ("dense", "dense"), *((p, m) for p in ("0.5", "2:4") for m in ("alps", "crepe")),
    }  # fmt: skip
    assert table["published, LLaMA-2-7B"] == ["6.85", "9.95"]
    assert "±" in table["dense"][0]  # of the last table, that of the tasks at 2:4
    assert table["dense"] == benchmark(*words)["dense"]
    assert {c["tasks"]["words acc"] for c in cells.values()} <= {0.0, 0.5, 1.0}
    assert cells["0.5", "alps"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert cells["0.5", "alps"]["perplexity"] != cells["2:4", "alps"]["perplexity"]
    assert kept.read_text() == before
