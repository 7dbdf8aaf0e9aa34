"""What a result is judged by: dense, Wanda and RIA on the windows that chose it."""

from pathlib import Path
from typing import Any

import pytest

from pho_service.errors import NumericalError
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import TextSource, read_windows
from pho_service.pipeline import rating
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.pipeline.search import memory_study, search_job
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Perplexities, in_words, published
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SearchRequest

WINDOWS = 4


@pytest.fixture
def report(model: LanguageModel, texts: dict[str, Path]) -> ReportText:
    """Some windows."""
    source = TextSource(path=str(texts["report"]))
    windows, record = read_windows(
        model, source, context_length=40, bos="auto", max_windows=WINDOWS
    )
    return ReportText(windows=windows, record=record)


@pytest.fixture
def pruned_with(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that perplexities are measured of, in their order: finalists first."""
    found: list[str] = []
    really = rating.measure

    def measure(subject: Any, candidate: Any, *args: Any, **more: Any) -> Any:
        found.append("dense" if candidate is None else candidate.method)
        return really(subject, candidate, *args, **more)

    monkeypatch.setattr(rating, "measure", measure)
    return found


@pytest.mark.parametrize(
    ("pattern", "steps", "objective", "same"),
    [
        pytest.param("0.5", Steps(), "activation-reconstruction", True, id="race"),
        pytest.param("0.5", Steps(), "perplexity", True, id="by-perplexity"),
        pytest.param(
            "2:4", Steps(permutation="score"), "activation-reconstruction", False, id="permuted"
        ),
    ],
)
def test_they_are_wanda_and_ria_as_published_whatever_the_steps_none_is_measured_again(
    bundle: ProxyBundle, model: LanguageModel, report: ReportText, pruned_with: list[str],
    pattern: str, steps: Steps, objective: Any, same: bool,
) -> None:  # fmt: skip
    asked = SearchRequest(
        pattern=Pattern.parse(pattern), trials=8, steps=steps, finalists=1,
        objective=Objective(name=objective),
    )  # fmt: skip
    study = memory_study(asked, bundle, report)
    options: dict[str, Any] = {"model": model, "confirm_text": report, "study": study}
    found = search_job(asked, bundle, **options).configuration
    measured = [*pruned_with]
    again = search_job(asked, bundle, **options).configuration
    methods = reference_methods(asked.pattern)
    alone = {
        name: rate_pruned(model, bundle.statistics(), each, report.windows)[0].perplexity
        for name, each in methods.items()
    }
    good = found.perplexities

    assert found.confirmation is not None
    assert good == Perplexities(
        dense=measure_perplexity(model, report.windows).perplexity,
        pruned=found.confirmation.perplexity,
        **alone,
    )
    finalists = {b.method for b in found.baselines if b.perplexity is not None}
    names = ["dense", *(each.method for each in methods.values())]
    judges = [name for name in names if not (same and name in finalists)]
    assert measured[len(measured) - len(judges) :] == judges
    assert again == found
    assert pruned_with == measured  # nothing is measured twice


def test_without_a_perplexity(
    bundle: ProxyBundle, model: LanguageModel, report: ReportText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published method whose model gives NaN has none, and the search ends all the same."""

    really = rating.measure

    def measure(subject: Any, candidate: Any, *args: Any, **more: Any) -> Any:
        if candidate == reference_methods(Pattern.parse("2:4"))["wanda"]:
            raise NumericalError("the loss is NaN or infinite.")
        return really(subject, candidate, *args, **more)

    monkeypatch.setattr(rating, "measure", measure)
    steps = Steps(permutation="score")
    asked = SearchRequest(pattern=Pattern.parse("2:4"), trials=8, steps=steps, finalists=1)
    found = search_job(asked, bundle, model=model, confirm_text=report)
    good = found.configuration.perplexities

    assert good is not None
    assert good.wanda is None
    assert "Wanda" not in str(good)
    assert any("not compared with wanda" in warning for warning in found.warnings)


def test_in_words() -> None:
    """A line of numbers with four digits, and the rise over dense in per cent."""
    good = Perplexities(dense=22.6, pruned=27.71, wanda=39.9, ria=41.24)

    assert str(good) == "22.60 dense, 27.71 pruned (+22.6%), Wanda 39.90, RIA 41.24"
    assert "22.50 pruned (-0.4%)" in str(good.model_copy(update={"pruned": 22.5}))
    assert in_words(5.5, {"a": 12345.6}, {"wanda": 3e7, "ria": None}) == (
        "5.500 dense, 12,346 a (+224,365.5%), Wanda 3.000e+07"
    )


def test_a_configuration_without_them_is_read_and_written_as_it_was() -> None:
    old = published("wanda", "0.5")

    assert old.perplexities is None
    assert "perplexities" not in old.model_dump(mode="json")
