"""From a model to a pruned one, verb by verb, on a model that runs in milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pho_service.configuration import read_configuration

Pho = Callable[..., Result]

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")
SEARCH = ("--pattern", "0.5", "--trials", 24)


def answer(result: Result) -> dict[str, Any]:
    """The JSON on stdout of a verb that succeeded."""
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def test_search_a_bundle(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """A bundle alone is enough to search; the result says that it is not confirmed."""
    made = answer(
        pho("calibrate", model_folder, "--text", texts["calibration"], *SMALL, "--json",
            "--out", "tiny.safetensors")
    )  # fmt: skip
    found = pho("search", "tiny.safetensors", *SEARCH, "--space", "kernel_sizes=3,5")
    configuration = read_configuration(Path("config.json"))

    assert made["bytes"] == Path("tiny.safetensors").stat().st_size
    assert made["text"]["source"] == str(texts["calibration"])
    assert found.exit_code == 0
    assert "Not confirmed: no perplexity was measured" in found.stderr
    assert configuration.confirmation is None
    assert configuration.model["name"] == str(model_folder)
    assert configuration.calibration["key"] == made["key"]
    assert configuration.search["trials"] == 24


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_never_worse_than_the_baselines(pho: Pho, bundle_file: Path, scope: str) -> None:
    """Unconfirmed, the result has the lowest proxy of all, the published methods included."""
    found = answer(
        pho("search", bundle_file, *SEARCH, "--scope", scope, "--space", "kernel_sizes=3,5",
            "--json")
    )["configuration"]  # fmt: skip
    baselines = {rating["method"]: rating["proxy"] for rating in found["baselines"]}

    assert {"magnitude", "wanda", "ria-row", "crepe-equal"} <= set(baselines)
    assert found["objective"]["value"] <= min(baselines.values())


def test_search_a_model(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """From the model the finalists are confirmed, and the lowest perplexity wins."""
    document = answer(
        pho("search", model_folder, *SEARCH, *SMALL, "--text", texts["calibration"],
            "--confirm-text", texts["confirmation"], "--confirm-windows", 4, "--finalists", 3,
            "--json")
    )  # fmt: skip
    found = document["configuration"]
    perplexities = [rating["perplexity"] for rating in found["candidates"]]

    assert found == read_configuration(Path("config.json")).model_dump(mode="json")
    assert perplexities == sorted(perplexities)
    assert found["confirmation"]["perplexity"] == perplexities[0]
    assert found["confirmation"]["tokens"] == 4 * 31
    assert found["confirmation"]["text"]["source"] == str(texts["confirmation"])
    assert found["method"] == found["candidates"][0]["method"]
    assert sum(r["method"] == "crepe" for r in found["candidates"]) == 3
    assert all(rating["perplexity"] for rating in found["baselines"])
    assert document["study"]["url"] == "sqlite:///study.db"
    assert Path("study.db").is_file()


def test_confirmed_on_what_calibration_left(
    pho: Pho, model_folder: Path, texts: dict[str, Path]
) -> None:
    """Without --confirm-text the windows that calibration did not use confirm."""
    found = answer(
        pho("search", model_folder, *SEARCH, *SMALL, "--text", texts["calibration"], "--json",
            "--finalists", 1)
    )["configuration"]  # fmt: skip

    assert found["confirmation"]["text"]["source"] == str(texts["calibration"])
    assert found["confirmation"]["tokens"] == 16 * 31


def test_same_bytes(
    pho: Pho,
    model_folder: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same search in another folder, with nothing cached, writes the same file."""
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("PHO_CACHE_DIR", str(tmp_path / name / "cache"))
        result = pho("search", model_folder, *SEARCH, *SMALL, "--text", texts["calibration"])
        assert result.exit_code == 0, result.stderr
        contents.append((tmp_path / name / "config.json").read_bytes())

    assert contents[0] == contents[1]


def test_search_again(pho: Pho, bundle_file: Path) -> None:
    """A finished search that is started again only reads its study, and says the same."""
    words = ("search", bundle_file, *SEARCH, "--space", "kernel_sizes=3,5", "--json")
    first, second = answer(pho(*words)), answer(pho(*words))

    assert first == second


@pytest.mark.parametrize(
    ("folder", "pattern", "scope"),
    [
        ("model_folder", "0.5", "row"),
        ("model_folder", "0.3", "global"),
        ("bos_folder", "0.5", "layer"),
        ("bos_folder", "2:4", None),
    ],
)
def test_pruned_model_is_what_was_searched(
    pho: Pho,
    texts: dict[str, Path],
    request: pytest.FixtureRequest,
    folder: str,
    pattern: str,
    scope: str | None,
) -> None:
    """The folder that `pho prune` writes has, to the last bit, the perplexity of the search."""
    model = request.getfixturevalue(folder)
    calibration = (*SMALL, "--text", texts["calibration"])
    scoped = ("--scope", scope) if scope else ()
    found = answer(
        pho("search", model, "--pattern", pattern, *scoped, "--trials", 12, *calibration,
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


def test_pruned_folder(
    pho: Pho, model_folder: Path, bundle_file: Path, tiny_llama: LlamaForCausalLM
) -> None:
    """transformers loads the folder; its zeros are those of the recipe, all else is untouched."""
    assert pho("search", bundle_file, "--pattern", "2:4", "--trials", 12,
               "--space", "kernel_sizes=3,5").exit_code == 0  # fmt: skip
    printed = answer(
        pho("prune", model_folder, "--config", "config.json", "--bundle", bundle_file, "--out",
            "pruned", "--json")
    )  # fmt: skip
    recipe = json.loads(Path("pruned/pruning.json").read_text())
    dense = dict(tiny_llama.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained("pruned")

    assert recipe["layers"] == printed["layers"]
    assert len(recipe["layers"]) == 14
    assert recipe["sparsity"] == printed["sparsity"] == 0.5
    assert recipe["configuration"] == json.loads(Path("config.json").read_text())
    assert recipe["model"]["name"] == str(model_folder)
    for name, weight in loaded.named_parameters():
        kept = weight != 0
        assert torch.equal(weight[kept], dense[name][kept])
        layer = name.removesuffix(".weight")
        if layer in recipe["layers"]:
            assert recipe["layers"][layer] == float((~kept).float().mean())
            assert bool((kept.reshape(-1, 4).sum(dim=1) == 2).all())
        else:
            assert torch.equal(weight, dense[name])


def test_other_statistics_are_noted(
    pho: Pho, model_folder: Path, bundle_file: Path, texts: dict[str, Path]
) -> None:
    """Pruned with another text than the search's, the user is told."""
    assert pho("search", bundle_file, *SEARCH, "--space", "kernel_sizes=3").exit_code == 0
    result = pho("prune", model_folder, "--config", "config.json", "--text", texts["report"],
                 *SMALL, "--out", "pruned")  # fmt: skip

    assert result.exit_code == 0
    assert "Note: these statistics are not those of the search" in result.stderr


def test_folder_in_use(pho: Pho, model_folder: Path, bundle_file: Path) -> None:
    """`pho prune` writes over nothing."""
    assert pho("search", bundle_file, *SEARCH, "--space", "kernel_sizes=3").exit_code == 0
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    result = pho("prune", model_folder, "--config", "config.json", "--bundle", bundle_file,
                 "--out", "mine")  # fmt: skip

    assert result.exit_code == 1
    assert "mine is in use" in result.stderr
    assert [p.name for p in Path("mine").iterdir()] == ["notes.txt"]


def test_evaluate(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """The JSON has what the number was measured on; the plain answer has the number."""
    words = ("evaluate", model_folder, "--text", texts["report"], "--context-length", 32)
    document = answer(pho(*words, "--json"))

    assert {"perplexity", "tokens", "context_length", "text_sha256"} <= set(document)
    assert document["tokens"] == document["windows"] * 31
    assert document["context_length"] == 32
    assert document["bos"] is False
    assert f"perplexity {document['perplexity']:.4f}" in pho(*words).stdout


def test_bos_changes_perplexity(pho: Pho, bos_folder: Path, texts: dict[str, Path]) -> None:
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


def test_compare(pho: Pho, model_folder: Path, bundle_file: Path, texts: dict[str, Path]) -> None:
    """The rows are dense, the published methods, then each configuration."""
    assert pho("search", bundle_file, *SEARCH, "--space", "kernel_sizes=3").exit_code == 0
    words = ("compare", model_folder, "--pattern", "0.5", *SMALL, "--text", texts["calibration"],
             "--report-text", texts["report"], "--config", "config.json")  # fmt: skip
    rows = answer(pho(*words, "--json"))["rows"]
    dense = answer(
        pho("evaluate", model_folder, "--text", texts["report"], "--context-length", 32, "--json")
    )
    table = pho(*words).stdout

    assert [row["method"] for row in rows] == [
        "dense", "magnitude", "wanda", "ria-row", "ria-layer", "crepe-equal", "config.json",
    ]  # fmt: skip
    assert rows[0]["perplexity"] == dense["perplexity"]
    assert rows[0]["sparsity"] == 0
    assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-4) for row in rows[1:])
    assert all(row["seconds"] > 0 for row in rows)
    assert all(f"{row['perplexity']:.3f}" in table for row in rows)


def test_compare_other_pattern(
    pho: Pho, model_folder: Path, bundle_file: Path, texts: dict[str, Path]
) -> None:
    """A configuration for another pattern does not belong in the table."""
    assert pho("search", bundle_file, *SEARCH, "--space", "kernel_sizes=3").exit_code == 0
    result = pho("compare", model_folder, "--pattern", "2:4", *SMALL, "--text",
                 texts["calibration"], "--report-text", texts["report"],
                 "--config", "config.json")  # fmt: skip

    assert result.exit_code == 1
    assert "config.json is for the pattern 0.5" in result.stderr


def test_validate(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """Each proxy has its rank correlations with intervals; the plot is a PNG."""
    words = ("validate", model_folder, "--pattern", "0.5", *SMALL, "--text", texts["calibration"],
             "--confirm-windows", 2, "--candidates", 8)  # fmt: skip
    document = answer(pho(*words, "--plot", "plot.png", "--json"))
    spearman = document["proxies"]["activation-reconstruction/blend"]["spearman"]
    table = pho(*words)

    assert set(document["proxies"]) == {
        "activation-reconstruction/blend", "activation-reconstruction/fisher",
        "activation-reconstruction/relative", "activation-reconstruction/absolute", "gini",
    }  # fmt: skip
    for quality in document["proxies"].values():
        for name in ("spearman", "kendall", "regret"):
            low, high = quality[f"{name}_interval"]
            assert low <= high
            assert isinstance(quality[name], float)
    assert len(document["candidates"]) == 8
    assert Path("plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{spearman:+.2f}" in table.stdout
    assert ("does not rank candidates" in table.stderr) is (abs(spearman) < 0.5)
