"""A job that validates its proxy does so before it confirms."""

from typing import Any

import pytest

from pho_service.tuning import validation
from storage.records import VALIDATION, JobState, StageKind

ASKED = {"validation": {"candidates": 8}}
DOUBT = "The proxy does not rank."


@pytest.fixture
def doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the proxy says, nobody believes it."""
    monkeypatch.setattr(validation, "verdict", lambda *_: DOUBT)


@pytest.mark.usefixtures("doubted")
def test_before_confirming(hand: Any, small: Any) -> None:
    """All random candidates are measured first; more finalists are confirmed, and told."""
    job = hand.until(hand.submit(small(**ASKED, trials=12)), StageKind.CONFIRM)
    first = [stage.number for stage in job.of_kind(StageKind.PERPLEXITY)]
    job = hand.until(job, None)
    (planned,) = job.of_kind(StageKind.CONFIRM)

    assert first == [VALIDATION + i for i in range(8)]
    assert job.state is JobState.SUCCEEDED
    assert planned.result["doubt"] in job.warnings
    assert "8 by it are finalists instead of 2" in planned.result["doubt"]
