"""Corrections of a search's best allocation, from the search to the configuration."""

from dataclasses import replace
from typing import Any

import optuna
import pytest
from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.interface.objective import configuration
from pho_service.models.loading import LanguageModel
from pho_service.pipeline.rating import ReportText
from pho_service.pipeline.search import search_job
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import AllocationProxy, ProxyEvaluator
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Coefficients, Linears, Pattern
from pho_service.spec.steps import Allocation, Candidate, Steps
from pho_service.tuning.plan import SearchRequest

PATTERN = Pattern.parse("0.6", "layer")
REQUEST = SearchRequest(
    pattern=PATTERN, trials=10, corrections=3, steps=Steps(allocation=Allocation(method="fisher"))
)


@pytest.fixture
def options(model: LanguageModel, report: ReportText) -> dict[str, Any]:
    """What a search with corrections takes beside the bundle."""
    windows: Tensor = report.windows
    return {"model": model, "confirm_text": report, "calibration": windows.flip(0)}


def study_of(name: str = "study") -> optuna.Study:
    """A new record in memory."""
    return optuna.create_study(study_name=name)


def corrections(study: optuna.Study) -> list[tuple[Any, ...]]:
    """The corrections in a study."""
    return [
        (t.number, t.value, t.user_attrs["calibration_divergence"], t.user_attrs["steps"])
        for t in study.trials
        if "corrects" in t.user_attrs
    ]


def test_corrected(bundle: ProxyBundle, options: Any) -> None:
    """Corrections are trials after the search's; the nearest one is confirmed with the others."""
    study = study_of()
    found = search_job(REQUEST, bundle, study=study, **options).configuration
    trials, correction = corrections(study), found.search["correction"]

    assert [number for number, *_ in trials] == [10, 11, 12]
    assert {*trials[0][3]["allocation"]["offsets"]} == {layer.kind for layer in bundle.layers}
    assert correction["count"] == 3
    before, after = correction["divergences"]
    best = min(trials, key=lambda trial: trial[2])
    nearest = (best[2], best[0]) if best[2] < before else (before, None)
    assert (after, correction["trial"]) == nearest
    confirmed = {each.trial for each in found.candidates}
    assert correction["trial"] is None or correction["trial"] in confirmed
    assert confirmed - {correction["trial"]} <= {*range(10)}


def test_resumed(bundle: ProxyBundle, options: Any) -> None:
    """A search that breaks off amid its corrections goes on to the same trials and result."""
    whole, broken = study_of(), study_of()
    expected = search_job(REQUEST, bundle, study=whole, **options)
    unconfirmed = {**options, "confirm_text": None}
    search_job(replace(REQUEST, corrections=1), bundle, study=broken, **unconfirmed)
    resumed = search_job(REQUEST, bundle, study=broken, **options)

    assert resumed.configuration == expected.configuration
    assert corrections(broken) == corrections(whole)


def test_search_goes_on(bundle: ProxyBundle, options: Any) -> None:
    """A longer search goes on past the corrections, with the trials that it has without them."""
    corrected, plain = study_of(), study_of()
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


def test_without_perplexities(bundle: ProxyBundle, options: Any) -> None:
    """Without a text the nearest to the dense model is the result, and its study says so."""
    study = study_of()
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
        ({"objective": Objective(name="gini")}, "the objective is gini"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    """What cannot be corrected is refused before anything is searched."""
    with pytest.raises(InvalidInput, match=message):
        replace(REQUEST, **changes)


def test_needs_the_model(bundle: ProxyBundle) -> None:
    """A bundle alone cannot tell how far a pruned model is from the dense one."""
    with pytest.raises(InvalidInput, match="give the model instead of a bundle"):
        search_job(REQUEST, bundle)


def test_nothing_to_correct(bundle: ProxyBundle, options: Any) -> None:
    """Where each linear has a sparsity by hand there is nothing to move."""
    steps = replace(REQUEST.steps, linears=Linears(sparsities={"*": 0.5}))
    with pytest.raises(InvalidInput, match="nothing to correct: the best candidate"):
        search_job(replace(REQUEST, steps=steps), bundle, **options)


@pytest.mark.parametrize("weighting", ["blend", "geometric", "relative"])
def test_proxy_of_allocations(bundle: ProxyBundle, weighting: Any) -> None:
    """Error curves give what rating each allocation gives, within the sampled rows' rounding."""
    evaluator = ProxyEvaluator(bundle)
    candidate = Candidate(
        method="crepe",
        coefficients=Coefficients(row=1, column=1, neighbourhood=1),
        pattern=PATTERN,
        steps=Steps(allocation=Allocation(method="fisher")),
    )
    proxy = AllocationProxy(evaluator, candidate, weighting)
    allocations = [
        replace(proxy.allocation, offsets={"q_proj": 0.4, "up_proj": -0.3}, depth=(0.2, -0.1)),
        replace(proxy.allocation, offsets={"down_proj": 0.5}),
        proxy.allocation,
    ]

    found = proxy.rate(allocations)

    rated = evaluator.evaluate(
        [replace(candidate, steps=Steps(allocation=each)) for each in allocations]
    )
    assert found == pytest.approx([getattr(each, weighting) for each in rated], rel=0.03)
