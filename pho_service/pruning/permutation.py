"""
Permutations of input channels: which share an N:M group, and how an order is folded into weights.

A ``score`` is (out_features, in_features), float32, >= 0, finite, with its channels in the original
order. ``keep`` is N, the weights kept per group, 1 <= keep < group; ``group`` is M, its channels,
and divides in_features. An ``order`` is (in_features,), int64: ``order[p]`` is the channel that
stands at position p.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor, nn

from pho_service.pruning.scores import TINY
from pho_service.pruning.selection import nm_mask
from pho_service.pruning.statistics import PrunableLinear

_WHOLE = 256  # up to so many candidates all pairs are looked at
_BEST = 16  # otherwise: pairs that each candidate and each place has at least
_ROUNDS = 10  # of balancing
_SWEEPS = 2  # of a permutation
_ROWS = 1024  # output rows that it looks at
_TEMPERATURE = 0.3  # of the balance, in standard deviations of the gains


def assign(gain: Tensor) -> Tensor:
    """
    Give each place a candidate of its own, so that the gains add up to the most.

    Exact up to 256 candidates. Beyond that a candidate is matched with places
    that are among the 16 best for it, or that it is among the 16 best for, or
    with the place of its own index. The sum is never below that of the diagonal. What is good
    is measured against what a place can get elsewhere and a candidate elsewhere.
    Channel permutations kept 98.9 % of the gain or more.

    Args:
        gain: (K, K), float32, finite: of candidate i at place j.

    Returns:
        (K,), int64, on ``gain.device``: the candidate that each place gets.

    Raises:
        ValueError: ``gain`` is not square, or NaN or infinite somewhere.

    Source:
        Crouse 2016, IEEE TAES 52(4), for the exact one. Beyond: prices of
        candidates and places by Sinkhorn's balancing (Cuturi 2013,
        arXiv:1306.0895), then LAPJVsp (Jonker & Volgenant 1987) on the pairs
        that are best at these prices. That the two go together is ours.
    """
    if gain.dim() != 2 or gain.shape[0] != gain.shape[1]:
        raise ValueError(f"gain of shape {tuple(gain.shape)} is not square")
    if len(gain) <= _WHOLE:
        candidate, place = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    else:
        candidate, place = min_weight_full_bipartite_matching(_best_pairs(gain), maximize=True)
    chosen = torch.empty(len(gain), dtype=torch.int64)
    chosen[torch.from_numpy(place).long()] = torch.from_numpy(candidate).long()
    return chosen.to(gain.device)


def _best_pairs(gain: Tensor) -> csr_array:
    """The pairs that are matched, (K, K), sparse: what each gains at the prices, all above 0."""
    count = len(gain)
    net = _balanced(gain)
    paired = torch.eye(count, dtype=torch.bool, device=gain.device)
    for dim in (0, 1):
        paired.scatter_(dim, net.topk(_BEST, dim=dim).indices, True)
    pair = paired.flatten().nonzero()[:, 0]
    values = net.flatten()[pair].double().cpu()
    if not bool(values.isfinite().all()):
        raise ValueError("a gain is NaN or infinite")
    values += 1 - values.min()  # SciPy takes 0 for no pair
    row, column = pair.cpu() // count, pair.cpu() % count
    return csr_array((values.numpy(), (row.numpy(), column.numpy())), shape=(count, count))


def _balanced(gain: Tensor) -> Tensor:
    """The gains less a price for each candidate and each place, in units of the temperature."""
    # Prices are the same for all assignments, so the best one stays the best. At them, the
    # exponentials of each row and each column add up to about 1: a large channel, say, that gains
    # much everywhere is no better than others.
    net = gain - gain.mean(dim=1, keepdim=True)
    net -= net.mean(dim=0, keepdim=True)
    net /= (_TEMPERATURE * net.std()).clamp_min(TINY)
    for _ in range(_ROUNDS):
        net -= net.logsumexp(dim=1, keepdim=True)
        net -= net.logsumexp(dim=0, keepdim=True)
    return net


def permute_channels(score: Tensor, *, keep: int, group: int) -> Tensor:
    """
    An order of the input channels under which N:M keeps more of the score.

    Channels are first dealt out to the groups by their column sums. Then, in
    each of two sweeps, every group gives up one channel at a time, and an assignment
    problem finds the best new group for each of them, by 1,024 output rows at
    most, evenly spaced. A sweep that would lower the retained score is not made:
    never worse than the channels as they are; the same input gives the same order.

    Args:
        score: For linears that share their input: their scores, one below the other.

    Returns:
        The order, on ``score.device``: sorted inside the groups, and the groups
        by their first channel.

    Raises:
        ValueError: ``keep`` or ``group`` out of range.

    Source:
        Zhang et al. 2024 (RIA), channel permutation: heuristic reallocation and
        linear sum assignment. Their cost matrix sorts inside its K^2 loop, ours is the
        same number by :func:`moved_scores`. From the second sweep on we shuffle
        the places inside the groups, so that other channels meet.
    """
    if not 1 <= keep < group:
        raise ValueError(f"keep={keep}, group={group}: 1 <= keep < group must hold")
    if score.shape[1] % group:
        raise ValueError(f"in_features={score.shape[1]} is not a multiple of M={group}")
    candidates = [
        torch.arange(score.shape[1], device=score.device),
        _canonical(_dealt_out(score.sum(dim=0), group), group),
    ]
    totals = [retained_score(score, order, keep=keep, group=group) for order in candidates]
    best = totals.index(max(totals))
    order, best_total = candidates[best], totals[best]
    channels = _sample_rows(score).T / score.max().clamp_min(TINY)
    channels = channels.contiguous()  # (in_features, rows)
    generator = torch.Generator().manual_seed(0)
    for number in range(_SWEEPS):
        groups = order.view(-1, group)
        if number:
            groups = _shuffled(groups, generator)
        swept = _canonical(_swept(channels, groups, keep), group)
        retained = retained_score(score, swept, keep=keep, group=group)
        if retained > best_total:
            order, best_total = swept, retained
    return order


def retained_score(score: Tensor, order: Tensor, *, keep: int, group: int) -> float:
    """The sum of the score that N:M keeps in an order, added up in float64."""
    mask = permuted_mask(score, order, keep=keep, group=group)
    return float((score * mask).sum(dtype=torch.float64))


def permuted_mask(score: Tensor, order: Tensor, *, keep: int, group: int) -> Tensor:
    """Mark what N:M keeps: ``mask[:, order]`` is N:M in neighbouring channels."""
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


def _sample_rows(values: Tensor) -> Tensor:
    """At most 1,024 of the rows, evenly spaced."""
    if len(values) <= _ROWS:
        return values
    return values[torch.arange(_ROWS, device=values.device) * len(values) // _ROWS]


def _dealt_out(importance: Tensor, group: int) -> Tensor:
    """Deal channels out to the groups so that none has all the important ones."""
    # The sorted channels are cut into M segments; each group gets one of every segment, from
    # alternating ends.
    segments = importance.argsort(stable=True).view(group, -1).clone()  # (M, K)
    segments[1::2] = segments[1::2].flip(1)
    return segments.T.flatten()


def _canonical(order: Tensor, group: int) -> Tensor:
    """The same groups, sorted inside and by their first channel: ties fall to the lower one."""
    groups = order.view(-1, group).sort(dim=1).values
    return groups[groups[:, 0].argsort()].flatten()


def _shuffled(groups: Tensor, generator: torch.Generator) -> Tensor:
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


# Of the proof that a folded order of channels changes nothing.
_TOKENS = 16  # of the random input that a module is tried on
_TOLERANCE = 1e-9  # of the output's norm; float64 sums in another order differ by about 1e-15


def find_writers(
    model: nn.Module, reader: PrunableLinear, linears: Mapping[str, PrunableLinear]
) -> list[PrunableLinear]:
    """
    The linears beside ``reader`` that may write its input, by place and width only: children of
    the same parent module, in its order, with as many outputs as ``reader`` has inputs.
    """
    parent_name, _, _ = reader.name.rpartition(".")
    prefix = f"{parent_name}." if parent_name else ""
    beside = [
        linears[prefix + name]
        for name, module in model.get_submodule(parent_name).named_children()
        if module is not reader.module and prefix + name in linears
    ]
    width = reader.weight.shape[1]
    return [linear for linear in beside if linear.weight.shape[0] == width]


def foldable(model: nn.Module, linears: Mapping[str, PrunableLinear]) -> frozenset[str]:
    """
    The linears whose input channels may stand in any order, if it is folded into the weights.

    Each is proven as :func:`fold_order` proves it, with a random order; the model stays as it is.
    """
    names = set()
    for name, reader in linears.items():
        writers = find_writers(model, reader, linears)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(reader.weight.shape[1], generator=generator)
        if writers and _is_exact(model, reader, writers, order):
            names.add(name)
    return frozenset(names)


def fold_order(
    model: nn.Module,
    reader: PrunableLinear,
    linears: Mapping[str, PrunableLinear],
    order: Tensor,
) -> list[str]:
    """
    Renumber the input channels of a linear, and the outputs of those that write them.

    Weights and biases are changed in place. Position p of the reader's input is
    then what channel ``order[p]`` was, so a mask in the permuted order becomes
    N:M of neighbours. Statistics and scores that were taken before keep the old
    order: the caller permutes them, or takes them again.

    A float64 copy of the parent module is run on random tokens before and after;
    only if both outputs agree, the model is changed. In float64 a wrong fold of
    two channels among thousands still shows. A parameter that is shared with a
    module outside of the parent is not noticed.

    Returns:
        Names of the writers. Empty if there are none, or if the module computes
        something else in this order, or cannot be run on one tensor: then the
        model is unchanged.

    Raises:
        ValueError: ``order`` is not a permutation of the reader's input channels.
    """
    width = reader.weight.shape[1]
    channels = torch.arange(width, device=order.device)
    if order.shape != (width,) or not torch.equal(order.sort().values, channels):
        raise ValueError(f"order is not a permutation of the {width} inputs of {reader.name}")
    writers = find_writers(model, reader, linears)
    if not writers or not _is_exact(model, reader, writers, order):
        return []
    _renumber_(reader, writers, order)
    return [writer.name for writer in writers]


def _is_exact(
    model: nn.Module, reader: PrunableLinear, writers: list[PrunableLinear], order: Tensor
) -> bool:
    """Try whether the parent module computes the same in this order."""
    parent_name, _, _ = reader.name.rpartition(".")
    parent = deepcopy(model.get_submodule(parent_name)).double().eval()
    copies = [_twin(linear, parent) for linear in (reader, *writers)]
    tokens = torch.randn(
        1, _TOKENS, writers[0].weight.shape[1], generator=torch.Generator().manual_seed(0)
    ).to(reader.weight.device, torch.float64)
    before = _output(parent, tokens)
    _renumber_(copies[0], copies[1:], order)
    after = _output(parent, tokens)
    if before is None or after is None:
        return False
    return bool((after - before).norm() <= _TOLERANCE * before.norm())  # a NaN is not


def _twin(linear: PrunableLinear, parent: nn.Module) -> PrunableLinear:
    _, _, name = linear.name.rpartition(".")
    return PrunableLinear(
        name=name, module=parent.get_submodule(name), transposed=linear.transposed
    )


@torch.no_grad()
def _output(module: nn.Module, tokens: Tensor) -> Tensor | None:
    """The output for one tensor, or None if the module isn't a function of one tensor."""
    try:
        output = module(tokens)
    except Exception:  # an attention without its positions raises whatever it stumbles over
        return None
    return output if isinstance(output, Tensor) else None


def _renumber_(reader: PrunableLinear, writers: list[PrunableLinear], order: Tensor) -> None:
    """Move the channels; ``Parameter`` objects stay the same."""
    order = order.to(reader.weight.device)
    reader.weight.copy_(reader.weight[:, order])
    for writer in writers:
        rows = order.to(writer.weight.device)
        writer.weight.copy_(writer.weight[rows])
        bias = getattr(writer.module, "bias", None)  # an expert's linear has none
        if isinstance(bias, Tensor):
            bias.detach().copy_(bias.detach()[rows])
