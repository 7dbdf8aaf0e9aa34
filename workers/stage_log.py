"""
What a worker logs while it works on a stage, kept with the job for its page.
"""

import logging
import threading
from datetime import UTC, datetime
from pathlib import Path

from pho_service.host.logs import is_about, redact
from pho_service.host.plain import plain_line
from storage.jobs import JobStore
from storage.records import Claim
from storage.studies import DatabaseGone

MOST_LINES = 200  # of an attempt; the worker's own log has all
_LONGEST = 500  # characters of a line
# What every record has, and every line of a stage.
_SAME = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
_SAME |= {"job", "stage", "number", "attempt", "worker", "trace", "span"}


class StageLog(logging.Handler):
    """
    Takes the lines that are logged about a stage, until they are stored.

    Nothing is stored while a line is logged: who logs may hold a row that would be waited for.
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
        said = record.getMessage().replace(f" of job {self._claim.job.id}", "")
        said = plain_line(redact(" ".join([said, *_more(record)])))[:_LONGEST]
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


def _more(record: logging.LogRecord) -> list[str]:
    """The fields of a line; folders of the machine are nobody's business."""
    fields = {n: v for n, v in record.__dict__.items() if n not in _SAME and v is not None}
    return [f"{n}={v}" for n, v in fields.items() if not Path(str(v)).is_absolute()]
