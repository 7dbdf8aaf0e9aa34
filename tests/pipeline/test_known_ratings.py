"""Searches that differ in steps that no proxy rates share their ratings, and nothing else."""

from typing import Any

import pytest

from pho_service.pipeline import search
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import Preset
from pho_service.tuning.plan import SearchRequest

PATTERN = Pattern.parse("0.5")


def request_of(preset: str, **changes: Any) -> SearchRequest:
    """The search of a preset."""
    found = Preset.of(preset, PATTERN)
    options = {"pattern": PATTERN, "steps": found.steps, "bounds": found.bounds, **changes}
    return SearchRequest(**{"trials": 16, **options})


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates each call of the objective was asked for."""
    asked: list[int] = []
    function = search.objective_function

    def counted(*args: Any) -> Any:
        rate = function(*args)

        def evaluate(candidates: Any) -> Any:
            asked.append(len(candidates))
            return rate(candidates)

        return evaluate

    monkeypatch.setattr(search, "objective_function", counted)
    return asked


def test_same_candidates(bundle: ProxyBundle, searched: Any, rated: list[int]) -> None:
    """`best` after `crepe-plus` rates nothing, and finds to the byte what it finds alone."""
    first = searched(request_of("crepe-plus"), bundle)
    alone = search.search_job(request_of("best"), bundle)
    rated.clear()
    second = searched(request_of("best"), bundle)

    assert rated == []
    assert (first.rated_before, second.rated_before) == (0, 16)
    assert second.study_name != first.study_name
    assert second.configuration.steps.update != first.configuration.steps.update
    assert second.configuration.model_dump_json() == alone.configuration.model_dump_json()


def test_other_ratings(bundle: ProxyBundle, searched: Any, rated: list[int]) -> None:
    """What the other study has not is rated, and with another weighting or pattern everything."""
    searched(request_of("crepe-plus"), bundle)
    rated.clear()
    longer = searched(request_of("best", trials=20), bundle)

    assert (longer.rated_before, sum(rated)) == (16, 4)
    for changes in (
        {"objective": Objective(weighting="fisher")},
        {"pattern": Pattern.parse("0.6")},
    ):
        assert searched(request_of("best", **changes), bundle).rated_before == 0
