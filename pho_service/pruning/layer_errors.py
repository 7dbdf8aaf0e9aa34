"""
Errors of candidates on each linear of a bundle, many linears at once in stacks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

from pho_service.errors import BundleError, NumericalError, field_name
from pho_service.pruning.allocation import allocate
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.hardware import in_threads
from pho_service.pruning.layer_view import (
    CURVE_ROWS,
    DIGIT_BITS,
    LayerView,
    LinearSize,
    View,
    curve_rows,
    require_finite_curve,
    require_finite_scores,
)
from pho_service.pruning.masks import over_rows, share_ties
from pho_service.pruning.scores import TINY, gini, importance
from pho_service.pruning.selection import (
    beaten_by,
    count_below,
    keep_highest,
    nm_mask,
    threshold_of,
)
from pho_service.spec.pattern import Coefficients, Pattern, Scope
from pho_service.spec.steps import Candidate

Piece = TypeVar("Piece")
Done = TypeVar("Done")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """
    I inputs of n channels, each read by L linears with R sampled rows.

    Linears that read one input are multiplied with its root together, and
    nothing of a root's size is copied for a candidate.
    """

    first: str  # name of a linear, for messages
    positions: Tensor  # (I * L,), int64, in the bundle, on the CPU; an input's readers side by side
    rows: Tensor  # (I, L, R, n)
    magnitude: Tensor  # (I, L, R, n)
    row_mean: Tensor  # (I, L, R)
    column_mean: Tensor  # (I, L, n)
    kernel_sizes: tuple[int, ...]  # K of them
    window_means: Tensor  # (K, I, L, R, n)
    activation_norm: Tensor  # (I, L, n)
    fisher: Tensor  # (I, L, R), of the sampled rows
    row_energy: Tensor  # (I, L, R): W H W^T, a row's error if all of it goes; >= TINY
    out_features: Tensor  # (I, L, 1)
    weights_per_value: Tensor  # (I * L,), float64: weights that each sampled one stands for
    roots: Tensor  # (I, rows of the root, n)

    def importance(self, coefficients: Sequence[Coefficients], out: Tensor) -> Tensor:
        """Score all weights in the ways of C candidates, into ``out``, which is contiguous."""
        windows = []
        for c in coefficients:
            needs_window = c.neighbourhood and c.normalisation != "none"
            if needs_window and c.kernel_size not in self.kernel_sizes:
                raise BundleError(
                    f"the bundle has no window means for kernel size {c.kernel_size}, only for "
                    f"{', '.join(map(str, self.kernel_sizes))}. Calibrate again with "
                    f"{field_name('calibration/kernel_sizes')}."
                )
            windows.append(self.kernel_sizes.index(c.kernel_size) if needs_window else 0)
        return importance(
            self.magnitude,
            row_mean=self.row_mean,
            column_mean=self.column_mean,
            window_means=self.window_means,
            windows=windows,
            activation_norm=self.activation_norm,
            fisher=self.fisher,
            out_features=self.out_features,
            coefficients=coefficients,
            out=out,
        )

    def plain_importance(self, gradient_exponent: float, out: Tensor | None = None) -> Tensor:
        """(I, L, R, n), float32: the scores by :func:`pho_service.pruning.masks.plain_score`."""
        out = torch.mul(self.magnitude, self.activation_norm[..., None, :], out=out)
        return out.mul_((self.fisher**gradient_exponent)[..., None]) if gradient_exponent else out

    def row_errors(self, keep: Tensor, out: Tensor) -> Tensor:
        """
        D H D^T of each row, (I, C, L, R), D being the weights that are not in ``keep``.

        ``out`` has the shape of ``keep``, float32, contiguous, and is written.
        """
        rows = self.rows[:, None]
        kept_share = out.copy_(keep.view(torch.uint8))  # 1 or 0
        return _row_errors(torch.addcmul(rows, rows, kept_share, value=-1, out=out), self.roots)


def _row_errors(rows: Tensor, roots: Tensor) -> Tensor:
    """D H D^T of each row: (I, ..., n) rows and (I, m, n) roots of H give (I, ...)."""
    flat = rows.flatten(1, -2).to(roots.dtype)
    outputs = torch.bmm(flat, roots.transpose(1, 2)).float()  # (I, ..., m), but flat
    return outputs.square_().sum(dim=-1).view(rows.shape[:-1])


def stack_bundle(
    bundle: ProxyBundle, device: torch.device, dtype: torch.dtype, *, values: int | None
) -> list[Stack]:
    """
    Copy a bundle's layers into as few stacks as their shapes allow.

    A stack's inputs are equally wide, with equally many readers, and those
    have equally many sampled rows. Linears of one input whose numbers of rows
    differ are stacked apart. Where nothing has to be converted, the bundle's
    large tensors become views of the stacks, so that they are not held twice. A
    stack of more than one input has at most so many sampled ``values``. ``dtype``
    is that of the products with the roots.
    """
    readers: dict[tuple[int, int], list[int]] = {}
    for position, layer in enumerate(bundle.layers):
        readers.setdefault((layer.input_index, len(layer.rows)), []).append(position)
    shapes: dict[tuple[int, int, int], list[list[int]]] = {}
    for (_, rows), together in readers.items():
        shape = (bundle.layers[together[0]].in_features, rows, len(together))
        shapes.setdefault(shape, []).append(together)
    stacks = []
    for (n, rows, linears), groups in shapes.items():
        group_limit = len(groups) if values is None else max(1, values // (n * rows * linears))
        stacks += [
            _stack(bundle, groups[start : start + group_limit], device, dtype)
            for start in range(0, len(groups), group_limit)
        ]
    return stacks


def _stack(
    bundle: ProxyBundle,
    groups: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> Stack:
    """Stack the linears whose positions are given, those of one input together."""
    positions = [position for group in groups for position in group]
    layers = [bundle.layers[position] for position in positions]
    inputs = [bundle.inputs[bundle.layers[group[0]].input_index] for group in groups]
    rows, n = layers[0].rows.shape
    count, linears = len(groups), len(groups[0])

    def stacked(tensor_of: Callable[[LayerSample], Tensor], *shape: int) -> Tensor:
        tensors = torch.stack([tensor_of(layer) for layer in layers])
        return tensors.view(count, linears, *shape).to(device)

    weights = stacked(lambda layer: layer.rows, rows, n)
    means = torch.empty(len(bundle.kernel_sizes), *weights.shape, device=device)
    for k, of_size in zip(bundle.kernel_sizes, means, strict=True):
        of_size.copy_(torch.stack([la.window_means[k] for la in layers]).view_as(of_size))
    roots = torch.stack([entry.root for entry in inputs]).to(device, dtype)
    out_features = torch.tensor([layer.out_features for layer in layers], device=device)
    norms = torch.stack([entry.activation_norm for entry in inputs]).to(device)
    stack = Stack(
        first=layers[0].name,
        positions=torch.tensor(positions),
        rows=weights,
        magnitude=weights.abs(),
        row_mean=stacked(lambda layer: layer.row_mean, rows),
        column_mean=stacked(lambda layer: layer.column_mean, n),
        kernel_sizes=bundle.kernel_sizes,
        window_means=means,
        activation_norm=norms[:, None].repeat(1, linears, 1),
        fisher=stacked(lambda layer: layer.fisher[layer.row_index], rows),
        row_energy=_row_errors(weights, roots).clamp_min_(TINY),
        out_features=out_features.view(count, linears, 1),
        weights_per_value=out_features.double() / rows,
        roots=roots,
    )
    if device.type == "cpu" and dtype is torch.float32:
        _share(bundle, stack, groups)
    return stack


def _share(bundle: ProxyBundle, stack: Stack, groups: Sequence[Sequence[int]]) -> None:
    """Let the large tensors of a bundle be views of a stack's, which has the same values."""
    for i, group in enumerate(groups):
        for j, position in enumerate(group):
            bundle.layers[position] = replace(
                bundle.layers[position],
                rows=stack.rows[i, j],
                window_means={
                    k: means[i, j]
                    for k, means in zip(stack.kernel_sizes, stack.window_means, strict=True)
                },
            )
        index = bundle.layers[group[0]].input_index
        bundle.inputs[index] = replace(bundle.inputs[index], root=stack.roots[i])


_BINS = 1 << DIGIT_BITS


@dataclass(frozen=True)
class StackedView:
    """Every linear of a bundle, on a device; it measures what a ``LayerView`` of each measures."""

    linears: Sequence[LinearSize]
    stacks: Sequence[Stack]

    def wanda_sums(self) -> list[float]:
        """See ``layer_view.View``."""
        sums = self._each(
            lambda stack: _scores(stack, 0.0).sum(dim=1, dtype=torch.float64)
        )  # (linears,)
        values: list[float] = sums.tolist()
        self._require_finite(values)  # a sum is not if a score is not
        return values

    def outliers(self, limits: Sequence[float]) -> list[int]:
        """See ``layer_view.View``."""
        of_all = torch.tensor(limits)

        def above(stack: Stack) -> Tensor:
            score = _scores(stack, 0.0)
            return (score > of_all[stack.positions, None].to(score.device)).sum(dim=1)

        counts: list[int] = self._each(above).tolist()
        return counts

    def digit_counts(self, shift: int, prefix: int) -> list[Tensor]:
        """See ``layer_view.View``."""
        self._require_finite(self._highest)

        def counted(stack: Stack) -> Tensor:
            score = _scores(stack, 0.5)
            digits = score.view(torch.int32) >> shift
            inside = (digits >> DIGIT_BITS == prefix).int()
            counts = inside.new_zeros(len(score), _BINS)
            return counts.scatter_add_(1, (digits & (_BINS - 1)).long(), inside)

        return list(self._each(counted).double())

    def error_curves(self, grid: Sequence[float], group: int) -> list[list[float]]:
        """See ``layer_view.View``."""
        self._require_finite(self._highest)
        errors = self._each(lambda stack: _error_curves(_sampled(stack), grid, group))
        scales = torch.tensor(
            [linear.out_features / min(CURVE_ROWS, linear.rows) for linear in self.linears],
            dtype=torch.float64,
        )
        curves: list[list[float]] = (errors * scales[:, None]).tolist()
        for linear, curve in zip(self.linears, curves, strict=True):
            require_finite_curve(curve, linear.name)
        return curves

    @cached_property
    def _highest(self) -> list[float]:
        """The highest score A * x * sqrt(g) of each linear."""
        values: list[float] = self._each(lambda stack: _scores(stack, 0.5).amax(dim=1)).tolist()
        return values

    def _each(self, measure: Callable[[Stack], Tensor]) -> Tensor:
        """Measure the I * L linears of each stack; values in the bundle's order."""
        values = torch.cat([measure(stack) for stack in self.stacks]).cpu()
        ordered = torch.empty_like(values)
        ordered[torch.cat([stack.positions for stack in self.stacks])] = values
        return ordered

    def _require_finite(self, highest: Sequence[float]) -> None:
        for linear, value in zip(self.linears, highest, strict=True):
            require_finite_scores(value, linear.name)


def _scores(stack: Stack, gradient_exponent: float) -> Tensor:
    """(I * L, R * n), float32: A * x * g**gradient_exponent of each linear."""
    return stack.plain_importance(gradient_exponent).flatten(0, 1).flatten(1)


def _sampled(stack: Stack) -> Stack:
    """At most CURVE_ROWS rows of each linear, evenly spaced."""
    rows = stack.rows.shape[2]
    index = curve_rows(rows, stack.rows.device)
    if len(index) == rows:
        return stack
    return replace(
        stack,
        rows=stack.rows[:, :, index],
        magnitude=stack.magnitude[:, :, index],
        fisher=stack.fisher[:, :, index],
    )


def _error_curves(stack: Stack, grid: Sequence[float], group: int) -> Tensor:
    """(I * L, points), float32: the error of each linear's rows at each sparsity."""
    score = stack.plain_importance(0.5)  # (I, L, R, n)
    if group:
        rank = beaten_by(score.view(-1, score.shape[-1]), group).view(score.shape)
        limits = [round((1 - sparsity) * group) for sparsity in grid]  # fewer are better
    else:
        rank = _rank_from_highest(score)
        values = score.shape[2] * score.shape[3]
        limits = [values - round(sparsity * values) for sparsity in grid]
    errors = []
    for limit in limits:
        keep = (rank < limit)[:, None]
        change = torch.empty_like(score)[:, None]
        lost = stack.row_errors(keep, out=change)[:, 0]  # (I, L, R)
        errors.append((lost * stack.fisher).sum(dim=-1))
    return torch.stack(errors, dim=-1).flatten(0, 1)


def _rank_from_highest(score: Tensor) -> Tensor:
    """(I, L, R, n), int64: how many scores of its linear come before one; of equals the first."""
    flat = score.flatten(2)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(flat.shape[-1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places).view(score.shape)


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
        """
        sums = self._by_position(
            self._each(lambda stack: self._rate(stack, candidates, lost, with_gini), self.stacks)
        )
        for highest in sums[..., 0].unbind(dim=1):
            require_finite(self.bundle.layers, highest, "a score of a candidate")
        return sums

    def candidate_shares(self, candidates: Sequence[Candidate]) -> list[Tensor | None]:
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
        rating = torch.stack([highest, inequality, *sums], dim=-1)  # (I, C, L, 5)
        return rating.transpose(1, 2).flatten(0, 1)

    def _views(self, device: torch.device) -> list[View]:
        """Views for allocations: one linear after the other on a CPU, all at once on a GPU."""
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
            size = BATCH * max(stack.rows.numel() for stack in self.stacks)
            self._memory.scores = torch.empty(size, device=self.stacks[0].rows.device)
        scores: Tensor = self._memory.scores
        return scores

    def _plain(self) -> list[Tensor]:
        """Memory for plain scores of all linears, which scope ``global`` needs, of this thread."""
        if not hasattr(self._memory, "plain"):
            self._memory.plain = [torch.empty_like(stack.rows) for stack in self.stacks]
        plain: list[Tensor] = self._memory.plain
        return plain

    def _by_position(self, values: Sequence[Tensor]) -> Tensor:
        """Bring values of stacks, (I * L, ...) each, into the order of the bundle, on the CPU."""
        joined = torch.cat(list(values)).cpu()
        ordered = torch.empty_like(joined)
        ordered[self._positions] = joined
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

    def pattern_shares(self, patterns: Sequence[Pattern]) -> Tensor:
        """What each layer loses by a pattern of its own, in the form that :meth:`shares` has."""
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
    rows, n = score.shape[3:]
    if pattern.group:
        keeps = pattern.keep if shares is None else shares[..., None]
        return nm_mask(score, keep=keeps, group=pattern.group)
    removed: int | Tensor
    if pattern.scope is Scope.ROW:
        lines = score.view(-1, n)
        removed = pattern.removed(n) if shares is None else over_rows(shares.flatten(), rows)
    else:
        lines = score.view(-1, rows * n)
        removed = pattern.removed(rows * n) if shares is None else shares.flatten()
    return keep_highest(lines, removed).view(score.shape)
