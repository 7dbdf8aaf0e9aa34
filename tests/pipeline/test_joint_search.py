"""One search over several models."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pho_service.errors import BundleError, InvalidInput, NumericalError
from pho_service.pipeline.objectives import rate_jointly
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import SearchRequest

PATTERN = Pattern.parse("0.5", "layer")
MEAN, WORST = Objective(over="mean"), Objective(over="worst")


@pytest.fixture
def other(bundle: ProxyBundle) -> ProxyBundle:
    """A bundle of another model: the inputs of ``bundle``'s channels in another order."""
    inputs = [
        replace(entry, activation_norm=entry.activation_norm.flip(0), root=entry.root.flip(1))
        for entry in bundle.inputs
    ]
    model = {**bundle.provenance["model"], "name": "folder/other"}
    provenance = {**bundle.provenance, "key": "other", "model": model}
    return replace(bundle, inputs=inputs, provenance=provenance)


@pytest.fixture
def bundles(bundle: ProxyBundle, other: ProxyBundle) -> dict[str, ProxyBundle]:
    """Two models' bundles by name."""
    return {"one": bundle, "two": other}


@pytest.fixture
def request_of() -> Any:
    """A small request with an objective."""

    def build(objective: Objective, **changes: Any) -> SearchRequest:
        request = SearchRequest(pattern=PATTERN, objective=objective, trials=22)
        return replace(request, **changes)

    return build


@pytest.mark.parametrize(("objective", "joined"), [(MEAN, lambda a, b: (a + b) / 2), (WORST, max)])
def test_value(
    bundles: dict[str, ProxyBundle],
    request_of: Any,
    objective: Objective,
    joined: Any,
    searched: Any,
) -> None:
    """A candidate counts by its proxy relative to RIA's, on each model; the lowest wins."""
    found = searched(request_of(objective), bundles).configuration
    ria = reference_methods(PATTERN)["ria"]
    relative = []
    for bundle in bundles.values():
        mine, its = ProxyEvaluator(bundle).evaluate([found.candidate(), ria])
        relative.append(mine.blend / its.blend)

    told = [*found.objective["relative_to_ria"].values()]
    assert told == pytest.approx(relative, rel=1e-6)  # which were rated beside others
    assert found.objective["value"] == joined(*told) <= 1
    assert found.objective["name"].endswith(f"{objective.over} over models relative to RIA")
    assert next(b.proxy for b in found.baselines if b.method == "ria-layer") == 1


def test_what_is_kept(bundles: dict[str, ProxyBundle], request_of: Any, searched: Any) -> None:
    """The configuration names both models and both calibrations, and says what to do next."""
    result = searched(request_of(MEAN), bundles)
    found = result.configuration

    assert [m["name"] for m in found.model["models"]][1] == "folder/other"
    assert found.model["name"].endswith(" + other")
    assert [b["key"] for b in found.calibration["bundles"]] == [
        b.provenance["key"] for b in bundles.values()
    ]
    assert any("`pho transfer` measures all of them" in each for each in result.warnings)


def test_again(bundles: dict[str, ProxyBundle], request_of: Any, searched: Any) -> None:
    """A joint search that is asked again, or longer, goes on with its study."""
    first = searched(request_of(MEAN), bundles)

    assert searched(request_of(MEAN), bundles) == first
    longer = searched(request_of(MEAN, trials=30), bundles)
    assert longer.study_name == first.study_name
    assert longer.configuration.objective["value"] <= first.configuration.objective["value"]


def test_worse_than_ria(bundles: dict[str, ProxyBundle], request_of: Any, searched: Any) -> None:
    """Where the result is worse than RIA on a model, a sentence names the model."""
    bounds = {"activation_exponent": (1.5, 1.5), "gradient_exponent": (1.0, 1.0)}
    asked = request_of(MEAN, bounds=bounds)
    evaluate = rate_jointly(
        {name: ProxyEvaluator(bundle) for name, bundle in bundles.items()}, PATTERN, MEAN
    )
    (outcome,) = evaluate([asked.plan((3,)).space.candidate(
        {"neighbourhood_share": 1.0, "row_share": 0.5, "activation_exponent": 1.5,
         "gradient_exponent": 1.0, "kernel_size": 3, "allocation": "uniform",
         "allocation_spread": 0.2}, PATTERN, asked.steps)])  # fmt: skip
    worse = [name for name, value in outcome.attributes["relative_to_ria"].items() if value >= 1]
    result = searched(asked, bundles)
    named = [
        name for name, v in result.configuration.objective["relative_to_ria"].items() if v >= 1
    ]

    assert worse
    assert [w.split()[1] for w in result.warnings if "good for the others" in w] == named


def test_failed_model(bundles: dict[str, ProxyBundle]) -> None:
    """A candidate that fails on one model fails, and the model is named."""
    rate = rate_jointly(
        {name: ProxyEvaluator(bundle) for name, bundle in bundles.items()}, PATTERN, WORST
    )
    ria = reference_methods(PATTERN)["ria"]
    huge = replace(ria, coefficients=replace(ria.coefficients, activation_exponent=300.0))
    failed, fine = rate([huge, ria])

    assert failed.value is None
    assert str(failed.failure).startswith("one: ")
    assert fine.value == 1


def test_no_scale(bundles: dict[str, ProxyBundle]) -> None:
    """Where RIA loses nothing, there is nothing to compare with."""
    still = [replace(e, root=torch.zeros_like(e.root)) for e in bundles["two"].inputs]
    evaluators = {"two": ProxyEvaluator(replace(bundles["two"], inputs=still))}

    with pytest.raises(NumericalError, match=r"two: the proxy of RIA is 0\.0"):
        rate_jointly(evaluators, PATTERN, MEAN)


def test_bundles_that_share_no_kernel_size_are_refused_with_the_way_out(
    bundles: dict[str, ProxyBundle], request_of: Any, searched: Any
) -> None:
    layers = [replace(la, window_means={9: la.window_means[3]}) for la in bundles["two"].layers]
    apart = {**bundles, "two": replace(bundles["two"], layers=layers)}

    with pytest.raises(BundleError, match=r"one, two have no kernel size in common. Calibrate"):
        searched(request_of(MEAN), apart)


@pytest.mark.parametrize("name", ["gini", "perplexity"])
def test_what_differs_from_model_to_model_in_its_scale_is_no_joint_objective(name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{name} has no common scale"):
        Objective(name=name, over="mean")


def test_not_told_how(bundles: dict[str, ProxyBundle], request_of: Any, searched: Any) -> None:
    """How the models count has to be said."""
    with pytest.raises(InvalidInput, match="how they count"):
        searched(request_of(Objective()), bundles)


def test_there_are_two_ways_to_count() -> None:
    with pytest.raises(InvalidInput, match=r"over 'best' is not one of mean, worst"):
        Objective(over="best")
