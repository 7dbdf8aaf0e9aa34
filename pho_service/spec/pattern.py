"""
How much is pruned, and where it is counted: a ratio or N:M, and a scope.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Self

from pho_service.errors import InvalidInput


class Scope(StrEnum):
    """Which weights compete with each other for the places that stay."""

    ROW = "row"  # the weights of one output row
    LAYER = "layer"  # the weights of one linear
    GLOBAL = "global"  # the weights of all linears

    @property
    def width(self) -> int:
        """0 for row, 1 for layer, 2 for global: a narrow scope satisfies every wider one."""
        return list(Scope).index(self)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """
    How many weights are removed, and where they are counted: a ratio or N:M.

    Attributes:
        sparsity: Share of weights removed, in (0, 1). For N:M it is 1 - N/M.
        scope: Where ``sparsity`` holds exactly. Always ``row`` for N:M.
        keep: N of N:M, the weights kept in a group; 0 for unstructured.
        group: M of N:M, neighbouring input channels; 0 for unstructured.
    """

    sparsity: float
    scope: Scope = Scope.ROW
    keep: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InvalidInput(
                f"sparsity {self.sparsity:g} is not between 0 and 1. It is the share of weights "
                "removed: write 0.5 to remove half of them."
            )
        if self.group and self.scope is not Scope.ROW:
            raise InvalidInput(
                f"pattern {self} counts inside groups of {self.group} input channels, so scope "
                f"{self.scope.value!r} has no meaning for it. Leave the scope out."
            )

    @classmethod
    def parse(cls, text: str, scope: str | None = None) -> Self:
        """
        Read ``"0.5"`` or ``"2:4"`` (N kept of M).

        Args:
            text: A sparsity in (0, 1), or N:M with 1 <= N < M <= 64.
            scope: ``row``, ``layer`` or ``global``. None takes ``row`` for N:M
                and ``layer`` otherwise.

        Raises:
            InvalidInput: Anything else.
        """
        rule = "Give the share of weights to remove (0.5) or N:M, N kept of M (2:4)."
        try:
            parsed_scope = None if scope is None else Scope(scope)
        except ValueError:
            names = ", ".join(Scope)
            raise InvalidInput(f"scope {scope!r} is not one of {names}.") from None
        if ":" in text:
            keep_text, _, group_text = text.partition(":")
            try:
                keep, group = int(keep_text), int(group_text)
            except ValueError:
                raise InvalidInput(f"pattern {text!r} is not N:M. {rule}") from None
            if not (1 <= keep < group <= 64):
                raise InvalidInput(
                    f"pattern {text!r} keeps N={keep} of M={group}, but 1 <= N < M <= 64 "
                    f"must hold. {rule}"
                )
            sparsity = float(1 - Fraction(keep, group))
            return cls(sparsity=sparsity, scope=parsed_scope or Scope.ROW, keep=keep, group=group)
        try:
            sparsity = float(text)
        except ValueError:
            raise InvalidInput(f"pattern {text!r} is neither a number nor N:M. {rule}") from None
        return cls(sparsity=sparsity, scope=parsed_scope or Scope.LAYER)

    def removed(self, count: int) -> int:
        """
        How many of ``count`` weights are removed: the exact product, rounded down.

        Wanda's and RIA's published code round down too. The decimal digits of
        ``sparsity`` count, not its binary value: 0.29 of 100 is 29.
        """
        if self.group:
            return (self.group - self.keep) * count // self.group
        return int(Fraction(repr(self.sparsity)) * count)

    def within(self, scope: Scope) -> "Pattern":
        """The same pattern counted in ``scope``; N:M has only one."""
        return self if self.group else replace(self, scope=scope)

    def check_width(self, in_features: int, layer: str) -> None:
        """Raise InvalidInput if ``layer`` cannot be cut into groups of M input channels."""
        if self.group and in_features % self.group:
            raise InvalidInput(
                f"{layer}: in_features={in_features} is not a multiple of M={self.group}. "
                "Choose an M that divides the input width of every linear, or a ratio such as 0.5."
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.group else repr(self.sparsity)
