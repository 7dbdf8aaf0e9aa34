"""
What a worker logs while it works on a stage, kept with the job for its page.
"""

import logging
import threading
from datetime import UTC, datetime

from pho_service.host.logs import is_about, redact
from pho_service.host.plain import plain_line
from storage.jobs import JobStore
from storage.records import Claim
from storage.studies import DatabaseGone

MOST_LINES = 200  # of an attempt; the worker's own log has all
_LONGEST = 500  # characters of a line


class StageLog(logging.Handler):
    """
    Takes the lines that are logged about a stage, until they are stored.

    Nothing is stored while a line is logged: who logs may hold a row that would be waited for.

    Args:
        store: Store of the job.
        claim: Claim of the stage; lines about others are left out.
        worker: Its name.
    """

    def __init__(self, store: JobStore, claim: Claim, worker: str) -> None:
        super().__init__(logging.INFO)
        self._store, self._claim, self._worker = store, claim, worker
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
        """Take a line."""
        if not is_about(job=str(self._claim.job.id)) or self._count > MOST_LINES:
            return
        self._count += 1
        at = datetime.fromtimestamp(record.created, UTC)
        said = plain_line(redact(record.getMessage()))[:_LONGEST]
        if self._count > MOST_LINES:
            said = "... The worker's own log has the rest."
        self._lines.append(f"{at:%H:%M:%S} {record.levelname} {said}")

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
