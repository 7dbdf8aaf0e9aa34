"""The proxy as a plain objective of Optuna."""

import pickle

import optuna
import pytest

import pho_service as pho


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
