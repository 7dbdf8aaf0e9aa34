"""
What a pruning does beside the score: linears, allocation, permutation, re-pruning, update,
reconstruction.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.allocation import Allocation
from pho_service.spec.document import STRICT, Document, Flag, Number, check_choice, check_number
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.reconstruction import RECONSTRUCTION, Reconstruction

NormSource = Literal["dense", "sequential"]
Permutation = Literal["none", "score", "error"]
Repruning = Literal["none", "dsnot", "swaps", "admm"]
Update = Literal["none", "obs", "least-squares", "sparsegpt", "admm", "alps"]
NORM_SOURCES: tuple[NormSource, ...] = get_args(NormSource)
PERMUTATIONS: tuple[Permutation, ...] = get_args(Permutation)
REPRUNINGS: tuple[Repruning, ...] = get_args(Repruning)
UPDATES: tuple[Update, ...] = get_args(Update)
CHOOSING: tuple[Update, ...] = ("sparsegpt", "admm", "alps")  # the mask too
MOST_SHRINKAGE = 1000.0

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
                f"shrinkage={self.shrinkage:g} has nothing to shrink: only permutation 'error', "
                "repruning 'swaps' and 'admm' and an update look at second moments. Take one of "
                "them, or leave it out."
            )

    @property
    def reads_moments(self) -> bool:
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
            or self.reads_moments
            or self.repruning != "none"
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
        """The fields as JSON; what few searches have, only where it says something."""
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
