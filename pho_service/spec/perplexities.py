"""
How good a pruned model is: its perplexity beside those of the dense model, Wanda and RIA.
"""

from collections.abc import Mapping
from typing import Any, Self

from pho_service.spec.document import Document

REFERENCES = ("dense", "wanda", "ria")  # what a result is judged by, in this order
_TITLES = {"wanda": "Wanda", "ria": "RIA"}


class Perplexities(Document):
    """
    Perplexities on the same windows of one text, which the search did not see.

    Attributes:
        dense: Perplexity of the model before it is pruned.
        pruned: Perplexity of the result.
        wanda: Perplexity of Wanda in the pattern of the search, as published: without the
            search's steps and, at N:M, in the model's own channel order. None if it has none:
            its model gives NaN.
        ria: The same of RIA, in the widest scope of the pattern that is not global.
    """

    dense: float
    pruned: float
    wanda: float | None = None
    ria: float | None = None

    @classmethod
    def of(cls, pruned: float, references: Mapping[str, float | None]) -> Self | None:
        """Those of a result; None where the dense model was not measured."""
        dense = references.get("dense")
        if dense is None:
            return None
        found: dict[str, Any] = {name: references.get(name) for name in REFERENCES}
        return cls(pruned=pruned, **found)

    @property
    def rise(self) -> float:
        """Share by which pruning raises the perplexity."""
        return self.pruned / self.dense - 1

    def __str__(self) -> str:
        """In one line: ``22.6 dense, 27.7 pruned (+23 %), Wanda 39.9, RIA 41.2``."""
        return in_words(self.dense, {"pruned": self.pruned}, {"wanda": self.wanda, "ria": self.ria})


def in_words(dense: float, found: Mapping[str, float], methods: Mapping[str, float | None]) -> str:
    """
    Perplexities of one text in a line.

    Args:
        dense: Perplexity of the dense model.
        found: Perplexities of results, by their names; each is shown with its rise over dense.
        methods: Perplexities of ``wanda``, ``ria`` or others, by their names; None is left out.
    """
    parts = [f"{_number(dense)} dense"]
    parts += [f"{_number(each)} {name} ({_rise(each / dense - 1)})" for name, each in found.items()]
    parts += [
        f"{_TITLES.get(name, name)} {_number(each)}"
        for name, each in methods.items()
        if each is not None
    ]
    return ", ".join(parts)


def _rise(share: float) -> str:
    digits = 1 if abs(share) < 0.0995 else 0
    return f"{100 * share:+,.{digits}f} %"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
