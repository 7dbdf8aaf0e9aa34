"""
Which weights of a linear compete for the places that a mask has, and how many places there are.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pho_service.pruning.selection import keep_highest, nm_mask


@dataclass(frozen=True, kw_only=True)
class Support:
    """
    The counts of a mask, without the mask: what a better one may change, and what not.

    Attributes:
        removed: (lines,), int64: weights that each line loses. A line is an
            output row, or the whole linear; empty with a ``group``.
        keep: N of N:M; 0 without a group.
        group: M of N:M; 0 for a ratio.
    """

    removed: Tensor
    keep: int = 0
    group: int = 0

    @classmethod
    def of(cls, mask: Tensor, *, by_row: bool = False, keep: int = 0, group: int = 0) -> Self:
        """
        The counts of a mask.

        Args:
            mask: (out_features, in_features), bool, True = kept.
            by_row: Each output row keeps its own number of weights; otherwise all rows compete.
            keep: N of N:M; only with ``group``.
            group: M of N:M; 0 for a ratio.
        """
        if group:
            return cls(removed=mask.new_zeros(0, dtype=torch.int64), keep=keep, group=group)
        lines = mask if by_row else mask.reshape(1, -1)
        return cls(removed=(~lines).sum(dim=1))

    def choose(self, score: Tensor) -> Tensor:
        """
        The mask of these counts that keeps the highest scores.

        Args:
            score: (out_features, in_features), float32, no NaN.

        Returns:
            The same shape, bool.
        """
        if self.group:
            return nm_mask(score, keep=self.keep, group=self.group)
        return self._highest(score, self.removed)

    def choose_part(self, score: Tensor, share: float) -> Tensor:
        """
        A mask that removes only a share of what :meth:`choose` does: the lowest scores of it.

        With N:M, the N highest of each run are out of danger, and the others of the linear compete.

        Args:
            score: As for :meth:`choose`.
            share: 0 to 1.
        """
        if not self.group:
            return self._highest(score, (self.removed.double() * share).long())
        safe = nm_mask(score, keep=self.keep, group=self.group)
        removed = score.numel() // self.group * (self.group - self.keep)
        part = torch.tensor([int(removed * share)])
        return self._highest(score.masked_fill(safe, torch.inf), part)

    @staticmethod
    def _highest(score: Tensor, removed: Tensor) -> Tensor:
        lines = score.reshape(len(removed), -1)
        return keep_highest(lines, removed).view(score.shape)
