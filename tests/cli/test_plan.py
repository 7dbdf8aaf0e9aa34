"""`pho plan`: the table, the exit code, a service's answer, and bad input."""

import json

from transformers import LlamaConfig

FEW = ["--samples", 8, "--context-length", 32]


def test_each_stage_has_a_range_of_seconds_and_a_service_answers_the_same(pho, url, model_folder):
    weights = model_folder / "model.safetensors"
    with weights.open("rb+") as file:
        file.truncate(8 + int.from_bytes(file.read(8), "little"))
    words = ["plan", model_folder, *FEW, "--card", "H100", "--prune", "--json"]
    plan = json.loads(pho(*words).stdout)
    there = pho(*words, "--url", url)

    assert plan["fits"]
    assert plan["model"]["prunable"] == 18_432
    assert [stage["title"] for stage in plan["stages"]] == [
        "read the model", "hash the weights", "calibrate", "search, 200 trials",
        "confirm by perplexity", "prune", "save",
    ]  # fmt: skip
    assert all(0 <= low <= high for low, high in (s["seconds"] for s in plan["stages"]))
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout) == plan


def test_people_get_a_table_with_where_the_rates_are_from(pho, model_folder):
    done = pho("plan", model_folder, *FEW, "--card", "cpu", "--pattern", "2:4", "--preset", "best")

    assert done.exit_code == 0, done.output
    assert "measured for a moment" in " ".join(done.stdout.split())
    assert "It fits." in done.stdout


def test_exit_code_1_why_and_what_would_do(pho, tmp_path, write_header):
    config = LlamaConfig(
        dtype="bfloat16", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64,
    )  # fmt: skip
    write_header(tmp_path, config)
    done = pho("plan", tmp_path, "--preset", "score", "--card", "A100", "--device-memory", "40GiB")

    assert done.exit_code == 1
    assert "It does not fit: " in done.stdout
    assert "--stream" in done.stdout
