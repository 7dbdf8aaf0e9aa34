"""
Searches with a name: what is searched, and what every candidate goes through.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, get_args

from pho_service.errors import InvalidInput
from pho_service.spec.allocation import Allocation
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.reconstruction import Reconstruction
from pho_service.spec.steps import Steps

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
        """
        The preset for a pattern.

        Args:
            name: ``score``: the score with its gradient exponent, nothing else.
                ``crepe``: as published: no gradient exponent. ``crepe-plus``:
                the best that leaves kept weights untouched. ``best``: kept
                weights are updated, and the winner's blocks trained, too.
            pattern: What is pruned. Allocation is for scopes row and layer;
                permutation for N:M.

        Raises:
            InvalidInput: Another name.
        """
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

        Args:
            given: Fields of :class:`Steps` by name; an allocation is the only one then.
            bounds: Fields of the search space.

        Raises:
            InvalidInput: The steps contradict each other.
        """
        own = self.bounds
        if "allocation" in given:
            own = {name: value for name, value in own.items() if "allocation" not in name}
        try:
            steps = replace(replace(self.steps, shrinkage=0.0), **given)
            if "shrinkage" not in given and steps.reads_moments:
                steps = replace(steps, shrinkage=self.steps.shrinkage)
        except InvalidInput as error:
            raise InvalidInput(
                f"{error} Steps that were not given are the preset's; those of 'score' are none."
            ) from error
        return replace(self, steps=steps, bounds={**own, **bounds})

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
