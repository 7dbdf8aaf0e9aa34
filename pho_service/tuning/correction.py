"""
The corrections of a search as it keeps them.
"""

from dataclasses import dataclass
from typing import Any

from pho_service.spec.document import JsonDocument, number


@dataclass(frozen=True, kw_only=True)
class Correction(JsonDocument):
    """Result of the corrections of a search."""

    corrects: int  # Number of the trial that they started from, the best by the proxy
    allocation: dict[str, Any]  # What that trial had, which other models can have, too
    # Number of the corrected candidate that is nearest to the dense model; None if none is nearer
    # than the one they started from.
    trial: int | None
    # Divergences of the start and of the nearest, in nats; equal if the start is the nearest.
    divergences: tuple[float, float]
    count: int  # How many were measured, failed ones included
    tokens: int  # Predictions that divergences are the mean of

    def __str__(self) -> str:
        before, after = self.divergences
        comparison = (
            f"{self.count} allocations by the slope of the loss, compared on {self.tokens} tokens"
        )
        if self.trial is None:
            return f"{comparison}: none is nearer than trial {self.corrects}, {number(before)}"
        best = f"{number(after)} at trial {self.trial}"
        return f"{comparison}: {number(before)} at trial {self.corrects}, {best}"
