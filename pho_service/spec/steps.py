"""
What a pruning does beside the score: which linears, allocation, permutation, re-pruning, update.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Document, Number
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern, Scope

NormSource = Literal["dense", "sequential"]
AllocationMethod = Literal["uniform", "owl", "fisher", "curves"]
AllocationUnit = Literal["linear", "block"]
Permutation = Literal["none", "score", "error"]
Repruning = Literal["none", "dsnot", "swaps"]
Update = Literal["none", "obs", "least-squares", "sparsegpt"]
NORM_SOURCES: tuple[NormSource, ...] = get_args(NormSource)
ALLOCATIONS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)
ALLOCATION_UNITS: tuple[AllocationUnit, ...] = get_args(AllocationUnit)
PERMUTATIONS: tuple[Permutation, ...] = get_args(Permutation)
REPRUNINGS: tuple[Repruning, ...] = get_args(Repruning)
UPDATES: tuple[Update, ...] = get_args(Update)

_LINEARS = "Which linears are pruned, and which have a sparsity of their own."
_STATISTICS = (
    "Model that the activation norms of a score come from: dense; sequential, where the blocks "
    "before are pruned already, as in the code of Wanda and RIA, which needs the calibration text."
)
_ALLOCATION = "How the sparsity is spread over the linears."
_PERMUTATION = (
    "Order of the input channels before N:M groups are cut: none; score keeps the most score; "
    "error gives the least error of the outputs."
)
_REPRUNING = (
    "Improvement of the finished mask: none; dsnot; swaps, each of which lowers the error of its "
    "row."
)
_UPDATE = (
    "Change of the weights that stay: none; obs, column by column as SparseGPT, given the mask; "
    "least-squares, on from there towards the least error that the mask allows; sparsegpt, which "
    "chooses the mask itself, so that the score has no say."
)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(f"{what} {value!r} is not one of {', '.join(allowed)}.")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """
    How the sparsity is spread over the linears of a model.

    Whatever the method, the model as a whole has the sparsity of the pattern.

    Source:
        Yin et al. 2024, arXiv:2310.05175 (OWL: M = outlier_ratio, lambda = spread).
    """

    __pydantic_config__ = STRICT

    method: Annotated[
        AllocationMethod,
        Field(
            description="uniform: the same sparsity everywhere. owl: less where many scores are "
            "far above the mean. fisher: one threshold on A * x * sqrt(g) for the whole model. "
            "curves: where the Fisher-weighted error of every linear rises equally steeply."
        ),
    ] = "uniform"
    unit: Annotated[
        AllocationUnit,
        Field(description="What shares one sparsity: a linear, or a whole block."),
    ] = "linear"
    spread: Annotated[
        Number,
        Field(
            ge=0,
            le=1,
            description="Every sparsity lies within the pattern's plus and minus this.",
        ),
    ] = 0.2
    outlier_ratio: Annotated[
        Number,
        Field(
            ge=1,
            le=1e6,
            description="For owl: a score above this many times the mean of its block is an "
            "outlier.",
        ),
    ] = 5.0

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
    """

    __pydantic_config__ = STRICT

    linears: Annotated[
        Linears, Field(description=_LINEARS, exclude_if=lambda linears: not linears)
    ] = Linears()
    statistics: Annotated[
        NormSource,
        Field(description=_STATISTICS, exclude_if=lambda statistics: statistics == "dense"),
    ] = "dense"
    allocation: Annotated[Allocation, Field(description=_ALLOCATION)] = Allocation()
    permutation: Annotated[Permutation, Field(description=_PERMUTATION)] = "none"
    repruning: Annotated[Repruning, Field(description=_REPRUNING)] = "none"
    update: Annotated[Update, Field(description=_UPDATE)] = "none"

    def __post_init__(self) -> None:
        _one_of("statistics", self.statistics, NORM_SOURCES)
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
        return (
            self.statistics != "dense"
            or self.permutation == "error"
            or self.repruning != "none"
            or self.update != "none"
        )

    @property
    def changes_weights(self) -> bool:
        """Whether weights that stay have other values afterwards."""
        return self.update != "none"

    @property
    def beside_mask(self) -> list[str]:
        """The names of the steps that come after the score and the allocation."""
        return [step for step in (self.permutation, self.repruning, self.update) if step != "none"]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; ``linears``, ``statistics`` only where they say something."""
        values = asdict(self)
        del values["linears"]
        if self.statistics == "dense":
            del values["statistics"]
        return {**values, **({"linears": self.linears.to_dict()} if self.linears else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """
        What :meth:`to_dict` gave.

        Raises:
            InvalidInput: A value breaks a rule.
        """
        parts = {
            "linears": Linears.from_dict(values.get("linears", {})),
            "allocation": Allocation(**values.get("allocation", {})),
        }
        return cls(**{**values, **parts})

    def __str__(self) -> str:
        """All steps in one line, for people."""
        spread = (
            "" if self.allocation.method == "uniform" else f" within {self.allocation.spread:.3f}"
        )
        return (
            f"allocation {self.allocation.method}{spread}, permutation {self.permutation}, "
            f"re-pruning {self.repruning}, update {self.update}"
            + (f", statistics {self.statistics}" if self.statistics != "dense" else "")
            + (f"; {self.linears}" if self.linears else "")
        )

    def check_pattern(self, pattern: Pattern) -> None:
        """
        Raises:
            InvalidInput: A step has no meaning in ``pattern``.
        """
        self.linears.check_pattern(pattern)
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


class StepsSpec(Document):
    """What candidates go through beside the score. What is null is the preset's."""

    linears: Linears | None = Field(None, description=_LINEARS)
    statistics: NormSource | None = Field(None, description=_STATISTICS)
    allocation: Allocation | None = Field(
        None, description=f"{_ALLOCATION} Its method is the only one that is searched then."
    )
    permutation: Permutation | None = Field(None, description=_PERMUTATION)
    repruning: Repruning | None = Field(None, description=_REPRUNING)
    update: Update | None = Field(None, description=_UPDATE)

    def given(self) -> dict[str, Any]:
        """The fields of :class:`Steps` that are not the preset's."""
        return {name: value for name, value in self if value is not None}
