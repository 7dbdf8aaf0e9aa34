"""
What candidates do to each linear of a bundle: the error of its output, summed up in several ways.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.pruning.allocation import allocate
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.layer_view import LayerView, LinearSize, View
from pho_service.pruning.masks import over_rows, share_ties
from pho_service.pruning.scores import gini
from pho_service.pruning.selection import count_below, keep_highest, nm_mask, threshold_of
from pho_service.pruning.stacked_view import StackedView
from pho_service.pruning.stacks import Stack, stack_bundle
from pho_service.pruning.threads import in_threads
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern, Scope

Piece = TypeVar("Piece")
Done = TypeVar("Done")

BATCH = 8  # candidates that are rated at once: a generation of the default sampler
CACHED = 1 << 21  # scores of a batch in a stack, 8 MiB for each thread, on a CPU


class LayerErrors:
    """
    Sums over the linears of one bundle, all of which are pruned alike; in one thread at a time.

    Args:
        bundle: What to rate on. On the CPU it shares memory with the stacks.
        device: Where the tensors are kept and the sums are done.
        dtype: Dtype of the matrix products.
    """

    def __init__(self, bundle: ProxyBundle, device: torch.device, dtype: torch.dtype) -> None:
        self.bundle = bundle
        values = CACHED // BATCH if device.type == "cpu" else None
        self.stacks = stack_bundle(bundle, device, dtype, values=values)
        # Overwritten by every candidate: memory asked for again costs more than what is done in it.
        self._memory = local()
        self._positions = torch.cat([stack.positions for stack in self.stacks])
        views = self._views(device)
        # A search often asks for an allocation that it has asked for before.
        self._allocate = lru_cache(maxsize=256)(
            lambda pattern, allocation: allocate(lambda: views, pattern, allocation)
        )

    def sums(
        self, candidates: Sequence[Candidate], lost: Sequence[Tensor | None], with_gini: bool
    ) -> Tensor:
        """
        Rate up to eight candidates of one pattern.

        Args:
            candidates: C of them.
            lost: What each takes from the linears, as :meth:`shares` gives it; None for all of
                them or for none.
            with_gini: Compute the Gini statistic too, which needs a sort.

        Returns:
            (layers, C, 5), float64, on the CPU: the highest score, NaN if any is; Gini of the
            scores; and the sums of a :class:`ProxyRating`'s fisher, absolute and blend.

        Raises:
            NumericalError: A score is NaN or infinite; names the layer.
        """
        found = self._by_position(
            self._each(lambda stack: self._rate(stack, candidates, lost, with_gini), self.stacks)
        )
        for highest in found[..., 0].unbind(dim=1):
            require_finite(self.bundle.layers, highest, "a score of a candidate")
        return found

    def each_shares(self, candidates: Sequence[Candidate]) -> list[Tensor | None]:
        """:meth:`shares` of each candidate; on a CPU side by side."""
        return self._each(self.shares, candidates)

    def _rate(
        self,
        stack: Stack,
        candidates: Sequence[Candidate],
        lost: Sequence[Tensor | None],
        with_gini: bool,
    ) -> Tensor:
        """(I * L, C, 5), float64: what :meth:`sums` has of each linear of a stack."""
        pattern = candidates[0].pattern
        pattern.check_width(stack.rows.shape[-1], stack.first)
        inputs, *shape = stack.rows.shape
        count = len(candidates) * stack.rows.numel()
        score = self._scores()[:count].view(inputs, len(candidates), *shape)  # (I, C, L, R, n)
        stack.importance([candidate.coefficients for candidate in candidates], out=score)
        shares = [
            removed[stack.positions].view(inputs, -1) for removed in lost if removed is not None
        ]  # (I, L) each; none if the pattern says it all
        keep = _keep(score, pattern, torch.stack(shares, dim=1) if shares else None)
        highest = score.amax(dim=(3, 4))  # NaN if any score is
        inequality = torch.zeros_like(highest)
        if with_gini:
            inequality = gini((score * keep).flatten(start_dim=3))
        error = stack.row_errors(keep, out=score)  # (I, C, L, R)
        loss = error * stack.fisher[:, None]
        blend = loss * (error / stack.row_energy[:, None]).sqrt()
        scale = stack.weights_per_value.view(inputs, 1, -1)
        sums = [rows.sum(dim=3) * scale for rows in (loss, error, blend)]
        found = torch.stack([highest, inequality, *sums], dim=-1)  # (I, C, L, 5)
        return found.transpose(1, 2).flatten(0, 1)

    def _views(self, device: torch.device) -> list[View]:
        """What allocations look at: one linear after the other on a CPU, all at once on a GPU."""
        layers = self.bundle.layers
        if device.type == "cpu":
            return [_view(self.bundle, layer) for layer in layers]
        return [StackedView([_size(layer) for layer in layers], self.stacks)]

    def _each(self, work: Callable[[Piece], Done], pieces: Sequence[Piece]) -> list[Done]:
        """Do independent pieces of work; on a CPU side by side."""
        if self.stacks[0].rows.device.type == "cpu":
            return in_threads(work, pieces)
        return [work(piece) for piece in pieces]

    def _scores(self) -> Tensor:
        """Memory for the scores of a batch in the largest stack, of this thread."""
        if not hasattr(self._memory, "scores"):
            most = BATCH * max(stack.rows.numel() for stack in self.stacks)
            self._memory.scores = torch.empty(most, device=self.stacks[0].rows.device)
        scores: Tensor = self._memory.scores
        return scores

    def _plain(self) -> list[Tensor]:
        """Memory for plain scores of all linears, which scope ``global`` needs, of this thread."""
        if not hasattr(self._memory, "plain"):
            self._memory.plain = [torch.empty_like(stack.rows) for stack in self.stacks]
        plain: list[Tensor] = self._memory.plain
        return plain

    def _by_position(self, values: Sequence[Tensor]) -> Tensor:
        """What stacks have of each linear, (I * L, ...), in the order of the bundle, on the CPU."""
        found = torch.cat(list(values)).cpu()
        ordered = torch.empty_like(found)
        ordered[self._positions] = found
        return ordered

    def shares(self, candidate: Candidate) -> Tensor | None:
        """
        What each layer of the bundle loses, if the pattern does not say it already.

        Returns:
            (layers,), int64: sampled weights to remove; for N:M the N of each layer.
        """
        pattern, allocation = candidate.pattern, candidate.steps.allocation
        if pattern.scope is Scope.GLOBAL:
            return self._global(candidate)
        if allocation.is_even:
            return None
        shares = self._allocate(pattern, allocation)
        if pattern.group:
            return torch.tensor([shares[layer.name] for layer in self.bundle.layers])
        return torch.tensor(
            [
                round(shares[layer.name] * len(layer.rows) / layer.out_features)
                for layer in self.bundle.layers
            ]
        )

    def own_shares(self, patterns: Sequence[Pattern]) -> Tensor:
        """
        What each layer loses by a pattern of its own.

        Args:
            patterns: Patterns of each layer.

        Returns:
            As :meth:`shares`.
        """
        lost = []
        for layer, pattern in zip(self.bundle.layers, patterns, strict=True):
            rows, n = layer.rows.shape
            if pattern.group:
                lost.append(pattern.keep)
            elif pattern.scope is Scope.ROW:
                lost.append(rows * pattern.removed(n))
            else:
                lost.append(pattern.removed(rows * n))
        return torch.tensor(lost)

    def _global(self, candidate: Candidate) -> Tensor:
        """Count what each layer loses under one threshold on the plain score."""
        exponent = candidate.coefficients.gradient_exponent
        scores = [
            stack.plain_importance(exponent, out=memory).flatten(0, 1).flatten(1)
            for stack, memory in zip(self.stacks, self._plain(), strict=True)
        ]  # (I * L, R * n) each
        weights = [stack.weights_per_value for stack in self.stacks]
        highest = self._by_position([score.amax(dim=1) for score in scores])
        require_finite(self.bundle.layers, highest, "a score of a candidate")
        total = candidate.pattern.removed(self.bundle.weights)
        threshold = threshold_of(lambda: zip(scores, weights, strict=True), total)
        below, tied = zip(*(count_below(score, threshold) for score in scores), strict=True)
        removed = share_ties(
            self._by_position(below).tolist(),
            self._by_position(tied).tolist(),
            self._by_position(weights).tolist(),
            total,
        )
        return torch.tensor(removed)


def require_finite(layers: Sequence[LayerSample], values: Tensor, what: str) -> None:
    """Raise NumericalError if a value of one of the linears is NaN or infinite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        name = layers[int((~finite).nonzero()[0])].name
        raise NumericalError(f"{name}: {what} is NaN or infinite.", layer=name)


def _size(layer: LayerSample) -> LinearSize:
    return LinearSize(
        name=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        rows=len(layer.rows),
    )


def _view(bundle: ProxyBundle, layer: LayerSample) -> LayerView:
    entry = bundle.inputs[layer.input_index]
    return LayerView(
        name=layer.name,
        out_features=layer.out_features,
        rows=layer.rows,
        activation_norm=entry.activation_norm,
        fisher=layer.fisher[layer.row_index],
        root=entry.root,
    )


def _keep(score: Tensor, pattern: Pattern, shares: Tensor | None) -> Tensor:
    """
    Mark what stays.

    Args:
        score: (I, C, L, R, n), contiguous.
        pattern: Pattern of all candidates.
        shares: (I, C, L), int64, on the CPU: what each linear loses, or its N of N:M, if not the
            pattern's.
    """
    rows, n = score.shape[3:]
    if pattern.group:
        kept = pattern.keep if shares is None else shares[..., None]
        return nm_mask(score, keep=kept, group=pattern.group)
    removed: int | Tensor
    if pattern.scope is Scope.ROW:
        lines = score.view(-1, n)
        removed = pattern.removed(n) if shares is None else over_rows(shares.flatten(), rows)
    else:
        lines = score.view(-1, rows * n)
        removed = pattern.removed(rows * n) if shares is None else shares.flatten()
    return keep_highest(lines, removed).view(score.shape)
