"""Searches from Python: what the command line finds, on any study, with any sampler of Optuna."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import pho_service as pho
from pho_service.cli import main
from pho_service.errors import InvalidInput
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.document import number
from pho_service.spec.objective import SearchOptions
from pho_service.tuning.plan import SearchRequest


def test_every_field_of_a_calibration_and_of_a_search_is_an_argument_that_is_described():
    elsewhere = {"pattern", "objective", "bounds", "steps", "warm_start", "validation"}
    elsewhere |= {"finalists"}  # None, which is another number of a cut
    asked = SearchRequest(pattern=pho.Pattern.parse("0.5"))
    for function, values, other in (
        (pho.calibrate, CalibrationSettings(), {"samples", "context_length"}),
        (pho.search, asked, elsewhere),
        (pho.curve, SearchOptions(), set()),
        (pho.search_within, SearchOptions(), set()),
        (pho.compare, SearchOptions(), set()),
    ):
        parameters = inspect.signature(function).parameters
        names = [each.name for each in dataclasses.fields(values) if each.name not in other]

        assert {name: parameters[name].default for name in names} == {
            name: getattr(values, name) for name in names
        }
        assert not [name for name in parameters if f"\n    {name}: " not in function.__doc__]
    search = inspect.signature(pho.search).parameters
    for function in (pho.curve, pho.search_within):
        parameters = inspect.signature(function).parameters
        shared = (parameters.keys() & search.keys()) - {"bundle", "model", "sampler", "finalists"}

        assert len(shared) >= 15
        assert not [name for name in shared if parameters[name].default != search[name].default]


def test_as_pho_search(model_folder, texts, tmp_path):
    """The same seeds, model folder and texts give the bytes of the command line's config.json."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    bundle = pho.calibrate(
        model, tokenizer, texts["calibration"], samples=6, context_length=32, kernel_sizes=(3, 5)
    )
    found = pho.search(
        bundle, "2:4", model=model, confirm=texts["confirmation"], trials=12, seed=3, sampler="tpe",
        finalists=1, report=texts["report"], report_windows=4,
    )  # fmt: skip
    found.write(tmp_path / "mine.json")
    words = [
        "search", model_folder, "--pattern", "2:4", "--text", texts["calibration"],
        "--samples", 6, "--context-length", 32, "--kernel-sizes", "3,5", "--trials", 12,
        "--seed", 3, "--confirm-text", texts["confirmation"], "--device", "cpu",
        "--study", f"sqlite:///{tmp_path / 's.db'}", "--out", tmp_path / "theirs.json",
        "--sampler", "tpe", "--finalists", 1, "--report-text", texts["report"],
        "--report-windows", 4,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 0, result.stderr

    assert "nothing was chosen on this text" in str(found).splitlines()[0]
    assert "; nothing was chosen on this text\nmethod " in result.stdout
    assert found.report.text["windows"] == 4
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()
    assert pho.read_configuration(tmp_path / "mine.json") == found.configuration


def test_dense_wanda_ria_and_the_finalists_are_measured_on_one_text_the_model_is_left_dense(
    tiny_llama, bundle, texts, weights
):
    found = pho.search(
        bundle, "0.5", preset="score", model=tiny_llama, trials=12, confirm=texts["confirmation"]
    )
    methods = [row.method for row in found.table]
    dense = pho.evaluate(
        tiny_llama, bundle.tokenizer, texts["confirmation"], context_length=32, max_windows=16
    )

    assert weights()
    assert methods[:3] == ["dense", "wanda", "ria"]
    assert found.table[0].perplexity == dense.perplexity
    assert found.configuration.confirmation is not None
    assert found.configuration.confirmation.text["source"] == str(texts["confirmation"])
    assert found.table[3].trial == found.trial
    assert found.table[3].perplexity == found.configuration.confirmation.perplexity
    assert "| wanda" in found._repr_markdown_()
    assert "<td>wanda" in found._repr_html_()
    assert f"{number(dense.perplexity)} dense" in repr(found)


@pytest.mark.thorough
def test_perplexities_on_windows_that_calibration_left_stand_at_the_trials_for_all_who_read_them(
    tiny_llama, bundle, tmp_path
):
    """In memory, in the database, and in what Optuna's own command lists."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    kept = pho.search(bundle, "0.5", preset="score", model=tiny_llama, trials=12, study=url)
    found = pho.search(bundle, "0.5", preset="score", model=tiny_llama, trials=12)
    read = optuna.load_study(study_name=kept.study_name, storage=url)
    expected = {row.trial: (row.perplexity, row.divergence) for row in found.table[3:]}
    # In a process of its own: it would leave the root logger here at DEBUG.
    command = [Path(sys.executable).with_name("optuna"), "studies", "--storage", url]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert kept.study_name in printed
    assert found.configuration.confirmation.tokens == len(bundle.text.held_out[:16]) * 31
    assert len(expected) >= 4
    for study in (kept.study, found.study, read):
        assert {
            trial.number: (trial.user_attrs.get("perplexity"), trial.user_attrs["divergence"])
            for trial in study.trials
            if "divergence" in trial.user_attrs
        } == expected
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(study.trials[0]._trial_id, "other", 1)


def test_a_bundles_file_is_enough(bundle, tmp_path):
    bundle.write(tmp_path / "b.safetensors")
    found = pho.search(
        tmp_path / "b.safetensors", 0.5, preset="score", trials=12, space={"row_share": 0.5}
    )
    same = pho.search(bundle, "0.5", preset="score", trials=12, space={"row_share": (0.5, 0.5)})

    assert found.configuration == same.configuration
    assert found.configuration.search["space"]["row_share"] == [0.5, 0.5]
    assert any("Not confirmed" in warning for warning in found.warnings)
    assert "wanda" in [row.method for row in found.table]
    assert found.study.metric_names == ["activation-reconstruction/blend"]


def test_bundles_by_name_are_searched_together(bundle):
    found = pho.search(
        {"one": bundle, "two": bundle}, "0.5", preset="score", trials=12, over="worst"
    )

    assert [*found.configuration.objective["relative_to_ria"]] == ["one", "two"]


def test_a_url_and_a_study_are_gone_on_with(bundle, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    seen = []
    short = pho.search(bundle, "0.5", preset="score", trials=12, study=url).study
    before = [(trial.params, trial.values, trial.datetime_complete) for trial in short.trials]
    note = [lambda _, trial: seen.append(trial.number)]
    long = pho.search(bundle, "0.5", preset="score", trials=15, study=url, callbacks=note)
    assert seen == [12, 13, 14]
    rated = [(trial.params, trial.values, trial.datetime_complete) for trial in long.study.trials]
    assert rated[:12] == before
    mine = optuna.create_study(study_name="mine")
    sampler = optuna.samplers.RandomSampler(seed=0)
    found = pho.search(bundle, "0.5", preset="score", trials=12, study=mine, sampler=sampler)

    assert found.study is mine
    assert len(mine.trials) == 12
    assert found.configuration.search["sampler"] == "RandomSampler"
    assert all(t.duration is not None and t.duration.total_seconds() > 0 for t in mine.trials)


def test_a_function_of_a_candidate_and_its_rating_or_the_pruned_model_is_an_objective(
    tiny_llama, bundle, weights
):
    def errors(_, rating):
        return 2 * float(rating.blend)

    def zeros(_, rating, model):
        sparsities.append(float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()))
        return float(rating.blend)

    sparsities = []
    options = {"preset": "crepe", "trials": 12}
    known = pho.search(bundle, "0.5", **options)
    mine = pho.search(bundle, "0.5", objective=errors, **options)
    pho.search(bundle, "0.5", objective=zeros, model=tiny_llama, **options)

    assert mine.configuration.objective["name"] == "own/errors"
    assert mine.study.best_value == pytest.approx(2 * known.study.best_value)
    assert sparsities == pytest.approx([0.5] * 12, abs=0.02)
    assert weights()
    with pytest.raises(InvalidInput, match="own/zeros takes a pruned model, and there is none"):
        pho.search(bundle, "0.5", objective=zeros, **options)


def test_an_objective_that_gives_nan_fails_its_trial_and_one_that_raises_ends_the_search_too(
    bundle,
):
    def some(candidate, rating):
        return float("nan") if candidate.method == "wanda" else float(rating.blend)

    def broken(candidate, rating):
        if candidate.method == "wanda":
            raise ZeroDivisionError("mine")
        return float(rating.blend)

    states = optuna.trial.TrialState
    study = optuna.create_study()
    found = pho.search(bundle, "0.5", preset="crepe", trials=12, objective=some)
    with pytest.raises(ZeroDivisionError, match="mine"):
        pho.search(bundle, "0.5", preset="crepe", trials=12, objective=broken, study=study)

    failed = found.study.get_trials(states=[states.FAIL])
    assert [trial.user_attrs["failure"] for trial in failed] == ["the objective own/some gave NaN"]
    assert len(found.study.trials) == 12
    assert study.trials[-1].state is states.FAIL
    assert study.trials[-1].user_attrs["failure"] == "ZeroDivisionError: mine"


def test_a_callback_of_optuna_stops_a_search_early(bundle):
    stop = optuna.study.MaxTrialsCallback(16)
    found = pho.search(bundle, "0.5", preset="crepe", trials=200, callbacks=[stop])

    assert len(found.study.trials) < 40


def test_what_was_found_is_a_data_frame_a_page_with_a_map_of_layers_and_a_short_repr(
    bundle, tmp_path
):
    found = pho.search(bundle, "0.5", preset="crepe", trials=12)
    frame = found.to_dataframe()
    shown = found.plot()
    written = found.plot(tmp_path / "found.html").page
    (cells,) = found.layers.values()

    assert list(frame["method"]) == [row.method for row in found.table]
    assert frame["proxy"].dtype == float
    assert len(cells) == 14
    assert sum(cell.sparsity for cell in cells) / 14 == pytest.approx(0.5, abs=0.02)
    assert written == (tmp_path / "found.html").read_text()
    assert "self_attn.q_proj" in shown._repr_html_()
    assert "a notebook shows it" in repr(shown)
    assert len(repr(found.configuration)) < 200
