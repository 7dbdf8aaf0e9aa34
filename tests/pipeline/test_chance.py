"""Models that predict nothing are searched with a warning."""

from dataclasses import replace
from typing import Any

import pytest

from pho_service.models.blockwise import measure_perplexity
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import TextSource
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import SearchRequest

SETTINGS = CalibrationSettings(
    samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3, 5)
)


def with_dense(bundle: ProxyBundle, perplexity: float | None) -> ProxyBundle:
    """The bundle of a model that has this perplexity; None does not say it."""
    provenance = {k: v for k, v in bundle.provenance.items() if k != "dense"}
    if perplexity is not None:
        provenance["dense"] = {**bundle.provenance["dense"], "perplexity": perplexity}
    return replace(bundle, provenance=provenance)


@pytest.fixture
def asked() -> SearchRequest:
    """The shortest search."""
    return SearchRequest(pattern=Pattern.parse("0.5"), trials=6)


@pytest.mark.parametrize("stream", [False, True])
def test_measured(model: LanguageModel, texts: dict[str, Any], stream: bool) -> None:
    """A bundle says how well the dense model predicts, and out of how many tokens."""
    model = replace(model, streamed_to=model.device) if stream else model
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    dense = calibrate(model, text, SETTINGS).provenance["dense"]
    rating = measure_perplexity(model, text.calibration)

    assert dense == {
        "perplexity": rating.perplexity, "tokens": rating.tokens, "vocabulary": 256
    }  # fmt: skip


@pytest.mark.parametrize(
    ("perplexity", "warned"), [(256.0, True), (130.0, True), (120.0, False), (None, False)]
)
def test_warning(
    bundle: ProxyBundle, asked: SearchRequest, perplexity: float | None, warned: bool, searched: Any
) -> None:
    """From half the vocabulary's size on, the search says that nothing can be told apart."""
    found = searched(asked, with_dense(bundle, perplexity)).warnings
    said = [warning for warning in found if "no better than chance" in warning]

    assert len(said) == warned
    assert all(f"{perplexity:.5g}" in each and "has 256" in each for each in said)


def test_several(bundle: ProxyBundle, asked: SearchRequest, searched: Any) -> None:
    """Of several models, those that predict nothing are named."""
    bundles = {
        name: replace(each, provenance={**each.provenance, "model": {"name": name}})
        for name, each in (("good", with_dense(bundle, 9.0)), ("bad", with_dense(bundle, 250.0)))
    }
    request = replace(asked, objective=Objective(over="mean"))
    (said,) = [w for w in searched(request, bundles).warnings if "than chance" in w]

    assert said.startswith("The dense model bad predicts")
