"""
A part of a report's page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pho_service.report.charts import Chart
from pho_service.report.tables import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """
    A part of the page under a heading.

    Attributes:
        texts: Sentences; what is not known is said here.
        blocks: Text as it is: commands and documents, with a caption each.
    """

    id: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    blocks: Sequence[tuple[str, str]] = ()
