"""
Whether a stage may go on: its job may be paused, cancelled or deleted, and its worker stopped.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pho_service.progress import Advance
from storage.jobs import JobStore
from storage.records import Claim
from storage.states import StageKind
from storage.studies import DatabaseGone

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # between two looks at whether the job may go on


class HandBack(Exception):
    """The stage is put down unfinished: its job may not work now, or the worker stops."""


class TurnOver(HandBack):
    """The search is put down for the stage of another job, and waits behind it."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """
    The turns in which searches share a worker.

    Attributes:
        seconds: That one keeps it while another job waits; 0 means until it is done.
        kinds: Stages that the worker does.
    """

    seconds: float = 0.0
    kinds: tuple[StageKind, ...] = tuple(StageKind)


class Watch:
    """Looks now and then whether a stage may go on."""

    def __init__(
        self,
        store: JobStore,
        claim: Claim,
        stopping: threading.Event,
        turns: Turns,
    ) -> None:
        self._store = store
        self._claim = claim
        self._stopping = stopping
        self._looked = time.monotonic()
        self._step: dict[str, Any] | None = None
        self._turns = turns
        self._turn_ends: float | None = None  # once the search rates
        self._other_waited = False

    def look(self, *, now: bool = False) -> None:
        """
        Raise HandBack if it may not.

        While the database is away it may: what is written at last says whose the stage is.
        """
        if self._stopping.is_set():
            raise HandBack
        if now or time.monotonic() - self._looked > LOOK_EVERY_S:
            try:
                may_work = self._store.watch(self._claim, self._step).may_work
            except DatabaseGone as error:
                logger.warning("%s goes on without a database: %s", self._claim.stage.kind, error)
                may_work = True
            self._looked = time.monotonic()
            if not may_work:
                raise HandBack

    def look_for_others(self) -> None:
        """
        Raise TurnOver if the search has had its turn, and another job still waits for the worker.

        Called between trials. A worker that is free has a second to take what waits.
        """
        now = time.monotonic()
        if self._turn_ends is None:
            self._turn_ends = now + self._turns.seconds
        if self._turns.seconds == 0 or now < self._turn_ends:
            return
        self._turn_ends = now + LOOK_EVERY_S
        waits = self._store.another_waits(self._claim, self._turns.kinds)
        if waits and self._other_waited:
            raise TurnOver
        self._other_waited = waits

    @contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Advance]:
        """For long work: each step looks, and tells those who watch the job how far it is."""
        logger.info("%s", title, extra={"job": str(self._claim.job.id), "steps": steps})
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._step = {"title": title, "done": done, "steps": steps}
            self.look()

        yield advance
