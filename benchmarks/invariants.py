"""
What must hold, however often it is looked at: counted, with an example of each that does not.
"""

import threading
from collections import Counter
from collections.abc import Iterable

from rich import box
from rich.table import Table


class Invariants:
    """Rules with how often each was checked and violated; several threads may check."""

    def __init__(self) -> None:
        self.checked: Counter[str] = Counter()
        self.violated: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._lock = threading.Lock()

    def check(self, rule: str, holds: bool, about: str = "") -> None:
        """
        Count that a rule was looked at.

        Args:
            rule: A sentence.
            holds: Whether it is kept.
            about: What breaks it, if it does.
        """
        with self._lock:
            self.checked[rule] += 1
            if not holds:
                self.violated[rule] += 1
                self.examples.setdefault(rule, about[:2000])

    def check_all(self, rule: str, broken: Iterable[str], *, of: int) -> None:
        """Count that a rule was looked at for so many things, some of which break it."""
        found = [*broken]
        for about in found:
            self.check(rule, False, about)
        with self._lock:
            self.checked[rule] += of - len(found)

    def table(self) -> Table:
        """A row for each rule, in the order in which they were first checked."""
        table = Table(box=box.MARKDOWN)
        table.add_column("invariant")
        table.add_column("checked", justify="right")
        table.add_column("violated", justify="right")
        for rule, count in self.checked.items():
            table.add_row(rule, f"{count:,}", str(self.violated[rule]))
        return table
