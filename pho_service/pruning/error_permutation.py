"""
Which input channels share an N:M group, by the error that is made in the layers' outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pho_service.pruning.chunks import chunk_size
from pho_service.pruning.permutation import (
    canonical_order,
    check_groups,
    permute_channels,
    permuted_mask,
    shuffled_groups,
)
from pho_service.pruning.repruning import row_errors

_SWAPS = 16  # tried for each pair of groups in a round; all of them up to M = 4
_CHUNK = 1 << 18  # weights that a CPU looks at at a time: 1 MiB a tensor stays in the cache


@dataclass(frozen=True, kw_only=True)
class PermutedLinear:
    """
    One of the linears that read one input, and so share its order.

    Attributes:
        weight: (out_features, in_features), float32.
        score: (out_features, in_features), float32, >= 0, in the original order.
        fisher: (out_features,), float32, >= 0: what an error of each row costs.
    """

    weight: Tensor
    score: Tensor
    fisher: Tensor


def permute_for_error(
    linears: Sequence[PermutedLinear],
    gram: Tensor,
    *,
    keep: int,
    group: int,
    sweeps: int = 2,
    rounds: int = 12,
    max_rows: int = 512,
) -> Tensor:
    """
    An order of the input channels under which N:M makes less error in the outputs.

    Masks still keep the highest scores of a group: the order only decides who
    shares one. The best of three orders (as they are, by the score, by the
    error without correlations) is improved by swaps of channels. In each round
    the groups are paired at random, and the best swap of each pair is made if
    all of them together lower the exact error. Never worse than the channels as
    they are; the same input gives the same order.

    Args:
        linears: All linears that read this input, at least one.
        gram: (in_features, in_features), float32: E[x x^T] of the input.
        keep: N, weights kept per group. 1 <= keep < group.
        group: M, channels of a group. Divides in_features.
        sweeps: Number of sweeps of :func:`permute_channels`.
        rounds: Number of rounds of swaps, >= 0.
        max_rows: Output rows that proposals look at: those that would make the
            largest errors. What decides is the error of all rows.

    Returns:
        (in_features,), int64, as from :func:`permute_channels`.

    Raises:
        ValueError: No linears, shapes that differ, or a number out of range.

    Source:
        Ours. PermLLM (2025) observes that a higher retained score
        can raise the error of the output, and learns its order by gradients.
    """
    _check_linears(linears, gram)
    score = torch.cat([linear.score for linear in linears])
    check_groups(score, keep=keep, group=group, sweeps=sweeps, max_rows=max_rows)
    fisher = torch.cat([linear.fisher for linear in linears])[:, None]
    weight = torch.cat([linear.weight for linear in linears]) * fisher.sqrt()
    alone = weight.square() * gram.diagonal()  # the error of each weight, if only it went
    rows = alone.sum(dim=1).argsort(descending=True, stable=True)[:max_rows]
    orders = [torch.arange(score.shape[1], device=score.device)] + [
        permute_channels(each, keep=keep, group=group, sweeps=sweeps, max_rows=max_rows)
        for each in (score, alone[rows])
    ]

    def error_of(order: Tensor) -> float:
        return sum(
            reconstruction_error(
                linear, gram, permuted_mask(linear.score, order, keep=keep, group=group)
            )
            for linear in linears
        )

    errors = [error_of(order) for order in orders]
    least = min(errors)
    order = orders[errors.index(least)]
    sample = _Sample(
        weight=weight[rows].T.contiguous(),
        score=score[rows].T.contiguous(),
        gram=gram,
        keep=keep,
        group=group,
    )
    return _after_swaps(order, least, error_of, sample, rounds)


def reconstruction_error(linear: PermutedLinear, gram: Tensor, mask: Tensor) -> float:
    """
    What a mask costs: the squared error of each output row, weighted by its Fisher weight.

    With D the weights removed: the sum over rows i of g_i D_i H D_i^T.

    Args:
        linear: Its score is not looked at.
        gram: (in_features, in_features), float32: H = E[x x^T].
        mask: (out_features, in_features), bool, True = kept.
    """
    errors = row_errors(linear.weight, mask, gram)
    return float(errors.double() @ linear.fisher.double())


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The output rows that proposals are rated on, channel by channel."""

    weight: Tensor  # (in_features, rows), times the root of the Fisher weight
    score: Tensor  # (in_features, rows)
    gram: Tensor  # (in_features, in_features)
    keep: int
    group: int

    def best_swaps(self, order: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """
        The swap in each pair of groups that lowers the error most.

        Args:
            order: (in_features,), int64, as it is now.
            pairs: (P, 2 M), int64: the channels of two groups.

        Returns:
            (P, 2 M), the channels after it, and (P,), the change of the error
            if this were the only swap. Equal scores may give a wrong change.
        """
        kept = permuted_mask(self.score.T, order, keep=self.keep, group=self.group).T
        removed = self.weight.masked_fill(kept, 0)  # (in_features, rows)
        slope = 2 * (self.gram @ removed)
        size = chunk_size(removed.device, _CHUNK) // (2 * self.group * removed.shape[1])
        change = torch.cat(
            [self._changes(chunk, removed, slope) for chunk in pairs.split(max(1, size))]
        )  # (P, swaps)
        least, swap = change.min(dim=1)
        swapped = pairs.clone()
        places = _swaps(self.group).to(pairs.device)[swap]  # (P, 2)
        swapped.scatter_(1, places, pairs.gather(1, places.flip(1)))
        return swapped, least

    def _changes(self, pairs: Tensor, removed: Tensor, slope: Tensor) -> Tensor:
        """
        (P, swaps), float32: the change of the error for each swap alone.

        A swap moves no data: it only changes the score below which the weights
        of each group go. Who leaves a group is held against the other one's.
        """
        score, weight = self.score[pairs], self.weight[pairs]  # (P, 2 M, rows)
        gram = self.gram[pairs[:, :, None], pairs[:, None, :]]  # (P, 2 M, 2 M)
        now = removed[pairs]
        outside = slope[pairs] - 2 * (gram @ now)  # what the other channels contribute
        lower, upper = self._bars(score)
        changes = []
        for first, second in _swaps(self.group).tolist():
            bar = score[:, second].clamp(lower[:, first], upper[:, first])[:, None]
            other = score[:, first].clamp(lower[:, second], upper[:, second])[:, None]
            below = torch.cat([score[:, : self.group] < bar, score[:, self.group :] < other], 1)
            below[:, first] = score[:, first] < other[:, 0]
            below[:, second] = score[:, second] < bar[:, 0]
            changes.append(_error(weight * below, outside, gram))
        return torch.stack(changes, dim=1) - _error(now, outside, gram)[:, None]

    def _bars(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """
        The N-th highest score of the others in each group, and the one above it.

        With a newcomer of score s in its place, weights below s.clamp(lower,
        upper) go.
        """
        groups = score.unflatten(1, (2, self.group))  # (P, 2, M, rows)
        highest = groups.topk(self.keep + 1, dim=2).values
        nth, below = highest[:, :, self.keep - 1, None], highest[:, :, self.keep, None]
        lower = torch.where(groups >= nth, below, nth)
        upper = torch.full_like(groups, torch.inf)
        if self.keep > 1:
            above = highest[:, :, self.keep - 2, None]
            upper = torch.where(groups >= above, nth, above)
        return lower.flatten(1, 2), upper.flatten(1, 2)


def _error(removed: Tensor, outside: Tensor, gram: Tensor) -> Tensor:
    """(P,): the part of the error that some channels' removed weights (P, c, rows) make."""
    linear = torch.linalg.vecdot(removed.flatten(1), outside.flatten(1))
    error: Tensor = linear + ((removed @ removed.mT) * gram).sum(dim=(1, 2))
    return error


def _after_swaps(
    order: Tensor,
    error: float,
    error_of: Callable[[Tensor], float],
    sample: _Sample,
    rounds: int,
) -> Tensor:
    """Make, round by round, as many of the best swaps together as lower the exact error."""
    generator = torch.Generator().manual_seed(0)
    most = len(order)  # swaps that are tried together
    for _ in range(rounds):
        pairs, rest = _paired(shuffled_groups(order.view(-1, sample.group), generator))
        swapped, change = sample.best_swaps(order, pairs)
        helpful = change.argsort(stable=True)[: int((change < 0).sum())]
        count = min(len(helpful), most)
        while count:
            made = helpful[:count]
            trial = pairs.clone()
            trial[made] = swapped[made]
            trial_order = canonical_order(
                torch.cat([trial.flatten(), rest.flatten()]), sample.group
            )
            trial_error = error_of(trial_order)
            if trial_error < error:
                order, error = trial_order, trial_error
                break
            count //= 2
        most = max(1, 2 * count)
    return order


def _check_linears(linears: Sequence[PermutedLinear], gram: Tensor) -> None:
    if not linears:
        raise ValueError("no linears: at least one must read the input")
    for linear in linears:
        out_features, in_features = linear.weight.shape
        shapes = tuple(linear.score.shape), tuple(linear.fisher.shape), tuple(gram.shape)
        if shapes != ((out_features, in_features), (out_features,), (in_features, in_features)):
            raise ValueError(
                f"score, fisher and gram of shapes {shapes} do not fit a weight of "
                f"{out_features} x {in_features}"
            )


def _paired(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(K // 2, 2 M), two groups a row, and the group that is left over, if any."""
    even = len(groups) // 2 * 2
    return groups[:even].reshape(even // 2, 2 * groups.shape[1]), groups[even:]


def _swaps(group: int) -> Tensor:
    """(swaps, 2), int64: a place in the first group, and one in the second that follows it."""
    places = torch.cartesian_prod(torch.arange(group), torch.arange(group))
    shift = (places[:, 1] - places[:, 0]) % group  # so that the first few leave no place out
    return (places + torch.tensor([0, group]))[shift.argsort(stable=True)][:_SWAPS]
