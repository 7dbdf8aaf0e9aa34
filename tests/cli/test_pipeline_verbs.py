"""The steps beside the score, as a user asks for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from pho_service.spec.baselines import shown_baselines
from pho_service.spec.pattern import Pattern

Pho = Callable[..., Result]

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")


def answer(result: Result) -> dict[str, Any]:
    """The JSON on stdout of a verb that succeeded."""
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def searched(pho: Pho, model: Path, texts: dict[str, Path], *words: object) -> dict[str, Any]:
    """The configuration of a small search."""
    return answer(
        pho("search", model, "--preset", "score", *words, "--trials", 12, "--finalists", 1, *SMALL,
            "--text", texts["calibration"], "--confirm-text", texts["confirmation"],
            "--confirm-windows", 3, "--json")
    )["configuration"]  # fmt: skip


def checks(result: Result) -> dict[str, bool]:
    """Whether each check passed, by name."""
    return {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}


@pytest.mark.parametrize(
    ("pattern", "preset"),
    [("0.5", "crepe-plus"), ("0.5", "best"), ("2:4", "best")],
)
def test_search_prune_check(
    pho: Pho, model_folder: Path, texts: dict[str, Path], pattern: str, preset: str
) -> None:
    """What a preset's search confirms is what is pruned, to the last bit, and passes its check."""
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


def test_check_finds_a_changed_weight(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    searched(pho, model_folder, texts, "--pattern", "0.5")
    pho("prune", model_folder, "--config", "config.json", *SMALL, "--text", texts["calibration"],
        "--out", "out")  # fmt: skip
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


def test_steps_by_hand(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """Single options change a preset, and the configuration says what was done."""
    found = searched(
        pho, model_folder, texts, "--pattern", "0.5", "--preset", "best",
        "--allocation", "owl", "--allocation-unit", "block", "--allocation-spread", 0.1,
        "--repruning", "dsnot", "--update", "none",
    )  # fmt: skip

    assert found["steps"] == {
        "allocation": {"method": "owl", "unit": "block", "spread": 0.1, "outlier_ratio": 5.0}
        if found["method"] == "crepe"
        else {"method": "uniform", "unit": "block", "spread": 0.1, "outlier_ratio": 5.0},
        "permutation": "none", "repruning": "dsnot", "update": "none",
    }  # fmt: skip


def test_compare(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """A comparison shows the published methods, each with seconds and memory."""
    rows = answer(
        pho("compare", model_folder, "--pattern", "0.5", *SMALL, "--text", texts["calibration"],
            "--report-text", texts["report"], "--report-windows", 2, "--json")
    )["rows"]  # fmt: skip

    published = [each.method for each in shown_baselines(None, Pattern.parse("0.5"))]

    assert [row["method"] for row in rows] == ["dense", *published]
    assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-3) for row in rows[1:])
    assert all(row["memory_bytes"] > 2**20 and row["seconds"] > 0 for row in rows)


def test_prune_by_a_method(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
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


def test_deployable(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """What a runtime must permute is told, and with --deployable there is nothing of it."""
    words = ("prune", model_folder, "--method", "wanda-permuted", "--pattern", "2:4", *SMALL,
             "--text", texts["calibration"])  # fmt: skip
    free, folded = pho(*words, "--out", "a"), pho(*words, "--out", "b", "--deployable", "--json")

    assert "12 linears hold their groups in an order that a runtime must" in free.stdout
    assert answer(folded)["orders"] == {"folded": 2, "gathered": 0, "kept": 12}
    assert json.loads(Path("b/pruning.json").read_text())["configuration"]["steps"]["deployable"]


def test_streamed(pho: Pho, model_folder: Path, texts: dict[str, Path]) -> None:
    """A streamed model gives the same configuration, the same folder and the same perplexity."""
    words = ("--pattern", "0.5", "--preset", "best")
    whole = searched(pho, model_folder, texts, *words)
    streamed = searched(pho, model_folder, texts, *words, "--stream")
    calibration = (*SMALL, "--text", texts["calibration"], "--config", "config.json")
    for folder, stream in (("whole", ()), ("streamed", ("--stream",))):
        result = pho("prune", model_folder, *calibration, *stream, "--out", folder)
        assert result.exit_code == 0, result.stderr
    tensors, others = load_file("whole/model.safetensors"), load_file("streamed/model.safetensors")
    rating = ("--text", texts["report"], "--context-length", 32, "--json")
    perplexities = [
        answer(pho("evaluate", "whole", *rating, *stream))["perplexity"]
        for stream in ((), ("--stream",))
    ]

    assert streamed["coefficients"] == whole["coefficients"]
    assert all(torch.allclose(others[name], t, atol=1e-5) for name, t in tensors.items())
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)


def test_bundle_is_not_enough(
    pho: Pho, model_folder: Path, bundle_file: Path, texts: dict[str, Path]
) -> None:
    """With a bundle alone weights cannot be updated; with the text beside it they can."""
    searched(pho, model_folder, texts, "--pattern", "0.5", "--preset", "best")
    words = ("prune", model_folder, "--config", "config.json", "--bundle", bundle_file)
    refused = pho(*words, "--out", "out")
    done = pho(*words, *SMALL, "--text", texts["calibration"], "--out", "out")

    assert refused.exit_code == 2
    assert "Give the calibration text too: --text" in refused.stderr
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seeds", "0,x"), "--seeds '0,x' are not whole numbers"),
        (("--seeds", "1,1"), "one is given twice"),
        (("--seeds", "1", "--calibration-seed", 2), "both say how the calibration is drawn"),
        (("--trials", 9), "--trials: for --preset alone"),
        (("--preset", "bst"), "--preset 'bst' is not one of"),
        (("--method", "owl-wanda"), "OWL has no row at N:M"),
        (("--ablation",), "takes configurations apart"),
    ],
    ids=["no-number", "twice", "two-seeds", "no-search", "no-preset", "owl", "nothing-to-ablate"],
)
def test_comparison_refused(pho: Pho, words: tuple[object, ...], message: str) -> None:
    """What cannot be compared is said before a model is read."""
    result = pho("compare", "nowhere", "--pattern", "2:4", "--report-text", "r.txt", *words)

    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "MODEL, --out, and one of --config, --method and --from-library are needed"),
        (("m", "--out", "o", "--method", "wanda"), "--method needs a --pattern"),
        (
            ("m", "--out", "o", "--method", "wnada", "--pattern", "0.5"),
            "method 'wnada' is not one of those at 0.5",
        ),
        (
            ("m", "--out", "o", "--method", "wanda", "--pattern", "0.5", "--scope", "layer"),
            "wanda counts in scope row, but scope 'layer' is given",
        ),
        (
            ("m", "--out", "o", "--config", "c.json", "--ignore", "*.o_proj"),
            "--ignore: a configuration has its pattern, scope and linears",
        ),
        (("--check", "out", "--out", "other"), "--check takes a folder and prunes nothing"),
        (("--check", "nothing"), "nothing"),
    ],
)
def test_bad_use(pho: Pho, words: tuple[str, ...], message: str) -> None:
    """Pruning wants a model, a configuration and a folder; checking wants a folder."""
    result = pho("prune", *words)

    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_streamed_gguf(pho: Pho, tmp_path: Path, texts: dict[str, Path]) -> None:
    """What cannot be streamed says why, before it is read."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = pho("evaluate", tmp_path / "model.gguf", "--text", texts["report"], "--stream")

    assert result.exit_code == 2
    assert "cannot be streamed: GGUF is dequantised" in result.stderr
