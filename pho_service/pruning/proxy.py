"""
Rate candidates on a proxy bundle: by how much does pruning change each linear's output?

For a candidate with mask M, D = W * ~M is what goes, and D H D^T the error of
a row. Linears of one shape are stacked and rated together. Score and
allocation are rated; permutation, re-pruning and weight updates need all rows
of a linear, so candidates are compared as they are before those steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pho_service.errors import BundleError, NumericalError
from pho_service.pruning.allocation import LayerView, allocate
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.masks import line_mask, mask_of, plain_score, share_ties
from pho_service.pruning.scores import TINY, gini, importance
from pho_service.pruning.selection import threshold_of
from pho_service.spec import Candidate, Coefficients, Scope


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


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Layers of one shape, stacked: L layers, R sampled rows, n input channels."""

    layers: list[LayerSample]
    positions: list[int]  # of the layers in the bundle
    rows: Tensor  # (L, R, n)
    magnitude: Tensor  # (L, R, n)
    row_mean: Tensor  # (L, R, 1)
    column_mean: Tensor  # (L, 1, n)
    window_means: dict[int, Tensor]  # each (L, R, n)
    activation_norm: Tensor  # (L, 1, n)
    fisher: Tensor  # (L, R, 1), of the sampled rows
    row_energy: Tensor  # (L, R, 1): W H W^T of the sampled rows
    roots: Tensor  # (inputs, rows of the root, n)
    root_of: Tensor  # (L,), int64, index into roots

    @property
    def weights_per_value(self) -> float:
        """How many weights of a layer each sampled one stands for."""
        return self.layers[0].out_features / self.rows.shape[1]


class ProxyEvaluator:
    """
    Rates candidates on one bundle, in memory, on one device.

    Args:
        bundle: What to rate on.
        device: Where the tensors are kept and the sums are done.
    """

    def __init__(self, bundle: ProxyBundle, device: torch.device | str = "cpu") -> None:
        self.bundle = bundle
        self.device = torch.device(device)
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for position, layer in enumerate(bundle.layers):
            shape = (layer.out_features, *layer.rows.shape)
            shapes.setdefault(shape, []).append(position)
        self._stacks = [self._stack(positions) for positions in shapes.values()]
        # A search often asks for an allocation that it has asked for before.
        self._allocate = lru_cache(maxsize=256)(
            lambda pattern, allocation: allocate(self._views, pattern, allocation)
        )

    def _stack(self, positions: list[int]) -> _Stack:
        layers = [self.bundle.layers[p] for p in positions]
        used = sorted({layer.input_index for layer in layers})
        inputs = [self.bundle.inputs[i] for i in used]

        def stacked(tensors: list[Tensor]) -> Tensor:
            return torch.stack(tensors).to(self.device)

        rows = stacked([layer.rows for layer in layers])
        roots = stacked([entry.root for entry in inputs])
        root_of = torch.tensor([used.index(layer.input_index) for layer in layers]).to(self.device)
        return _Stack(
            layers=layers,
            positions=positions,
            rows=rows,
            magnitude=rows.abs(),
            row_mean=stacked([layer.row_mean for layer in layers])[:, :, None],
            column_mean=stacked([layer.column_mean for layer in layers])[:, None, :],
            window_means={
                k: stacked([layer.window_means[k] for layer in layers])
                for k in self.bundle.kernel_sizes
            },
            activation_norm=stacked(
                [self.bundle.inputs[layer.input_index].activation_norm for layer in layers]
            )[:, None, :],
            fisher=stacked([layer.fisher[layer.row_index] for layer in layers])[:, :, None],
            row_energy=_row_errors(rows, roots[root_of]),
            roots=roots,
            root_of=root_of,
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
        return [self._rate(candidate, with_gini) for candidate in candidates]

    def layer_errors(self, candidate: Candidate) -> dict[str, float]:
        """
        The error of each linear relative to the energy of its output, by name.

        Raises:
            BundleError, InvalidInput: As :meth:`evaluate`.
        """
        absolute = self._sums(candidate, with_gini=False).absolute
        return dict(
            zip((la.name for la in self.bundle.layers), self._relative(absolute), strict=True)
        )

    def _rate(self, candidate: Candidate, with_gini: bool) -> ProxyRating:
        return self._summary(self._sums(candidate, with_gini), with_gini)

    def _sums(self, candidate: Candidate, with_gini: bool) -> "_Sums":
        shares = self._shares(candidate)
        sums = _Sums(*(torch.zeros(len(self.bundle.layers)) for _ in range(4)))
        for stack in self._stacks:
            score = self._score(stack, candidate.coefficients)
            keep = self._keep(stack, score, candidate, shares)
            gone = stack.rows.masked_fill(keep, 0)  # (L, R, n)
            error = _row_errors(gone, stack.roots[stack.root_of])  # (L, R, 1)
            loss = error * stack.fisher
            relative = (error / stack.row_energy.clamp_min(TINY)).sqrt()
            scale = stack.weights_per_value
            sums.absolute[stack.positions] = error.sum(dim=(1, 2)).cpu() * scale
            sums.fisher[stack.positions] = loss.sum(dim=(1, 2)).cpu() * scale
            sums.blend[stack.positions] = (loss * relative).sum(dim=(1, 2)).cpu() * scale
            if with_gini:
                sums.gini[stack.positions] = gini((score * keep).flatten(start_dim=1)).cpu()
        return sums

    def _relative(self, absolute: Tensor) -> list[float]:
        energy = torch.tensor([layer.output_energy for layer in self.bundle.layers])
        values: list[float] = (absolute / energy.clamp_min(TINY)).tolist()
        return values

    def _score(self, stack: _Stack, coefficients: Coefficients) -> Tensor:
        k = coefficients.kernel_size
        needs_window = coefficients.neighbourhood and coefficients.normalisation != "none"
        if needs_window and k not in stack.window_means:
            raise BundleError(
                f"the bundle has no window means for kernel size {k}, only for "
                f"{', '.join(map(str, stack.window_means))}. Calibrate again with --kernel-sizes."
            )
        score = importance(
            stack.magnitude,
            row_mean=stack.row_mean,
            column_mean=stack.column_mean,
            window_mean=stack.window_means[k] if needs_window else None,
            activation_norm=stack.activation_norm,
            fisher=stack.fisher,
            out_features=stack.layers[0].out_features,
            coefficients=coefficients,
        )
        finite = torch.isfinite(score).flatten(start_dim=1).all(dim=1)
        if not bool(finite.all()):
            name = stack.layers[int((~finite).nonzero()[0])].name
            raise NumericalError(f"{name}: a score of a candidate is NaN or infinite.", layer=name)
        return score

    def _shares(self, candidate: Candidate) -> list[int] | None:
        """
        What each layer of the bundle loses, if the pattern does not say it already.

        Sampled weights to remove; for N:M the N of each layer.
        """
        pattern, allocation = candidate.pattern, candidate.steps.allocation
        if pattern.scope is Scope.GLOBAL:
            return self._global(candidate)
        if allocation.method == "uniform":
            return None
        shares = self._allocate(pattern, allocation)
        if pattern.group:
            return [shares[layer.name] for layer in self.bundle.layers]
        return [
            round(shares[layer.name] * len(layer.rows) / layer.out_features)
            for layer in self.bundle.layers
        ]

    def _views(self) -> Iterator[LayerView]:
        for layer in self.bundle.layers:
            entry = self.bundle.inputs[layer.input_index]
            yield LayerView(
                name=layer.name,
                out_features=layer.out_features,
                rows=layer.rows,
                activation_norm=entry.activation_norm,
                fisher=layer.fisher[layer.row_index],
                root=entry.root,
            )

    def _global(self, candidate: Candidate) -> list[int]:
        pattern = candidate.pattern
        plain = plain_score(candidate.coefficients.gradient_exponent)
        scores = [self._score(stack, plain) for stack in self._stacks]

        def weighted() -> Iterator[tuple[Tensor, float]]:
            for stack, score in zip(self._stacks, scores, strict=True):
                yield score, stack.weights_per_value

        threshold = threshold_of(weighted, pattern.removed(self.bundle.weights))
        count = len(self.bundle.layers)
        below, tied, weights = [0] * count, [0] * count, [1.0] * count
        for stack, score in zip(self._stacks, scores, strict=True):
            under = (score < threshold).sum(dim=(1, 2)).tolist()
            equal = (score == threshold).sum(dim=(1, 2)).tolist()
            for i, position in enumerate(stack.positions):
                below[position], tied[position] = under[i], equal[i]
                weights[position] = stack.weights_per_value
        return share_ties(below, tied, weights, pattern.removed(self.bundle.weights))

    def _keep(
        self, stack: _Stack, score: Tensor, candidate: Candidate, shares: list[int] | None
    ) -> Tensor:
        """(L, R, n), bool."""
        for layer in stack.layers:
            candidate.pattern.check_width(layer.in_features, layer.name)
        if shares is None:
            lines = score if candidate.pattern.scope is Scope.ROW else score.flatten(start_dim=1)
            return line_mask(lines, candidate.pattern).view_as(score)
        return torch.stack(
            [
                mask_of(layer_score, candidate.pattern, shares[position], None).keep
                for layer_score, position in zip(score, stack.positions, strict=True)
            ]
        )

    def _summary(self, sums: "_Sums", with_gini: bool) -> ProxyRating:
        layers = self.bundle.layers
        fisher, absolute, blend = sums.fisher, sums.absolute, sums.blend
        finite = torch.isfinite(fisher) & torch.isfinite(absolute) & torch.isfinite(blend)
        if not bool(finite.all()):
            name = layers[int((~finite).nonzero()[0])].name
            raise NumericalError(
                f"{name}: the proxy's error is NaN or infinite for a candidate.", layer=name
            )
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

    fisher: Tensor
    absolute: Tensor
    blend: Tensor
    gini: Tensor


def _row_errors(rows: Tensor, roots: Tensor) -> Tensor:
    """D H D^T of each row: (L, R, n) rows and (L, m, n) roots of H give (L, R, 1)."""
    return torch.bmm(rows, roots.transpose(1, 2)).square().sum(dim=-1, keepdim=True)
