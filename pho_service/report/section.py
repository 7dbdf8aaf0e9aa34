"""
A part of a report's page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pho_service.report.charts import Chart
from pho_service.report.tables import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """
    A part of the page under a heading.

    Attributes:
        texts: Sentences; what is not known is said here.
        commands: To be run with the result, one a line.
        blocks: Documents as they are, with a caption each; they are folded.
        events: What happened, with the time; the newest first.
    """

    id: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    commands: Sequence[str] = ()
    blocks: Sequence[tuple[str, str]] = ()
    events: Sequence[tuple[datetime, str]] = ()
