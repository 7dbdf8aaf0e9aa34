"""A search that validates its proxy, and confirms more finalists where it does not rank."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pho_service.errors import InvalidInput
from pho_service.interface.search import validation_of
from pho_service.models.loading import LanguageModel
from pho_service.pipeline import confirmation, rating
from pho_service.pipeline.rating import ReportText
from pho_service.pruning.bundle import ProxyBundle
from pho_service.spec.configuration import WIDER, ProxyQuality
from pho_service.spec.fields import ValidationSpec
from pho_service.spec.pattern import Pattern
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.validation import finalists_wanted

REQUEST = SearchRequest(
    pattern=Pattern.parse("0.5"), trials=20, finalists=1, validation=ValidationSpec(candidates=8)
)
BLEND = "activation-reconstruction/blend"


def quality(spearman: float, better_half: float | None = None) -> ProxyQuality:
    """Of a proxy with this rank correlation, and the same or another in the better half."""
    half = spearman if better_half is None else better_half
    return ProxyQuality(
        spearman=spearman, spearman_interval=(spearman, spearman), spearman_better_half=half,
        kendall=spearman, kendall_interval=(spearman, spearman), regret=0.0,
        regret_interval=(0.0, 0.0), top_k=2,
    )  # fmt: skip


def test_how_many() -> None:
    """A proxy that ranks is trusted; one that does not is told, with how many are finalists."""
    count, doubt = finalists_wanted(5, BLEND, quality(0.1))

    assert finalists_wanted(5, BLEND, quality(0.9)) == (5, None)
    assert finalists_wanted(5, "gini", quality(-0.9)) == (5, None)
    assert count == 5 * WIDER
    assert doubt is not None
    assert "does not rank" in doubt
    assert "20 by it are finalists instead of 5" in doubt


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        (BLEND, quality(-0.9), r"does not rank .* is -0\.90, so .* is worse than chance"),
        ("gini", quality(0.9), r"does not rank .* is \+0\.90, so .* is worse than chance"),
        (BLEND, quality(0.8, -0.3), r"does not order the better half .* \+0\.80, and -0\.30 in"),
        ("gini", quality(-0.9, 0.1), r"does not order the better half .* -0\.90, and \+0\.10 in"),
    ],
)
def test_wrong_order(name: str, found: ProxyQuality, said: str) -> None:
    """A proxy that ranks the other way round is not trusted, nor one without order at the top."""
    count, doubt = finalists_wanted(5, name, found)

    assert doubt is not None
    assert re.search(said, doubt)
    assert count == 5 * WIDER


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was measured, call by call; and nobody believes the proxy."""
    calls: list[int] = []
    original = rating.measure

    def measure(*given: Any, **more: Any) -> Any:
        calls.append(1)
        return original(*given, **more)

    monkeypatch.setattr(rating, "measure", measure)
    monkeypatch.setattr(confirmation, "judge", lambda *_, **__: {BLEND: quality(0.2)})
    return calls


def test_confirmation_takes_over(
    bundle: ProxyBundle, model: LanguageModel, report: ReportText, searched: Any, measured: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """More finalists are looked at, the result says why, and what is measured is kept."""
    options = {"model": model, "confirm_text": report}
    wide = searched(REQUEST, bundle, **options)
    count = len(measured)
    again = searched(REQUEST, bundle, **options)
    at_once = len(measured)
    alone = f"sqlite:///{tmp_path / 'alone.db'}"
    plain = searched(replace(REQUEST, validation=None), bundle, url=alone, **options)

    def compared(result: Any) -> int:
        return sum(each.divergence is not None for each in result.configuration.candidates)

    assert 8 < count == at_once
    assert compared(wide) > compared(plain)
    assert any("4 by it are finalists instead of 1" in warning for warning in wide.warnings)
    assert again.configuration == wide.configuration
    assert plain.validation is None
    assert wide.validation == {BLEND: quality(0.2)}


def test_python() -> None:
    """`pho.search(validate=8)` is the same, and too few are refused with the rule."""
    assert validation_of(8) == REQUEST.validation
    assert validation_of(None) is None
    with pytest.raises(InvalidInput, match=r"validate=7 is not in 8\.\.1000"):
        validation_of(7)


def test_without_a_model(bundle: ProxyBundle, searched: Any) -> None:
    """From a bundle alone nothing can be validated, and the message says what to do."""
    with pytest.raises(InvalidInput, match=r"give a model instead of a bundle.*--validate"):
        searched(REQUEST, bundle)
