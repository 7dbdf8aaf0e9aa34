"""`pho transfer`, and searches over several models or from what was found elsewhere."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pretended_user import answer

SMALL = ("--context-length", "32", "--samples", "6", "--kernel-sizes", "3,5")


SCORE = {
    "row": 0.1, "column": 0.8, "neighbourhood": 0.1, "kernel_size": 3, "activation_exponent": 0.9,
    "gradient_exponent": 0.4,
}  # fmt: skip


def written(folder, **changes):
    """A configuration's file."""
    document = {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": SCORE, **changes,
    }  # fmt: skip
    path = folder / "found.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def configuration(tmp_path):
    """What was found on some other model."""
    return written(tmp_path)


def test_each_model_has_its_perplexities_and_its_own_best_another_is_added_and_all_is_kept(
    pho, configuration, made_model, bos_folder, texts
):
    words = [
        "--text", texts["calibration"], "--report-text", texts["report"], *SMALL, "--search",
        "--trials", 9, "--finalists", 1, "--report-windows", 3, "--json",
    ]  # fmt: skip
    first = answer(pho("transfer", configuration, made_model, *words))
    kept = json.loads(Path("transfer.json").read_text())
    again = pho("transfer", configuration, bos_folder, made_model, *words, "--plot", "t.html")
    document = answer(again)
    targets = json.loads(Path("transfer.json").read_text())["targets"]
    drawn = Path("t.html").read_text()

    assert kept == first
    assert targets[0] == kept["targets"][0]
    assert [t["target"] for t in targets] == [str(made_model), str(bos_folder)]
    assert document["targets"] == targets[::-1]
    assert again.stderr.count("Measuring perplexities") >= 1
    for target in targets:
        assert set(target["perplexities"]) == {"dense", "wanda", "ria", "transferred", "own"}
        assert target["own"]["pattern"] == "0.5"
        assert target["model"]["weights_sha256"]
    for name in ("dense", "wanda", "ria", "transferred", "own best"):
        assert f">{name}</text>" in drawn
    assert "By perplexity, on each model" in drawn


def test_a_bundles_table_has_proxies(pho, configuration, bundle_file):
    result = pho("transfer", configuration, bundle_file)

    assert result.exit_code == 0, result.output
    assert "gain in the proxy" in result.stdout
    assert "gain in perplexity" not in result.stdout
    assert "-" not in result.stdout.split("tiny.safetensors")[1].split("\n")[0]


def test_what_does_not_transfer_is_told(pho, tmp_path, bundle_file):
    bad = {
        **SCORE, "row": 0.0, "neighbourhood": 0.0, "activation_exponent": 0.0,
        "gradient_exponent": 4.0,
    }  # fmt: skip
    result = pho("transfer", written(tmp_path, coefficients=bad), bundle_file)

    assert result.exit_code == 0
    assert "Note: " in result.stderr
    assert "it does not transfer. Search there: pho search" in result.stderr
    assert re.search(r" -[\d.]+%", result.stdout)


@pytest.mark.parametrize(
    ("held", "message"),
    [('{"a": 1}', "is something else"), (None, "of another")],
)
def test_a_file_that_is_there_already_is_not_overwritten(
    pho, tmp_path, configuration, bundle_file, held, message
):
    if held is None:
        answer(pho("transfer", configuration, bundle_file, "--json"))
        configuration = written(tmp_path, scope="row")
    else:
        Path("transfer.json").write_text(held)
    before = Path("transfer.json").read_bytes()
    result = pho("transfer", configuration, bundle_file)

    assert result.exit_code == 1
    assert message in result.stderr
    assert "Give another --out" in result.stderr
    assert Path("transfer.json").read_bytes() == before


def test_bundles_and_models_may_be_mixed_the_result_says_what_it_is_on_each(
    pho, bundle_file, bos_folder, texts
):
    words = [
        "search", bundle_file, bos_folder, "--preset", "score", "--pattern", "0.5", "--trials", 14,
        "--over", "worst", "--text", texts["calibration"], *SMALL,
    ]  # fmt: skip
    objective = answer(pho(*words, "--json"))["configuration"]["objective"]
    shown = pho(*words)

    assert set(objective["relative_to_ria"]) == {str(bundle_file), str(bos_folder)}
    assert objective["value"] == max(objective["relative_to_ria"].values())
    assert f"of RIA's on {bos_folder}" in shown.stdout


def test_what_a_warm_start_was_worth(pho, configuration, bundle_file):
    words = ["search", bundle_file, "--preset", "score", "--pattern", "0.5", "--trials", 20]
    result = pho(*words, "--warm-start", configuration)
    found = json.loads(Path("config.json").read_text())
    (start,) = found["search"]["warm_start"]

    assert result.exit_code == 0, result.output
    assert "warm start" in result.stdout
    assert start["trial"] == 6
    assert start["value"] >= found["objective"]["value"]
    assert start["params"]["row_share"] == pytest.approx(1 / 9)
    assert "warm_start" not in answer(pho(*words, "--json"))["configuration"]["search"]


def test_a_search_that_starts_from_a_folder_takes_what_fits_and_says_why(
    pho, configuration, bundle_file, tmp_path
):
    folder = tmp_path / "library"
    folder.mkdir()
    words = ["search", bundle_file, "--preset", "score", "--trials", 30]
    words += ["--warm-start", folder]
    empty = pho(*words, "--pattern", "0.5", "--json")
    shutil.copy(configuration, folder)
    warm = pho(*words, "--pattern", "0.5")
    found = json.loads(Path("config.json").read_text())["search"]
    other = pho(*words, "--pattern", "0.6")

    assert "nothing to start from: the library" in empty.stderr
    assert "is empty" in empty.stderr
    assert "warm_start" not in answer(empty)["configuration"]["search"]
    assert f"Starting from {configuration.name}: pattern 0.5" in warm.stderr
    assert "warm start   " in warm.stdout
    assert found["warm_start"][0]["trial"] == 6
    assert "has nothing for 0.6" in other.stderr
    assert other.exit_code == 0
