"""The page on the Python API: its blocks are run as they stand, on a model in memory."""

import re
from functools import partial
from pathlib import Path

import optuna
import pytest
from transformers import AutoTokenizer

import pho_service as pho

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()

# The block of ```py loads a model and texts from the hub: whoever runs the tests has neither.
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SMALLER = {"samples=64, context_length=512)": "samples=16, context_length=128)", "=200)": "=20)"}


@pytest.fixture
def given(tiny_llama, model_folder, texts, tmp_path):
    """What a reader brings: a model, its tokenizer, long texts, a sampler and a storage."""
    tiny_llama.save_pretrained(tmp_path / "here" / "dense")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(tmp_path / "here" / "dense")
    lines = {name: path.read_text().replace('{"text": "', "").replace('"}', "").splitlines()
             for name, path in texts.items()}  # fmt: skip
    return {
        "model": tiny_llama,
        "tokenizer": tokenizer,
        "texts": [f"{a} {b}" for a in lines["calibration"][:5] for b in lines["calibration"]],
        "other_texts": [f"{a} {b}" for a in lines["confirmation"][:2] for b in lines["report"]],
        "report_texts": [f"{a} {b}" for a in lines["report"][:2] for b in lines["confirmation"]],
        "my_sampler": optuna.samplers.TPESampler(seed=0),
        "my_storage": optuna.storages.InMemoryStorage(),
    }


@pytest.mark.thorough
def test_blocks(given, tmp_path, monkeypatch):
    """Every block runs, one after the other; each result is what the page says."""
    monkeypatch.chdir(tmp_path / "here")
    # For time, as is SMALLER.
    monkeypatch.setattr(pho, "search", partial(pho.search, trials=10, finalists=1))
    monkeypatch.setattr(pho, "compare", partial(pho.compare, methods=["wanda", "sparsegpt"]))
    for block in BLOCKS:
        for wanted, smaller in SMALLER.items():
            block = block.replace(wanted, smaller)
        exec(compile(block, "docs/python.md", "exec"), given)  # noqa: S102 - our own page

    assert len(BLOCKS) >= 6
    assert pho.read_configuration(Path("config.json")) == given["found"].configuration
    assert given["pruned"].sparsity == pytest.approx(0.5)
    assert Path("folder/pruning.json").is_file()
    assert len(given["study"].trials) == 20
    assert given["best"].objective["value"] == given["study"].best_value
    assert given["some"].configuration.steps.linears


def test_every_pho_on_the_page_is_a_public_name():
    names = set(re.findall(r"\bpho\.(\w+)", PAGE))

    assert names <= {*pho.__all__}
    assert {"calibrate", "search", "prune", "save", "evaluate", "compare", "objective"} <= names
