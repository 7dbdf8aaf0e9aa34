"""
Steps of a candidate beside its score: allocation, re-pruning, updates, reconstruction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import (
    SEEDS,
    STRICT,
    FieldShown,
    Flag,
    JsonDocument,
    Number,
    Partial,
    Whole,
    check_choice,
    check_number,
    check_seed,
    optional,
)
from pho_service.spec.pattern import LONGEST, Coefficients, Linears, Pattern, Scope

AllocationMethod = Literal["uniform", "owl", "fisher", "curves"]
AllocationUnit = Literal["linear", "block"]
ALLOCATIONS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)
ALLOCATION_UNITS: tuple[AllocationUnit, ...] = get_args(AllocationUnit)
MOST_SHIFT = 10.0  # of log-odds: 1 / 22,000 of a linear
MOST_OFFSETS = 32_768  # the largest mixtures have 20,000 linears
MOST_DEPTHS = 2  # numbers of a curve over depth
Shift = Annotated[Number, Field(ge=-MOST_SHIFT, le=MOST_SHIFT)]


def _check_kind(kind: str) -> None:
    """Raise InvalidInput if no linear can be of this kind, or have this name."""
    if not kind.isprintable() or not 0 < len(kind) <= LONGEST or {*"/* "} & {*kind}:
        raise InvalidInput(
            f"allocation offset {kind!r} is not the name of a linear. Give q_proj for all linears "
            "of that kind, or a full name (model.layers.3.mlp.up_proj), not a pattern."
        )


@dataclass(frozen=True, kw_only=True)
class Allocation(JsonDocument):
    """
    How the sparsity is spread over the linears of a model.

    Whatever the method, the model as a whole has the sparsity of the pattern.

    Source:
        Yin et al. 2024, arXiv:2310.05175 (OWL: M = outlier_ratio, lambda = spread).
    """

    __pydantic_config__ = STRICT

    method: Annotated[
        AllocationMethod,
        FieldShown(option="--allocation", default="the preset's"),
        Field(
            description="uniform: the same sparsity everywhere. owl: less where many scores are "
            "far above the mean. fisher: one threshold on A * x * sqrt(g) for the whole model. "
            "curves: where the Fisher-weighted error of every linear rises equally steeply."
        ),
    ] = "uniform"
    unit: Annotated[
        AllocationUnit,
        FieldShown(option="--allocation-unit"),
        Field(description="What shares one sparsity: a linear, or a whole block."),
    ] = "linear"
    spread: Annotated[
        Number,
        FieldShown(option="--allocation-spread"),
        Field(
            ge=0,
            le=1,
            description="Every sparsity lies within the pattern's plus and minus this.",
        ),
    ] = 0.2
    outlier_ratio: Annotated[
        Number,
        FieldShown(option="--allocation-outlier-ratio"),
        Field(
            ge=1,
            le=1e6,
            description="For owl: a score above this many times the mean of its block is an "
            "outlier.",
        ),
    ] = 5.0
    offsets: Annotated[
        dict[str, Shift],
        FieldShown(option="--allocation-offset"),
        Field(
            max_length=MOST_OFFSETS,
            description="Added to the log-odds of the share that linears keep, by the last part "
            "of their names (q_proj), and by their full names: above 0 they keep more. Names that "
            "a model does not have are ignored.",
            exclude_if=lambda offsets: not offsets,
        ),
    ] = field(default_factory=dict, hash=False)
    depth: Annotated[
        tuple[Shift, ...],
        FieldShown(option="--allocation-depth"),
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
            ("offsets", len(self.offsets), MOST_OFFSETS), ("depth", len(self.depth), MOST_DEPTHS),
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
        by_kind = {name: value for name, value in self.offsets.items() if "." not in name}
        offsets = [f"{kind} {value:+.2f}" for kind, value in by_kind.items()]
        if one_by_one := len(self.offsets) - len(by_kind):
            offsets.append(f"{one_by_one} linears one by one")
        depth = ["depth " + " ".join(f"{value:+.2f}" for value in self.depth)] if self.depth else []
        shifts = f" ({', '.join([*offsets, *depth])})" if offsets or depth else ""
        return f"{self.method}{spread}{shifts}"


ReconstructionMethod = Literal["none", "block"]
RECONSTRUCTIONS: tuple[ReconstructionMethod, ...] = get_args(ReconstructionMethod)


def _whole(value: object) -> object:
    """An integer for a number like 3.0, which JSON does not tell from 3; all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_SHORTER = 2  # times that a training can get shorter: to one pass, and to none


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """
    How the kept weights of each block are trained towards what the dense block gave.

    Masks stay as they are. Adam over the calibration windows, one window a step, with a learning
    rate that falls to 0; every eighth window is held out, and says which weights are taken.
    """

    __pydantic_config__ = STRICT

    method: Annotated[
        ReconstructionMethod,
        FieldShown(option="--reconstruction", argument="reconstruction", default="the preset's"),
        Field(
            description="none. block: the kept weights of each pruned block are trained until its "
            "output is near the dense block's."
        ),
    ] = "none"
    passes: Annotated[
        Whole,
        FieldShown(option="--reconstruction-passes"),
        Field(ge=1, le=1000, description="Passes over the calibration windows, at most."),
        BeforeValidator(_whole),
    ] = 2
    blocks: Annotated[
        tuple[Annotated[Whole, Field(ge=1), BeforeValidator(_whole)], ...],
        FieldShown(option="--reconstruction-blocks"),
        Field(
            max_length=_SHORTER,
            description="Where the training gets shorter: so many of the first blocks are trained "
            "in all passes, and those behind them in one; those behind a second number are not "
            "trained. Without numbers all blocks are trained in all passes.",
            exclude_if=lambda blocks: not blocks,
        ),
    ] = ()
    learning_rate: Annotated[
        Number,
        FieldShown(option="--reconstruction-rate"),
        Field(
            gt=0,
            le=1,
            description="Learning rate of Adam in the first step, as a share of the root mean "
            "square of a parameter's kept weights; it falls to 0.",
        ),
    ] = 5e-3
    seed: Annotated[
        Whole,
        FieldShown(option="--reconstruction-seed"),
        Field(ge=0, lt=SEEDS, description="Seed of the order of the windows."),
        BeforeValidator(_whole),
    ] = 0

    def __post_init__(self) -> None:
        check_choice("reconstruction", self.method, RECONSTRUCTIONS)
        passes = self.passes
        if not isinstance(passes, int) or isinstance(passes, bool) or not 1 <= passes <= 1000:
            raise InvalidInput(f"reconstruction passes={passes!r} is not in 1..1000.")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        self._check_blocks()
        rate = self.learning_rate
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 < rate <= 1:
            raise InvalidInput(f"reconstruction learning_rate={rate!r} is not above 0 and up to 1.")
        check_seed(self.seed)
        if not self.wanted and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise InvalidInput(
                "reconstruction method 'none' trains nothing, so passes, blocks, learning_rate and "
                "seed say nothing. Leave them out, or take method 'block'."
            )

    @property
    def wanted(self) -> bool:
        """Return whether anything is trained."""
        return self.method != "none"

    def _check_blocks(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in self.blocks)
        if not whole or len(self.blocks) > _SHORTER or [*self.blocks] != sorted(self.blocks):
            raise InvalidInput(
                f"reconstruction blocks={[*self.blocks]!r} are not up to {_SHORTER} numbers above "
                "0, the smaller one first: how many blocks have all passes, and how many have any."
            )

    def passes_of(self, number: int) -> int:
        """In how many passes a block is trained, by its number from 0."""
        return (self.passes, 1, 0)[sum(number >= first for first in self.blocks)]

    def shorter(self, number: int) -> "Reconstruction":
        """The same with fewer passes from the block of a number on."""
        firsts = (*self.blocks, number) if self.blocks or self.passes > 1 else (number, number)
        return replace(self, blocks=firsts[:_SHORTER])

    def __str__(self) -> str:
        """In words, for people."""
        if not self.wanted:
            return "reconstruction none"
        shorter = (
            "", " in the first {} blocks and one in the others,",
            " in the first {} blocks and one up to block {},",
        )[len(self.blocks)].format(*self.blocks)  # fmt: skip
        passes = f"{self.passes} passes{shorter} from rate {self.learning_rate:g}"
        return f"reconstruction {self.method}, {passes}"


def with_method(value: Any) -> Any:
    """A reconstruction as it was given, by its method if that was left out: who says how trains."""
    says_how = isinstance(value, Mapping) and value and "method" not in value
    return {**value, "method": "block"} if says_how else value


NormSource = Literal["dense", "sequential"]
Permutation = Literal["none", "score"]
Repruning = Literal["none", "dsnot", "swaps", "admm"]
Update = Literal["none", "obs", "least-squares", "sparsegpt", "admm", "alps"]
NORM_SOURCES: tuple[NormSource, ...] = get_args(NormSource)
PERMUTATIONS: tuple[Permutation, ...] = get_args(Permutation)
REPRUNINGS: tuple[Repruning, ...] = get_args(Repruning)
UPDATES: tuple[Update, ...] = get_args(Update)
CHOOSING: tuple[Update, ...] = ("sparsegpt", "admm", "alps")  # the mask too
MOST_SHRINKAGE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Steps(JsonDocument):
    """
    Steps of a pruning beside the score.
    """

    __pydantic_config__ = STRICT

    linears: Annotated[
        Linears,
        FieldShown(fold="Which linears"),
        Field(
            description="Which linears are pruned, and which have a sparsity of their own.",
            exclude_if=lambda linears: not linears,
        ),
    ] = Linears()
    statistics: Annotated[
        NormSource,
        Field(
            description="Model that the activation norms of a score come from: dense; sequential, "
            "where the blocks before are pruned already, as in the code of Wanda and RIA, which "
            "needs the calibration text.",
            exclude_if=lambda statistics: statistics == "dense",
        ),
    ] = "dense"
    allocation: Annotated[
        Allocation,
        Field(
            description="How the sparsity is spread over the linears; in a search, its method is "
            "the only one."
        ),
    ] = Allocation()
    permutation: Annotated[
        Permutation,
        Field(
            description="Order of the input channels before N:M groups are cut: none; score keeps "
            "the most score."
        ),
    ] = "none"
    deployable: Annotated[
        Flag,
        Field(
            description="Whether only those input channels are permuted whose order can be folded "
            "into the stored weights, so that N:M holds as they are stored and no runtime has to "
            "permute.",
            exclude_if=lambda deployable: not deployable,
        ),
    ] = False
    repruning: Annotated[
        Repruning,
        Field(
            description="Improvement of the finished mask: none; dsnot; swaps, each of which "
            "lowers the error of its row; admm, which looks for the mask whose kept weights, "
            "changed by the update, make the least error."
        ),
    ] = "none"
    update: Annotated[
        Update,
        Field(
            description="Change of the weights that stay. With none, they stay as they are. obs "
            "works column by column, like SparseGPT, with a given mask; least-squares continues "
            "towards the least error that the mask allows. sparsegpt, admm and alps, as "
            "published, choose the mask themselves, so that the score has no effect."
        ),
    ] = "none"
    shrinkage: Annotated[
        Number,
        Field(
            ge=0,
            le=MOST_SHRINKAGE,
            description="How much the second moments that re-pruning and update work with are "
            "shrunk towards their diagonal, so that they do not follow chance: all others are "
            "multiplied by tokens / (tokens + shrinkage * in_features). 0: not at all, as "
            "published.",
            exclude_if=lambda shrinkage: not shrinkage,
        ),
    ] = 0.0
    reconstruction: Annotated[
        Reconstruction,
        BeforeValidator(with_method),
        Field(
            description="Training of the kept weights, block by block; only the winner of a "
            "search has it.",
            exclude_if=lambda given: not given.wanted,
        ),
    ] = Reconstruction()

    def __post_init__(self) -> None:
        check_choice("statistics", self.statistics, NORM_SOURCES)
        check_choice("permutation", self.permutation, PERMUTATIONS)
        check_choice("repruning", self.repruning, REPRUNINGS)
        check_choice("update", self.update, UPDATES)
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
        check_number("shrinkage", self.shrinkage, 0, MOST_SHRINKAGE)
        if self.shrinkage and not self.reads_moments:
            raise InvalidInput(
                f"shrinkage={self.shrinkage:g} has nothing to shrink: only repruning 'swaps' "
                "and 'admm' and an update look at second moments. Take one of them, or leave it "
                "out."
            )

    @property
    def reads_moments(self) -> bool:
        """Return whether a step looks at more of the second moments than their diagonal."""
        return self.repruning in ("swaps", "admm") or self.update != "none"

    @property
    def needs_text(self) -> bool:
        """Return whether more than a bundle is needed: second moments of all inputs, in full."""
        return (
            self.statistics != "dense"
            or self.reads_moments
            or self.repruning != "none"
            or self.reconstruction.wanted
        )

    @property
    def gives_up_orders(self) -> bool:
        """Return whether linears are kept from an order of channels that they would have."""
        return self.deployable and self.permutation != "none"

    def trained_at_once(self, finalists: int) -> bool:
        """Whether the only finalist is measured as it is trained, and not before that as well."""
        # A block whose training does not lower its error on held-out windows stays as it was. What
        # orders that fold give up is told by the untrained one.
        trained = self.reconstruction.wanted and self.before_reconstruction.needs_text
        return finalists == 1 and trained and not self.gives_up_orders

    @property
    def chooses_mask(self) -> bool:
        """Return whether the update chooses what is removed, so that a score has no say."""
        return self.update in CHOOSING

    @property
    def rated(self) -> Self:
        """The part that a proxy rates: which linears are pruned, and how much each loses."""
        return type(self)(linears=self.linears, allocation=self.allocation)

    @property
    def masked(self) -> Self:
        """The part that gives a mask without a text."""
        return replace(self.rated, permutation=self.permutation, deployable=self.deployable)

    @property
    def changes_weights(self) -> bool:
        """Return whether weights that stay have other values afterwards."""
        return self.update != "none" or self.reconstruction.wanted

    @property
    def beside_mask(self) -> list[str]:
        """The names of the steps that come after the score and the allocation."""
        steps = [step for step in (self.permutation, self.repruning, self.update) if step != "none"]
        return [*steps, *(["reconstruction"] if self.reconstruction.wanted else [])]

    @property
    def before_reconstruction(self) -> Self:
        return replace(self, reconstruction=Reconstruction())

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


@optional(Steps)
class StepsSpec(Partial):
    """Describe the steps of candidates beside the score. What is null is the preset's."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Score, pattern and steps together: a search can rate it, and a model be pruned with it."""

    method: str  # ``crepe``, or the name of the baseline that it stands for
    coefficients: Coefficients  # The score
    pattern: Pattern  # What is removed, and where it is counted
    steps: Steps = Steps()  # What happens beside the score

    def __post_init__(self) -> None:
        self.pattern.refuse_structured("no score of single weights does that")
        self.steps.check_pattern(self.pattern)

    def to_dict(self) -> dict[str, Any]:
        """
        The candidate as JSON values, without the share that its pattern removes.

        All candidates of a search have that in common; only their scopes differ.
        """
        return {
            "method": self.method,
            "scope": self.pattern.scope.value,
            "coefficients": self.coefficients.to_dict(),
            "steps": self.steps.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], pattern: Pattern) -> Self:
        """Read what :meth:`to_dict` gave, among other keys."""
        return cls(
            method=values["method"],
            coefficients=Coefficients(**values["coefficients"]),
            pattern=pattern.within(Scope(values["scope"])),
            steps=Steps.from_dict(values["steps"]),
        )
