"""`--minutes`: a search says what it will do, and the options that say the same."""

import json
import re
import shlex
from pathlib import Path

import pytest
from pretended_user import answer

from pho_service.pipeline import search as pipeline
from pho_service.pipeline.minutes import Clock
from pho_service.progress import Steps

HOW = ("--rows-per-layer", 4, "--projection-rows", 16, "--kernel-sizes", "3,5", "--trials", 20)


@pytest.fixture
def words(made_model, texts):
    """The words of a small search without its sizes."""
    text = ("--text", texts["calibration"], "--confirm-text", texts["confirmation"])
    return ("search", made_model, "--pattern", "0.5", "--preset", "score", *text, *HOW)


def chosen(result):
    """The options that a search says it has chosen."""
    (options,) = re.findall(r"Chosen, with [0-9]+ minutes left: (--.*)\. They do", result.stderr)
    return shlex.split(options)


def without_search(file):
    document = json.loads(Path(file).read_text())
    return {name: value for name, value in document.items() if name not in ("search", "study")}


def test_a_search_without_sizes_says_how_long_it_takes_and_how_to_do_the_same(pho, words):
    first = pho(*words, "--out", "first.json")
    options = chosen(first)
    again = pho(*words, *options, "--out", "again.json", "--study", "sqlite:///other.db")

    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert re.search(
        r"windows of [0-9]+ tokens, 20 trials, 5 finalists on .*: about ", first.stderr
    )
    assert options[0] == "--samples"
    assert without_search("first.json") == without_search("again.json")


def test_the_time_left_is_that_of_what_was_chosen_behind_the_calibration(pho, words, monkeypatch):
    given, calibrated = {}, Clock.calibrated

    def choose(clock, *args, **options):
        spec = calibrated(clock, *args, **options)
        plans.append(clock.plan.steps)
        return spec

    plans = []
    monkeypatch.setattr(Clock, "calibrated", choose)
    monkeypatch.setattr(Steps, "give", lambda _, name, seconds: given.update({name: seconds}))
    pho(*words, "--out", "first.json")
    (steps,) = plans

    assert given == {name: steps[name] for name in ("search", "confirm")}


def test_time_that_nothing_else_can_use_trains_the_best_in_more_passes_and_says_so(pho, words):
    best = [word if word != "score" else "best" for word in words]
    first = pho(*best, "--out", "first.json")
    (passes,) = re.findall(r"time that is left: (--recon.* [0-9]+)\.", first.stderr)
    said = (*chosen(first), *passes.split())
    again = pho(*best, *said, "--out", "again.json", "--study", "sqlite:///other.db")

    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert int(passes.split()[-1]) > 2
    assert without_search("first.json") == without_search("again.json")


def test_finalists_that_there_is_no_time_for_are_left_out_and_said_as_an_option(
    pho, words, monkeypatch
):
    best = [word if word != "score" else "best" for word in words]
    left = iter([True, True, False, False, False])
    with monkeypatch.context() as late:
        late.setattr(Clock, "another_left", lambda *_: next(left))
        first = pho(*best, "--out", "first.json")
    said = re.findall(r"time that is left: (--[^.]* [0-9]+)\.", first.stderr)
    options = [*chosen(first), *shlex.split(" ".join(said))]
    again = pho(*best, *options, "--out", "again.json", "--study", "sqlite:///other.db")

    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert "Pruning no more finalists in the time that is left: --finalists 2." in first.stderr
    assert len(json.loads(Path("first.json").read_text())["finalists"]) == 2
    assert without_search("first.json") == without_search("again.json")


def test_a_finalist_that_takes_too_long_is_given_up_and_left_out_of_the_options(
    pho, words, monkeypatch
):
    """Also by a search that goes on; the first finalist is not given up."""
    best = [word if word != "score" else "best" for word in words]
    with monkeypatch.context() as late:
        late.setattr(Clock, "another_left", lambda *_: True)
        late.setattr(Clock, "prunes_on_left", lambda *_: False)
        first = pho(*best, "--out", "first.json")
    said = re.findall(r"time that is left: (--[^.]* [0-9]+)\.", first.stderr)
    options = [*chosen(first), *shlex.split(" ".join(said))]
    pho(*best, "--out", "longer.json")
    again = pho(*best, *options, "--out", "again.json", "--study", "sqlite:///other.db")

    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert "Pruning no more finalists in the time that is left: --finalists 1." in first.stderr
    documents = [without_search(name) for name in ("first.json", "longer.json", "again.json")]
    (finalist,) = documents[0]["finalists"]
    assert documents[0] == documents[1]
    # The only finalist is measured as it is trained, so that less is known of it before.
    alike = documents[0].keys() - {"finalists", "confirmation"}
    assert [documents[2][name] for name in alike] == [documents[0][name] for name in alike]
    assert documents[2]["finalists"][0]["trial"] == finalist["trial"]
    assert documents[2]["confirmation"]["perplexity"] == documents[0]["confirmation"]["perplexity"]


@pytest.mark.thorough
def test_a_training_that_takes_too_long_says_from_which_block_on_it_is_short(
    pho, words, monkeypatch
):
    """The same options train the same blocks as long, anywhere."""
    best = [word if word != "score" else "best" for word in words]
    with monkeypatch.context() as late:
        late.setattr(Clock, "trains_on", lambda *_: False)
        first = pho(*best, "--out", "first.json", "--finalists", 1, "--in-full", 1)
    said = re.findall(r"time that is left: (--[^.]* [0-9]+)\.", first.stderr)
    options = [*chosen(first), *shlex.split(" ".join(said))]
    again = pho(*best, *options, "--out", "again.json", "--study", "sqlite:///other.db")

    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert (
        "In one pass, training the other blocks in the time that is left: "
        "--reconstruction-blocks 1." in first.stderr
    )
    assert without_search("first.json") == without_search("again.json")


@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_an_interrupted_search_goes_on_with_what_was_chosen_for_it(pho, words, monkeypatch, before):
    """So does one that is over, with what it has found."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if before:
            patched.setattr(pipeline._SearchPieces, "choose", interrupted)
        first = pho(*words)
    second = pho(*words)

    assert (first.exit_code != 0) is before
    assert second.exit_code == 0
    assert f"Going on with what was chosen for it: {shlex.join(chosen(first))}." in second.stderr


@pytest.mark.thorough
def test_what_is_given_is_kept_and_all_of_it_leaves_nothing_to_choose(pho, words):
    sizes = ("--samples", 6, "--context-length", 32, "--confirm-windows", 2, "--finalists", 3)
    some = pho(*words, *sizes[:4], "--minutes", 3)
    every = pho(*words, *sizes, "--in-full", 2, "--minutes", 3)
    none = pho(*words, *sizes[:4])

    assert chosen(some)[:4] == ["--samples", "6", "--context-length", "32"]
    assert "All sizes are given, so --minutes 3 chooses none." in every.stderr
    assert "Chosen" not in every.stderr + none.stderr


@pytest.mark.thorough
def test_a_curve_shares_its_minutes(pho, words):
    curve = ("curve", *words[1:2], *words[4:], "--patterns", "0.3,0.5")
    first, again = pho(*curve, "--minutes", 5), pho(*curve, "--minutes", 5)

    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert f"Going on with what was chosen for it: {shlex.join(chosen(first))}." in again.stderr


@pytest.mark.thorough
def test_a_cut_takes_its_minutes(pho, made_model, texts):
    words = ("prune", made_model, "--pattern", "structured:20%", "--text", texts["calibration"])
    result = pho(*words, *HOW[:-2], "--minutes", 5, "--out", "cut", "--json")
    document = answer(result)

    assert "2 finalists on 8 windows: about" in result.stderr
    settings = document["configuration"]["calibration"]["settings"]
    assert chosen(result)[1] == str(settings["samples"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--minutes", "soon"), "--minutes 'soon' is not a number of minutes above 0"),
        (("--minutes", "-1"), "--minutes '-1' is not a number of minutes above 0"),
        (("--minutes", "inf"), "Write --minutes 20, or --minutes none"),
    ],
)
def test_minutes_that_are_none_are_refused_before_anything_is_read(pho, words, more, said):
    result = pho(*words, *more)

    assert result.exit_code == 2
    assert said in result.stderr


def test_a_bundle_is_calibrated_already(pho, bundle_file):
    result = pho("search", bundle_file, "--pattern", "0.5", "--minutes", 5)
    without = pho("search", bundle_file, "--pattern", "0.5", *HOW[-2:], "--kernel-sizes", "3,5")

    assert result.exit_code == 2
    assert "--minutes chooses how a model is calibrated" in result.stderr
    assert without.exit_code == 0, without.output


def test_the_least_is_done_and_said_where_the_minutes_are_too_few(pho, words):
    result = pho(*words, "--minutes", "0.0001")

    assert result.exit_code == 0
    assert "It is the least, and more than 0.0001 minutes." in result.stderr
    assert chosen(result)[:2] == ["--samples", "4"]


@pytest.mark.thorough
def test_who_prunes_with_a_configuration_calibrates_as_it_was_found(pho, words, made_model, texts):
    sizes = ("--samples", 6, "--context-length", 32)
    pho(*words, *sizes, "--out", "config.json")
    pruning = ("prune", made_model, "--config", "config.json", "--text", texts["calibration"])
    as_found = pho(*pruning, *HOW[:-2], "--out", "as-found")
    same, other = (
        pho(*pruning, *HOW[:-2], "--samples", count, "--context-length", 32, "--out", f"{count}")
        for count in (6, 4)
    )
    keys = [
        json.loads(Path(folder, "pruning.json").read_text())["calibration"]["key"]
        for folder in ("as-found", "6", "4")
    ]

    assert "Calibrating as it was found: on 6 windows of 32 tokens." in as_found.stderr
    assert "as it was found" not in same.stderr + other.stderr
    assert keys[0] == keys[1] != keys[2]


def test_a_comparison_without_sizes_says_how_long_it_takes_and_how_to_do_the_same(
    pho, made_model, texts
):
    words = (
        "compare", made_model, "--pattern", "0.5", "--text", texts["calibration"],
        "--report-text", texts["report"], "--method", "wanda", *HOW[:6], "--json",
    )  # fmt: skip
    first = pho(*words, "--minutes", "0.2")
    (options,) = re.findall(r"Chosen: (--.*)\. They do", first.stderr)
    again = pho(*words, *shlex.split(options))
    dense, wanda = json.loads(first.stdout)["rows"]

    assert re.search(r"windows of [0-9]+ tokens, 1 rows: about ", first.stderr)
    assert "Chosen" not in again.stderr
    assert [row["perplexity"] for row in json.loads(again.stdout)["rows"]] == [
        dense["perplexity"], wanda["perplexity"],
    ]  # fmt: skip


def test_a_published_method_takes_its_minutes(pho, made_model, texts):
    words = (
        "prune", made_model, "--method", "sparsegpt", "--pattern", "0.5",
        "--text", texts["calibration"],
    )  # fmt: skip
    first = pho(*words, "--minutes", "0.2", "--out", "first")
    (options,) = re.findall(r"Chosen: (--.*)\. They do", first.stderr)
    again = pho(*words, *shlex.split(options), "--out", "again")
    recipes = [json.loads(Path(out, "pruning.json").read_text()) for out in ("first", "again")]
    weights = [Path(out, "model.safetensors").read_bytes() for out in ("first", "again")]

    assert re.search(r"windows of [0-9]+ tokens, sparsegpt: about ", first.stderr)
    assert "Chosen" not in again.stderr
    assert recipes[0]["calibration"] == recipes[1]["calibration"]
    assert weights[0] == weights[1]
