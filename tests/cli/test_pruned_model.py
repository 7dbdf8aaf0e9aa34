"""What `pho prune` writes is what `pho search` rated, in every pattern, with and without BOS."""

from pathlib import Path

import pytest
from pretended_user import answer

from pho_service.spec.document import number

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")


@pytest.mark.parametrize(
    ("folder", "pattern", "scope"),
    [
        ("model_folder", "0.3", "global"),
        ("bos_folder", "2:4", None),
    ],
)
def test_the_folder_has_to_the_last_bit_the_perplexity_that_the_search_confirmed(
    pho, texts, request, folder, pattern, scope
):
    model = request.getfixturevalue(folder)
    calibration = (*SMALL, "--text", texts["calibration"])
    scoped = ("--scope", scope) if scope else ()
    found = answer(
        pho("search", model, "--preset", "score",
            "--pattern", pattern, *scoped, "--trials", 12, *calibration,
            "--confirm-text", texts["confirmation"], "--confirm-windows", 5, "--json")
    )["configuration"]["confirmation"]  # fmt: skip
    pruned = pho("prune", model, "--config", "config.json", *calibration, "--out", "pruned")
    rated = answer(
        pho("evaluate", "pruned", "--text", texts["confirmation"], "--context-length", 32,
            "--max-windows", 5, "--json")
    )  # fmt: skip

    assert pruned.exit_code == 0
    assert "Note" not in pruned.stderr
    assert rated["perplexity"] == found["perplexity"]
    assert rated["tokens"] == found["tokens"] == 5 * 31
    assert rated["text_sha256"] == found["text"]["sha256"]
    assert rated["bos"] is (folder == "bos_folder")


def test_a_recovered_folder_is_better_and_passes_its_check(pho, model_folder, texts):
    length = ("--context-length", 32)
    pho("prune", model_folder, "--method", "wanda", "--pattern", "2:4", "--text",
        texts["calibration"], *SMALL, "--out", "pruned")  # fmt: skip
    done = pho("recover", "pruned", "--teacher", model_folder, "--text", texts["report"], *length,
               "--tokens", 640, "--rate", 2e-3, "--confirm-text", texts["confirmation"],
               "--out", "recovered")  # fmt: skip
    checked = pho("prune", model_folder, "--check", "recovered")
    again = pho("recover", "pruned", "--teacher", model_folder, "--text", texts["report"],
                "--out", "recovered")  # fmt: skip

    assert done.exit_code == 0
    assert "divergence from the dense model" in done.stdout
    assert "recovered" in done.stdout
    assert not Path(".recovered.recovery").exists()
    assert checked.exit_code == 0
    assert "in use" in again.stderr


def test_pruned_with_another_text_than_the_searchs_the_user_is_told(
    pho, model_folder, bundle_file, texts
):
    pho("search", bundle_file, "--preset", "score", "--pattern", "0.5", "--trials", 12)
    result = pho("prune", model_folder, "--config", "config.json", "--text", texts["report"],
                 *SMALL, "--out", "pruned")  # fmt: skip

    assert result.exit_code == 0
    assert "Note: these statistics are not those of the search" in result.stderr


def test_auto_adds_bos_as_the_tokenizer(pho, bos_folder, texts):
    words = ("evaluate", bos_folder, "--text", texts["report"], "--context-length", 32)
    auto, always, never = (
        answer(pho(*words, "--json", "--bos", bos))["perplexity"]
        for bos in ("auto", "always", "never")
    )

    assert auto == always
    assert auto != never
    assert f"perplexity {number(auto)}" in pho(*words).stdout


def test_dataset(pho, model_folder, texts, tmp_path):
    """A data set in a folder rates as the same text in a file does."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(texts["report"].read_text().replace('"text"', '"body"'))
    rating = ("--context-length", 32, "--json")
    data = answer(pho("evaluate", model_folder, "--dataset", folder, "--field", "body", *rating))
    file = answer(pho("evaluate", model_folder, "--text", texts["report"], *rating))

    assert data["perplexity"] == file["perplexity"]
    assert data["text_sha256"] == file["text_sha256"]


def test_the_pruned_model_does_not_lie_in_the_one_that_is_pruned(pho, model_folder, texts):
    before = sorted(model_folder.rglob("*"))
    method = ("--pattern", "0.5", "--method", "wanda", *SMALL, "--text", texts["calibration"])
    result = pho("prune", model_folder, *method, "--out", model_folder / "pruned")

    assert result.exit_code == 2
    assert "would lie in" in result.stderr
    assert sorted(model_folder.rglob("*")) == before


def test_a_share_that_short_rows_cannot_have_is_explained(pho, model_folder, texts):
    method = ("--method", "wanda", *SMALL, "--text", texts["calibration"])
    fine = pho("prune", model_folder, "--pattern", "0.5", *method, "--out", "half")
    short = pho("prune", model_folder, "--pattern", "0.9999", *method, "--out", "most")

    assert "was asked for" not in fine.stderr
    assert "0.9999 was asked for: of each row a whole number" in " ".join(short.stderr.split())
