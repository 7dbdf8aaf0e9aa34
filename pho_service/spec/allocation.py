"""
How the sparsity is spread over the linears of a model.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Number, Shown, Stored, check_choice, check_number
from pho_service.spec.linears import LONGEST, MOST

AllocationMethod = Literal["uniform", "owl", "fisher", "curves"]
AllocationUnit = Literal["linear", "block"]
ALLOCATIONS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)
ALLOCATION_UNITS: tuple[AllocationUnit, ...] = get_args(AllocationUnit)
MOST_SHIFT = 10.0  # of log-odds: 1 / 22,000 of a linear
MOST_DEPTHS = 2  # numbers of a curve over depth
Shift = Annotated[Number, Field(ge=-MOST_SHIFT, le=MOST_SHIFT)]


def _check_kind(kind: str) -> None:
    """Raise InvalidInput if no linear can be of this kind."""
    if not kind.isprintable() or not 0 < len(kind) <= LONGEST or {*"./* "} & {*kind}:
        raise InvalidInput(
            f"allocation offset {kind!r} is not the last part of a linear's name. Give q_proj for "
            "all linears of that kind, not a full name and not a pattern."
        )


@dataclass(frozen=True, kw_only=True)
class Allocation(Stored):
    """
    How the sparsity is spread over the linears of a model.

    Whatever the method, the model as a whole has the sparsity of the pattern.

    Source:
        Yin et al. 2024, arXiv:2310.05175 (OWL: M = outlier_ratio, lambda = spread).
    """

    __pydantic_config__ = STRICT

    method: Annotated[
        AllocationMethod,
        Shown(option="--allocation", default="the preset's"),
        Field(
            description="uniform: the same sparsity everywhere. owl: less where many scores are "
            "far above the mean. fisher: one threshold on A * x * sqrt(g) for the whole model. "
            "curves: where the Fisher-weighted error of every linear rises equally steeply."
        ),
    ] = "uniform"
    unit: Annotated[
        AllocationUnit,
        Shown(option="--allocation-unit"),
        Field(description="What shares one sparsity: a linear, or a whole block."),
    ] = "linear"
    spread: Annotated[
        Number,
        Shown(option="--allocation-spread"),
        Field(
            ge=0,
            le=1,
            description="Every sparsity lies within the pattern's plus and minus this.",
        ),
    ] = 0.2
    outlier_ratio: Annotated[
        Number,
        Shown(option="--allocation-outlier-ratio"),
        Field(
            ge=1,
            le=1e6,
            description="For owl: a score above this many times the mean of its block is an "
            "outlier.",
        ),
    ] = 5.0
    offsets: Annotated[
        dict[str, Shift],
        Shown(option="--allocation-offset"),
        Field(
            max_length=MOST,
            description="Added to the log-odds of the share that linears keep, by the last part "
            "of their names (q_proj): above 0 they keep more. Kinds that a model does not have "
            "are ignored.",
            exclude_if=lambda offsets: not offsets,
        ),
    ] = field(default_factory=dict, hash=False)
    depth: Annotated[
        tuple[Shift, ...],
        Shown(option="--allocation-depth"),
        Field(
            max_length=MOST_DEPTHS,
            description="Added to the same log-odds over the depth of the model: a slope, which "
            "keeps more in late blocks if it is above 0, and a curvature, which keeps more in the "
            "first and last ones.",
            exclude_if=lambda depth: not depth,
        ),
    ] = ()

    def __post_init__(self) -> None:
        check_choice("allocation", self.method, ALLOCATIONS)
        check_choice("allocation unit", self.unit, ALLOCATION_UNITS)
        for name, value, low, high in (
            ("spread", self.spread, 0.0, 1.0), ("outlier_ratio", self.outlier_ratio, 1.0, 1e6),
        ):  # fmt: skip
            check_number(f"allocation {name}", value, low, high)
        object.__setattr__(self, "offsets", dict(self.offsets))
        object.__setattr__(self, "depth", tuple(self.depth))
        self._check_shifts()

    def _check_shifts(self) -> None:
        if self.offsets and self.unit == "block":
            raise InvalidInput(
                "allocation offsets tell the linears of a block apart, but unit 'block' gives them "
                "one sparsity. Take unit 'linear', or leave the offsets out."
            )
        for what, count, most in (
            ("offsets", len(self.offsets), MOST), ("depth", len(self.depth), MOST_DEPTHS),
        ):  # fmt: skip
            if count > most:
                raise InvalidInput(
                    f"allocation {what} has {count} numbers, and {most} are the most."
                )
        for kind, value in self.offsets.items():
            _check_kind(kind)
            check_number(f"allocation offset {kind}", value, -MOST_SHIFT, MOST_SHIFT)
        for i, value in enumerate(self.depth):
            check_number(f"allocation depth[{i}]", value, -MOST_SHIFT, MOST_SHIFT)

    @property
    def is_even(self) -> bool:
        """Tell whether all linears lose the same share."""
        return self.method == "uniform" and not self.offsets and not self.depth

    def __str__(self) -> str:
        """In a few words, for people."""
        spread = "" if self.is_even else f" within {self.spread:.3f}"
        offsets = [f"{kind} {value:+.2f}" for kind, value in self.offsets.items()]
        depth = ["depth " + " ".join(f"{value:+.2f}" for value in self.depth)] if self.depth else []
        shifts = f" ({', '.join([*offsets, *depth])})" if offsets or depth else ""
        return f"{self.method}{spread}{shifts}"
