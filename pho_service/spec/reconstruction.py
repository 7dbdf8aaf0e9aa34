"""
Block reconstruction: what the kept weights of a block are trained with, after it is pruned.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, Number, Shown, Whole, check_choice
from pho_service.spec.seed import SEEDS, check_seed

ReconstructionMethod = Literal["none", "block"]
RECONSTRUCTIONS: tuple[ReconstructionMethod, ...] = get_args(ReconstructionMethod)


def _whole(value: object) -> object:
    """An integer for a number like 3.0, which JSON does not tell from 3; all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
        Shown(option="--reconstruction", default="the preset's"),
        Field(
            description="none. block: the kept weights of each pruned block are trained until its "
            "output is near the dense block's."
        ),
    ] = "none"
    passes: Annotated[
        Whole,
        Shown(option="--reconstruction-passes"),
        Field(ge=1, le=1000, description="Passes over the calibration windows, at most."),
        BeforeValidator(_whole),
    ] = 2
    learning_rate: Annotated[
        Number,
        Shown(option="--reconstruction-rate"),
        Field(
            gt=0,
            le=1,
            description="Learning rate of Adam in the first step, as a share of the root mean "
            "square of a parameter's kept weights; it falls to 0.",
        ),
    ] = 5e-3
    seed: Annotated[
        Whole,
        Shown(option="--reconstruction-seed"),
        Field(ge=0, lt=SEEDS, description="Seed of the order of the windows."),
        BeforeValidator(_whole),
    ] = 0

    def __post_init__(self) -> None:
        check_choice("reconstruction", self.method, RECONSTRUCTIONS)
        passes = self.passes
        if not isinstance(passes, int) or isinstance(passes, bool) or not 1 <= passes <= 1000:
            raise InvalidInput(f"reconstruction passes={passes!r} is not in 1..1000.")
        rate = self.learning_rate
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 < rate <= 1:
            raise InvalidInput(f"reconstruction learning_rate={rate!r} is not above 0 and up to 1.")
        check_seed(self.seed)
        if not self.wanted and any(getattr(self, f.name) != f.default for f in fields(self)):
            raise InvalidInput(
                "reconstruction method 'none' trains nothing, so passes, learning_rate and seed "
                "say nothing. Leave them out, or take method 'block'."
            )

    @property
    def wanted(self) -> bool:
        """Whether anything is trained."""
        return self.method != "none"

    def __str__(self) -> str:
        """In words, for people."""
        return (
            f"reconstruction {self.method}, {self.passes} passes from rate {self.learning_rate:g}"
            if self.wanted
            else "reconstruction none"
        )
