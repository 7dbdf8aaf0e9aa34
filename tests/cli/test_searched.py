"""`pho prune --pattern 0.5`: a search, the pruned model and its recovery, in one command."""

import json
import re
import shlex
from pathlib import Path

import pytest
from pretended_user import answer
from safetensors.torch import load_file

from pho_service.pipeline.minutes import Clock

SMALL = ("--context-length", 32, "--samples", 6, "--kernel-sizes", "3,5")


@pytest.fixture
def words(made_model, texts):
    return ("prune", made_model, "--pattern", "0.5", "--text", texts["calibration"])


def test_a_pattern_alone_searches_and_prunes_with_the_bytes_of_two_commands(pho, words, made_model):
    pruned = answer(pho(*words, *SMALL, "--out", "pruned", "--json"))
    found = pho("search", *words[1:], *SMALL, "--out", "config.json", "--json")
    again = pho(*words[:2], "--config", "config.json", *words[4:], *SMALL, "--out", "again")
    checked = pho("prune", made_model, "--check", "pruned")

    assert (found.exit_code, again.exit_code, checked.exit_code) == (0, 0, 0), checked.output
    best = json.loads(Path("config.json").read_text())
    assert pruned["warnings"] == json.loads(found.stdout)["warnings"]
    assert pruned["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert pruned["configuration"]["steps"] == best["steps"]
    assert pruned["configuration"]["coefficients"] == best["coefficients"]
    folders = [Path(folder, "model.safetensors").read_bytes() for folder in ("pruned", "again")]
    assert folders[0] == folders[1]
    assert not [*Path().glob(".pruned*")]  # what an interrupted run would go on with


def test_a_person_sees_how_good_it_is_what_is_gone_and_what_to_do_next(
    pho, words, made_model, monkeypatch
):
    monkeypatch.setattr(Clock, "recovery_s", lambda _: 0.0)
    words = [*words, "--kernel-sizes", "3,5", "--finalists", "3"]
    ran = pho(*words, "--minutes", "0.2", "--out", "pruned")
    lines = " ".join(ran.stderr.split())

    assert ran.exit_code == 0, ran.output
    assert "finalists on" in lines
    assert "It is not recovered: the search has left too few of the minutes" in lines
    assert "pruned: 50.0000% of" in ran.stdout
    assert "dense" in ran.stdout
    assert f"`pho recover pruned --teacher {made_model}`" in lines
    chosen = re.findall(r"(?:minutes left|time that is left): (--[^.]*)\. ", f"{lines} ")
    options = [word for words in chosen for word in shlex.split(words)]
    again = pho(*words, *options, "--out", "again")
    assert again.exit_code == 0, again.output
    folders = [Path(folder, "model.safetensors").read_bytes() for folder in ("pruned", "again")]
    assert folders[0] == folders[1]


def test_what_the_minutes_leave_recovers_it_also_after_an_interruption(
    pho, resumed, words, made_model
):
    words = (*words, "--kernel-sizes", "3,5", "--minutes", "0.3", "--out", "pruned", "--json")
    result = resumed(*words)
    recovered = answer(result)["recovery"]
    weights = load_file("pruned/model.safetensors")
    zeros = [(w == 0).float().mean() for name, w in weights.items() if "q_proj.weight" in name]

    assert "--recover-minutes 0.05" in result.stderr
    assert recovered["tokens"] > 0
    assert {"dense", "pruned", "recovered"} == recovered["perplexities"].keys()
    assert pho("prune", made_model, "--check", "pruned").exit_code == 0
    assert min(zeros) > 0.2
    assert not [path for path in Path().glob(".*") if path.suffix in (".search", ".recovery")]


def test_scope_linears_and_a_folded_permutation_are_those_of_a_search(pho, words):
    words = (*words[:3], "2:4", *words[4:], *SMALL, "--targets", "*.q_proj", "--deployable")
    pruned = answer(pho(*words, "--out", "pruned", "--json"))

    assert {name.rpartition(".")[2] for name in pruned["layers"]} == {"q_proj"}
    assert pruned["configuration"]["scope"] == "row"
    assert pruned["configuration"]["steps"]["deployable"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bundle", "b.safetensors"), "--pattern 0.5 searches, and calibrates on a text, for"),
        (("--force",), "--force says nothing"),
        (("--scope", "column"), "column"),
        (("--public",), "--public is for --push"),
        (("--method", "wanda", "--preset", "best"), "--preset: only for a search"),
        (("--method", "wanda", "--report-windows", 4), "--report-windows: only for a search"),
    ],
)
def test_what_a_search_has_no_use_for_is_refused(pho, words, more, message):
    result = pho(*words, *SMALL, *more, "--out", "pruned")

    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
    assert not Path("pruned").exists()


def test_the_options_repeat_a_search_whose_time_left_one_finalist_alone(pho, words, monkeypatch):
    """Its training, which makes a random model worse, is kept as that of one that is asked for."""
    monkeypatch.setattr(Clock, "recovery_s", lambda _: 0.0)
    words = [*words, "--kernel-sizes", "3,5", "--finalists", "3"]
    with monkeypatch.context() as late:
        late.setattr(Clock, "another_left", lambda _, before: not before)
        ran = pho(*words, "--minutes", "0.3", "--out", "pruned")
    lines = " ".join(ran.stderr.split())
    chosen = re.findall(r"(?:minutes left|time that is left): (--[^.]*)\. ", f"{lines} ")
    options = [word for words in chosen for word in shlex.split(words)]
    again = pho(*words, *options, "--out", "again")
    folders = [Path(folder, "model.safetensors").read_bytes() for folder in ("pruned", "again")]

    assert again.exit_code == 0, again.output
    assert options[-2:] == ["--finalists", "1"]
    assert folders[0] == folders[1]
