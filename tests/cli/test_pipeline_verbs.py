"""The steps beside the score, as a user asks for them."""

import json
from pathlib import Path

import pytest
import torch
from pretended_user import answer
from safetensors.torch import load_file, save_file

from pho_service.models.scratch import Memo

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")


def searched(pho, model, texts, *words):
    """The configuration of a small search."""
    return answer(
        pho("search", model, "--preset", "score", *words, "--trials", 12, "--finalists", 1, *SMALL,
            "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
            "--confirm-windows", 3, "--json")
    )["configuration"]  # fmt: skip


def checks(result):
    """Whether each check passed, by name."""
    return {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}


@pytest.mark.parametrize(
    ("pattern", "preset"),
    [("0.5", "crepe-plus"), ("2:4", "best")],
)
def test_what_a_presets_search_confirms_is_what_is_pruned_to_the_last_bit_and_passes_its_check(
    pho, model_folder, texts, pattern, preset
):
    found = searched(pho, model_folder, texts, "--pattern", pattern, "--preset", preset)
    calibration = (*SMALL, "--text", texts["calibration"])
    pruned = pho("prune", model_folder, "--config", "config.json", *calibration, "--out", "out")
    rated = answer(
        pho("evaluate", "out", "--text", texts["confirmation"], "--context-length", 32,
            "--max-windows", 3, "--json")
    )  # fmt: skip
    checked = pho("prune", model_folder, "--check", "out", "--json")

    assert pruned.exit_code == 0, pruned.stderr
    assert rated["perplexity"] == pytest.approx(found["confirmation"]["perplexity"], rel=1e-5)
    assert checked.exit_code == 0, checked.output
    assert all(checks(checked).values())


TRAINED = (
    "--preset", "score", "--pattern", "0.5", "--update", "least-squares",
    "--reconstruction", "block",
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_blocks_that_a_search_has_trained_are_not_trained_again(
    pho, model_folder, texts, cache,
    monkeypatch, trained,
):  # fmt: skip
    """Also by a search that was killed between two blocks; other text, and they are not taken."""
    read = Memo.read

    def killed(self, name):
        if "1" in name:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Memo, "read", killed)
        pho("search", model_folder, *TRAINED, "--trials", 12, "--finalists", 1, *SMALL,
            "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
            "--confirm-windows", 3)  # fmt: skip
    found = searched(pho, model_folder, texts, *TRAINED)
    words = ("prune", model_folder, "--config", "config.json", *SMALL)
    other = pho(*words, "--text", texts["report"], "--out", "other")
    own = ["model.layers.0", "model.layers.1"]
    there = trained == [*own, *own]
    pruned = pho(*words, "--text", texts["calibration"], "--out", "a")
    left = [*(cache / "blocks").iterdir()]
    again = pho(*words, "--text", texts["calibration"], "--out", "b")

    assert [other.exit_code, pruned.exit_code, again.exit_code] == [0, 0, 0]
    assert found["steps"]["reconstruction"]["method"] == "block"
    assert there
    assert trained == 3 * own  # the last time there were none any more
    assert left == []
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_a_full_cache_ends_no_search(pho, model_folder, texts, cache):
    cache.mkdir()
    (cache / "blocks").write_text("in the way")

    assert searched(pho, model_folder, texts, *TRAINED)["confirmation"]


def test_check_finds_a_changed_weight(pho, model_folder, texts):
    pho("prune", model_folder, "--method", "wanda", "--pattern", "0.5", *SMALL, "--text",
        texts["calibration"], "--out", "out")  # fmt: skip
    file = Path("out/model.safetensors")
    tensors = load_file(file)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.where(weight == 0, 1, weight)
    save_file(tensors, file, metadata={"format": "pt"})
    told, machine = pho("prune", "--check", "out"), pho("prune", "--check", "out", "--json")

    assert told.exit_code == machine.exit_code == 1
    assert "FAILED" in told.stdout
    assert "out is not what its recipe says: zeros" in told.stderr
    assert not checks(machine)["zeros"]


def test_prune_by_a_method(pho, model_folder, texts):
    """A published method is pruned with and saved by its name, and is what the table shows."""
    calibration = (*SMALL, "--text", texts["calibration"], "--ignore", "*.layers.0.*")
    method = "sparsegpt-permuted"
    pruned = pho("prune", model_folder, "--method", method, "--pattern", "2:4", *calibration,
                 "--out", "out")  # fmt: skip
    recipe = json.loads(Path("out/pruning.json").read_text())
    checked = pho("prune", model_folder, "--check", "out", "--json")
    rated = answer(
        pho("evaluate", "out", "--text", texts["report"], "--context-length", 32, "--max-windows",
            2, "--json")
    )  # fmt: skip
    rows = answer(
        pho("compare", model_folder, "--pattern", "2:4", *calibration, "--method", method,
            "--report-text", texts["report"], "--report-windows", 2, "--json")
    )["rows"]  # fmt: skip

    assert pruned.exit_code == 0, pruned.stderr
    assert recipe["configuration"]["method"] == method
    assert all(checks(checked).values())
    assert [row["method"] for row in rows] == ["dense", method]
    assert rated["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)


def test_deployable(pho, model_folder, texts):
    """What a runtime must permute is told, and with --deployable there is nothing of it."""
    words = ("prune", model_folder, "--method", "wanda-permuted", "--pattern", "2:4", *SMALL,
             "--text", texts["calibration"])  # fmt: skip
    free, folded = pho(*words, "--out", "a"), pho(*words, "--out", "b", "--deployable", "--json")

    assert "12 linears hold their groups in an order that a runtime must" in free.stdout
    assert answer(folded)["orders"] == {"folded": 2, "gathered": 0, "kept": 12}
    assert json.loads(Path("b/pruning.json").read_text())["configuration"]["steps"]["deployable"]


def test_streamed(pho, model_folder, texts):
    """A streamed model gives the same configuration, the same folder and the same perplexity."""
    words = ("--pattern", "0.5", "--update", "obs")
    whole = searched(pho, model_folder, texts, *words)
    streamed = searched(pho, model_folder, texts, *words, "--stream")
    calibration = (*SMALL, "--text", texts["calibration"], "--config", "config.json")
    rating = ("--text", texts["report"], "--context-length", 32, "--json")
    perplexities = []
    for folder, stream in (("whole", ()), ("streamed", ("--stream",))):
        result = pho("prune", model_folder, *calibration, *stream, "--out", folder)
        assert result.exit_code == 0, result.stderr
        perplexities.append(answer(pho("evaluate", "whole", *rating, *stream))["perplexity"])
    tensors, others = load_file("whole/model.safetensors"), load_file("streamed/model.safetensors")

    assert streamed["coefficients"] == whole["coefficients"]
    assert all(torch.allclose(others[name], t, atol=1e-5) for name, t in tensors.items())
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)


def test_what_cannot_be_streamed_says_why(pho, tmp_path, texts):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = pho("evaluate", tmp_path / "model.gguf", "--text", texts["report"], "--stream")

    assert result.exit_code == 2
    assert "cannot be streamed: GGUF is dequantised" in result.stderr
