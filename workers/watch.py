"""
Whether a stage may go on, what it logs, and how it is let go of by force.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pho_service.errors import plain_line
from pho_service.host.logs import is_about, redact
from pho_service.progress import Advance
from storage.jobs import JobStore
from storage.records import Claim, JobRecord, LostClaim, StageKind
from storage.studies import DatabaseGone, StorageError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # between two looks at whether the job may go on
PATIENCE_S = 5.0  # with a stage that should be put down
MOST_LINES = 200  # of an attempt; the worker's own log has all
_LONGEST_LINE = 500  # characters
# What every record has, and every line of a stage.
_SAME = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
_SAME |= {"job", "stage", "number", "attempt", "worker", "trace", "span"}


class HandBack(Exception):
    """The stage is put down unfinished: its job may not work now, or the worker stops."""


class TurnOver(HandBack):
    """The stage is put down for that of another job, and waits behind it."""


@dataclass(kw_only=True)
class Turns:
    """The turns in which jobs share a worker."""

    seconds: float = 0.0  # That one keeps it while another waits; 0 means until it is done
    kinds: tuple[StageKind, ...] = tuple(StageKind)  # Stages that the worker does
    _job: uuid.UUID | None = None
    _ends: float = 0.0

    def begin(self, job: JobRecord) -> None:
        """Go on with the turn that a job has, or begin its turn."""
        if job.id != self._job:
            self._job = job.id
            self.renew()

    def renew(self) -> None:
        self._ends = time.monotonic() + self.seconds

    @property
    def is_over(self) -> bool:
        return self.seconds > 0 and time.monotonic() >= self._ends


class Watch:
    """Looks now and then whether a stage may go on."""

    def __init__(
        self, store: JobStore, claim: Claim, stopping: threading.Event, turns: Turns
    ) -> None:
        self._store = store
        self._claim = claim
        self._stopping = stopping
        self._looked = time.monotonic()
        self._step: dict[str, Any] | None = None
        self._turns = turns
        self._turn_ends: float | None = None  # that of this stage, once it has something to keep
        self._other_waited = self._gives_way = False

    def look(self, *, now: bool = False) -> None:
        """Raise HandBack if it may not."""
        # While the database is away it may: what is written at last says whose the stage is.
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

    def gives_way(self) -> bool:
        """Whether the stage has had its turn, and another job waits for the worker."""
        # Asked between what is kept: trials, measurements. A worker that is free has a second to
        # take what waits.
        now = time.monotonic()
        if self._turn_ends is None:
            self._turn_ends = now + self._turns.seconds
        if self._turns.seconds and now >= self._turn_ends:
            self._turn_ends = now + LOOK_EVERY_S
            try:
                waits = self._store.another_waits(self._claim, self._turns.kinds)
            except DatabaseGone:  # nobody else can be given a stage, either
                waits = False
            self._gives_way = waits and self._other_waited
            self._other_waited = waits
        return self._gives_way

    def look_for_others(self) -> None:
        """Raise TurnOver if it should give way."""
        if self.gives_way():
            raise TurnOver

    def look_between(self) -> None:
        """Between two pieces of a stage: raise if it may not go on, or its turn is over."""
        self.look()
        self.look_for_others()

    @contextmanager
    def progress(self, title: str, steps: int) -> Iterator[Advance]:
        """For long work: each step looks, and tells those who watch the job how far it is."""
        logger.info("%s", title, extra={"job": str(self._claim.job.id), "steps": steps})
        done = 0.0

        def advance(count: float) -> None:
            nonlocal done
            done += count
            self._step = {"title": title, "done": int(done + 1e-6), "steps": steps}
            self.look()

        yield advance


class StageLog(logging.Handler):
    """Takes the lines that are logged about a stage, for the job's page, until they are stored."""

    # Nothing is stored while a line is logged: who logs may hold a row that would be waited for.

    def __init__(
        self, store: JobStore, claim: Claim, worker: str, hide: Callable[[str], str] = str
    ) -> None:
        super().__init__(logging.INFO)
        self._store, self._claim, self._worker, self._hide = store, claim, worker, hide
        self._lines: list[str] = []
        self._count = 0
        self._storing = threading.Lock()

    def __enter__(self) -> "StageLog":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        self.store()

    def emit(self, record: logging.LogRecord) -> None:
        if not is_about(job=str(self._claim.job.id)) or self._count > MOST_LINES:
            return
        self._count += 1
        at = datetime.fromtimestamp(record.created, UTC)
        message = record.getMessage().replace(f" of job {self._claim.job.id}", "")
        line = plain_line(self._hide(redact(" ".join([message, *_more(record)]))))
        if self._count > MOST_LINES:
            line = "... The worker's own log has the rest."
        self._lines.append(f"{at:%H:%M:%S} {record.levelname} {line[:_LONGEST_LINE]}")

    def store(self) -> None:
        """Store the lines that are not stored yet; later, if the database is away."""
        with self._storing:
            lines = self._lines[:]
            if not lines:
                return
            try:
                self._store.log(self._claim, lines, worker=self._worker)
            except DatabaseGone:
                return
            del self._lines[: len(lines)]


def _more(record: logging.LogRecord) -> list[str]:
    """The fields of a line; folders of the machine are nobody's business."""
    fields = {n: v for n, v in record.__dict__.items() if n not in _SAME and v is not None}
    return [f"{n}={v}" for n, v in fields.items() if not Path(str(v)).is_absolute()]


class Hold:
    """The stage that a worker has in hand, at most one, let go of by force where it must be."""

    def __init__(self, store: JobStore, worker: str, hide: Callable[[str], str] = str) -> None:
        self._store, self._worker, self._hide = store, worker, hide
        self._log: StageLog | None = None
        self._claim: Claim | None = None
        self._late_since: float | None = None  # when it was seen that it should be put down
        self.idle_since: float | None = time.monotonic()  # None while a thread works on a stage

    @contextmanager
    def of(self, claim: Claim) -> Iterator[None]:
        """Inside, a thread works on a stage, and what it logs is kept with the job."""
        self._late_since = self.idle_since = None
        self._claim = claim
        try:
            with StageLog(self._store, claim, self._worker, self._hide) as self._log:
                yield
        finally:
            self._log = self._claim = None
            self.idle_since = time.monotonic()

    def is_stuck(self) -> bool:
        """Tell whether the stage should have been put down a few seconds ago; store its log."""
        claim, log, since = self._claim, self._log, self._late_since
        if claim is None:
            return False
        if log is not None:
            log.store()
        try:
            late = not self._store.watch(claim).may_work
        except LostClaim:
            late = True
        if claim is not self._claim:  # that one was put down meanwhile
            return False
        now = time.monotonic()
        self._late_since = (since or now) if late else None
        return late and since is not None and now - since > PATIENCE_S

    def give_up(self) -> None:
        """Hand the stage in hand back, if there is one: its thread ends with the process."""
        claim = self._claim
        if claim is None:
            return
        logger.warning(
            "%s of job %s does not stop by itself: it is handed back, and this process ends",
            claim.stage.kind, claim.job.id,
        )  # fmt: skip
        try:
            self._store.give_up(claim)
        except (LostClaim, StorageError) as error:
            logger.warning("it was not handed back: %s", error or "it is another worker's")
