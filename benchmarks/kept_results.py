"""Results in a file, one JSON line each, so that an interrupted benchmark goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click


class KeptResults:
    """
    The results of a benchmark.

    Args:
        path: The file; made by the first result.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last result with all these fields, or None."""
        for line in reversed(self._lines()):
            if all(field in line and line[field] == value for field, value in key.items()):
                return line
        return None

    def keep(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """
        Add a result, in one piece: other processes may add theirs to the same file.

        Raises:
            ValueError: A field of the result would take the place of one of the key.
        """
        if both := key.keys() & result.keys():
            raise ValueError(f"{', '.join(sorted(both))} of the result hides what it is found by")
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps({**key, **result}).encode() + b"\n")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise click.ClickException(
                    f"{self.path}, line {number} is not JSON: {error}. Delete that line, and what "
                    "it held is measured again."
                ) from error
        return lines
