"""
What a pruning does beside the score: linears, allocation, permutation, re-pruning, update,
reconstruction.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Document, Flag, Number
from pho_service.spec.linears import LONGEST, MOST, Linears
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.reconstruction import RECONSTRUCTION, Reconstruction

NormSource = Literal["dense", "sequential"]
AllocationMethod = Literal["uniform", "owl", "fisher", "curves"]
AllocationUnit = Literal["linear", "block"]
Permutation = Literal["none", "score", "error"]
Repruning = Literal["none", "dsnot", "swaps", "admm"]
Update = Literal["none", "obs", "least-squares", "sparsegpt", "admm", "alps"]
NORM_SOURCES: tuple[NormSource, ...] = get_args(NormSource)
ALLOCATIONS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)
ALLOCATION_UNITS: tuple[AllocationUnit, ...] = get_args(AllocationUnit)
PERMUTATIONS: tuple[Permutation, ...] = get_args(Permutation)
REPRUNINGS: tuple[Repruning, ...] = get_args(Repruning)
UPDATES: tuple[Update, ...] = get_args(Update)
CHOOSING: tuple[Update, ...] = ("sparsegpt", "admm", "alps")  # the mask too
MOST_SHIFT = 10.0  # of log-odds: 1 / 22,000 of a linear
MOST_DEPTHS = 2  # numbers of a curve over depth
MOST_SHRINKAGE = 1000.0
Shift = Annotated[Number, Field(ge=-MOST_SHIFT, le=MOST_SHIFT)]

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
_DEPLOYABLE = (
    "Whether only those input channels are permuted whose order can be folded into the stored "
    "weights, so that N:M holds as they are stored and no runtime has to permute."
)
_REPRUNING = (
    "Improvement of the finished mask: none; dsnot; swaps, each of which lowers the error of its "
    "row; admm, which looks for the mask whose kept weights, changed by the update, make the least "
    "error."
)
_UPDATE = (
    "Change of the weights that stay. With none, they stay as they are. obs works column by "
    "column, like SparseGPT, with a given mask; least-squares continues towards the least error "
    "that the mask allows. sparsegpt, admm and alps, as published, choose the mask themselves, so "
    "that the score has no effect."
)
_SHRINKAGE = (
    "How much the second moments that re-pruning and update work with are shrunk towards their "
    "diagonal, so that they do not follow chance: all others are multiplied by tokens / (tokens + "
    "shrinkage * in_features). 0: not at all, as published."
)


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(f"{what} {value!r} is not one of {', '.join(allowed)}.")


def _check_shrinkage(value: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= MOST_SHRINKAGE:
        raise InvalidInput(f"shrinkage={value!r} is not in 0..{MOST_SHRINKAGE:g}.")


def _check_kind(kind: str) -> None:
    """Raise InvalidInput if no linear can be of this kind."""
    if not kind.isprintable() or not 0 < len(kind) <= LONGEST or {*"./* "} & {*kind}:
        raise InvalidInput(
            f"allocation offset {kind!r} is not the last part of a linear's name. Give q_proj for "
            "all linears of that kind, not a full name and not a pattern."
        )


def _check_shift(what: str, value: float) -> None:
    """Raise InvalidInput if this cannot be added to log-odds."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not isfinite(value) or abs(value) > MOST_SHIFT:
        rule = f"-{MOST_SHIFT:g}..{MOST_SHIFT:g}"
        raise InvalidInput(f"allocation {what}={value!r} is not in {rule}.")


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
    offsets: Annotated[
        dict[str, Shift],
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
        Field(
            max_length=MOST_DEPTHS,
            description="Added to the same log-odds over the depth of the model: a slope, which "
            "keeps more in late blocks if it is above 0, and a curvature, which keeps more in the "
            "first and last ones.",
            exclude_if=lambda depth: not depth,
        ),
    ] = ()

    def __post_init__(self) -> None:
        _one_of("allocation", self.method, ALLOCATIONS)
        _one_of("allocation unit", self.unit, ALLOCATION_UNITS)
        for name, value, low, high in (
            ("spread", self.spread, 0.0, 1.0), ("outlier_ratio", self.outlier_ratio, 1.0, 1e6),
        ):  # fmt: skip
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise InvalidInput(f"allocation {name}={value!r} is not in {low:g}..{high:g}.")
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
            _check_shift(f"offset {kind}", value)
        for i, value in enumerate(self.depth):
            _check_shift(f"depth[{i}]", value)

    @property
    def is_even(self) -> bool:
        """Tell whether all linears lose the same share."""
        return self.method == "uniform" and not self.offsets and not self.depth

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; ``offsets`` and ``depth`` only where they say something."""
        values = asdict(self)
        shifts = {"offsets": values.pop("offsets"), "depth": [*values.pop("depth")]}
        return {**values, **{name: value for name, value in shifts.items() if value}}

    def __str__(self) -> str:
        """In a few words, for people."""
        spread = "" if self.is_even else f" within {self.spread:.3f}"
        offsets = [f"{kind} {value:+.2f}" for kind, value in self.offsets.items()]
        depth = ["depth " + " ".join(f"{value:+.2f}" for value in self.depth)] if self.depth else []
        shifts = f" ({', '.join([*offsets, *depth])})" if offsets or depth else ""
        return f"{self.method}{spread}{shifts}"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """
    Steps of a pruning beside the score.
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
    deployable: Annotated[
        Flag, Field(description=_DEPLOYABLE, exclude_if=lambda deployable: not deployable)
    ] = False
    repruning: Annotated[Repruning, Field(description=_REPRUNING)] = "none"
    update: Annotated[Update, Field(description=_UPDATE)] = "none"
    shrinkage: Annotated[
        Number,
        Field(
            ge=0,
            le=MOST_SHRINKAGE,
            description=_SHRINKAGE,
            exclude_if=lambda shrinkage: not shrinkage,
        ),
    ] = 0.0
    reconstruction: Annotated[
        Reconstruction,
        Field(description=RECONSTRUCTION, exclude_if=lambda given: not given.wanted),
    ] = Reconstruction()

    def __post_init__(self) -> None:
        _one_of("statistics", self.statistics, NORM_SOURCES)
        _one_of("permutation", self.permutation, PERMUTATIONS)
        _one_of("repruning", self.repruning, REPRUNINGS)
        _one_of("update", self.update, UPDATES)
        if not isinstance(self.deployable, bool):
            raise InvalidInput(f"deployable={self.deployable!r} is not true or false.")
        if self.chooses_mask and self.repruning != "none":
            raise InvalidInput(
                f"repruning {self.repruning!r} has no mask to start from with update "
                f"{self.update!r}, which chooses the mask and the weights together. Take update "
                "'least-squares', or repruning 'none'."
            )
        if self.repruning == "admm" and self.update == "none":
            raise InvalidInput(
                "repruning 'admm' finds a mask for weights that are changed after it, and update "
                "is 'none'. Take update 'least-squares', or repruning 'swaps'."
            )
        _check_shrinkage(self.shrinkage)
        if self.shrinkage and not self.solves:
            raise InvalidInput(
                f"shrinkage={self.shrinkage:g} has nothing to shrink: only permutation 'error', "
                "repruning 'swaps' and 'admm' and an update look at second moments. Take one of "
                "them, or leave it out."
            )

    @property
    def solves(self) -> bool:
        """Whether a step looks at more of the second moments than their diagonal."""
        return (
            self.permutation == "error"
            or self.repruning in ("swaps", "admm")
            or self.update != "none"
        )

    @property
    def needs_text(self) -> bool:
        """Whether more than a bundle is needed: the second moments of all inputs, in full."""
        return (
            self.statistics != "dense"
            or self.permutation == "error"
            or self.repruning != "none"
            or self.update != "none"
            or self.reconstruction.wanted
        )

    @property
    def gives_up_orders(self) -> bool:
        """Whether linears are kept from an order of channels that they would have."""
        return self.deployable and self.permutation != "none"

    @property
    def chooses_mask(self) -> bool:
        """Whether the update chooses what is removed, so that a score has no say."""
        return self.update in CHOOSING

    @property
    def rated(self) -> Self:
        """The part that a proxy rates: which linears are pruned, and how much each loses."""
        return type(self)(linears=self.linears, allocation=self.allocation)

    @property
    def changes_weights(self) -> bool:
        """Whether weights that stay have other values afterwards."""
        return self.update != "none" or self.reconstruction.wanted

    @property
    def beside_mask(self) -> list[str]:
        """The names of the steps that come after the score and the allocation."""
        steps = [step for step in (self.permutation, self.repruning, self.update) if step != "none"]
        return [*steps, *(["reconstruction"] if self.reconstruction.wanted else [])]

    @property
    def before_reconstruction(self) -> Self:
        """The same without the reconstruction, which only the winner of a search goes through."""
        return replace(self, reconstruction=Reconstruction())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON; those that older versions had not, only where they say something."""
        values = asdict(self)
        del values["linears"], values["reconstruction"]
        if self.statistics == "dense":
            del values["statistics"]
        if not self.deployable:
            del values["deployable"]
        if not self.shrinkage:
            del values["shrinkage"]
        values["allocation"] = self.allocation.to_dict()
        if self.linears:
            values["linears"] = self.linears.to_dict()
        if self.reconstruction.wanted:
            values["reconstruction"] = asdict(self.reconstruction)
        return values

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
            "reconstruction": Reconstruction(**values.get("reconstruction", {})),
        }
        return cls(**{**values, **parts})

    def __str__(self) -> str:
        """All steps in one line, for people."""
        where = " where it can be folded" if self.gives_up_orders else ""
        return (
            f"allocation {self.allocation}, permutation {self.permutation}{where}, "
            f"re-pruning {self.repruning}, update {self.update}"
            + (f", shrinkage {self.shrinkage:g}" if self.shrinkage else "")
            + (f", {self.reconstruction}" if self.reconstruction.wanted else "")
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
        if not self.allocation.is_even and pattern.scope is Scope.GLOBAL:
            raise InvalidInput(
                f"allocation {self.allocation.method!r} and scope 'global' both say how much each "
                "linear loses. Take scope layer or row."
            )


class StepsSpec(Document):
    """Describe the steps of candidates beside the score. What is null is the preset's."""

    linears: Linears | None = Field(None, description=_LINEARS)
    statistics: NormSource | None = Field(None, description=_STATISTICS)
    allocation: Allocation | None = Field(
        None, description=f"{_ALLOCATION} Its method is the only one that is searched then."
    )
    permutation: Permutation | None = Field(None, description=_PERMUTATION)
    deployable: bool | None = Field(None, description=_DEPLOYABLE)
    repruning: Repruning | None = Field(None, description=_REPRUNING)
    update: Update | None = Field(None, description=_UPDATE)
    shrinkage: Number | None = Field(None, ge=0, le=MOST_SHRINKAGE, description=_SHRINKAGE)
    reconstruction: Reconstruction | None = Field(None, description=RECONSTRUCTION)

    def given(self) -> dict[str, Any]:
        """The fields of :class:`Steps` that are not the preset's."""
        return {name: value for name, value in self if value is not None}
