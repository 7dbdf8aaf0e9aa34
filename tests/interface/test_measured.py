"""Perplexities of models in memory: as the command line measures them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pho_service as pho
from pho_service.cli import main
from pho_service.errors import BundleError, ConfigurationError, InvalidInput
from pho_service.spec.numbers import number


def printed(*words: object) -> Any:
    """What a verb prints as JSON."""
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def loaded(folder: Path) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer, as a notebook loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_evaluate(bos_folder: Path, texts: dict[str, Path]) -> None:
    """`pho evaluate` prints the same of a folder as the API says of the model in memory."""
    model, tokenizer = loaded(bos_folder)
    found = pho.evaluate(model, tokenizer, texts["report"], context_length=32, max_windows=3)
    document = printed(
        "evaluate", bos_folder, "--text", texts["report"], "--context-length", 32,
        "--max-windows", 3, "--device", "cpu",
    )  # fmt: skip

    assert {name: getattr(found, name) for name in document} == document
    assert repr(found).startswith("perplexity")
    assert number(found.perplexity) in found._repr_markdown_()


def test_compare(
    model_folder: Path, texts: dict[str, Path], configuration: pho.Configuration
) -> None:
    """`pho compare` prints the same table, but for times; the model is left dense."""
    model, tokenizer = loaded(model_folder)
    before = pho.evaluate(model, tokenizer, texts["report"], context_length=32).model
    pho.write_configuration(configuration, model_folder.parent / "c.json")
    found = pho.compare(
        model, tokenizer, "0.5", texts=texts["calibration"], report=texts["report"],
        configurations={"c.json": model_folder.parent / "c.json"}, samples=6, context_length=32,
        methods=["wanda", "sparsegpt"], presets=["crepe"], seeds=[0, 1], trials=9, finalists=1,
        confirm_windows=2,
    )  # fmt: skip
    document = printed(
        "compare", model_folder, "--pattern", "0.5", "--text", texts["calibration"], "--samples", 6,
        "--report-text", texts["report"], "--config", model_folder.parent / "c.json",
        "--context-length", 32, "--device", "cpu", "--method", "wanda", "--method", "sparsegpt",
        "--preset", "crepe", "--seeds", "0,1", "--trials", 9, "--finalists", 1,
        "--confirm-windows", 2,
    )  # fmt: skip
    mine = json.loads(json.dumps(found.to_dict()))
    for each in (mine, document):
        for rows in (each["rows"], *each["seeds"].values()):
            rows[3]["method"] = "c.json"  # the verb calls it by its whole path
            for row in rows:
                del row["seconds"], row["memory_bytes"]

    assert mine == document
    assert [row.method for row in found.rows] == ["dense", "wanda", "sparsegpt", "c.json", "crepe"]
    assert mine["seeds"]["0"][1]["perplexity"] != mine["seeds"]["1"][1]["perplexity"]
    assert before == found.model
    assert "<td>wanda</td>" in found._repr_html_()
    assert len(repr(found).splitlines()) == len(found.rows) + 4


def test_compare_on_a_bundle(
    tiny_llama: PreTrainedModel, bundle: Any, texts: dict[str, Path], weights: Callable[[], bool]
) -> None:
    """With the bundle that was made, neither a text nor a tokenizer is needed again."""
    found = pho.compare(tiny_llama, None, "2:4", bundle=bundle, report=texts["report"])

    assert weights()
    assert [row.method for row in found.rows][-1] == "sparsegpt-permuted"  # which needs windows
    assert found.report["context_length"] == 32


def test_refused(
    tiny_llama: PreTrainedModel, bundle: Any, windows: Tensor, configuration: pho.Configuration
) -> None:
    """A configuration of another pattern or family, and a comparison on nothing."""
    elsewhere = configuration.model_copy(update={"model": {"family": "gpt2"}})

    def compare(pattern: str, **more: Any) -> None:
        pho.compare(tiny_llama, None, pattern, **{"bundle": bundle, "report": windows, **more})

    with pytest.raises(ConfigurationError, match=r"mine is for the pattern 0.5.*for 2:4"):
        compare("2:4", configurations={"mine": configuration})
    with pytest.raises(ConfigurationError, match=r"mine was found on gpt2.*family llama"):
        compare("0.5", configurations={"mine": elsewhere})
    with pytest.raises(InvalidInput, match="nothing to calibrate on"):
        compare("0.5", bundle=None)
    with pytest.raises(InvalidInput, match="scope 'row' is given beside a pattern"):
        compare(pho.Pattern.parse("0.5"), scope="row")
    with pytest.raises(InvalidInput, match="a float is given for a configuration"):
        compare("0.5", configurations={"mine": 0.5})


def test_other_bundle(tiny_llama: PreTrainedModel, bundle: Any, windows: Tensor) -> None:
    """A bundle of other weights is refused."""
    tiny_llama.model.layers[0].mlp.up_proj.weight.data += 1

    with pytest.raises(BundleError, match="bundle is of another model"):
        pho.compare(tiny_llama, None, "0.5", bundle=bundle, report=windows)
