"""
The proxy of one score under many allocations, from the error curves of the linears: microseconds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pho_service.pruning.offsets import bounds, kind_of, offset
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.scores import TINY
from pho_service.spec.allocation import Allocation
from pho_service.spec.candidate import Candidate
from pho_service.spec.objective import Weighting
from pho_service.spec.pattern import Pattern

CURVE_POINTS = 16  # sparsities at which each linear's error is known


class AllocationProxy:
    """
    Rates a candidate with other offsets of its allocation.

    The errors of linears add up, and each depends on its own sparsity alone. So they are computed
    at some sparsities, once, and read off between them in the logarithm.

    Args:
        evaluator: Evaluator of the bundle.
        candidate: Its pattern is a ratio, in scope row or layer.
        weighting: Weighting of the rating.

    Attributes:
        allocation: The candidate's, without offsets.
    """

    def __init__(
        self, evaluator: ProxyEvaluator, candidate: Candidate, weighting: Weighting
    ) -> None:
        steps, pattern = candidate.steps, candidate.pattern
        self._pattern = pattern
        self.allocation = replace(steps.allocation, offsets={}, depth=())
        chosen = evaluator.bundle.choose(steps.linears, pattern)
        layers = {layer.name: layer for layer in evaluator.bundle.layers}
        self._names = list(chosen.shared)
        self._sizes = torch.tensor(
            [layers[name].out_features * layers[name].in_features for name in self._names],
            dtype=torch.float64,
        )
        plain = replace(candidate, steps=replace(steps, allocation=self.allocation))
        shares = evaluator.layer_sparsities(plain)
        self._sparsity = torch.tensor([shares[name] for name in self._names], dtype=torch.float64)
        low, high = bounds(pattern, self.allocation.spread)
        self._grid = torch.linspace(max(low, 0.01), min(high, 0.99), CURVE_POINTS).double()
        even = replace(candidate, steps=replace(steps, allocation=Allocation()))
        losses = [
            evaluator.layer_losses(replace(even, pattern=_at(pattern, sparsity)), weighting)
            for sparsity in self._grid.tolist()
        ]
        self._curves = torch.tensor(
            [[at[name] for name in self._names] for at in losses], dtype=torch.float64
        )  # (points, linears)
        rest = losses[0].keys() - set(self._names)
        self._rest = sum(losses[0][name] for name in sorted(rest))  # of sparsities by hand

    @property
    def kinds(self) -> list[str]:
        """The kinds of the linears that the allocation shares the sparsity among, sorted."""
        return sorted({kind_of(name) for name in self._names})

    def rate(self, allocations: Sequence[Allocation]) -> list[float]:
        """
        Rate allocations that differ from the candidate's in ``offsets`` and ``depth`` alone.
        """
        lost = offset(self._names, self._sizes, self._sparsity, allocations, self._pattern)
        at = (lost / self._sizes - self._grid[0]) / (self._grid[1] - self._grid[0])
        below = at.floor().clamp(0, CURVE_POINTS - 2)  # (A, linears)
        logs = self._curves.clamp_min(TINY).log()
        lower, upper = (logs.gather(0, below.long() + step) for step in (0, 1))
        errors = torch.lerp(lower, upper, at - below).exp()
        found: list[float] = (errors.sum(dim=1) + self._rest).tolist()
        return found


def _at(pattern: Pattern, sparsity: float) -> Pattern:
    return replace(pattern, sparsity=round(sparsity, 4))
