"""Every refusal is one sentence with the right exit code, and leaves nothing behind."""

import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

Pho = Callable[..., Result]

SMALL = "--context-length 32 --samples 6 --kernel-sizes 3,5"
CALIBRATE = "calibrate {model} --text {text} --out x.safetensors"
SEARCH = "search {bundle} --pattern 0.5 --kernel-sizes 3,5"
EVALUATE = "evaluate {model} --context-length 32"
COMPARE = "compare {model} --text {text} --report-text {text}"
VALIDATE = "validate {model} --text {text} " + SMALL
PRUNE = "prune {model} --config {config} --bundle {bundle} --out pruned"


def configured(folder: Path, **coefficients: Any) -> Path:
    """A configuration by hand."""
    score = {
        "row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
        "activation_exponent": 0.5,
    }  # fmt: skip
    document = {
        "format": "pho-configuration", "version": 1, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": score | coefficients,
    }  # fmt: skip
    path = folder / "by-hand.json"
    path.write_text(json.dumps(document))
    return path


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
        "short": short, "empty": empty, "tmp": tmp_path, "config": configured(tmp_path),
    }  # fmt: skip


def refused(pho: Pho, words: str, places: dict[str, Path]) -> tuple[int, str]:
    """Exit code and message of a command that must leave nothing behind."""
    result = pho(*words.format(**places).split())
    lines = [line for line in result.stderr.splitlines() if line.startswith(("pho: ", "Error: "))]

    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert len(lines) == 1
    assert result.stdout == ""
    assert list(Path().iterdir()) == []
    return result.exit_code, lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (SEARCH + " --pattern nan", "sparsity nan is not between 0 and 1"),
        (SEARCH + " --pattern 2:5", r"layers\.0\.\S+: in_features=32 is not a multiple of M=5"),
        (VALIDATE + " --pattern 5:4", "'5:4' keeps N=5 of M=4"),
        (COMPARE + " --pattern 1.5", "sparsity 1.5 is not between 0 and 1"),
        (SEARCH + " --space kernel_sizes=4", "4 is even, but a window must have a middle"),
        (SEARCH + " --space kernel_sizes=7", "kernel_sizes has 7, which is not in .*: 3, 5"),
        (SEARCH + " --space speed=1", "'speed' is not one of"),
        (SEARCH + " --seed -1", "--seed -1 is below 0"),
        (SEARCH + " --finalists 0", "--finalists 0 is below 1"),
        (SEARCH + " --text {text}", "is a bundle: it needs no text"),
        (SEARCH + " --confirm-text {text}", "is a bundle: it needs no text"),
        (SEARCH + " --objective perplexity", "perplexity needs the model and a text"),
        (VALIDATE + " --pattern 0.5 --candidates 7", "--candidates 7 is below 8"),
        (VALIDATE + " --pattern 0.5 --confirm-windows 0", "confirm-windows 0 is below 1"),
        (
            EVALUATE + " --text {text} --data-file a",
            "--data-file a: data_file is a file of a dataset",
        ),
        (EVALUATE + " --text {text} --revision main", "is for hub ids"),
        (EVALUATE + " --text {text} --context-length 4", "context-length 4 is below 8"),
        (EVALUATE + " --text {text} --max-windows -1", "max-windows -1 is below 1"),
        (EVALUATE + " --text {text} --bos maybe", "'maybe' is not one of 'auto'"),
        (CALIBRATE + " --seed -1", "--seed -1 is below 0"),
        (CALIBRATE + " --context-length 4096", "4096 is more than .* can read: 2048"),
        (CALIBRATE + " --out x.bin", r"must end in \.safetensors"),
        (VALIDATE + " --pattern 0.5 --plot a.png", r"a\.png is not a name of a page.*a\.html"),
        (PRUNE + " --text {text}", "--bundle and a text are both given"),
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
        ("evaluate none.gguf --text {text}", r"none\.gguf does not exist"),
        ("evaluate {tmp} --text {text}", r"has no config\.json"),
        ("evaluate {text} --text {text}", r"is neither a folder nor a \.gguf or \.pho file"),
        (EVALUATE + " --text {empty}", r"empty\.txt is empty"),
        (EVALUATE + " --text {short}", "2 tokens, which do not fill one window of 32"),
        (EVALUATE + " --text none.txt", r"none\.txt does not exist"),
        (EVALUATE + " --text {text} --field body", "line 1 has no text in the field 'body'"),
        (CALIBRATE + " --text {empty}", r"empty\.txt is empty"),
        (CALIBRATE + " --text {short}", "2 tokens, which do not fill one window of 2048"),
        (VALIDATE + " --pattern 0.5 --samples 99", "no text to measure perplexity on"),
        ("search none.safetensors --pattern 0.5", r"none\.safetensors does not exist"),
        ("search {model}/model.safetensors --pattern 0.5", "but no proxy bundle"),
        (PRUNE + " --config none.json", r"none\.json cannot be read: No such file"),
        (PRUNE + " --config {text}", "is not JSON"),
        (PRUNE + " --bundle none.safetensors", r"none\.safetensors does not exist"),
        (PRUNE + " --out {text}", "is a file"),
        (CALIBRATE + " --out no/x.safetensors", "the folder .*no does not exist"),
        (VALIDATE + " --pattern 0.5 --plot no/plot.html", "the folder .*no does not exist"),
        (SEARCH + " --study study.db", r"'study\.db' is not a database URL"),
        (SEARCH + " --study sqlite:///no/study.db", "the folder .*no does not exist"),
    ],
)
def test_failure(pho: Pho, places: dict[str, Path], words: str, message: str) -> None:
    """What is not there, or cannot be used, is named; exit code 1."""
    code, said = refused(pho, words, places)

    assert code == 1
    assert re.search(message, said)


def test_pickled_weights(pho: Pho, places: dict[str, Path], tmp_path: Path) -> None:
    """Pickled weights are refused without being opened: what they would run does not run."""
    hostile = f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode()
    pickle.loads(hostile.replace(b"ran", b"proof"))  # noqa: S301 - shows that it would run
    (places["model"] / "model.safetensors").unlink()
    (places["model"] / "pytorch_model.bin").write_bytes(hostile)
    code, said = refused(pho, EVALUATE + " --text {text}", places)

    assert code == 1
    assert "only pickled weights (pytorch_model.bin)" in said
    assert (tmp_path / "proof").exists()
    assert not (tmp_path / "ran").exists()


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
    """A configuration that makes no sense is refused before a model is read."""
    places["config"] = configured(places["tmp"], **coefficients)
    code, said = refused(pho, PRUNE.replace("{model}", "./none"), places)

    assert code == 1
    assert message in said


@pytest.fixture
def full_disk(
    places: dict[str, Path], limited_disk: Callable[[int], AbstractContextManager[None]]
) -> Iterator[dict[str, Path]]:
    """``places``, where no file may grow beyond 20,000 bytes: a write fails as on a full disk."""
    with limited_disk(20_000):
        yield places


def test_bundle_on_a_full_disk(pho: Pho, full_disk: dict[str, Path]) -> None:
    """When the disk is full no half of a bundle stays."""
    code, said = refused(pho, f"{CALIBRATE} {SMALL}", full_disk)

    assert code == 1
    assert "x.safetensors was not written" in said


def test_folder_on_a_full_disk(pho: Pho, full_disk: dict[str, Path]) -> None:
    """When the disk is full no half of a pruned model stays."""
    code, said = refused(pho, PRUNE, full_disk)

    assert code == 1
    assert "pruned was not written" in said


def test_study_on_a_full_disk(pho: Pho, full_disk: dict[str, Path]) -> None:
    """When the study cannot grow, the search says so and writes no result."""
    result = pho(*SEARCH.format(**full_disk).split())

    assert result.exit_code == 1
    assert "the database fails: " in result.stderr
    assert not Path("config.json").exists()


def test_no_windows(pho: Pho, places: dict[str, Path]) -> None:
    """A perplexity over no windows is refused."""
    code, said = refused(pho, EVALUATE + " --text {text} --max-windows 0", places)

    assert code == 2
    assert "max-windows 0 is below 1" in said


@pytest.mark.parametrize("windows", [0, -1])
def test_no_report_windows(pho: Pho, places: dict[str, Path], windows: int) -> None:
    """A report over no windows, or fewer, is refused."""
    words = f"{COMPARE} --pattern 0.5 {SMALL} --report-windows {windows}"
    code, said = refused(pho, words, places)

    assert code == 2
    assert f"report-windows {windows} is below 1" in said


def test_negative_seed_of_candidates(pho: Pho, places: dict[str, Path]) -> None:
    """A seed below 0 is refused before any work."""
    words = VALIDATE + " --pattern 0.5 --candidates 8 --confirm-windows 1 --seed -1"
    code, said = refused(pho, words, places)

    assert code == 2
    assert "seed" in said


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_large_seed(pho: Pho, places: dict[str, Path], sampler: str) -> None:
    """A seed of more than 32 bits works, or is refused in words."""
    words = f"{SEARCH} --trials 12 --sampler {sampler} --seed {2**32}"
    result = pho(*words.format(**places).split())

    assert result.exit_code in (0, 2)


def test_database_without_a_driver(pho: Pho, places: dict[str, Path]) -> None:
    """A database whose driver is not installed is refused in words."""
    code, said = refused(pho, SEARCH + " --study postgresql+pg8000://localhost/pho", places)

    assert code == 1
    assert "postgresql" in said


def test_window_beyond_the_positions(pho: Pho, places: dict[str, Path]) -> None:
    """A model that has no position for a token says how long a window may be."""
    config = GPT2Config(
        vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(places["model"])
    _, said = refused(pho, "evaluate {model} --text {text} --context-length 128", places)

    assert "64" in said


def test_tokenizer_of_another_model(pho: Pho, places: dict[str, Path]) -> None:
    """Tokens that the model has no embedding for are refused in words."""
    file = places["model"] / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:10].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    config = places["model"] / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 256', '"vocab_size": 10'))
    code, said = refused(pho, EVALUATE + " --text {text}", places)

    assert code == 1
    assert "vocabulary" in said or "token" in said


def test_own_kernel_sizes_of_a_bundle(pho: Pho, places: dict[str, Path]) -> None:
    """A search may choose among the kernel sizes of its bundle, whatever the defaults are."""
    calibrated = pho(
        *f"{CALIBRATE} --context-length 32 --samples 6 --kernel-sizes 3,7".format(**places).split()
    )
    found = pho("search", "x.safetensors", "--pattern", "0.5", "--trials", 12,
                "--space", "kernel_sizes=7")  # fmt: skip

    assert calibrated.exit_code == 0
    assert found.exit_code == 0, found.stderr


def test_huge_kernel_size(pho: Pho, places: dict[str, Path]) -> None:
    """A kernel size that no tensor can have is refused in words."""
    places["config"] = configured(places["tmp"], kernel_size=10**12 + 1)
    code, said = refused(pho, PRUNE, places)

    assert code in (1, 2)
    assert "kernel_size" in said


def test_empty_name_of_a_text(
    pho: Pho, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty name (of an unset variable in a script, say) is not another text."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = pho("evaluate", places["model"], "--text", "", "--context-length", 32)

    assert result.exit_code != 0
    assert "c4" not in result.stderr
