"""
What a pruning does beside the score: allocation, permutation, re-pruning, weight update.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from pho_service.errors import InvalidInput
from pho_service.spec.pattern import Pattern, Scope

AllocationMethod = Literal["uniform", "owl", "fisher", "curves"]
AllocationUnit = Literal["linear", "block"]
Permutation = Literal["none", "score", "error"]
Repruning = Literal["none", "dsnot", "swaps"]
Update = Literal["none", "obs", "least-squares", "sparsegpt"]
ALLOCATIONS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)
ALLOCATION_UNITS: tuple[AllocationUnit, ...] = get_args(AllocationUnit)
PERMUTATIONS: tuple[Permutation, ...] = get_args(Permutation)
REPRUNINGS: tuple[Repruning, ...] = get_args(Repruning)
UPDATES: tuple[Update, ...] = get_args(Update)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(f"{what} {value!r} is not one of {', '.join(allowed)}.")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """
    How the sparsity is spread over the linears of a model.

    Whatever the method, the model as a whole has the sparsity of the pattern.

    Attributes:
        method: ``uniform``: the same everywhere. ``owl``: less where many
            scores are far above the mean. ``fisher``: one threshold on
            A * x * sqrt(g) for the whole model. ``curves``: where the
            Fisher-weighted error of every linear rises equally steeply.
        unit: What shares one sparsity: a ``linear``, or a whole ``block``.
        spread: Every sparsity lies within the pattern's plus and minus this.
        outlier_ratio: Of ``owl``: a score above this many times the mean of its block is an
            outlier.

    Source:
        Yin et al. 2024, arXiv:2310.05175 (OWL: M = outlier_ratio, lambda = spread).
    """

    method: str = "uniform"
    unit: str = "linear"
    spread: float = 0.2
    outlier_ratio: float = 5.0

    def __post_init__(self) -> None:
        _one_of("allocation", self.method, ALLOCATIONS)
        _one_of("allocation unit", self.unit, ALLOCATION_UNITS)
        for name, value, low, high in (
            ("spread", self.spread, 0.0, 1.0), ("outlier_ratio", self.outlier_ratio, 1.0, 1e6),
        ):  # fmt: skip
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise InvalidInput(f"allocation {name}={value!r} is not in {low:g}..{high:g}.")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """
    What a pruning does beside the score.

    Attributes:
        allocation: How much each linear loses.
        permutation: Of the input channels before N:M groups are cut: ``none``,
            ``score`` (most score is kept), or ``error`` (the least error of the outputs).
        repruning: Of a finished mask: ``none``, ``dsnot``, or ``swaps`` (each
            lowers the error of its row).
        update: Of the weights that stay: ``none``; ``obs`` (column by column, as
            SparseGPT, given the mask); ``least-squares`` (on from there towards the least error
            that the mask allows); ``sparsegpt`` (which chooses the mask itself: the score has no
            say).
    """

    allocation: Allocation = Allocation()
    permutation: str = "none"
    repruning: str = "none"
    update: str = "none"

    def __post_init__(self) -> None:
        _one_of("permutation", self.permutation, PERMUTATIONS)
        _one_of("repruning", self.repruning, REPRUNINGS)
        _one_of("update", self.update, UPDATES)
        if self.update == "sparsegpt" and self.repruning != "none":
            raise InvalidInput(
                f"repruning {self.repruning!r} has no mask to start from with update 'sparsegpt', "
                "which chooses the mask and the weights together. Take update 'least-squares', or "
                "repruning 'none'."
            )

    @property
    def needs_text(self) -> bool:
        """Whether more than a bundle is needed: the second moments of all inputs, in full."""
        return self.permutation == "error" or self.repruning != "none" or self.update != "none"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """
        What :meth:`to_dict` gave.

        Raises:
            InvalidInput: A value breaks a rule.
        """
        return cls(**{**values, "allocation": Allocation(**values.get("allocation", {}))})

    def __str__(self) -> str:
        """All steps in one line, for people."""
        spread = (
            "" if self.allocation.method == "uniform" else f" within {self.allocation.spread:.3f}"
        )
        return (
            f"allocation {self.allocation.method}{spread}, permutation {self.permutation}, "
            f"re-pruning {self.repruning}, update {self.update}"
        )

    def check_pattern(self, pattern: Pattern) -> None:
        """
        Raises:
            InvalidInput: A step has no meaning in ``pattern``.
        """
        if self.permutation != "none" and not pattern.group:
            raise InvalidInput(
                f"permutation {self.permutation!r} changes nothing at {pattern}: the order of "
                "channels only matters to N:M. Leave it out."
            )
        if self.allocation.method != "uniform" and pattern.scope is Scope.GLOBAL:
            raise InvalidInput(
                f"allocation {self.allocation.method!r} and scope 'global' both say how much each "
                "linear loses. Take scope layer or row."
            )
