"""
Structured pruning of one linear: which input columns leave together, and what the others become.

A neuron of an FFN is one input column of the linear that reads it, a query head of an attention
``head_dim`` neighbours. All of it works on the Gram matrix H = E[x x^T] of that input, as the
updates of single weights do.

A ``weight`` is (out_features, in_features), of any floating dtype, finite; ``gram`` is H,
(in_features, in_features), symmetric, and what is made of it has its dtype. ``damping``, >= 0, is
the share of the mean diagonal that is added to the diagonal. A ``ValueError`` says which shape or
number does not fit, a ``NumericalError`` that H is not finite, or not positive definite after
damping, of the linear ``layer``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.pruning.weight_update import damped

_CATCH_UP = 64  # removed columns that the matrices catch up with together; for speed only


@dataclass(frozen=True, kw_only=True)
class RemovalOrder:
    """
    In which order groups of input columns leave, and what it costs.

    Attributes:
        groups: (groups,), int64: the one that leaves first comes first.
        errors: (groups + 1,), float64, non-decreasing: entry k is the error when the first k groups
            are gone and the rest makes up for them. Entry 0 is 0.
    """

    groups: Tensor
    errors: Tensor

    def kept(self, count: int) -> Tensor:
        """The groups that stay when all but ``count`` have left, ascending; (count,), int64."""
        return self.groups[len(self.groups) - count :].sort().values


def removal_order(
    weight: Tensor,
    gram: Tensor,
    row_weights: Tensor,
    *,
    group: int = 1,
    within: Tensor | None = None,
    damping: float = 0.01,
    layer: str,
) -> RemovalOrder:
    """
    Remove groups of input columns one by one, always the one whose loss costs least.

    The cost of columns B is tr(W_B^T diag(g) W_B (H^-1_BB)^-1): the least error that
    the columns which stay can bring it down to. W and H^-1 are then brought up to date exactly, so
    one sweep is the exact greedy choice at every width. Dead inputs leave first.

    Args:
        row_weights: (out_features,), >= 0: the weight g of an output's squared error.
        group: Neighbouring columns that leave together; divides in_features.
        within: (groups,), int64: the class of each group, such as its KV head. From each class one
            group leaves before any class gives a second one. None: all are of one class.

    Source:
        Hassibi & Stork 1993 (OBS) on whole columns: Kurtic et al. 2023, arXiv:2302.04089 (ZipLM),
        algorithm 1. They keep W, we only S = W^T diag(g) W, which all costs follow from. Both
        matrices catch up with 64 removed columns at a time; until then each
        step works out only the columns that it reads.
    """
    out_features, in_features = weight.shape
    if gram.shape != (in_features, in_features) or row_weights.shape != (out_features,):
        raise ValueError(f"weight {tuple(weight.shape)}, gram {tuple(gram.shape)} and row weights "
                         f"{tuple(row_weights.shape)} do not fit")  # fmt: skip
    if group < 1 or in_features % group:
        raise ValueError(f"in_features={in_features} is not a multiple of group={group}")
    count = in_features // group
    classes = torch.zeros(count, dtype=torch.int64) if within is None else within.cpu()
    if classes.shape != (count,):
        raise ValueError(f"within {tuple(classes.shape)} is not of {count} groups")
    matrix = damped(gram, damping, layer=layer)
    scale = matrix.diagonal().sqrt()
    weighted = weight.detach().to(gram.dtype) * row_weights.to(gram.dtype).sqrt()[:, None] * scale
    inverse = _inverse(matrix.div_(scale).div_(scale[:, None]), layer)
    sweep = _Sweep(inverse, weighted.T @ weighted, group)
    del matrix, weighted
    gone = torch.zeros(int(classes.max()) + 1, dtype=torch.int64)  # of each class
    left = torch.bincount(classes)
    open_groups = torch.ones(count, dtype=torch.bool)
    groups, costs = [], []
    for _ in range(count):
        if within is not None:
            open_groups = gone[classes] == gone[left > 0].min()
        chosen, cost = sweep.remove(open_groups)
        gone[classes[chosen]] += 1
        left[classes[chosen]] -= 1
        groups.append(chosen)
        costs.append(cost)
    increments = torch.tensor([0.0, *costs], dtype=torch.float64).clamp_min(0)
    return RemovalOrder(groups=torch.tensor(groups), errors=increments.cumsum(dim=0))


class _Sweep:
    """The matrices of :func:`removal_order` while columns leave; they are changed in place."""

    def __init__(self, inverse: Tensor, sums: Tensor, group: int) -> None:
        self._inverse, self._sums, self._group = inverse, sums, group
        count = len(inverse) // group
        self._names = torch.arange(count)  # of the groups that the matrices still have
        self._is_here = torch.ones(count, dtype=torch.bool)  # of these: not removed since
        room = (max(_CATCH_UP, group), len(inverse))
        # What the matrices must catch up with: H^-1 - Y^T Y, and S - U^T Y - Y^T U.
        self._y, self._u, self._behind = inverse.new_empty(room), inverse.new_empty(room), 0
        self._set_diagonals()

    def _set_diagonals(self) -> None:
        """Read the blocks of both matrices that belong to one group, (groups, group, group)."""
        count, group = len(self._names), self._group
        self._own_inverse, self._own_sums = (
            blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            for blocks in (
                self._inverse.view(count, group, count, group),
                self._sums.view(count, group, count, group),
            )
        )

    def remove(self, is_open: Tensor) -> tuple[int, float]:
        """Remove the cheapest of the groups that are open; its number and what it costs."""
        choice = (is_open[self._names] & self._is_here).to(self._inverse.device)
        costs = self._costs().masked_fill_(~choice, torch.inf)
        place = int(costs.argmin())
        removed = int(self._names[place]), float(costs[place])
        self._take_out(place)
        return removed

    def _costs(self) -> Tensor:
        if self._group == 1:  # the inputs have second moments of 1, so no inverse is below 1
            return (self._own_sums / self._own_inverse.clamp_min(1))[:, 0, 0]
        solved: Tensor = torch.linalg.solve(self._own_inverse, self._own_sums)
        return solved.diagonal(dim1=1, dim2=2).sum(dim=1)

    def _take_out(self, place: int) -> None:
        group, behind = self._group, self._behind
        columns = slice(place * group, (place + 1) * group)
        y, u = self._y[:behind], self._u[:behind]
        inverse = self._inverse[columns] - y[:, columns].T @ y  # (group, in)
        sums = self._sums[columns] - u[:, columns].T @ y - y[:, columns].T @ u
        own = inverse[:, columns]
        lower = torch.linalg.cholesky(own) if group > 1 else own.clamp_min(1).sqrt()
        new_y = torch.linalg.solve_triangular(lower, inverse, upper=False)
        back = torch.linalg.solve_triangular(lower.T, new_y, upper=True)  # own^-1 @ inverse
        new_u = torch.linalg.solve_triangular(
            lower, sums - sums[:, columns] @ back / 2, upper=False
        )
        y_blocks, u_blocks = (  # (groups, group, removed)
            new.view(group, -1, group).permute(1, 2, 0) for new in (new_y, new_u)
        )
        self._own_inverse -= y_blocks @ y_blocks.mT
        outer = u_blocks @ y_blocks.mT
        self._own_sums -= outer + outer.mT
        self._own_inverse[place].fill_(0).fill_diagonal_(1)
        self._own_sums[place] = 0
        self._is_here[place] = False
        self._y[behind : behind + group], self._u[behind : behind + group] = new_y, new_u
        self._behind += group
        if self._behind + group > len(self._y):
            self._catch_up()

    def _catch_up(self) -> None:
        """Bring both matrices up to date, without the columns that are gone."""
        here = self._is_here.repeat_interleave(self._group).nonzero()[:, 0]
        here = here.to(self._inverse.device)
        y, u = self._y[: self._behind, here], self._u[: self._behind, here]
        self._inverse = self._inverse[here][:, here].addmm_(y.T, y, alpha=-1)
        self._sums = self._sums[here][:, here].addmm_(u.T, y, alpha=-1).addmm_(y.T, u, alpha=-1)
        self._names = self._names[self._is_here]
        self._is_here = torch.ones_like(self._names, dtype=torch.bool)
        self._y, self._u = (self._y.new_empty(len(self._y), len(here)) for _ in range(2))
        self._behind = 0
        self._set_diagonals()


def _inverse(matrix: Tensor, layer: str) -> Tensor:
    """The inverse of a positive definite matrix, in its dtype; worked out in float64."""
    return torch.cholesky_inverse(_lower(matrix, layer)).to(matrix.dtype)


def _lower(matrix: Tensor, layer: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix.double())
    if bool(failed):
        raise NumericalError(
            f"{layer}: the second moments of its inputs are not positive definite after damping, "
            "so nothing can make up for what is removed. Calibrate on more text, or raise the "
            "damping (0.1).",
            layer=layer,
        )
    lower: Tensor = factor
    return lower


def narrowed(
    weight: Tensor, gram: Tensor, kept: Tensor, *, damping: float = 0.01, layer: str
) -> Tensor:
    """
    Give the weights of the columns that stay, such that outputs change least: exact least squares.

    Each row minimises (W - W') (H + damping * mean(diag H) I) (W - W')^T over weights W' that are
    zero outside ``kept``: what is gone is W'_S = W_S + W_R H_RS (H_SS + ridge)^-1.

    Args:
        kept: (columns,), int64: input columns that stay, in their new order.

    Returns:
        (out_features, columns).
    """
    matrix = damped(gram, damping, layer=layer)
    is_gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    is_gone[kept] = False
    lost = weight.detach()[:, is_gone].double() @ gram[is_gone][:, kept].double()  # (out, columns)
    made_up = torch.cholesky_solve(lost.T, _lower(matrix[kept][:, kept], layer)).T
    return (weight.detach()[:, kept].double() + made_up).to(gram.dtype)


def corrected(
    weight: Tensor, gram: Tensor, errors: Tensor, *, damping: float = 0.01, layer: str
) -> Tensor:
    """
    Give the weights whose outputs are nearest to others: exact least squares on what is missing.

    Args:
        errors: (out_features, in_features): E[e x^T], with e what its outputs lack.
    """
    lower = _lower(damped(gram, damping, layer=layer), layer)
    added = torch.cholesky_solve(errors.double().T, lower).T
    return (weight.detach().double() + added).to(gram.dtype)
