"""
What a search may choose: a point on the simplex of the coefficients, and the rest of the score.

A common factor of the coefficients changes no mask, so two shares describe
all three: how much the neighbourhood counts, and how the remainder is split
between row and column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from pho_service.errors import InvalidInput
from pho_service.spec import BASELINES, Candidate, Coefficients, Pattern, Scope

Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """
    The box of a search. A bound whose two ends are equal fixes the value.

    Attributes:
        neighbourhood_share: The neighbourhood's part of the three coefficients.
        row_share: The row's part of what the neighbourhood leaves.
        activation_exponent: 0.5 is RIA's choice, 1 Wanda's.
        gradient_exponent: 0.5 is the second-order choice. Cancels in scope row.
        kernel_sizes: Odd sizes, ascending; those that the bundle has.
    """

    neighbourhood_share: Bounds = (0.0, 1.0)
    row_share: Bounds = (0.0, 1.0)
    activation_exponent: Bounds = (0.0, 1.5)
    gradient_exponent: Bounds = (0.0, 1.0)
    kernel_sizes: tuple[int, ...] = (3, 5, 9, 15)

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

    def fitted(self, pattern: Pattern) -> Self:
        """The box without what has no effect in ``pattern``: g cancels within a row."""
        if pattern.scope is Scope.ROW:
            return replace(self, gradient_exponent=(0.0, 0.0))
        return self

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's form of the box, fixed values included."""
        space: dict[str, BaseDistribution] = {
            name: FloatDistribution(*getattr(self, name)) for name in _HIGHEST
        }
        space["kernel_size"] = CategoricalDistribution(self.kernel_sizes)
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
        space["method"] = CategoricalDistribution(("crepe", *BASELINES))
        return space

    def to_dict(self) -> dict[str, Any]:
        """The bounds as JSON values."""
        return {name: list(values) for name, values in asdict(self).items()}

    def candidate(self, params: Mapping[str, Any], pattern: Pattern) -> Candidate:
        """The candidate that ``params``, drawn from :meth:`distributions`, stand for."""
        neighbourhood, row = params["neighbourhood_share"], params["row_share"]
        coefficients = Coefficients(
            row=(1 - neighbourhood) * row,
            column=(1 - neighbourhood) * (1 - row),
            neighbourhood=neighbourhood,
            kernel_size=params["kernel_size"],
            activation_exponent=params["activation_exponent"],
            gradient_exponent=params["gradient_exponent"],
        )
        return Candidate(method="crepe", coefficients=coefficients, pattern=pattern)

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
            "method": candidate.method,
        }

    def on_border(self, params: Mapping[str, Any]) -> list[str]:
        """
        Which values lie within 2 % of an end of their range, or at an extreme kernel size.

        A fixed value has no border.
        """
        names = []
        for name in _HIGHEST:
            low, high = getattr(self, name)
            margin = 0.02 * (high - low)
            if margin and not low + margin <= params[name] <= high - margin:
                names.append(name)
        ends = (self.kernel_sizes[0], self.kernel_sizes[-1])
        if len(self.kernel_sizes) > 1 and params["kernel_size"] in ends:
            names.append("kernel_size")
        return names


def parse_bounds(texts: Sequence[str]) -> dict[str, Any]:
    """
    Read ``name=low:high``, ``name=value`` or ``kernel_sizes=3,5`` as fields of a space.

    Raises:
        InvalidInput: Unknown name, or no number.
    """
    bounds: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in (*_HIGHEST, "kernel_sizes"):
            raise InvalidInput(
                f"search space {text!r}: {name!r} is not one of "
                f"{', '.join((*_HIGHEST, 'kernel_sizes'))}."
            )
        try:
            if name == "kernel_sizes":
                bounds[name] = tuple(sorted({int(k) for k in value.split(",")}))
            else:
                low, _, high = value.partition(":")
                bounds[name] = (float(low), float(high or low))
        except ValueError:
            example = "3,5,9" if name == "kernel_sizes" else "0.2:0.8"
            raise InvalidInput(
                f"search space {text!r} is not understood. Write {name}={example}."
            ) from None
    return bounds


# The highest value that a bound may have, by name.
_HIGHEST = {
    "neighbourhood_share": 1.0,
    "row_share": 1.0,
    "activation_exponent": 4.0,
    "gradient_exponent": 2.0,
}
