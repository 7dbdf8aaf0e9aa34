"""
The importance score of a weight: the coefficients of its parts.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Number, Stored, Whole, check_choice

KERNEL_SIZES = (3, 5, 9, 15)  # that a bundle is made for, and that a search chooses from
Normalisation = Literal["mean", "sum", "none"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)


@dataclass(frozen=True, kw_only=True)
class Coefficients(Stored):
    """
    One importance score: how much each part of it counts.

    With A = |W|, x the activation norm and g the Fisher row weight:

        R = row * A/mean_row(A) + column * A/mean_col(A)
            + neighbourhood * A/mean_kxk(A)
        score = R * x**activation_exponent * g**gradient_exponent

    A common factor of the three coefficients changes nothing.
    """

    __pydantic_config__ = STRICT

    row: Annotated[
        Number, Field(description="Weight of the magnitude relative to its output row, >= 0.")
    ]
    column: Annotated[
        Number, Field(description="Weight of the magnitude relative to its input channel, >= 0.")
    ]
    neighbourhood: Annotated[
        Number,
        Field(description="Weight of the magnitude relative to the k x k window around it, >= 0."),
    ]
    kernel_size: Annotated[Whole, Field(description="k, odd, 3 to 999.")] = 3
    activation_exponent: Annotated[
        Number, Field(description="0 ignores the activations, 1 is Wanda's choice.")
    ] = 0.5
    gradient_exponent: Annotated[
        Number,
        Field(
            description="0 is CRePE as published, 0.5 the second-order choice. It cancels within "
            "one output row."
        ),
    ] = 0.0
    normalisation: Annotated[
        Normalisation,
        Field(
            description="mean as in the formula; sum divides the row and column terms by sums, as "
            "RIA does; none leaves R = A."
        ),
    ] = "mean"

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
        check_choice("normalisation", self.normalisation, NORMALISATIONS)
