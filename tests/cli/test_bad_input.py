"""What a user can get wrong: a clear sentence, the right exit code, and nothing left behind."""

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

Pho = Callable[..., Result]

SMALL = "--context-length 32 --samples 6 --kernel-sizes 3,5"
CALIBRATE = "calibrate {model} --out x.safetensors"
SEARCH = "search {bundle} --pattern 0.5 --space kernel_sizes=3,5"
EVALUATE = "evaluate {model} --context-length 32"
COMPARE = "compare {model} --text {text} --report-text {text}"
VALIDATE = "validate {model} --text {text} " + SMALL


@pytest.fixture
def places(
    model_folder: Path, bundle_file: Path, texts: dict[str, Path], tmp_path: Path
) -> dict[str, Path]:
    """What words in braces stand for."""
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("the model")
    empty.write_text(" \n")
    return {
        "model": model_folder, "bundle": bundle_file, "text": texts["calibration"],
        "short": short, "empty": empty, "tmp": tmp_path,
    }  # fmt: skip


def refused(pho: Pho, words: str, places: dict[str, Path]) -> tuple[int, str]:
    """Exit code and message of a command that must leave nothing behind."""
    result = pho(*words.format(**places).split())
    lines = [line for line in result.stderr.splitlines() if line.startswith(("pho: ", "Error: "))]

    assert isinstance(result.exception, SystemExit), result.exception
    assert len(lines) == 1
    assert result.stdout == ""
    assert list(Path().iterdir()) == []
    return result.exit_code, lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # patterns
        (SEARCH + " --pattern 5:4", "'5:4' keeps N=5 of M=4, but 1 <= N < M <= 64"),
        (SEARCH + " --pattern 0", "sparsity 0 is not between 0 and 1"),
        (SEARCH + " --pattern 1.0", "sparsity 1 is not between 0 and 1"),
        (SEARCH + " --pattern half", "'half' is neither a number nor N:M"),
        (SEARCH + " --pattern 2:5", r"layers\.0\.\S+: in_features=32 is not a multiple of M=5"),
        (SEARCH + " --pattern 2:4 --scope global", "'global' has no meaning"),
        (VALIDATE + " --pattern 5:4", "'5:4' keeps N=5 of M=4"),
        (COMPARE + " --pattern 1.5", "sparsity 1.5 is not between 0 and 1"),
        # spaces and budgets
        (SEARCH + " --space kernel_sizes=4", "kernel_size=4 is not an odd whole number"),
        (SEARCH + " --space kernel_sizes=7", "7 is not in the bundle"),
        (SEARCH + " --space row_share=0.9:0.1", "low <= high"),
        (SEARCH + " --space speed=1", "'speed' is not one of"),
        (SEARCH + " --trials 3", "trials=3 is too few"),
        (SEARCH + " --seed -1", "seed=-1 is below 0"),
        (SEARCH + " --finalists 0", "finalists=0 is below 1"),
        (SEARCH + " --confirm-windows 0", "confirm-windows 0 is below 1"),
        (SEARCH + " --sampler hill", "'hill' is not one of 'cmaes'"),
        (VALIDATE + " --pattern 0.5 --candidates 7", "candidates 7 is too few"),
        (VALIDATE + " --pattern 0.5 --confirm-windows 0", "confirm-windows 0 is below 1"),
        # what contradicts itself
        (SEARCH + " --text {text}", "is a bundle: it needs no text"),
        (SEARCH + " --confirm-text {text}", "is a bundle: it needs no text"),
        (SEARCH + " --objective perplexity", "perplexity needs the model and a text"),
        (EVALUATE + " --text {text} --dataset c4", "--text and --dataset are both given"),
        (EVALUATE + " --text {text} --data-file a", "--data-file is a file of a --dataset"),
        (EVALUATE + " --text {text} --revision main", "is for hub ids"),
        # calibration
        (CALIBRATE + " --text {text} --kernel-sizes 4", "are not odd whole numbers"),
        (CALIBRATE + " --text {text} --kernel-sizes a", "are not numbers with commas"),
        (CALIBRATE + " --text {text} --samples 0", "samples=0 is below 1"),
        (CALIBRATE + " --text {text} --seed -1", "seed=-1 is below 0"),
        (CALIBRATE + " --text {text} --context-length 4096", "4096 is more than .* can read: 2048"),
        (CALIBRATE + " --text {text} --out x.bin", "must end in .safetensors"),
        (EVALUATE + " --text {text} --context-length 4", "context-length 4 is below 8"),
        (EVALUATE + " --text {text} --max-windows -1", "max-windows -1 is below 1"),
        (EVALUATE + " --text {text} --device tpu", "'tpu' is not known to torch"),
        (EVALUATE + " --text {text} --device cuda:9", "does not exist: torch sees"),
        (EVALUATE + " --text {text} --bos maybe", "'maybe' is not one of 'auto'"),
    ],
)
def test_bad_usage(pho: Pho, places: dict[str, Path], words: str, message: str) -> None:
    """A value that breaks a rule is named with the rule; exit code 2."""
    code, said = refused(pho, words, places)

    assert code == 2
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # models
        ("evaluate ./none --text {text}", "./none does not exist. Give a hub id"),
        ("evaluate none.gguf --text {text}", "none.gguf does not exist"),
        ("evaluate {tmp} --text {text}", r"has no config\.json"),
        ("evaluate {text} --text {text}", "is neither a folder nor a .gguf file"),
        # texts
        (EVALUATE + " --text {empty}", r"empty\.txt is empty"),
        (EVALUATE + " --text {short}", "2 tokens, which do not fill one window of 32"),
        (EVALUATE + " --text none.txt", "none.txt does not exist"),
        (EVALUATE + " --text {text} --field body", "line 1 has no text in the field 'body'"),
        (CALIBRATE + " --text {empty}", r"empty\.txt is empty"),
        (CALIBRATE + " --text {short}", "2 tokens, which do not fill one window of 2048"),
        (VALIDATE + " --pattern 0.5 --samples 99", "no text to measure perplexity on"),
        # bundles and configurations
        ("search none.safetensors --pattern 0.5", "none.safetensors does not exist"),
        ("search {model}/model.safetensors --pattern 0.5", "but no proxy bundle"),
        ("prune {model} --config none.json --out p", "none.json cannot be read: No such file"),
        ("prune {model} --config {text} --out p", "is not JSON"),
        # outputs
        (CALIBRATE + " --text {text} --out no/x.safetensors", "the folder .*no does not exist"),
        (SEARCH + " --out no/config.json", "the folder .*no does not exist"),
        (VALIDATE + " --pattern 0.5 --plot no/plot.png", "the folder .*no does not exist"),
        ("prune {model} --config {text} --out {model}", "is in use: it holds files"),
        ("prune {model} --config {text} --out {text}", "is a file"),
        (SEARCH + " --study study.db", "'study.db' is not a database URL"),
        (SEARCH + " --study sqlite:///no/study.db", "the folder .*no does not exist"),
        (SEARCH + " --study sqlite:///{text}", "file is not a database"),
    ],
)
def test_failure(pho: Pho, places: dict[str, Path], words: str, message: str) -> None:
    """What is not there, or cannot be used, is named; exit code 1."""
    before = places["text"].read_bytes()
    code, said = refused(pho, words, places)

    assert code == 1
    assert re.search(message, said)
    assert places["text"].read_bytes() == before


def test_pickled_weights(pho: Pho, places: dict[str, Path], tmp_path: Path) -> None:
    """Pickled weights are refused without being opened: what they would run does not run."""
    (places["model"] / "model.safetensors").unlink()
    (places["model"] / "pytorch_model.bin").write_bytes(
        b"cpathlib\nPath\n(V" + str(tmp_path / "ran").encode() + b"\ntR(dVx\nI1\nsb."
    )
    code, said = refused(pho, EVALUATE + " --text {text}", places)

    assert code == 1
    assert "only pickled weights (pytorch_model.bin)" in said


def test_truncated_bundle(pho: Pho, places: dict[str, Path]) -> None:
    """A bundle that was cut off is said to be, with the way out."""
    content = places["bundle"].read_bytes()
    places["bundle"].write_bytes(content[: len(content) // 2])
    code, said = refused(pho, SEARCH, places)

    assert code == 1
    assert "is damaged or truncated" in said
    assert "Make it again with `pho calibrate`" in said


def configured(places: dict[str, Path], **coefficients: Any) -> Path:
    """A configuration by hand."""
    score = {
        "row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
        "activation_exponent": 0.5,
    }  # fmt: skip
    path = places["tmp"] / "by-hand.json"
    path.write_text(
        json.dumps(
            {
                "format": "pho-configuration", "version": 1, "method": "crepe", "pattern": "0.5",
                "scope": "layer", "coefficients": score | coefficients,
            }
        )
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 is not an odd whole number"),
        ({"row": -1.0}, "row=-1"),
        ({"row": 0.0, "column": 0.0, "neighbourhood": 0.0}, "are all zero"),
    ],
)
def test_bad_configuration(
    pho: Pho, places: dict[str, Path], coefficients: dict[str, Any], message: str
) -> None:
    """A configuration that makes no sense is refused before the model is read."""
    places["config"] = configured(places, **coefficients)
    code, said = refused(pho, "prune ./none --config {config} --out p", places)

    assert code == 1
    assert message in said


def test_bundle_of_another_model(pho: Pho, places: dict[str, Path]) -> None:
    """A bundle is of one model's weights: one changed row of one layer is another model."""
    places["config"] = configured(places)
    file = places["model"] / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    code, said = refused(pho, "prune {model} --config {config} --bundle {bundle} --out p", places)

    assert code == 1
    assert "the bundle is of another model: the weights of model.layers.1.mlp.up_proj" in said


def test_nan_activations(pho: Pho, places: dict[str, Path]) -> None:
    """NaN in the activations names the first layer that saw it."""
    file = places["model"] / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    code, said = refused(pho, f"{CALIBRATE} --text {{text}} {SMALL}", places)

    assert code == 1
    assert re.search(r"model\.layers\.1\.mlp\.(gate|up)_proj: the activations .* NaN", said)


def test_full_disk(pho: Pho, places: dict[str, Path]) -> None:
    """When the disk is full nothing half-written stays, neither a bundle nor a folder."""
    places["config"] = configured(places)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        bundle = refused(pho, f"{CALIBRATE} --text {{text}} {SMALL}", places)
        config = "--config {config} --bundle {bundle}"
        folder = refused(pho, f"prune {{model}} {config} --out pruned", places)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert bundle[0] == folder[0] == 1
    assert "x.safetensors was not written" in bundle[1]
    assert "pruned was not written" in folder[1]


@pytest.mark.parametrize(
    "words",
    [
        EVALUATE + " --text {text} --max-windows 0",
        COMPARE + " --pattern 0.5 " + SMALL + " --report-windows 0",
        COMPARE + " --pattern 0.5 " + SMALL + " --report-windows -1",
        VALIDATE + " --pattern 0.5 --candidates 8 --confirm-windows 1 --seed -1",
        SEARCH + " --study postgresql://localhost/pho",
    ],
)
def test_refused_in_words(pho: Pho, places: dict[str, Path], words: str) -> None:
    """Numbers and databases that cannot be used are refused in a sentence, not a traceback."""
    code, _ = refused(pho, words, places)

    assert code in (1, 2)


def test_window_beyond_the_positions(pho: Pho, places: dict[str, Path]) -> None:
    """A model that has no position for a token says how long a window may be."""
    config = GPT2Config(
        vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(places["model"])
    _, said = refused(pho, "evaluate {model} --text {text} --context-length 128", places)

    assert "64" in said


def test_own_kernel_sizes_of_a_bundle(pho: Pho, places: dict[str, Path]) -> None:
    """A search may use the kernel sizes that its bundle has, whatever the defaults are."""
    calibrated = pho(
        *(f"calibrate {places['model']} --text {places['text']} --context-length 32 --samples 6 "
          "--kernel-sizes 3,7 --out seven.safetensors").split()
    )  # fmt: skip
    found = pho("search", "seven.safetensors", "--pattern", "0.5", "--trials", 12,
                "--space", "kernel_sizes=7")  # fmt: skip

    assert calibrated.exit_code == 0
    assert found.exit_code == 0, found.stderr


def test_huge_kernel_size(pho: Pho, places: dict[str, Path]) -> None:
    """A kernel size that no tensor can have is refused in words."""
    places["config"] = configured(places, kernel_size=10**12 + 1)
    code, said = refused(
        pho, "prune {model} --config {config} --bundle {bundle} --out pruned", places
    )

    assert code in (1, 2)
    assert "kernel_size" in said


def test_large_seed(pho: Pho, places: dict[str, Path]) -> None:
    """A seed of more than 32 bits works, or is refused in words."""
    result = pho(*f"{SEARCH} --trials 12 --sampler tpe --seed {2**32}".format(**places).split())

    assert result.exit_code in (0, 2)
