"""
The stage that a worker has in hand, and how it is let go of where its own thread does not.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from storage.jobs import JobStore
from storage.records import Claim, LostClaim
from storage.studies import StorageError
from workers.stage_log import StageLog

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0  # with a stage that should be put down


class Hold:
    """At most one stage at a time."""

    def __init__(self, store: JobStore, worker: str) -> None:
        self._store, self._worker = store, worker
        self._log: StageLog | None = None
        self._claim: Claim | None = None
        self._late_since: float | None = None  # when it was seen that it should be put down

    @contextmanager
    def of(self, claim: Claim) -> Iterator[None]:
        """Inside, a thread works on a stage, and what it logs is kept with the job."""
        self._late_since, self._claim = None, claim
        try:
            with StageLog(self._store, claim, self._worker) as self._log:
                yield
        finally:
            self._log = self._claim = None

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
