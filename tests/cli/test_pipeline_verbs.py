"""What `pho prune` writes is what `pho search` rated, and the steps beside the score."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pretended_user import answer
from safetensors.torch import load_file, save_file

from pho_service.models.scratch import Memo

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")
SCORE = ("--preset", "score")


def searched(pho, model, texts, *words):
    """The configuration of a small search."""
    return answer(
        pho("search", model, *words, "--trials", 12, "--finalists", 1, *SMALL,
            "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
            "--confirm-windows", 3, "--json")
    )["configuration"]  # fmt: skip


def checks(result):
    """Whether each check passed, by name."""
    return {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("model_folder", ("--pattern", "0.3", "--scope", "global", *SCORE)),
        ("bos_folder", ("--pattern", "2:4", "--preset", "best")),
        pytest.param("bos_folder", ("--pattern", "2:4", *SCORE), marks=pytest.mark.thorough),
        pytest.param(
            "model_folder", ("--pattern", "0.5", "--preset", "crepe-plus"),
            marks=pytest.mark.thorough,
        ),
    ],
)  # fmt: skip
def test_what_a_search_confirms_is_what_is_pruned_and_passes_its_check(
    pho, texts, request, folder, words
):
    model = request.getfixturevalue(folder)
    confirmation = searched(pho, model, texts, *words)["confirmation"]
    calibration = (*SMALL, "--text", texts["calibration"])
    pruned = pho("prune", model, "--config", "config.json", *calibration, "--out", "out")
    rated = answer(
        pho("evaluate", "out", "--text", texts["confirmation"], "--context-length", 32,
            "--max-windows", 3, "--json")
    )  # fmt: skip
    checked = pho("prune", model, "--check", "out", "--json")
    exact = "score" in words  # masks alone: to the last bit

    assert pruned.exit_code == 0, pruned.stderr
    assert "Note" not in pruned.stderr
    assert rated["perplexity"] == pytest.approx(
        confirmation["perplexity"], rel=0 if exact else 1e-5, abs=0
    )
    assert rated["tokens"] == confirmation["tokens"] == 3 * 31
    assert rated["text_sha256"] == confirmation["text"]["sha256"]
    assert rated["bos"] is (folder == "bos_folder")
    assert checked.exit_code == 0, checked.output
    assert all(checks(checked).values())


TRAINED = (*SCORE, "--pattern", "0.5", "--update", "least-squares", "--reconstruction", "block")


@pytest.mark.thorough
def test_blocks_that_a_search_has_trained_are_not_trained_again(
    pho, made_model, texts, own_cache, monkeypatch, trained
):
    """Also by a search that was killed between two blocks; other text, and they are not taken."""
    read = Memo.read

    def killed(self, name):
        if "1" in name:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Memo, "read", killed)
        pho("search", made_model, *TRAINED, "--trials", 12, "--finalists", 1, *SMALL,
            "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
            "--confirm-windows", 3)  # fmt: skip
    configuration = searched(pho, made_model, texts, *TRAINED)
    words = ("prune", made_model, "--config", "config.json", *SMALL)
    other = pho(*words, "--text", texts["report"], "--out", "other")
    blocks = ["model.layers.0", "model.layers.1"]
    trained_before = [*trained]
    pruned = pho(*words, "--text", texts["calibration"], "--out", "a")
    left = [*(own_cache / "blocks").iterdir()]
    again = pho(*words, "--text", texts["calibration"], "--out", "b")

    assert [other.exit_code, pruned.exit_code, again.exit_code] == [0, 0, 0]
    assert "Note: these statistics are not those of the search" in other.stderr
    assert configuration["steps"]["reconstruction"]["method"] == "block"
    assert trained_before == 2 * blocks
    assert trained == 3 * blocks  # the last time there were none any more
    assert left == []
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_a_full_cache_ends_no_search(pho, made_model, texts, own_cache):
    own_cache.mkdir()
    (own_cache / "blocks").write_text("in the way")

    assert searched(pho, made_model, texts, *TRAINED)["confirmation"]


def test_a_recovered_folder_passes_its_check_until_a_weight_is_changed(pho, made_model, texts):
    length = ("--context-length", 32)
    pho("prune", made_model, "--method", "wanda", "--pattern", "2:4", "--text",
        texts["calibration"], *SMALL, "--out", "pruned")  # fmt: skip
    words = ("recover", "pruned", "--teacher", made_model, "--text", texts["report"])
    done = pho(*words, *length, "--tokens", 640, "--rate", 2e-3,
               "--confirm-text", texts["confirmation"], "--out", "out")  # fmt: skip
    again = pho(*words, "--out", "out")
    own = pho(*words, *length, "--tokens", 640, "--out", "own")
    Path("short.txt").write_text(" ".join(["lorem", "ipsum", "dolor", "sit"] * 50))
    short = pho(*words[:-1], "short.txt", *length, "--tokens", 64, "--out", "short")
    measured = json.loads(Path("own/pruning.json").read_text())["recovery"]["measured"]
    good = pho("prune", made_model, "--check", "out")
    file = Path("out/model.safetensors")
    tensors = load_file(file)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.where(weight == 0, 1, weight)
    save_file(tensors, file, metadata={"format": "pt"})
    shown, machine = pho("prune", "--check", "out"), pho("prune", "--check", "out", "--json")

    assert done.exit_code == good.exit_code == 0
    assert "divergence from the dense model" in done.stdout
    assert "recovered" in done.stdout
    assert f"On {measured['windows']} windows of report.jsonl that it was not trained" in own.stdout
    assert short.exit_code == 0, short.stderr
    assert "The text is too short to measure on, too" in short.stderr
    assert not Path(".out.recovery").exists()
    assert "in use" in again.stderr
    assert shown.exit_code == machine.exit_code == 1
    assert "FAILED" in shown.stdout
    assert "out is not what its recipe says: zeros" in shown.stderr
    assert not checks(machine)["zeros"]


def test_a_smaller_model_is_recovered_towards_its_teacher_and_checked(
    pho, made_model, tiny_llama, texts, texts_of_all
):
    tiny_llama.model.layers = tiny_llama.model.layers[:1]
    tiny_llama.config.num_hidden_layers = 1
    shutil.copytree(texts_of_all["tokenizer"], "smaller")
    tiny_llama.save_pretrained("smaller")
    words = ("--text", texts["report"], "--context-length", 32, "--tokens", 640, "--rate", 2e-3)
    done = pho("recover", "smaller", "--teacher", made_model, *words, "--confirm-text",
               texts["confirmation"], "--out", "out")  # fmt: skip
    good = pho("prune", made_model, "--check", "out")
    larger = pho("recover", made_model, "--teacher", "smaller", *words, "--out", "other")
    tensors = load_file("out/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    changed = pho("prune", "--check", "out")

    assert done.exit_code == good.exit_code == 0, done.stderr
    assert "divergence from the teacher" in done.stdout
    assert "against student" in done.stdout
    assert larger.exit_code == 1
    assert "parameters in 2 blocks, its teacher 25,696 in 1" in " ".join(larger.stderr.split())
    assert not Path("other").exists()
    assert "out is not what its recipe says: weight hashes" in changed.stderr


def test_prune_by_a_method(pho, made_model, texts):
    """A published method is pruned with and saved by its name, and is what the table shows."""
    calibration = (*SMALL, "--text", texts["calibration"], "--ignore", "*.layers.0.*")
    method = "sparsegpt-permuted"
    pruned = pho("prune", made_model, "--method", method, "--pattern", "2:4", *calibration,
                 "--out", "out")  # fmt: skip
    recipe = json.loads(Path("out/pruning.json").read_text())
    checked = pho("prune", made_model, "--check", "out", "--json")
    rated = answer(
        pho("evaluate", "out", "--text", texts["report"], "--context-length", 32, "--max-windows",
            2, "--json")
    )  # fmt: skip
    rows = answer(
        pho("compare", made_model, "--pattern", "2:4", *calibration, "--method", method,
            "--report-text", texts["report"], "--report-windows", 2, "--json")
    )["rows"]  # fmt: skip

    assert pruned.exit_code == 0, pruned.stderr
    assert recipe["configuration"]["method"] == method
    assert all(checks(checked).values())
    assert [row["method"] for row in rows] == ["dense", method]
    assert rated["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)


def test_deployable(pho, made_model, texts):
    """What a runtime must permute is told, and with --deployable there is nothing of it."""
    words = ("prune", made_model, "--method", "wanda-permuted", "--pattern", "2:4", *SMALL,
             "--text", texts["calibration"])  # fmt: skip
    free, folded = pho(*words, "--out", "a"), pho(*words, "--out", "b", "--deployable", "--json")

    assert "12 linears hold their groups in an order that a runtime must" in free.stdout
    assert answer(folded)["orders"] == {"folded": 2, "gathered": 0, "kept": 12}
    assert json.loads(Path("b/pruning.json").read_text())["configuration"]["steps"]["deployable"]


@pytest.mark.thorough
def test_streamed(pho, made_model, texts):
    """A streamed model gives the same configuration, the same folder and the same perplexity."""
    words = (*SCORE, "--pattern", "0.5", "--update", "obs")
    whole = searched(pho, made_model, texts, *words)
    streamed = searched(pho, made_model, texts, *words, "--stream")
    calibration = (*SMALL, "--text", texts["calibration"], "--config", "config.json")
    rating = ("--text", texts["report"], "--context-length", 32, "--json")
    perplexities = []
    for folder, stream in (("whole", ()), ("streamed", ("--stream",))):
        result = pho("prune", made_model, *calibration, *stream, "--out", folder)
        assert result.exit_code == 0, result.stderr
        perplexities.append(answer(pho("evaluate", folder, *rating, *stream))["perplexity"])
    tensors, others = load_file("whole/model.safetensors"), load_file("streamed/model.safetensors")

    assert streamed["coefficients"] == whole["coefficients"]
    assert all(torch.allclose(others[name], t, atol=1e-5) for name, t in tensors.items())
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)


def test_dataset(pho, made_model, texts, tmp_path):
    """A data set in a folder rates as the same text in a file does."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(texts["report"].read_text().replace('"text"', '"body"'))
    rating = ("--context-length", 32, "--json")
    data = answer(pho("evaluate", made_model, "--dataset", folder, "--field", "body", *rating))
    file = answer(pho("evaluate", made_model, "--text", texts["report"], *rating))

    assert data["perplexity"] == file["perplexity"]
    assert data["text_sha256"] == file["text_sha256"]


def test_a_share_that_short_rows_cannot_have_is_explained(pho, made_model, texts):
    method = ("--method", "wanda", *SMALL, "--text", texts["calibration"])
    fine = pho("prune", made_model, "--pattern", "0.5", *method, "--out", "half")
    short = pho("prune", made_model, "--pattern", "0.9999", *method, "--out", "most")

    assert "was asked for" not in fine.stderr
    assert "0.9999 was asked for: of each row a whole number" in " ".join(short.stderr.split())
