"""
The space of a search, and searches with a name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from pydantic import Field, ValidationInfo, field_validator

from pho_service.errors import InvalidInput
from pho_service.spec.baselines import BASELINES
from pho_service.spec.calibration import KernelSizes
from pho_service.spec.document import STRICT, JsonDocument, Number, Partial, optional
from pho_service.spec.pattern import KERNEL_SIZES, Coefficients, Pattern, Scope
from pho_service.spec.steps import (
    ALLOCATIONS,
    Allocation,
    AllocationMethod,
    Candidate,
    Reconstruction,
    Steps,
)

# Low and high; equal ones fix a value.
Bounds = Annotated[tuple[Number, ...], Field(min_length=2, max_length=2)]

# RIA's coefficients as a point of a search space, but for its sums instead of means: where a
# hill climb begins, with the first of the kernel sizes.
RIA: dict[str, Any] = {
    "neighbourhood_share": 0.0, "row_share": 0.5, "activation_exponent": 0.5,
    "gradient_exponent": 0.0, "allocation": "uniform", "allocation_spread": Allocation().spread,
}  # fmt: skip

# Fields that list their values, with an example.
_LISTS = {"kernel_sizes": "3,5,9", "allocations": "uniform,owl,fisher,curves"}

# The highest value that a bound may have, by name.
_HIGHEST = {
    "neighbourhood_share": 1.0,
    "row_share": 1.0,
    "activation_exponent": 4.0,
    "gradient_exponent": 2.0,
    "allocation_spread": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class SearchSpace(JsonDocument):
    """
    The box of a search. A bound whose two ends are equal fixes the value.
    """

    __pydantic_config__ = STRICT

    neighbourhood_share: Annotated[
        Bounds,
        Field(description="The neighbourhood's part of the three coefficients, within [0, 1]."),
    ] = (0.0, 1.0)
    row_share: Annotated[
        Bounds,
        Field(description="The row's part of what the neighbourhood leaves, within [0, 1]."),
    ] = (0.0, 1.0)
    activation_exponent: Annotated[
        Bounds, Field(description="Exponent of the activations, within [0, 4].")
    ] = (0.0, 1.5)
    gradient_exponent: Annotated[
        Bounds, Field(description="Exponent of the gradients, within [0, 2].")
    ] = (0.0, 1.0)
    kernel_sizes: Annotated[
        KernelSizes,
        Field(description="Sizes of the neighbourhood, odd; all that were calibrated by default."),
    ] = KERNEL_SIZES
    allocations: Annotated[
        tuple[AllocationMethod, ...],
        Field(
            min_length=1,
            max_length=4,
            description="Methods of allocation, instead of steps.allocation.method.",
        ),
    ] = ("uniform",)
    allocation_spread: Annotated[
        Bounds, Field(description="Spread of the allocation, within [0, 1].")
    ] = (0.2, 0.2)

    def __post_init__(self) -> None:
        for name, highest in _HIGHEST.items():
            low, high = getattr(self, name)
            if not 0 <= low <= high <= highest:
                raise InvalidInput(
                    f"search space {name}={low:g}:{high:g} is not allowed: "
                    f"0 <= low <= high <= {highest:g} must hold."
                )
        if not self.kernel_sizes:
            raise InvalidInput("search space kernel_sizes is empty. Give at least one odd size.")
        for k in self.kernel_sizes:
            Coefficients(row=1, column=1, neighbourhood=1, kernel_size=k)  # raises if k is no size
        if not self.allocations:
            raise InvalidInput("search space allocations is empty. Give at least uniform.")
        for method in self.allocations:
            Allocation(method=method)  # raises if it is none

    def fitted(self, pattern: Pattern) -> Self:
        """The box without what has no effect in ``pattern``: g cancels within a row."""
        fitted = self
        if pattern.scope is Scope.ROW:
            fitted = replace(fitted, gradient_exponent=(0.0, 0.0))
        if self.allocations == ("uniform",):
            low = self.allocation_spread[0]
            fitted = replace(fitted, allocation_spread=(low, low))
        return fitted

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the box, fixed values included."""
        space: dict[str, BaseDistribution] = {
            name: FloatDistribution(*getattr(self, name)) for name in _HIGHEST
        }
        space["kernel_size"] = CategoricalDistribution(self.kernel_sizes)
        space["allocation"] = CategoricalDistribution(self.allocations)
        return space

    def recorded_distributions(self) -> dict[str, BaseDistribution]:
        """
        The widest form of the box, in which every trial of a study is recorded.

        Baselines lie outside of a narrow box; ``method`` tells them apart.
        """
        space: dict[str, BaseDistribution] = {
            name: FloatDistribution(0.0, highest) for name, highest in _HIGHEST.items()
        }
        space["kernel_size"] = CategoricalDistribution(self.kernel_sizes)
        space["allocation"] = CategoricalDistribution(ALLOCATIONS)
        space["method"] = CategoricalDistribution(("crepe", *BASELINES))
        return space

    def candidate(self, params: Mapping[str, Any], pattern: Pattern, steps: Steps) -> Candidate:
        """
        The candidate that ``params``, drawn from :meth:`distributions`, stand for.

        ``steps`` says all that is not searched.
        """
        neighbourhood, row = params["neighbourhood_share"], params["row_share"]
        coefficients = Coefficients(
            row=(1 - neighbourhood) * row,
            column=(1 - neighbourhood) * (1 - row),
            neighbourhood=neighbourhood,
            kernel_size=params["kernel_size"],
            activation_exponent=params["activation_exponent"],
            gradient_exponent=params["gradient_exponent"],
        )
        allocation = replace(
            steps.allocation, method=params["allocation"], spread=params["allocation_spread"]
        )
        return Candidate(
            method="crepe",
            coefficients=coefficients,
            pattern=pattern,
            steps=replace(steps, allocation=allocation),
        )

    def params(self, candidate: Candidate) -> dict[str, Any]:
        """
        The point of :meth:`recorded_distributions` for a candidate, baselines included.
        """
        c = candidate.coefficients
        total = c.row + c.column + c.neighbourhood
        rest = c.row + c.column
        return {
            "neighbourhood_share": c.neighbourhood / total,
            "row_share": c.row / rest if rest else 0.5,
            "activation_exponent": c.activation_exponent,
            "gradient_exponent": c.gradient_exponent,
            "kernel_size": c.kernel_size,
            "allocation": candidate.steps.allocation.method,
            "allocation_spread": candidate.steps.allocation.spread,
            "method": candidate.method,
        }

    def nearest(self, candidate: Candidate) -> dict[str, Any]:
        """The point of :meth:`distributions` that is nearest to a candidate found elsewhere."""
        params = self.params(candidate)
        del params["method"]
        for name in _HIGHEST:
            low, high = getattr(self, name)
            params[name] = min(max(params[name], low), high)
        size = params["kernel_size"]
        params["kernel_size"] = min(self.kernel_sizes, key=lambda k: (abs(k - size), k))
        if params["allocation"] not in self.allocations:
            params["allocation"] = self.allocations[0]
        return params

    def effective(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """
        ``params`` without what changes no mask beside the others.

        No neighbourhood, no window; nothing but the neighbourhood, nothing to split between row
        and column; no allocation but a uniform one, no spread.
        """
        without = {
            "kernel_size": params["neighbourhood_share"] == 0,
            "row_share": params["neighbourhood_share"] == 1,
            "allocation_spread": params["allocation"] == "uniform",
        }
        return {name: value for name, value in params.items() if not without.get(name)}

    def on_border(self, params: Mapping[str, Any]) -> list[str]:
        """
        Which values lie within 2 % of an end of their range, or at an extreme kernel size, where
        there is more beyond it, and they change a mask.
        """
        names, effective = [], self.effective(params)
        for name, highest in _HIGHEST.items():
            low, high = getattr(self, name)
            margin = 0.02 * (high - low)
            below = low > 0 and params[name] < low + margin
            above = high < highest and params[name] > high - margin
            if name in effective and margin and (below or above):
                names.append(name)
        ends = {self.kernel_sizes[0], self.kernel_sizes[-1]} - {3}  # the smallest that there is
        if len(self.kernel_sizes) > 1 and effective.get("kernel_size") in ends:
            names.append("kernel_size")
        return names


@optional(SearchSpace)
class SearchSpaceSpec(Partial):
    """Bounds [low, high] of what is searched; equal ones fix a value, null is the preset's."""

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            SearchSpace(**{str(info.field_name): tuple(value)})  # raises with the rule
        if value is not None and info.field_name == "allocations":
            return [method for method in ALLOCATIONS if method in value]
        return value

    def given(self) -> dict[str, Any]:
        """The bounds that are given, as a space has them."""
        return {name: tuple(values) for name, values in super().given().items()}


def parse_bounds(texts: Sequence[str]) -> dict[str, Any]:
    """
    Read ``name=low:high``, ``name=value``, ``kernel_sizes=3,5`` or ``allocations=uniform,fisher``.
    """
    bounds: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in (*_HIGHEST, *_LISTS):
            raise InvalidInput(
                f"search space {text!r}: {name!r} is not one of {', '.join((*_HIGHEST, *_LISTS))}."
            )
        try:
            if name == "kernel_sizes":
                bounds[name] = tuple(sorted({int(k) for k in value.split(",")}))
            elif name == "allocations":
                bounds[name] = tuple(m for m in ALLOCATIONS if m in _known(value.split(",")))
            else:
                low, _, high = value.partition(":")
                bounds[name] = (float(low), float(high or low))
        except ValueError:
            example = _LISTS.get(name, "0.2:0.8")
            raise InvalidInput(
                f"search space {text!r} is not understood. Write {name}={example}."
            ) from None
    return bounds


def _known(methods: Sequence[str]) -> Sequence[str]:
    if not set(methods) <= set(ALLOCATIONS):
        raise ValueError(methods)
    return methods


PresetName = Literal["score", "crepe", "crepe-plus", "best"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)
DEFAULT_PRESET: PresetName = "best"
SHRINKAGE = 1.0  # of best


@dataclass(frozen=True, kw_only=True)
class Preset:
    """
    Attributes:
        steps: What every candidate goes through.
        bounds: Fields of the search space that differ from its defaults.
    """

    steps: Steps = field(default_factory=Steps)
    bounds: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, pattern: Pattern) -> Self:
        """The preset for a pattern."""
        if name not in PRESETS:
            raise InvalidInput(f"preset {name!r} is not one of {', '.join(PRESETS)}.")
        if name == "score":
            return cls()
        if name == "crepe":
            return cls(bounds={"gradient_exponent": (0.0, 0.0)})
        plus = cls._plus(pattern)
        if name == "crepe-plus":
            return plus
        trained = Reconstruction(method="block")
        steps = replace(
            plus.steps,
            repruning="admm",
            update="least-squares",
            shrinkage=SHRINKAGE,
            reconstruction=trained,
        )
        return replace(plus, steps=steps)

    def changed(self, given: Mapping[str, Any], bounds: Mapping[str, Any]) -> Self:
        """
        The preset with what a user said otherwise.

        Where no step is left that has a use for the preset's shrinkage, it goes.
        """
        base = self.bounds
        if "allocation" in given:
            base = {name: value for name, value in base.items() if "allocation" not in name}
        try:
            steps = replace(replace(self.steps, shrinkage=0.0), **given)
            if "shrinkage" not in given and steps.reads_moments:
                steps = replace(steps, shrinkage=self.steps.shrinkage)
        except InvalidInput as error:
            raise InvalidInput(
                f"{error} Steps that were not given are the preset's; those of 'score' are none."
            ) from error
        return replace(self, steps=steps, bounds={**base, **bounds})

    @classmethod
    def _plus(cls, pattern: Pattern) -> Self:
        if pattern.group:
            return cls(steps=Steps(permutation="score", repruning="swaps"))
        if pattern.scope is Scope.GLOBAL:
            return cls(steps=Steps(repruning="swaps"))
        return cls(
            steps=Steps(allocation=Allocation(method="fisher"), repruning="swaps"),
            bounds={"allocation_spread": (0.05, 0.4)},
        )
