"""
The masks of a whole model for one candidate, and a model with them applied.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pho_service.pruning.allocation import allocate
from pho_service.pruning.hardware import free_memory
from pho_service.pruning.layer_view import LayerView
from pho_service.pruning.permutation import permute_channels, permuted_mask
from pho_service.pruning.scores import layer_importance
from pho_service.pruning.selection import count_below, keep_highest, nm_mask, threshold_of
from pho_service.pruning.statistics import PrunableLinear, Statistics
from pho_service.spec.pattern import Coefficients, Pattern, Scope
from pho_service.spec.steps import Candidate


def plain_score(gradient_exponent: float) -> Coefficients:
    """
    The score that layers are compared by in scope ``global``: A * x * g^b.

    Relative importances have no common scale across layers: with them, a
    global threshold ruins some layers. So the plain score decides how many
    weights each layer loses, and a candidate's own score which ones. Within a
    layer RIA and CRePE stay exact; across layers every candidate is the plain
    form.
    """
    return Coefficients(
        row=1,
        column=0,
        neighbourhood=0,
        activation_exponent=1,
        gradient_exponent=gradient_exponent,
        normalisation="none",
    )


def line_mask(lines: Tensor, pattern: Pattern) -> Tensor:
    """Prune each line of scores, (..., n), by itself; the pattern's scope is not looked at."""
    if pattern.group:
        return nm_mask(lines, keep=pattern.keep, group=pattern.group)
    n = lines.shape[-1]
    return keep_highest(lines.reshape(-1, n), pattern.removed(n)).view(lines.shape)


@dataclass(frozen=True, kw_only=True)
class LinearMask:
    """
    Weights that a candidate removes from one linear.

    Attributes:
        keep: (out_features, in_features), bool.
        order: (in_features,), int64: the channel that stands at each position
            while N:M groups are cut; None is the natural order.
        group_keep: N of N:M in this linear; 0 for unstructured.
    """

    keep: Tensor
    order: Tensor | None = None
    group_keep: int = 0


def linear_masks(
    linears: Mapping[str, PrunableLinear],
    statistics: Statistics,
    candidate: Candidate,
    movable: frozenset[str] | None = None,
) -> Iterator[tuple[str, LinearMask]]:
    """
    Give what goes of one pruned linear after the other, by score, allocation and permutation.

    Linears that read one input come together, and their scores are held at a
    time. In scope ``global``, and with an allocation, all linears are gone
    through at once, before anything is given. ``movable`` is as of :class:`Losses`.

    Raises:
        InvalidInput: N:M does not divide an input width, or what the candidate says of linears
            does not fit the model.
        NumericalError: A score is NaN or infinite; names the layer.
    """
    losses = linear_losses(linears, statistics, candidate, movable)
    pruned = {name: linear for name, linear in linears.items() if name in losses.names}
    return masks_of(pruned, statistics, candidate, losses)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The share that a candidate takes of each linear of a model, before any mask is made."""

    names: frozenset[str]  # Names of the linears that are pruned
    shares: Mapping[str, int]  # See linear_shares
    patterns: Mapping[str, Pattern]  # Of linears that have one of their own
    movable: frozenset[str] | None = None  # Whose inputs a permutation may move; None is all


def linear_losses(
    linears: Mapping[str, PrunableLinear],
    statistics: Statistics,
    candidate: Candidate,
    movable: frozenset[str] | None = None,
) -> Losses:
    """Decide which linears of a model are pruned, and how much each of them loses."""
    chosen = candidate.steps.linears.choose(list(linears), candidate.pattern)
    for name, linear in linears.items():
        if name in chosen.names:
            candidate.pattern.check_width(linear.weight.shape[1], name)
    together = {name: linears[name] for name in chosen.shared}
    shares = linear_shares(together, statistics, candidate) if together else {}
    return Losses(names=chosen.names, shares=shares, patterns=chosen.patterns, movable=movable)


def masks_of(
    linears: Mapping[str, PrunableLinear],
    statistics: Statistics,
    candidate: Candidate,
    losses: Losses,
) -> Iterator[tuple[str, LinearMask]]:
    """
    Give the masks of linears, those that read one input together.

    All of them are pruned. They may be some of a model, such as those of a block, and ``losses``
    are those of the whole model.
    """
    for names in readers(linears, statistics):
        scores = {
            name: layer_score(linears, statistics, name, candidate.coefficients) for name in names
        }
        order = None
        moves = losses.movable is None or losses.movable.issuperset(names)
        if candidate.steps.permutation == "score" and moves:
            together = torch.cat(list(scores.values()))  # (all their rows, in_features)
            keep = candidate.pattern.keep
            order = permute_channels(together, keep=keep, group=candidate.pattern.group)
        for name in names:
            pattern = losses.patterns.get(name, candidate.pattern)
            yield name, mask_of(scores.pop(name), pattern, losses.shares.get(name), order)


def readers(
    linears: Mapping[str, PrunableLinear], statistics: Statistics
) -> Iterator[tuple[str, ...]]:
    """The names of the linears, those that read one input together, in the order of the first."""
    together: dict[int, list[str]] = {}
    for name in linears:
        together.setdefault(statistics.input_of[name], []).append(name)
    yield from map(tuple, together.values())


def layer_score(
    linears: Mapping[str, PrunableLinear],
    statistics: Statistics,
    name: str,
    coefficients: Coefficients,
) -> Tensor:
    """:func:`pho_service.pruning.scores.layer_importance` of one of the linears."""
    return layer_importance(
        linears[name].weight,
        activation_norm=statistics.activation_norm(name),
        fisher=statistics.fisher[name],
        coefficients=coefficients,
        layer=name,
    )


def linear_shares(
    linears: Mapping[str, PrunableLinear], statistics: Statistics, candidate: Candidate
) -> dict[str, int]:
    """
    What an allocation, or scope ``global``, gives each linear; empty if the pattern says it.

    These are the weights to remove by name of the linear, or the N of each for N:M.
    """
    pattern, allocation = candidate.pattern, candidate.steps.allocation
    if pattern.scope is Scope.GLOBAL:
        plain = plain_score(candidate.coefficients.gradient_exponent)
        return _shares(lambda name: layer_score(linears, statistics, name, plain), linears, pattern)
    if allocation.is_even:
        return {}

    def views() -> Iterator[LayerView]:
        for name, linear in linears.items():
            entry = statistics.inputs[statistics.input_of[name]]
            weight = linear.weight.float()
            yield LayerView(
                name=name,
                out_features=len(weight),
                rows=weight,
                activation_norm=entry.activation_norm.to(weight.device),
                fisher=statistics.fisher[name].to(weight.device),
                root=entry.root.to(weight.device),
            )

    return allocate(views, pattern, allocation)


def mask_of(score: Tensor, pattern: Pattern, share: int | None, order: Tensor | None) -> LinearMask:
    """
    The mask of one linear by its score, (out_features, in_features), float32.

    ``share`` is the weights to remove, or N for N:M; None is what the pattern says. ``order`` is
    that of the channels, for N:M.
    """
    if pattern.group:
        keep = pattern.keep if share is None else share
        if order is None:
            mask = nm_mask(score, keep=keep, group=pattern.group)
        else:
            mask = permuted_mask(score, order, keep=keep, group=pattern.group)
        return LinearMask(keep=mask, order=order, group_keep=keep)
    lines = score if pattern.scope is Scope.ROW else score.reshape(1, -1)
    if share is None:
        return LinearMask(keep=line_mask(lines, pattern).view(score.shape))
    removed = over_rows(torch.tensor([share]), len(lines))
    return LinearMask(keep=keep_highest(lines, removed).view(score.shape))


def over_rows(removed: Tensor, rows: int) -> Tensor:
    """
    Spread what layers lose, (layers,), evenly over the rows of each: (layers * rows,), int64.

    The first rows of a layer lose the remainder.
    """
    whole, remainder = (removed // rows)[:, None], (removed % rows)[:, None]
    return (whole + (torch.arange(rows, device=removed.device) < remainder)).flatten()


def _shares(
    score: Callable[[str], Tensor], linears: Mapping[str, PrunableLinear], pattern: Pattern
) -> dict[str, int]:
    """Number of weights that each linear loses under one threshold; they add up exactly."""
    total = pattern.removed(sum(linear.weight.numel() for linear in linears.values()))
    threshold = threshold_of(lambda: ((score(name), 1.0) for name in linears), total)
    below, tied = [], []
    for name in linears:
        less, equal = count_below(score(name).reshape(1, -1), threshold)
        below.append(int(less))
        tied.append(int(equal))
    removed = share_ties(below, tied, [1.0] * len(below), total)
    return dict(zip(linears, removed, strict=True))


def share_ties(
    below: Sequence[int], tied: Sequence[int], weights: Sequence[float], total: float
) -> list[int]:
    """
    Decide which of the scores that equal a threshold go: the earlier layers keep theirs.

    Args:
        below: Scores under the threshold, layer by layer; all of them go.
        tied: Scores that equal it.
        weights: How many weights of the model each score of a layer stands for.
        total: Weights of the model to remove.

    Returns:
        Scores to remove, layer by layer; they stand for ``total`` weights, or
        for less by under one score of a layer.
    """
    removed = list(below)
    rest_to_remove = total - sum(n * weight for n, weight in zip(below, weights, strict=True))
    for i in reversed(range(len(removed))):
        share = min(tied[i], int(rest_to_remove / weights[i] + 1e-6))
        removed[i] += share
        rest_to_remove -= share * weights[i]
    return removed


@contextmanager
def pruned(
    linears: Mapping[str, PrunableLinear], masks: Iterator[tuple[str, Tensor]]
) -> Iterator[dict[str, float]]:
    """
    Zero the masked weights of a model, and put them back afterwards.

    Inside, nobody else may change them. The masks, (name, mask) pairs, must not depend on weights
    that were masked before.

    Yields:
        The achieved sparsity of each linear.
    """
    removed: dict[str, Tensor] = {}
    rooms: dict[torch.device, int] = {}
    sparsity: dict[str, float] = {}
    try:
        for name, keep in masks:
            removed[name] = _remove_(linears[name].weight, keep, rooms)
            sparsity[name] = 1 - int(keep.count_nonzero()) / keep.numel()
        yield sparsity
    finally:
        # Backwards, for a module that two names stand for.
        for name, values in reversed(removed.items()):
            _restore_(linears[name].weight, values)


def _remove_(weight: Tensor, keep: Tensor, rooms: dict[torch.device, int]) -> Tensor:
    """Zero the masked weights, and give what :func:`_restore_` needs to undo it, bit by bit."""
    # On a CPU that is a copy of all: faster than anything else. On a GPU, which a model may nearly
    # fill, it is what stood where there are zeros now, in main memory once that takes half of what
    # was free on the card.
    dense = weight.clone()
    weight.mul_(keep).add_(0)  # faster than a fill; -0 becomes 0
    if weight.device.type != "cuda":
        return dense
    values = dense[weight == 0]  # what was zero before is among them
    room = rooms.setdefault(weight.device, free_memory(weight.device) // 2)
    if values.nbytes > room:
        return values.cpu()
    rooms[weight.device] -= values.nbytes
    return values


def _restore_(weight: Tensor, dense: Tensor) -> None:
    if dense.shape == weight.shape:
        weight.copy_(dense)
    else:
        weight.masked_scatter_(weight == 0, dense.to(weight.device))


def model_sparsity(linears: Mapping[str, PrunableLinear], sparsity: Mapping[str, float]) -> float:
    """The share that is gone of the weights of all linears that have a sparsity."""
    sizes = {name: linear.weight.numel() for name, linear in linears.items() if name in sparsity}
    return sum(sparsity[name] * size for name, size in sizes.items()) / sum(sizes.values())


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
        """The counts of a mask; ``by_row``, each output row keeps its own number of weights."""
        if group:
            return cls(removed=mask.new_zeros(0, dtype=torch.int64), keep=keep, group=group)
        lines = mask if by_row else mask.reshape(1, -1)
        return cls(removed=(~lines).sum(dim=1))

    def choose(self, score: Tensor) -> Tensor:
        """The mask of these counts that keeps the highest scores, float32, no NaN."""
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


KEEP, GROUP = 2, 4  # the only pattern that GPUs have kernels for


def to_semi_structured(weight: Tensor) -> Tensor:
    """
    Turn a weight into torch's semi-structured tensor, which multiplies as the weight does.

    Args:
        weight: (out_features, in_features), 16-bit, on a GPU, contiguous; at most two of
            each four neighbours of a row are not zero. More are lost without a word: see
            :func:`broken_groups`.

    Raises:
        RuntimeError: A dtype or a shape that torch's kernels do not take, or no kernels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is a prototype
        semi_structured: Tensor = torch.sparse.to_sparse_semi_structured(weight)
        return semi_structured


def broken_groups(weight: Tensor) -> int:
    """
    Count the groups of four neighbouring inputs that keep more than two weights.

    Args:
        weight: (out_features, in_features). All groups count as broken where in_features is not
            a multiple of four.
    """
    out_features, in_features = weight.shape
    if in_features % GROUP:
        return out_features * -(-in_features // GROUP)
    keeps = weight.ne(0).view(out_features, -1, GROUP).sum(dim=-1, dtype=torch.uint8)
    return int((keeps > KEEP).count_nonzero())


def pack(keep: Tensor) -> Tensor:
    """(ceil(numel / 8),), uint8, on the CPU: the rows one after the other, one bit a weight."""
    flat = keep.detach().contiguous().view(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    bytes_ = pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=flat.device)
    return (bytes_ << places).sum(dim=1, dtype=torch.uint8).cpu()


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of this shape, bool, that :func:`pack` packed."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.view(np.bool_)).view(shape)
