"""A job that validates its proxy does so before it confirms; older jobs, after."""

from typing import Any

import pytest

from pho_service.tuning import validation
from storage.records import NewStage
from storage.states import REFERENCES, VALIDATION, JobState, StageKind

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


def test_older_job(hand: Any, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose search an older version ended is validated beside its finalists, as it was."""
    confirm = [NewStage(kind=StageKind.CONFIRM)]
    monkeypatch.setattr("workers.stages.after_search", lambda *_: confirm)
    job = hand.done(small(**ASKED))
    (finish,) = job.of_kind(StageKind.FINISH)
    numbers = [stage.number for stage in job.of_kind(StageKind.PERPLEXITY)]

    assert sum(VALIDATION <= number < REFERENCES for number in numbers) == 8
    assert any(number < VALIDATION for number in numbers)
    assert "gini" in finish.result["validation"]
