"""
Rate candidates on a proxy bundle: by how much does pruning change each linear's output?

For a candidate with mask M, D = W * ~M is what goes, and D H D^T the error of
a row. Score and allocation are rated; permutation, re-pruning and weight
updates need all rows of a linear, so candidates are compared as they are
before those steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.pruning.allocation import allocate
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.layer_view import LayerView, LinearSize, View
from pho_service.pruning.masks import over_rows, share_ties
from pho_service.pruning.scores import TINY, gini
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


@dataclass(frozen=True, kw_only=True)
class ProxyRating:
    """
    What the proxies say of one candidate. Lower is better for all but Gini.

    Attributes:
        fisher: Sum over layers and rows of g_i * (D H D^T)_i: up to a factor, a second-order
            estimate of the rise of the loss, in nats a token.
        relative: Sum over layers of error / output energy.
        absolute: Sum over layers and rows of the error.
        blend: As ``fisher``, each row times the square root of its relative
            error (D H D^T)_i / (W H W^T)_i. A second-order estimate holds for
            small errors and flatters scores that use g; this makes ruined
            rows count more.
        gini: Gini coefficient of the scores with the removed ones at 0, mean
            over layers by number of weights; None if it was not asked for.
            Higher went with lower perplexity in our measurements.
        error_by_kind: Mean relative error of the layers of each kind (q_proj ...).
    """

    fisher: float
    relative: float
    absolute: float
    blend: float
    gini: float | None
    error_by_kind: dict[str, float]


class ProxyEvaluator:
    """
    Rates candidates on one bundle, in memory, on one device; in one thread at a time.

    Candidates of one pattern are rated up to eight at a time, which changes
    nothing in their ratings: nothing is added up over candidates.

    Args:
        bundle: What to rate on. On the CPU it shares memory with the evaluator.
        device: Where the tensors are kept and the sums are done.
        dtype: Of the matrix products, which take most of the time. Scores,
            masks and sums are float32 in any case.
    """

    def __init__(
        self,
        bundle: ProxyBundle,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.bundle = bundle
        on = torch.device(device)
        values = CACHED // BATCH if on.type == "cpu" else None
        self.stacks = stack_bundle(bundle, on, dtype, values=values)
        # Overwritten by every candidate: memory asked for anew costs more than what is done in it.
        self._memory = local()
        self._positions = torch.cat([stack.positions for stack in self.stacks])
        views = self._views(on)
        # A search often asks for an allocation that it has asked for before.
        self._allocate = lru_cache(maxsize=256)(
            lambda pattern, allocation: allocate(lambda: views, pattern, allocation)
        )

    def evaluate(
        self, candidates: Sequence[Candidate], *, with_gini: bool = False
    ) -> list[ProxyRating]:
        """
        Rate candidates; each rating is independent of the others in the list.

        Args:
            candidates: Kernel sizes must be among the bundle's.
            with_gini: Compute the Gini statistic too, which needs a sort.

        Raises:
            BundleError: A kernel size that the bundle has no window means for.
            InvalidInput: N:M does not divide an input width.
            NumericalError: A rating is NaN or infinite; names the layer.
        """
        ratings = []
        for _, alike in groupby(
            candidates, key=lambda c: (c.pattern, c.steps.allocation.method == "uniform")
        ):
            together = list(alike)
            for start in range(0, len(together), BATCH):
                sums = self._sums(together[start : start + BATCH], with_gini)
                ratings += [self._summary(each, with_gini) for each in sums]
        return ratings

    def layer_errors(self, candidate: Candidate) -> dict[str, float]:
        """
        The error of each linear relative to the energy of its output, by name.

        Raises:
            BundleError, InvalidInput: As :meth:`evaluate`.
        """
        (sums,) = self._sums([candidate], with_gini=False)
        return dict(
            zip((la.name for la in self.bundle.layers), self._relative(sums.absolute), strict=True)
        )

    def layer_sparsities(self, candidate: Candidate) -> dict[str, float]:
        """
        The share of its weights that each linear loses, by name.

        In scope ``global`` and with an allocation it is that of the sampled rows, which the whole
        linear comes near; otherwise it is exact.

        Raises:
            NumericalError: A score is NaN or infinite; names the layer.
        """
        pattern = candidate.pattern
        lost = self._shares(candidate)
        found = {}
        for number, layer in enumerate(self.bundle.layers):
            if pattern.group:
                kept = pattern.keep if lost is None else int(lost[number])
                found[layer.name] = 1 - kept / pattern.group
            elif lost is not None:
                found[layer.name] = int(lost[number]) / layer.rows.numel()
            else:
                rows = 1 if pattern.scope is Scope.ROW else layer.out_features
                found[layer.name] = pattern.removed(rows * layer.in_features) / (
                    rows * layer.in_features
                )
        return found

    def _sums(self, candidates: Sequence[Candidate], with_gini: bool) -> list["_Sums"]:
        """What each of up to eight candidates does to the layers; they are of one pattern."""
        lost = self._each(self._shares, candidates)
        found = self._by_position(
            self._each(lambda stack: self._rate(stack, candidates, lost, with_gini), self.stacks)
        )  # (layers, C, 5)
        sums = [_Sums(*values.T) for values in found.unbind(dim=1)]
        for each in sums:
            self._require_finite(each.highest, "a score of a candidate")
        return sums

    def _rate(
        self,
        stack: Stack,
        candidates: Sequence[Candidate],
        lost: Sequence[Tensor | None],
        with_gini: bool,
    ) -> Tensor:
        """(I * L, C, 5), float64: what :class:`_Sums` has of each linear of a stack."""
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

    def _require_finite(self, values: Tensor, what: str) -> None:
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            name = self.bundle.layers[int((~finite).nonzero()[0])].name
            raise NumericalError(f"{name}: {what} is NaN or infinite.", layer=name)

    def _relative(self, absolute: Tensor) -> list[float]:
        energy = torch.tensor([layer.output_energy for layer in self.bundle.layers])
        values: list[float] = (absolute / energy.clamp_min(TINY)).tolist()
        return values

    def _shares(self, candidate: Candidate) -> Tensor | None:
        """
        What each layer of the bundle loses, if the pattern does not say it already.

        Returns:
            (layers,), int64: sampled weights to remove; for N:M the N of each layer.
        """
        pattern, allocation = candidate.pattern, candidate.steps.allocation
        if pattern.scope is Scope.GLOBAL:
            return self._global(candidate)
        if allocation.method == "uniform":
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

    def _global(self, candidate: Candidate) -> Tensor:
        """What each layer loses under one threshold on the plain score."""
        exponent = candidate.coefficients.gradient_exponent
        scores = [
            stack.plain_importance(exponent, out=memory).flatten(0, 1).flatten(1)
            for stack, memory in zip(self.stacks, self._plain(), strict=True)
        ]  # (I * L, R * n) each
        weights = [stack.weights_per_value for stack in self.stacks]
        highest = self._by_position([score.amax(dim=1) for score in scores])
        self._require_finite(highest, "a score of a candidate")
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

    def _summary(self, sums: "_Sums", with_gini: bool) -> ProxyRating:
        layers = self.bundle.layers
        fisher, absolute, blend = sums.fisher, sums.absolute, sums.blend
        highest = torch.stack([fisher, absolute, blend]).amax(dim=0)
        self._require_finite(highest, "the proxy's error of a candidate")
        relative = self._relative(absolute)
        by_kind: dict[str, list[float]] = {}
        for layer, value in zip(layers, relative, strict=True):
            by_kind.setdefault(layer.kind, []).append(value)
        mean_gini = None
        if with_gini:
            sizes = torch.tensor([float(la.out_features * la.in_features) for la in layers])
            mean_gini = float((sums.gini * sizes).sum() / sizes.sum())
        return ProxyRating(
            fisher=float(fisher.double().sum()),
            relative=float(torch.tensor(relative).double().sum()),
            absolute=float(absolute.double().sum()),
            blend=float(blend.double().sum()),
            gini=mean_gini,
            error_by_kind={kind: sum(v) / len(v) for kind, v in by_kind.items()},
        )


@dataclass(frozen=True)
class _Sums:
    """What a candidate does to each layer, in the order of the bundle: each (layers,)."""

    highest: Tensor  # score
    gini: Tensor
    fisher: Tensor
    absolute: Tensor
    blend: Tensor


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
        pattern: Of all candidates.
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
