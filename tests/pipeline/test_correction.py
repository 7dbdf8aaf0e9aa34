"""Corrections of a search's best allocation, from the search to the configuration."""

from dataclasses import replace

import optuna
import pytest

from pho_service.errors import InvalidInput
from pho_service.interface.objective import configuration
from pho_service.pipeline.search import search_job
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.steps import Allocation, Steps
from pho_service.tuning.plan import SearchRequest

PATTERN = Pattern.parse("0.6", "layer")
REQUEST = SearchRequest(
    pattern=PATTERN, trials=10, corrections=3, steps=Steps(allocation=Allocation(method="fisher"))
)


@pytest.fixture
def options(confirming):
    """What a search with corrections takes beside the bundle."""
    return {**confirming, "calibration": confirming["confirm_text"].windows.flip(0)}


def corrections(study):
    """The corrections in a study."""
    return [
        (t.number, t.value, t.user_attrs["calibration_divergence"], t.user_attrs["steps"])
        for t in study.trials
        if "corrects" in t.user_attrs
    ]


def test_corrected(bundle, options):
    """Corrections are trials after the search's; the nearest one is confirmed with the others."""
    study = optuna.create_study(study_name="study")
    found = search_job(REQUEST, bundle, study=study, **options).configuration
    trials, correction = corrections(study), found.search["correction"]

    assert [number for number, *_ in trials] == [10, 11, 12]
    assert {*trials[0][3]["allocation"]["offsets"]} == {layer.name for layer in bundle.layers}
    assert correction["count"] == 3
    before, after = correction["divergences"]
    best = min(trials, key=lambda trial: trial[2])
    nearest = (best[2], best[0]) if best[2] < before else (before, None)
    assert (after, correction["trial"]) == nearest
    confirmed = {each.trial for each in found.finalists}
    assert correction["trial"] is None or correction["trial"] in confirmed
    assert confirmed - {correction["trial"]} <= {*range(10)}


def test_a_search_that_breaks_off_amid_its_corrections_goes_on_to_the_same_trials_and_result(
    bundle, options
):
    whole, broken = (optuna.create_study(study_name="study") for _ in range(2))
    expected = search_job(REQUEST, bundle, study=whole, **options)
    unconfirmed = {**options, "confirm_text": None}
    search_job(replace(REQUEST, corrections=1), bundle, study=broken, **unconfirmed)
    resumed = search_job(REQUEST, bundle, study=broken, **options)

    assert resumed.configuration == expected.configuration
    assert corrections(broken) == corrections(whole)


def test_a_longer_search_goes_on_past_the_corrections_with_the_trials_that_it_has_without_them(
    bundle, options
):
    corrected, plain = (optuna.create_study(study_name="study") for _ in range(2))
    unconfirmed = {**options, "confirm_text": None}
    search_job(replace(REQUEST, corrections=1), bundle, study=corrected, **unconfirmed)
    for study in (corrected, plain):
        search_job(replace(REQUEST, trials=20, corrections=0), bundle, study=study)

    searched = [
        [t.params for t in study.trials if "corrects" not in t.user_attrs]
        for study in (corrected, plain)
    ]
    assert searched[0] == searched[1]
    assert len(searched[0]) == 20


def test_without_perplexities(bundle, options):
    """Without a text the nearest to the dense model is the result, and its study says so."""
    study = optuna.create_study(study_name="study")
    result = search_job(REQUEST, bundle, study=study, **{**options, "confirm_text": None})

    correction = result.configuration.search["correction"]
    assert result.trial == (correction["trial"] or correction["corrects"])
    assert configuration(study, bundle).steps == result.configuration.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": Pattern.parse("2:4")}, "corrections=3 is for allocations of a ratio"),
        (
            {"pattern": Pattern.parse("0.5", "global"), "steps": Steps()},
            "in scope global nothing is shared out",
        ),
        ({"steps": Steps(allocation=Allocation(unit="block"))}, "one sparsity. Take unit 'linear'"),
        ({"objective": Objective(name="gini")}, "the objective is gini"),
    ],
)
def test_what_cannot_be_corrected_is_refused_before_anything_is_searched(changes, message):
    with pytest.raises(InvalidInput, match=message):
        replace(REQUEST, **changes)


def test_a_bundle_alone_cannot_be_corrected_nor_sparsities_by_hand(bundle, options):
    with pytest.raises(InvalidInput, match="give the model instead of a bundle"):
        search_job(REQUEST, bundle)
    steps = replace(REQUEST.steps, linears=Linears(sparsities={"*": 0.5}))
    with pytest.raises(InvalidInput, match="nothing to correct: the best candidate"):
        search_job(replace(REQUEST, steps=steps), bundle, **options)


def test_a_calibration_of_one_window_has_none_to_measure_a_correction_on(bundle, options):
    with pytest.raises(InvalidInput, match=r"only one\. Give 2"):
        search_job(REQUEST, bundle, **{**options, "calibration": options["calibration"][:1]})
