"""What `pho prune` writes is what `pho search` rated, in every pattern, with and without BOS."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pho_service.spec.document import number

Pho = Callable[..., Result]

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")


def answer(result: Result) -> dict[str, Any]:
    """The JSON on stdout of a verb that succeeded."""
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(
    ("folder", "pattern", "scope"),
    [
        ("model_folder", "0.5", "row"),
        ("model_folder", "0.3", "global"),
        ("bos_folder", "0.5", "layer"),
        ("bos_folder", "2:4", None),
    ],
)
def test_the_folder_has_to_the_last_bit_the_perplexity_that_the_search_confirmed(
    pho: Pho,
    texts: dict[str, Path],
    request: pytest.FixtureRequest,
    folder: str,
    pattern: str,
    scope: str | None,
) -> None:
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


def test_groups(
    pho: Pho, model_folder: Path, bundle_file: Path, tiny_llama: LlamaForCausalLM
) -> None:
    """At 2:4 every group of four has two zeros; all other weights are untouched."""
    searched = pho("search", bundle_file, "--preset", "score", "--pattern", "2:4", "--trials", 12,
                   "--kernel-sizes", "3,5")  # fmt: skip
    printed = answer(
        pho("prune", model_folder, "--config", "config.json", "--bundle", bundle_file, "--out",
            "pruned", "--json")
    )  # fmt: skip
    recipe = json.loads(Path("pruned/pruning.json").read_text())
    dense = dict(tiny_llama.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained("pruned")

    assert searched.exit_code == 0
    assert {n: entry["sparsity"] for n, entry in recipe["layers"].items()} == printed["layers"]
    assert recipe["sparsity"] == printed["sparsity"] == 0.5
    assert recipe["configuration"] == json.loads(Path("config.json").read_text())
    for name, weight in loaded.named_parameters():
        kept = weight != 0
        assert torch.equal(weight[kept], dense[name][kept])
        if name.removesuffix(".weight") in recipe["layers"]:
            assert bool((kept.reshape(-1, 4).sum(dim=1) == 2).all())
        else:
            assert torch.equal(weight, dense[name])


def test_pruned_with_another_text_than_the_searchs_the_user_is_told(
    pho: Pho, model_folder: Path, bundle_file: Path, texts: dict[str, Path]
) -> None:
    pho(
        "search",
        bundle_file,
        "--preset",
        "score",
        "--pattern",
        "0.5",
        "--trials",
        12,
        "--kernel-sizes",
        "3,5",
    )
    result = pho("prune", model_folder, "--config", "config.json", "--text", texts["report"],
                 *SMALL, "--out", "pruned")  # fmt: skip

    assert result.exit_code == 0
    assert "Note: these statistics are not those of the search" in result.stderr


def test_bos(pho: Pho, bos_folder: Path, texts: dict[str, Path]) -> None:
    """For a tokenizer that adds BOS, auto is always, and never is something else."""
    words = ("evaluate", bos_folder, "--text", texts["report"], "--context-length", 32, "--json")
    auto, always, never = (
        answer(pho(*words, "--bos", bos))["perplexity"] for bos in ("auto", "always", "never")
    )

    assert auto == always
    assert auto != never


def test_dataset(pho: Pho, model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """A data set in a folder rates as the same text in a file does."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(texts["report"].read_text().replace('"text"', '"body"'))
    rating = ("--context-length", 32, "--json")
    data = answer(pho("evaluate", model_folder, "--dataset", folder, "--field", "body", *rating))
    file = answer(pho("evaluate", model_folder, "--text", texts["report"], *rating))

    assert data["perplexity"] == file["perplexity"]
    assert data["text_sha256"] == file["text_sha256"]


def test_plain_answer(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """For people, `pho evaluate` prints the number that its JSON has."""
    words = ("evaluate", model_folder, "--text", texts["report"], "--context-length", 32)
    perplexity = answer(pho(*words, "--json"))["perplexity"]

    assert f"perplexity {number(perplexity)}" in pho(*words).stdout


def test_statistics_of_the_search(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """With the kernel sizes of the search, the default ones too, its own statistics are taken."""
    calibration = ("--context-length", 32, "--samples", 6, "--text", texts["calibration"],
                   "--kernel-sizes", "3,5,9,15")  # fmt: skip
    pho(
        "search",
        model_folder,
        "--preset",
        "score",
        "--pattern",
        "0.5",
        "--trials",
        12,
        *calibration,
    )
    result = pho("prune", model_folder, "--config", "config.json", *calibration, "--out", "pruned")

    assert result.exit_code == 0, result.stderr
    assert "Note" not in result.stderr
