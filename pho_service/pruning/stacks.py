"""
The sampled linears of a bundle, stacked so that many of them are rated at once.

A stack is scored, pruned and multiplied for several candidates before the next
one's turn comes. So its roots, most of a bundle, are read once for all of them,
and on a CPU stacks are small enough for all that is in between to stay in its caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pho_service.errors import BundleError
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.scores import TINY, importance
from pho_service.spec.score import Coefficients


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
        """
        Score all weights of the stack.

        Args:
            coefficients: How much each part counts, of C candidates.
            out: (I, C, L, R, n), contiguous, is written and given back.

        Raises:
            BundleError: There are no window means for a kernel size.
        """
        windows = []
        for c in coefficients:
            needs_window = c.neighbourhood and c.normalisation != "none"
            if needs_window and c.kernel_size not in self.kernel_sizes:
                raise BundleError(
                    f"the bundle has no window means for kernel size {c.kernel_size}, only for "
                    f"{', '.join(map(str, self.kernel_sizes))}. Calibrate again with "
                    "--kernel-sizes."
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
        """
        Score all weights of the stack by :func:`pho_service.pruning.masks.plain_score`.

        Args:
            gradient_exponent: Gradient exponent of that score.
            out: (I, L, R, n), is written and given back.

        Returns:
            (I, L, R, n), float32.
        """
        out = torch.mul(self.magnitude, self.activation_norm[..., None, :], out=out)
        return out.mul_((self.fisher**gradient_exponent)[..., None]) if gradient_exponent else out

    def row_errors(self, keep: Tensor, out: Tensor) -> Tensor:
        """
        D H D^T of each row, D being the weights that are not kept.

        Args:
            keep: (I, C, L, R, n), bool, of C candidates.
            out: The same shape, float32, contiguous: is written.

        Returns:
            (I, C, L, R), float32.
        """
        rows = self.rows[:, None]
        kept = out.copy_(keep.view(torch.uint8))  # 1 or 0
        return _row_errors(torch.addcmul(rows, rows, kept, value=-1, out=out), self.roots)


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
    large tensors become views of the stacks, so that they are not held twice.

    Args:
        bundle: All of it.
        device: Where the stacks are kept.
        dtype: Dtype of the matrix products with the roots.
        values: The most sampled weights of a stack, if it has more than one input.
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
        most = len(groups) if values is None else max(1, values // (n * rows * linears))
        stacks += [
            _stack(bundle, groups[start : start + most], device, dtype)
            for start in range(0, len(groups), most)
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

    def stacked(of: Callable[[LayerSample], Tensor], *shape: int) -> Tensor:
        tensors = torch.stack([of(layer) for layer in layers])
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
