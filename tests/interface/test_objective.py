"""The proxy as a plain objective of Optuna."""

import pickle

import optuna
import pytest

import pho_service as pho
from pho_service.errors import InvalidInput, StudyError


def test_any_sampler_and_storage_optimises_it(bundle, tmp_path):
    rate = pickle.loads(pickle.dumps(pho.objective(bundle, "0.5", preset="score")))  # noqa: S301 - our own
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path / 's.db'}", sampler=optuna.samplers.TPESampler(seed=0)
    )
    study.optimize(rate, n_trials=6)
    study.optimize(pho.objective(bundle, "0.5", preset="score"), n_trials=6, n_jobs=2)
    best = pho.configuration(study, bundle)
    again = pho.objective(bundle, "0.5", preset="score").bundle

    assert best.objective["value"] == study.best_value
    assert (best.method, best.pattern, best.scope) == ("crepe", "0.5", "layer")
    assert best.search["sampler"] == "TPESampler"
    assert best.search["trials"] == 12
    assert "seed" not in best.search
    assert best.coefficients.kernel_size == study.best_params["kernel_size"]
    assert study.metric_names == ["activation-reconstruction/blend"]
    assert again.contents_sha256 == bundle.contents_sha256
    assert not hasattr(again, "tokenizer")


def test_a_point_has_the_value_that_a_search_of_pho_gives_it(bundle):
    found = pho.search(bundle, "0.5", preset="score", trials=12)
    trial = found.study.trials[-1]
    study = optuna.create_study()
    params = {name: value for name, value in trial.params.items() if name != "method"}
    study.enqueue_trial(params)
    study.optimize(pho.objective(bundle, "0.5", preset="score"), n_trials=1)

    assert study.best_value == pytest.approx(trial.value, rel=1e-6)
    assert study.trials[0].user_attrs["coefficients"] == trial.user_attrs["coefficients"]


def test_of_a_searchs_study_it_is_the_trial_that_was_chosen_by_perplexity(
    tiny_llama, bundle, texts
):
    found = pho.search(
        bundle, "2:4", preset="score", model=tiny_llama, trials=12, confirm=texts["report"]
    )
    best = pho.configuration(found.study, bundle)

    assert best.candidate() == found.configuration.candidate()
    assert best.search == {**found.configuration.search}


def test_what_cannot_be_an_objective_is_named(bundle):
    with pytest.raises(InvalidInput, match="needs a model"):
        pho.objective(bundle, "0.5", preset="score", objective="perplexity")
    with pytest.raises(StudyError, match="direction='maximize'"):
        optuna.create_study().optimize(
            pho.objective(bundle, "0.5", preset="score", objective="gini"), n_trials=1
        )
    study = optuna.create_study()
    study.optimize(pho.objective(bundle, "0.5", preset="score"), n_trials=2)
    with pytest.raises(StudyError, match=r"its pattern is 0.5, and this is 2:4"):
        study.optimize(pho.objective(bundle, "2:4", preset="score"), n_trials=1)
    other = pho.objective(bundle, "0.5", preset="score").bundle
    other.provenance["key"] = "another"
    with pytest.raises(StudyError, match="is of another bundle"):
        pho.configuration(study, other)
    foreign = optuna.create_study()
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    with pytest.raises(StudyError, match=r"not made by pho\.objective"):
        pho.configuration(foreign, bundle)
    with pytest.raises(StudyError, match="not made by PHO"):
        foreign.optimize(pho.objective(bundle, "0.5", preset="score"), n_trials=1)
    over = pho.search({"one": bundle, "two": bundle}, "0.5", preset="score", trials=12).study
    with pytest.raises(StudyError, match="another bundle"):
        pho.configuration(over, bundle)
