"""
What a pruning is, in plain values: a pattern, coefficients, and both together.

No torch here, so that the search, the command line's help and (later) the
HTTP front end can speak of candidates without loading it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Any, Literal, Self, get_args

from pho_service.errors import InvalidInput

Normalisation = Literal["mean", "sum", "none"]
NORMALISATIONS: tuple[Normalisation, ...] = ("mean", "sum", "none")


# How many candidates each sampler gives before it wants to know their values.
SAMPLERS = {"cmaes": 8, "tpe": 1, "random": 8, "qmc": 8, "gp": 1, "hill-climb": 1}

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

# Searches with a name; pho_service.search.presets says what each is.
PresetName = Literal["score", "crepe", "crepe-plus", "best"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)

OBJECTIVES = ("activation-reconstruction", "gini", "perplexity")
WEIGHTINGS = ("blend", "fisher", "relative", "absolute")
OVER = ("mean", "worst")  # how several models count in one search


# What a model is calibrated on if nothing is said: the literature's choice.
C4_DATASET = "allenai/c4"
C4_FILE = "en/c4-train.00000-of-01024.json.gz"

SEEDS = 2**32  # what every generator in use takes


def check_seed(seed: int) -> None:
    """Raise InvalidInput unless 0 <= seed < 2**32."""
    if seed < 0:
        raise InvalidInput(f"seed={seed} is below 0.")
    if seed >= SEEDS:
        raise InvalidInput(f"seed={seed} is too large: it must be below {SEEDS}.")


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
    How many weights go, and where they are counted: a ratio or N:M.

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
                f"{self.scope.value!r} has no meaning for it. Leave --scope out."
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
        How many of ``count`` weights go: the exact product, rounded down.

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


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """
    One importance score: how much each part of it counts.

    With A = |W|, x the activation norm and g the Fisher row weight:

        R = row * A/mean_row(A) + column * A/mean_col(A)
            + neighbourhood * A/mean_kxk(A)
        score = R * x**activation_exponent * g**gradient_exponent

    A common factor of the three coefficients changes nothing.

    Attributes:
        row: Weight of the magnitude relative to its output row, >= 0.
        column: Relative to its input channel, >= 0.
        neighbourhood: Relative to the k x k window around it, >= 0.
        kernel_size: k, odd and at least 3.
        activation_exponent: 0 ignores the activations, 1 is Wanda's choice.
        gradient_exponent: 0 is CRePE as published, 0.5 the second-order choice.
            It cancels within one output row.
        normalisation: ``mean`` as above; ``sum`` divides the row and column
            terms by sums, as RIA does; ``none`` leaves R = A.
    """

    row: float
    column: float
    neighbourhood: float
    kernel_size: int = 3
    activation_exponent: float = 0.5
    gradient_exponent: float = 0.0
    normalisation: Normalisation = "mean"

    def __post_init__(self) -> None:
        for name in (
            "row", "column", "neighbourhood", "activation_exponent", "gradient_exponent",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InvalidInput(f"coefficient {name}={value!r} is not a number.")
            if not 0 <= value <= 1e30:
                raise InvalidInput(
                    f"coefficient {name}={value} is not allowed: it must lie between 0 and 1e30."
                )
        if self.row + self.column + self.neighbourhood <= 0:
            raise InvalidInput(
                "the coefficients row, column and neighbourhood are all zero, so every weight "
                "would score 0. At least one must be positive."
            )
        k = self.kernel_size
        if not isinstance(k, int) or isinstance(k, bool) or not 3 <= k < 1000 or k % 2 == 0:
            raise InvalidInput(
                f"kernel_size={k!r} is not an odd whole number from 3 to 999: the window must "
                "have a middle."
            )
        if self.normalisation not in NORMALISATIONS:
            raise InvalidInput(
                f"normalisation={self.normalisation!r} is not one of {', '.join(NORMALISATIONS)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


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


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """
    Something a search can rate and a model can be pruned with.

    Attributes:
        method: ``crepe``, or the name of the baseline that it stands for.
        coefficients: The score.
        pattern: What is removed, and where it is counted.
        steps: What happens beside the score.
    """

    method: str
    coefficients: Coefficients
    pattern: Pattern
    steps: Steps = Steps()

    def __post_init__(self) -> None:
        self.steps.check_pattern(self.pattern)


_MAGNITUDE = Coefficients(
    row=1, column=0, neighbourhood=0, activation_exponent=0, normalisation="none"
)
_WANDA = replace(_MAGNITUDE, activation_exponent=1)
_RIA = Coefficients(row=1, column=1, neighbourhood=0, normalisation="sum")
_EQUAL = Coefficients(row=1, column=1, neighbourhood=1)
_FISHER = replace(_WANDA, gradient_exponent=0.5)
BASELINES = (
    "magnitude", "wanda", "ria-row", "ria-layer", "crepe-equal", "fisher", "fisher-bounded",
)  # fmt: skip


def score_baselines(pattern: Pattern) -> list[Candidate]:
    """
    The published scores that every comparison shows, each in its own scope.

    Wanda compares within output rows, magnitude within a layer; RIA is shown
    both ways. CRePE with equal coefficients takes the scope of ``pattern``.

    Source:
        Sun et al. 2023, arXiv:2306.11695 (Wanda); Zhang et al. 2024, ICLR
        "Plug-and-Play" (RIA: sums, exponent 0.5).
    """
    return [
        Candidate(method=method, coefficients=coefficients, pattern=pattern.within(scope))
        for method, coefficients, scope in (
            ("magnitude", _MAGNITUDE, Scope.LAYER),
            ("wanda", _WANDA, Scope.ROW),
            ("ria-row", _RIA, Scope.ROW),
            ("ria-layer", _RIA, Scope.LAYER),
            ("crepe-equal", _EQUAL, pattern.scope),
        )
    ]


def comparison_baselines(pattern: Pattern) -> list[Candidate]:
    """
    The published methods that every comparison shows: scores, OWL with Wanda, SparseGPT.

    Source:
        As :func:`score_baselines`; Yin et al. 2024, arXiv:2310.05175 (OWL, with its
        lambda of 0.08 and one sparsity a block; for N:M it mixes N of M over the blocks);
        Frantar & Alistarh 2023, arXiv:2301.00774 (SparseGPT).
    """
    spread = max(0.08, 1 / pattern.group) if pattern.group else 0.08  # N moves by one at least
    owl = Steps(allocation=Allocation(method="owl", unit="block", spread=spread))
    sparsegpt = Candidate(
        method="sparsegpt",
        coefficients=_WANDA,
        pattern=pattern.within(Scope.LAYER),
        steps=Steps(update="sparsegpt"),
    )
    owl_wanda = Candidate(
        method="owl-wanda", coefficients=_WANDA, pattern=pattern.within(Scope.ROW), steps=owl
    )
    return [*score_baselines(pattern), owl_wanda, sparsegpt]


def search_baselines(
    pattern: Pattern,
    *,
    kernel_size: int,
    fisher: bool,
    steps: Steps = Steps(),
    allocations: tuple[str, ...] = ("uniform",),
) -> list[Candidate]:
    """
    The baselines that may win a search in ``pattern``: none is counted in a wider scope.

    Args:
        pattern: What the user asked for.
        kernel_size: For CRePE with equal coefficients; the others have no window.
        fisher: Add the plain second-order score A * x * sqrt(g) (method
            ``fisher``), which needs Fisher row weights and a scope beyond rows.
        steps: What every candidate of the search goes through; the baselines with one
            sparsity everywhere.
        allocations: Of the search; with ``fisher`` among them, the plain second-order
            score with that allocation is added (method ``fisher-bounded``).
    """
    uniform = replace(steps, allocation=replace(steps.allocation, method="uniform"))
    narrow: dict[tuple[Coefficients, Pattern], Candidate] = {}
    for candidate in score_baselines(pattern):
        scope = min(candidate.pattern.scope, pattern.scope, key=lambda s: s.width)
        coefficients = replace(candidate.coefficients, kernel_size=kernel_size)
        fitted = replace(
            candidate, pattern=pattern.within(scope), coefficients=coefficients, steps=uniform
        )
        narrow.setdefault((fitted.coefficients, fitted.pattern), fitted)
    found = list(narrow.values())
    plain = replace(_FISHER, kernel_size=kernel_size)
    if fisher and pattern.scope is not Scope.ROW:
        found.append(Candidate(method="fisher", coefficients=plain, pattern=pattern, steps=uniform))
    if "fisher" in allocations:
        bounded = replace(steps, allocation=replace(steps.allocation, method="fisher"))
        found.append(
            Candidate(method="fisher-bounded", coefficients=plain, pattern=pattern, steps=bounded)
        )
    return found


def reference_methods(pattern: Pattern) -> dict[str, Candidate]:
    """``wanda``, and ``ria`` in the widest scope of a pattern: what results are measured by."""
    baselines = search_baselines(pattern, kernel_size=3, fisher=False)
    return {
        name: next(c for c in reversed(baselines) if c.method.startswith(name))
        for name in ("wanda", "ria")
    }


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    What a search rates candidates by.

    Attributes:
        name: ``activation-reconstruction`` (the default), ``gini`` or ``perplexity``.
        weighting: How the errors of layers and rows are added up; only
            for activation reconstruction.
        over: How several models count, each relative to what RIA has on it: their ``mean``, or
            the ``worst``; only for activation reconstruction. None: there is one model.
    """

    name: str = "activation-reconstruction"
    weighting: str = "blend"
    over: str | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise InvalidInput(f"objective {self.name!r} is not one of {', '.join(OBJECTIVES)}.")
        if self.over is not None and self.over not in OVER:
            raise InvalidInput(f"over={self.over!r} is not one of {', '.join(OVER)}.")
        if self.over is not None and self.name != "activation-reconstruction":
            raise InvalidInput(
                f"the objective {self.name} has no common scale for several models. Search over "
                "them by activation-reconstruction."
            )
        if self.weighting not in WEIGHTINGS:
            raise InvalidInput(
                f"weighting {self.weighting!r} is not one of {', '.join(WEIGHTINGS)}."
            )

    @property
    def label(self) -> str:
        """``activation-reconstruction/blend``, ``gini`` or ``perplexity``; how models count."""
        if self.name != "activation-reconstruction":
            return self.name
        several = "" if self.over is None else f", {self.over} over models relative to RIA"
        return f"{self.name}/{self.weighting}{several}"

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Gini is maximised: higher went with lower perplexity in our measurements."""
        return "maximize" if self.name == "gini" else "minimize"


SHARDS = 8  # parts of a calibration
SHARDED_FROM = 2**17  # tokens: half of the default's


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """
    How a model is calibrated. The defaults are the literature's 128 x 2048 tokens.

    Attributes:
        samples: Windows of text for the forward pass.
        context_length: Tokens of a window.
        fisher_samples: Windows that are run backward too; None is a quarter of
            ``samples``.
        rows_per_layer: Output rows of each linear that the bundle keeps; 0 keeps all.
        projection_rows: Rows of the random projection of the activations; 0
            keeps the full Gram matrix.
        kernel_sizes: Windows that candidates may use, odd.
        bos: Whether windows start with BOS: ``auto``, ``always``, ``never``.
        seed: Of the text sample, the row sample and the projection.
        mixed_precision: Matrix products of a float32 model are in bfloat16, all sums in float32.
        memory_bytes: What the model's device may have in use at the peak, the model included.
            None is a GPU's free memory, and no limit on a CPU. Results depend on it by their
            rounding at most, so bundles of different limits are one.
    """

    samples: int = 128
    context_length: int = 2048
    fisher_samples: int | None = None
    rows_per_layer: int = 16
    projection_rows: int = 128
    kernel_sizes: tuple[int, ...] = (3, 5, 9, 15)
    bos: str = "auto"
    seed: int = 0
    mixed_precision: bool = False
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise InvalidInput(f"memory_bytes={self.memory_bytes} is below 1.")
        for name, least in (
            ("samples", 1), ("context_length", 8), ("rows_per_layer", 0), ("projection_rows", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise InvalidInput(f"{name}={getattr(self, name)} is below {least}.")
        check_seed(self.seed)
        if self.fisher_samples is not None and not 1 <= self.fisher_samples <= self.samples:
            raise InvalidInput(
                f"fisher_samples={self.fisher_samples} is not in 1..{self.samples}, the samples."
            )
        if not self.kernel_sizes or any(k < 3 or k % 2 == 0 for k in self.kernel_sizes):
            raise InvalidInput(
                f"kernel_sizes={self.kernel_sizes} are not odd whole numbers of at least 3."
            )

    def shards(self, *, stream: bool) -> int:
        """
        Into how many parts the windows are cut whose sums are added up one after the other.

        Several workers can do them at a time. So that the number of workers changes nothing, it
        depends on the settings alone, and all who calibrate cut alike. A streamed model is not cut,
        since each part would read all of it; nor is a full Gram matrix, which is larger than what
        it takes to gather it anew.
        """
        small = self.samples * self.context_length < SHARDED_FROM
        return 1 if small or stream or not self.projection_rows else min(SHARDS, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, all that decides what a bundle holds."""
        values = asdict(self) | {"kernel_sizes": list(self.kernel_sizes)}
        del values["memory_bytes"]
        return values
