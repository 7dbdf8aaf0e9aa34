"""
What a pruning does beside the score: linears, allocation, permutation, re-pruning, update,
reconstruction.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, get_args

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.allocation import Allocation
from pho_service.spec.document import (
    STRICT,
    Flag,
    Number,
    Partial,
    Shown,
    Stored,
    check_choice,
    check_number,
    optional,
)
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.reconstruction import Reconstruction

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


@dataclass(frozen=True, kw_only=True)
class Steps(Stored):
    """
    Steps of a pruning beside the score.
    """

    __pydantic_config__ = STRICT

    linears: Annotated[
        Linears,
        Shown(fold="Which linears"),
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
            "the most score; error gives the least error of the outputs."
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


@optional(Steps)
class StepsSpec(Partial):
    """Describe the steps of candidates beside the score. What is null is the preset's."""
