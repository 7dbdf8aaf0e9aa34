"""Whether a stage may go on, as its worker sees it."""

import threading
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from storage.records import JobState, LostClaim, StageKind
from storage.studies import DatabaseGone
from workers.watch import HandBack, TurnOver, Turns, Watch

CLAIM: Any = SimpleNamespace(stage=SimpleNamespace(kind=StageKind.CALIBRATE))


class Store:
    """One that answers what it was told, in turn."""

    def __init__(self, *answers):
        self.answers = [*answers]
        self.steps = []
        self.waiting = []

    def watch(self, claim, step):
        assert claim is CLAIM
        self.steps.append(step)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def another_waits(self, claim, kinds):
        assert (claim, kinds) == (CLAIM, Turns().kinds)
        return self.waiting.pop(0)


def watching(*answers, stopping=False, turn_s=0.0):
    """A watch of a stage, and what it asks."""
    store = Store(*answers)
    stop = threading.Event()
    if stopping:
        stop.set()
    return Watch(store, CLAIM, stop, Turns(seconds=turn_s)), store


def test_outage(caplog):
    """While the database is away, work goes on; when it is back, its word counts."""
    watch, _ = watching(DatabaseGone("refused"), DatabaseGone("refused"), JobState.CANCELLING)
    watch.look(now=True)
    watch.look(now=True)

    with pytest.raises(HandBack):
        watch.look(now=True)
    assert caplog.messages == ["calibrate goes on without a database: refused"] * 2
    lost, _ = watching(LostClaim())  # another worker was given the stage meanwhile
    with pytest.raises(LostClaim):
        lost.look(now=True)


def test_the_database_is_not_asked_at_every_step():
    watch, store = watching(JobState.RUNNING)
    watch.look()
    asked_at_once = not store.answers
    watch.look(now=True)

    assert not asked_at_once
    assert not store.answers
    watch, store = watching(JobState.RUNNING, stopping=True)
    with pytest.raises(HandBack):
        watch.look(now=True)
    assert store.answers  # a worker that is told to stop puts its stage down without asking


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test sets."""
    now = SimpleNamespace(now=100.0)
    monkeypatch.setattr("workers.watch.time", SimpleNamespace(monotonic=lambda: now.now))
    return now


def test_turns(clock):
    """After its turn a search asks each second, and ends when another job waits for so long."""
    watch, store = watching(turn_s=60)
    store.waiting = [False, True, False, True, True]
    watch.look_for_others()  # its turn begins
    for clock.now in (159.9, 160.0, 160.5, 161.0, 162.1, 163.1, 163.5):
        watch.look_for_others()
    clock.now = 164.1

    with pytest.raises(TurnOver):
        watch.look_for_others()
    assert not store.waiting
    watch, _ = watching(turn_s=0)  # with 0 seconds it never asks
    for clock.now in (100.0, 1e6):
        watch.look_for_others()


def test_stages_of_a_job_have_one_turn_together(clock):
    turns = Turns(seconds=60)
    mine, other = (SimpleNamespace(id=uuid.uuid4()) for _ in range(2))
    turns.begin(mine)
    clock.now = 150.0
    turns.begin(mine)
    before, clock.now = turns.is_over, 160.0
    over = turns.is_over
    turns.begin(other)

    assert (before, over, turns.is_over) == (False, True, False)
