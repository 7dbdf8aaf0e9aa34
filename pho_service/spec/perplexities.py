"""
How good a pruned model is: its perplexity beside those of the dense model, Wanda and RIA.
"""

from collections.abc import Mapping
from typing import Any, Self

from pho_service.spec.document import Document
from pho_service.spec.numbers import number, percent

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
        """In one line: ``22.60 dense, 27.70 pruned (+22.6%), Wanda 39.90, RIA 41.20``."""
        return in_words(self.dense, {"pruned": self.pruned}, {"wanda": self.wanda, "ria": self.ria})


def in_words(dense: float, found: Mapping[str, float], methods: Mapping[str, float | None]) -> str:
    """
    Perplexities of one text in a line: of results, with their rise over dense, and of ``wanda``,
    ``ria`` or others, where they have one.
    """
    rises = {name: percent(each / dense - 1, signed=True) for name, each in found.items()}
    return ", ".join(
        [
            f"{number(dense)} dense",
            *(f"{number(each)} {name} ({rises[name]})" for name, each in found.items()),
            *(f"{_TITLES.get(n, n)} {number(each)}" for n, each in methods.items() if each),
        ]
    )
