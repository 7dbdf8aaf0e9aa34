"""What an Optuna user finds natural: samplers, callbacks, names, times, Optuna's commands."""

import time
from dataclasses import replace
from datetime import timedelta

import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler

from pho_service.errors import StudyError
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.tuning.plan import Outcome, SearchPlan, SearchRequest
from pho_service.tuning.result import describe_study
from pho_service.tuning.search import run_search
from storage.studies import note_trial, open_storage, open_study

PATTERN = Pattern.parse("0.5", "layer")
PLAN = SearchPlan(
    pattern=PATTERN, space=SearchSpace(kernel_sizes=(3, 5)).fitted(PATTERN), trials=24
)


def evaluate(candidates):
    return [
        Outcome(value=1 + (c.coefficients.row - 0.2) ** 2 + c.coefficients.gradient_exponent)
        for c in candidates
    ]


def values(study):
    return [float(trial.value or 0) for trial in study.trials]


def test_a_sampler_of_optuna_is_used_with_its_own_seed_and_named_by_its_class():
    first, again, other = (
        optuna.create_study(study_name=name, direction="minimize") for name in ("a", "b", "c")
    )
    for study, seed in ((first, 1), (again, 1), (other, 2)):
        run_search(study, replace(PLAN, sampler=RandomSampler(seed=seed)), evaluate)

    assert replace(PLAN, sampler=RandomSampler()).sampler_name == "RandomSampler"
    assert len(first.trials) == PLAN.trials
    assert values(first) == values(again) != values(other)


def test_sampler_of_optuna_goes_on():
    study = optuna.create_study(direction="minimize")
    run_search(study, replace(PLAN, trials=20), evaluate)
    before = values(study)
    sampler = TPESampler(seed=0, n_startup_trials=1)
    run_search(study, replace(PLAN, sampler=sampler), evaluate)

    assert values(study)[:20] == before
    assert len(study.trials) == PLAN.trials
    narrow = replace(PLAN.space, row_share=(0.0, 0.01))
    with pytest.raises(StudyError, match="not in the space"):
        run_search(study, replace(PLAN, space=narrow, sampler=sampler), evaluate)


def test_each_new_trial_is_shown_once_recorded_already_study_stop_ends_the_search():
    study = optuna.create_study(direction="minimize")
    run_search(study, replace(PLAN, trials=10), evaluate)
    seen = []

    def callback(shown, trial):
        assert shown.trials[trial.number].value == trial.value
        seen.append(trial.number)
        if trial.number == 13:
            shown.stop()

    run_search(study, replace(PLAN, trials=40), evaluate, callbacks=[callback])

    assert seen == list(range(10, len(study.trials)))
    assert 14 <= len(study.trials) < 40
    with pytest.raises(RuntimeError, match=r"Study\.stop"):
        study.stop()  # as everywhere else outside of a callback


def test_a_study_for_high_values_is_not_one_for_low_values():
    with pytest.raises(StudyError, match="is to maximize its values, and this search is to mini"):
        run_search(optuna.create_study(direction="maximize"), PLAN, evaluate)


def test_a_trial_lasts_as_long_as_its_rating():
    def slow(candidates):
        time.sleep(0.002 * len(candidates))
        return [
            replace(outcome, attributes={"seconds": 0.001 * (1 + 2 * (i == 0))})
            for i, outcome in enumerate(evaluate(candidates))
        ]

    study = optuna.create_study(direction="minimize")
    run_search(study, replace(PLAN, trials=PLAN.trials), slow)
    trials = study.trials
    starts = [trial.datetime_start for trial in trials]
    first, second = (trial.duration or timedelta() for trial in trials[:2])

    assert starts == sorted(starts)
    assert first.total_seconds() == pytest.approx(3 * second.total_seconds(), abs=1e-5)
    assert sum(t.duration.total_seconds() for t in trials if t.duration) >= 0.002 * len(trials)


def test_a_study_whose_times_are_others_is_gone_on_with_as_it_would_have_been():
    whole, copy = (optuna.create_study(direction="minimize") for _ in range(2))
    run_search(whole, PLAN, evaluate)
    for trial in whole.trials[:15]:
        trial.datetime_start = trial.datetime_complete
        copy.add_trial(trial)
    run_search(copy, PLAN, evaluate)

    assert values(copy) == values(whole)


def test_optuna_says_as_much_after_a_search_as_before(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        with open_storage(f"sqlite:///{tmp_path / 's.db'}") as storage:
            run_search(open_study(storage, "s", direction="minimize"), PLAN, evaluate)

        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("where", ["ours", "memory", "cached"])
def test_what_is_measured_is_noted_on_its_trial(tmp_path, where):
    url = f"sqlite:///{tmp_path / 's.db'}"
    with open_storage(url) as storage:
        study = (
            open_study(storage, "s", direction="minimize")
            if where == "ours"
            else optuna.create_study(
                direction="minimize", storage=url if where == "cached" else None
            )
        )
        rated = run_search(study, PLAN, evaluate)
        for perplexity in (30.0, 20.0):
            note_trial(study, rated[0].number, "perplexity", perplexity)
        note_trial(study, rated[1].number, "divergence", 0.25)
        trials = study.trials
        if where == "cached":
            trials = optuna.load_study(study_name=study.study_name, storage=url).trials

    noted = {t.number: t.user_attrs.get("perplexity") for t in trials}
    assert noted == {t.number: 20.0 if t.number == rated[0].number else None for t in trials}
    assert trials[rated[1].number].user_attrs["divergence"] == 0.25
    assert study.trials[rated[0].number].user_attrs["perplexity"] == 20.0


def test_optuna_finds_the_study_and_what_was_optimised(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    request = SearchRequest(pattern=PATTERN, trials=8)
    with open_storage(url) as storage:
        study = open_study(storage, "mine", direction="minimize")
        describe_study(study, request, PLAN, {"key": "k"})
        run_search(study, replace(PLAN, trials=8), evaluate)

    (shown,) = optuna.get_all_study_summaries(url)
    found = optuna.load_study(study_name="mine", storage=url)

    assert shown.study_name == "mine"
    assert len(found.trials) == 8
    assert found.metric_names == ["activation-reconstruction/blend"]
