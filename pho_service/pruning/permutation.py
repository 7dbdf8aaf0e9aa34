"""
Which input channels share an N:M group: an order of the channels that loses less.

Inside a group the best N of M weights stay, so a group of channels that all
matter loses important weights while its neighbour keeps useless ones. Any order
of the channels gives the same dense layer, so one is chosen that spreads them.
Here the aim is to keep more of a score; :mod:`pho_service.pruning.error_permutation`
makes less error in the layers' outputs.
"""

import torch
from torch import Tensor

from pho_service.pruning.assignment import assign
from pho_service.pruning.scores import TINY
from pho_service.pruning.selection import nm_mask


def permute_channels(
    score: Tensor, *, keep: int, group: int, sweeps: int = 2, max_rows: int = 1024
) -> Tensor:
    """
    An order of the input channels under which N:M keeps more of the score.

    Channels are first dealt out to the groups by their column sums. Then, in
    each sweep, every group gives up one channel at a time, and an assignment
    problem finds the best new group for each of them. Never worse than the
    channels as they are; the same input gives the same order.

    Args:
        score: (out_features, in_features), float32, >= 0, finite, computed in
            the original order. For linears that share their input: their
            scores, one below the other.
        keep: N, weights kept per group. 1 <= keep < group.
        group: M, channels of a group. Divides in_features.
        sweeps: How often every channel may move, >= 0. One that would lower
            the retained score is not made.
        max_rows: Output rows that the assignment looks at, evenly spaced.

    Returns:
        (in_features,), int64, on ``score.device``: ``order[p]`` is the channel
        that stands at position p. Sorted inside the groups, and the groups by
        their first channel.

    Raises:
        ValueError: ``keep``, ``group``, ``sweeps`` or ``max_rows`` out of range.

    Source:
        Zhang et al. 2024 (RIA), channel permutation: heuristic reallocation and
        linear sum assignment. Their cost matrix sorts inside its K^2 loop, ours is the
        same number by :func:`moved_scores`. From the second sweep on we shuffle
        the places inside the groups, so that other channels meet.
    """
    check_groups(score, keep=keep, group=group, sweeps=sweeps, max_rows=max_rows)
    candidates = [
        torch.arange(score.shape[1], device=score.device),
        canonical_order(_dealt_out(score.sum(dim=0), group), group),
    ]
    kept = [retained_score(score, order, keep=keep, group=group) for order in candidates]
    best = kept.index(max(kept))
    order, most = candidates[best], kept[best]
    channels = _sample_rows(score, max_rows).T / score.max().clamp_min(TINY)
    channels = channels.contiguous()  # (in_features, rows)
    generator = torch.Generator().manual_seed(0)
    for number in range(sweeps):
        groups = order.view(-1, group)
        if number:
            groups = shuffled_groups(groups, generator)
        swept = canonical_order(_swept(channels, groups, keep), group)
        retained = retained_score(score, swept, keep=keep, group=group)
        if retained > most:
            order, most = swept, retained
    return order


def retained_score(score: Tensor, order: Tensor, *, keep: int, group: int) -> float:
    """
    The sum of the score that N:M keeps in an order, added up in float64.

    Args:
        score: (out_features, in_features), float32, in the original order.
        order: (in_features,), int64, a permutation of the input channels.
        keep: N, weights kept per group.
        group: M, channels of a group.
    """
    mask = permuted_mask(score, order, keep=keep, group=group)
    return float((score * mask).sum(dtype=torch.float64))


def permuted_mask(score: Tensor, order: Tensor, *, keep: int, group: int) -> Tensor:
    """
    Mark what N:M keeps in an order of the channels, in the original order.

    Args:
        score: (out_features, in_features), float32, no NaN, in the original order.
        order: (in_features,), int64, a permutation of the input channels.
        keep: N, weights kept per group. 1 <= keep < group.
        group: M, channels of a group. Divides in_features.

    Returns:
        (out_features, in_features), bool. ``mask[:, order]`` is N:M in
        neighbouring channels.

    Raises:
        ValueError: As :func:`nm_mask`.
    """
    mask = torch.empty_like(score, dtype=torch.bool)
    mask[:, order] = nm_mask(score[:, order], keep=keep, group=group)
    return mask


def moved_scores(channels: Tensor, moving: Tensor, staying: Tensor, keep: int) -> Tensor:
    """
    Return what each group would retain with each channel that moves.

    Args:
        channels: (in_features, rows), float32: the score, channel by channel.
        moving: (K,), int64, one channel of each group.
        staying: (K, M - 1), int64, the other channels of each group.
        keep: N, weights kept per group.

    Returns:
        (K, K), float32: entry (i, j) is the retained score of group j with
        channel ``moving[i]``, summed over the rows.

    Source:
        With b the N-th highest score of those that stay, a newcomer s adds
        max(0, s - b) to what they retain alone. Since 2 max(0, s - b) =
        |s - b| + s - b, the sum over rows is an L1 distance.
    """
    stay = channels[staying].topk(keep, dim=1).values  # (K, N, rows)
    alone = stay.sum(dim=(1, 2))  # (K,)
    bar = stay[:, -1].contiguous()  # (K, rows)
    newcomer = channels[moving]  # (K, rows)
    distance = torch.cdist(newcomer, bar, p=1)  # (K, K)
    hinge = (distance + newcomer.sum(dim=1)[:, None] - bar.sum(dim=1)) / 2
    return alone + hinge


def check_groups(score: Tensor, *, keep: int, group: int, sweeps: int, max_rows: int) -> None:
    """Raise ValueError where channels of such a score cannot be permuted for N:M."""
    if not 1 <= keep < group:
        raise ValueError(f"keep={keep}, group={group}: 1 <= keep < group must hold")
    if score.shape[1] % group:
        raise ValueError(f"in_features={score.shape[1]} is not a multiple of M={group}")
    if sweeps < 0 or max_rows < 1:
        raise ValueError(f"sweeps={sweeps} must be at least 0, max_rows={max_rows} at least 1")


def _sample_rows(values: Tensor, max_rows: int) -> Tensor:
    """At most ``max_rows`` of the rows, evenly spaced."""
    if len(values) <= max_rows:
        return values
    return values[torch.arange(max_rows, device=values.device) * len(values) // max_rows]


def _dealt_out(importance: Tensor, group: int) -> Tensor:
    """
    Deal channels out to the groups so that none has all the important ones.

    The sorted channels are cut into M segments; each group gets one of every
    segment, from alternating ends.
    """
    segments = importance.argsort(stable=True).view(group, -1).clone()  # (M, K)
    segments[1::2] = segments[1::2].flip(1)
    return segments.T.flatten()


def canonical_order(order: Tensor, group: int) -> Tensor:
    """The same groups, sorted inside and by their first channel: ties fall to the lower one."""
    groups = order.view(-1, group).sort(dim=1).values
    return groups[groups[:, 0].argsort()].flatten()


def shuffled_groups(groups: Tensor, generator: torch.Generator) -> Tensor:
    """The same groups in a random order, the channels of each too."""
    places = torch.rand(groups.shape, generator=generator).argsort(dim=1)
    turn = torch.randperm(len(groups), generator=generator).to(groups.device)
    shuffled: Tensor = groups.gather(1, places.to(groups.device))[turn]
    return shuffled


def _swept(channels: Tensor, groups: Tensor, keep: int) -> Tensor:
    """Reassign the channels at each place of the groups in turn; (in_features,), int64."""
    groups = groups.clone()  # (K, M)
    for place in range(groups.shape[1]):
        moving = groups[:, place].clone()
        staying = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
        groups[:, place] = moving[assign(moved_scores(channels, moving, staying, keep))]
    return groups.flatten()
