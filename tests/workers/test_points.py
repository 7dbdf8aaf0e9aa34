"""Jobs with several patterns: each point is what a search of it alone finds, whatever happens."""

from typing import Any

import pytest

from pho_service.errors import InvalidInput, TargetMissed
from storage.records import Job
from storage.states import JobState, StageKind

TARGET = {"perplexity_rise": 0.02, "step": 0.2, "lowest": 0.1, "highest": 0.9}


def found(job: Job) -> list[dict[str, Any]]:
    """What the points have stored, without what differs from job to job."""
    return [
        {
            **{name: v for name, v in stage.result.items() if name not in ("seconds", "study")},
            "configuration": without_study(stage.result["configuration"]),
        }
        for stage in job.of_kind(StageKind.POINT)
        if stage.result is not None
    ]


def without_study(configuration: dict[str, Any]) -> dict[str, Any]:
    """As another study would give it."""
    search = {k: v for k, v in configuration["search"].items() if k != "study"}
    return {**configuration, "search": search}


def test_patterns(hand: Any, small: Any, undisturbed: Any, home: Any) -> None:
    """
    One calibration, and each pattern's configuration is that of `pho search` at it, also where a
    worker was killed at the end of a point. `:prune` writes the model of the pattern it names.
    """
    spec = small(pattern=None, patterns=["2:4", "0.3"], preset="crepe-plus")
    job = hand.until(hand.submit(spec), StageKind.POINT)
    complete, hand.store.complete = hand.store.complete, _killed
    with pytest.raises(SystemExit):
        hand.step(job)
    hand.store.complete = complete
    job = hand.until(job, None)
    placed = {"text": str(home / "calibration.jsonl"), "confirm": str(home / "confirmation.jsonl")}
    alone = [
        undisturbed(
            one.model_copy(
                update={
                    "model": str(home / "model"),
                    "calibration": one.calibration.model_copy(update={"text": placed["text"]}),
                    "confirm": one.confirm.model_copy(update={"text": placed["confirm"]}),
                }
            )
        ).configuration
        for one in map(spec.of_pattern, spec.points)
    ]

    assert (job.state, job.best) == (JobState.SUCCEEDED, None)
    assert [stage.about for stage in job.of_kind(StageKind.POINT)] == ["0.3", "2:4"]
    assert [stage.attempt for stage in job.of_kind(StageKind.POINT)] == [2, 1]
    for mine, other in zip(found(job), alone, strict=True):
        assert mine["configuration"]["coefficients"] == other["coefficients"]
        assert mine["configuration"]["perplexities"] == other["perplexities"]
        assert mine["configuration"]["steps"] == other["steps"]


def _killed(*_: Any, **__: Any) -> None:
    raise SystemExit


def test_target(hand: Any, small: Any) -> None:
    """
    The answer is within the target and the next step is not, both measured; killed in the middle
    and done again, the same job has the same points.
    """
    spec = small(pattern=None, target=TARGET, preset="score")
    job = hand.done(spec)
    again = hand.submit(spec)
    for _ in range(2):
        hand.step(again)
    hand.inputs = hand.new_inputs()
    again = hand.until(again, None)
    points = sorted(found(job), key=lambda each: each["sparsity"])
    inside = [p for p in points if p["perplexity"] <= 1.02 * p["dense"]]

    assert job.state is JobState.SUCCEEDED
    assert job.best["pattern"] == inside[-1]["pattern"]
    assert job.best["search"]["target"]["points"] == [
        {"sparsity": p["sparsity"], "perplexity": p["perplexity"]} for p in points
    ]
    sparser = [p["sparsity"] for p in points if p["sparsity"] > inside[-1]["sparsity"]]
    assert not sparser or round(sparser[0] - inside[-1]["sparsity"], 6) == TARGET["step"]
    assert len(points) <= spec.most_points
    assert found(again) == found(job)


def test_missed(hand: Any, small: Any) -> None:
    """A target that nothing is within fails the job in words; what was measured stays."""
    spec = small(
        pattern=None,
        target={"perplexity_rise": 0.1, "lowest": 0.7, "highest": 0.71},
        preset="score",
    )
    job = hand.until(hand.submit(spec), StageKind.FINISH)
    hand.edit(job, StageKind.POINT, lambda point: point.update(perplexity=2 * point["dense"]))
    with pytest.raises(TargetMissed, match="no sparsity is within 10 % of dense"):
        hand.until(job, None)
    job = hand.store.get(job.id)

    assert (job.state, job.best) == (JobState.FAILED, None)
    assert "already the lowest sparsity, 0.7, is above" in job.error["message"]
    assert [stage.about for stage in job.of_kind(StageKind.POINT)] == ["0.7"]


def test_width(hand: Any, small: Any) -> None:
    """A pattern that does not divide a width fails before any search, and names the width."""
    job = hand.submit(small(pattern=None, patterns=["0.5", "3:7"]))
    with pytest.raises(InvalidInput, match="not a multiple of M=7"):
        hand.until(job, None)

    assert hand.store.get(job.id).of_kind(StageKind.POINT) == []
