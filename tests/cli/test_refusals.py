"""Every refusal is one sentence with the right exit code, and leaves nothing behind."""

import json
import re
from pathlib import Path

import pytest

SMALL = "--context-length 32 --samples 6 --kernel-sizes 3,5"
CALIBRATE = "calibrate {model} --text {text} --out x.safetensors"
SEARCH = "search {bundle} --pattern 0.5 --kernel-sizes 3,5"
EVALUATE = "evaluate {model} --context-length 32"
VALIDATE = "validate {model} --text {text} " + SMALL
PRUNE = "prune {model} --config {config} --bundle {bundle} --out pruned"
CURVE = "curve {model} --text {text} " + SMALL
WITHIN = f"search {{model}} --text {{text}} {SMALL} --within"
RECOVER = "recover pruned --teacher dense --text a.txt --out o"
COMPARE = "compare nowhere --pattern 2:4 --report-text r.txt"


@pytest.fixture
def places(model_folder, bundle_file, texts, tmp_path):
    """What words in braces stand for."""
    (tmp_path / "short.txt").write_text("the model")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    score = {
        "row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
        "activation_exponent": 0.5,
    }  # fmt: skip
    document = {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": score,
    }  # fmt: skip
    (tmp_path / "by-hand.json").write_text(json.dumps(document))
    score["kernel_size"] = 10**12 + 1
    (tmp_path / "huge.json").write_text(json.dumps(document))
    return {
        "model": model_folder, "bundle": bundle_file, "text": texts["calibration"],
        "short": tmp_path / "short.txt", "gguf": tmp_path / "model.gguf", "tmp": tmp_path,
        "config": tmp_path / "by-hand.json", "huge": tmp_path / "huge.json",
    }  # fmt: skip


def refused(pho, words, places):
    """Exit code and message of a command that must leave nothing behind."""
    before = sorted(places["model"].rglob("*"))
    result = pho(*words.format(**places).split())
    lines = [line for line in result.stderr.splitlines() if line.startswith(("pho: ", "Error: "))]

    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert len(lines) == 1
    assert result.stdout == ""
    assert not [*Path().iterdir()]
    assert sorted(places["model"].rglob("*")) == before
    return result.exit_code, lines[0]


BAD_USAGE = [
    (SEARCH + " --pattern 2:5", r"layers\.0\.\S+: in_features=32 is not a multiple of M=5"),
    (SEARCH + " --seed -1", "--seed -1 is below 0"),
    (SEARCH + " --text {text}", "is a bundle: it needs no text"),
    (SEARCH + " --objective perplexity", "perplexity needs the model and a text"),
    (SEARCH + " --over mean", "--over mean: over=mean is for several models"),
    (SEARCH + " --scope row --warm-start {config}", "is for 0.5 in scope layer"),
    ("search {bundle} {model} --pattern 0.5 --confirm-text x", "--confirm-text x: several models"),
    (VALIDATE + " --pattern 0.5 --candidates 7", "--candidates 7 is below 8"),
    (EVALUATE + " --text {text} --data-file a", "data-file a: data_file is a file of a dataset"),
    (EVALUATE + " --text {text} --revision main", "is for hub ids"),
    (CALIBRATE + " --out x.bin", r"must end in \.safetensors"),
    (VALIDATE + " --pattern 0.5 --plot a.png", r"a\.png is not a name of a page.*a\.html"),
    (PRUNE + " --text {text}", "--bundle and a text are both given"),
    (CALIBRATE + " --kernel-sizes x", "not numbers"),
    (CALIBRATE + " --samples 4 --context-length 24 --calibration-memory 1.5MiB", "take 1.5 MiB"),
    (CALIBRATE + " --device cuda:77", "does not exist"),
    ("transfer {config} {model}", "Give --report-text or --report-dataset, or a bundle"),
    (CURVE + " --patterns 0.5,3:5", "in_features=32 is not a multiple of M=5"),
    (CURVE + " --patterns 0.5,0.50", "the pattern 0.5 is given twice"),
    (CURVE, "neither --patterns nor --bytes is given. Give one"),
    (CURVE + " --patterns 0.5 --bytes 1MB", "--patterns and --bytes are both given. Give one"),
    (CURVE + " --bytes 1MB,much", "--bytes 'much' is not a size"),
    ("curve {bundle} --bytes 1MB", r"tiny\.safetensors is a bundle"),
    ("curve {bundle} --patterns 0.5 --text a.txt", r"tiny\.safetensors is a bundle"),
    (WITHIN + " 5% --pattern 0.5", "Give one of them"),
    (WITHIN + " 5", "would be 500 %"),
    (WITHIN + " much", "is not a rise"),
    (WITHIN + " 5% --no-confirm", "--no-confirm cannot be used with --within"),
    (SEARCH + " --step 0.1", "--step is for --within alone"),
    (COMPARE + " --seeds 0,x", "--seeds '0,x' are not numbers with commas between"),
    (COMPARE + " --seeds 1,1", "one is given twice"),
    (COMPARE + " --seeds 1 --calibration-seed 2", "both say how the calibration is drawn"),
    (COMPARE + " --trials 9", "--trials: for --preset alone"),
    (COMPARE + " --preset bst", "--preset 'bst' is not one of"),
    (COMPARE + " --method owl-wanda", "OWL has no row at N:M"),
    (COMPARE + " --ablation", "configurations are taken apart, and there is none"),
    (COMPARE + " --recover-tokens 9", "configurations are recovered, and there is none"),
    ("prune", "MODEL, --out, and one of --pattern, --config, --method, --from-library, --smaller"),
    ("prune m --out o --method wanda", "--method needs a --pattern"),
    ("prune m --out o --method wnada --pattern 0.5", "'wnada' is not one of those at 0.5"),
    ("prune m --out o --method wanda --pattern 0.5 --scope layer", "wanda counts in scope row"),
    ("prune m --out o --config c.json --ignore *.o_proj", "--ignore: a configuration has its"),
    (PRUNE + " --recover-minutes 5", "--recover-minutes: only for a search"),
    (PRUNE + " --no-recovery", "--no-recovery: only for a search"),
    ("prune --check {model} --no-recovery", "leave --no-recovery out"),
    ("prune {model} --out {model}/pruned --pattern 0.5 --method wanda --text {text} " + SMALL,
     "would lie in"),
    ("evaluate {gguf} --text {text} --stream", "cannot be streamed: GGUF is dequantised"),
    ("prune --check out --out other", "--check takes a folder and prunes nothing"),
    (RECOVER + " --minutes 0", "--minutes 0.0 is not above 0"),
    (RECOVER + " --minutes 1 --tokens 9", "minutes=1 and tokens=9 both say how long to train"),
    ("plan m --card K80", "'K80' is not known"),
    ("plan m --pattern 4:2", "4:2"),
]  # fmt: skip
FAILURES = [
    (PRUNE + " --config {huge}", "kernel_size"),
    ("evaluate {text} --text {text}", r"is neither a folder nor a \.gguf or \.pho file"),
    (EVALUATE + " --text {short}", "2 tokens, which do not fill one window of 32"),
    *(
        (
            words + " --samples 99",
            "no windows left to confirm on. Give --confirm-text, or fewer --s",
        )
        for words in (
            "search {model} --text {text} --pattern 0.5 --context-length 32 --kernel-sizes 3,5",
            VALIDATE + " --pattern 0.5",
            CURVE + " --patterns 0.5",
        )
    ),
    (PRUNE + " --config none.json", r"none\.json cannot be read: No such file"),
    (PRUNE + " --out {text}", "is a file"),
    ("prune --check nothing", "nothing"),
    ("plan ./nowhere", "./nowhere does not exist on this machine"),
    (CALIBRATE + " --out no/x.safetensors", "the folder .*no does not exist"),
    (VALIDATE + " --pattern 0.5 --plot no/plot.html", "the folder .*no does not exist"),
    (SEARCH + " --study study.db", r"'study\.db' is not a database URL"),
    (SEARCH + " --study sqlite:///no/study.db", "the folder .*no does not exist"),
    (SEARCH + " --study postgresql+pg8000://localhost/pho", "postgresql"),  # no driver
    (SEARCH + " --out no/c.json", "the folder .*no does not exist"),
    (CURVE + " --patterns 0.5 --out {text}/none", "none cannot be made: .* cannot be written"),
    ("transfer {config} {bundle} --pattern 2:4", "for 0.5 in scope layer, but 2:4 in scope row"),
    ("transfer {config} {bundle} --out {tmp}/none/t.json", "none"),
]


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [*((2, *row) for row in BAD_USAGE), *((1, *row) for row in FAILURES)],
)
def test_what_cannot_be_done_is_said_with_its_rule_and_leaves_nothing(
    pho, places, code, words, message
):
    said = refused(pho, words, places)

    assert said[0] == code
    assert re.search(message, said[1])


@pytest.fixture
def full_disk(places, limited_disk):
    """``places``, where no file may grow beyond 20,000 bytes: a write fails as on a full disk."""
    with limited_disk(20_000):
        yield places


@pytest.mark.parametrize(
    ("words", "named"), [(f"{CALIBRATE} {SMALL}", "x.safetensors"), (PRUNE, "pruned")]
)
def test_what_a_full_disk_does_not_take_is_named(pho, full_disk, words, named):
    code, said = refused(pho, words, full_disk)

    assert code == 1
    assert f"{named} was not written" in said


def test_study_on_a_full_disk(pho, full_disk):
    result = pho(*SEARCH.format(**full_disk).split())

    assert result.exit_code == 1
    assert "the database fails: " in result.stderr
    assert not Path("config.json").exists()


def test_empty_name_of_a_text(pho, places, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = pho("evaluate", places["model"], "--text", "", "--context-length", 32)

    assert result.exit_code != 0
    assert "c4" not in result.stderr
