"""
The proxy bundle: all that any candidate needs to be rated, and nothing that grows with the model.

A few rows of each linear are sampled, with the means that the score divides
by, taken over the whole layer. The error of a row needs only that row, so
sampled rows rank candidates as all rows do.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import BundleError
from pho_service.pruning.scores import sampled_window_mean
from pho_service.pruning.statistics import InputStatistics, PrunableLinear, Statistics
from pho_service.spec.pattern import ChosenLinears, Linears, Pattern


@dataclass(frozen=True, kw_only=True)
class LayerSample:
    """
    Some rows of one linear, and what the score needs besides.

    Attributes:
        out_features: Width of the outputs of the whole layer; in_features is the width of ``rows``.
        input_index: Which of the bundle's inputs the linear reads.
        row_index: (rows,), int64, ascending: where ``rows`` stand in the layer.
        rows: (rows, in_features), float32, the weights.
        row_mean: (rows,), float32: mean of |W| of each of these rows.
        column_mean: (in_features,), float32: mean of |W| over all output rows.
        window_means: For each kernel size, (rows, in_features), float32, > 0.
        fisher: (out_features,), float32, of all rows.
        output_energy: tr(W H W^T) over all rows: mean over tokens of the
            squared length of the output without bias.
    """

    name: str
    out_features: int
    input_index: int
    row_index: Tensor
    rows: Tensor
    row_mean: Tensor
    column_mean: Tensor
    window_means: dict[int, Tensor]
    fisher: Tensor
    output_energy: float

    @property
    def in_features(self) -> int:
        """Input channels of the layer."""
        return self.rows.shape[1]

    @property
    def kind(self) -> str:
        """The linear's own name without its path: ``q_proj``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class ProxyBundle:
    """
    Attributes:
        layers: One sample a linear, in the model's order.
        inputs: What is known of each distinct input.
        provenance: JSON values: model, revision, text and hash, seeds, versions.
    """

    layers: list[LayerSample]
    inputs: list[InputStatistics]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """
        Name of the bundle: two bundles with the same key may share studies.

        That of its calibration, from the provenance; a bundle that was put together without one
        is named by its contents.
        """
        return str(self.provenance.get("key") or self.contents_sha256)

    @property
    def model_name(self) -> str:
        """What the model is called that it was made of."""
        return str(self.provenance.get("model", {}).get("name", "model"))

    @property
    def origin(self) -> dict[str, Any]:
        """The provenance, with the key in any case."""
        return {**self.provenance, "key": self.key}

    @cached_property
    def contents_sha256(self) -> str:
        """Hash of everything that a rating depends on: names, places and tensors."""
        layers = (
            (f"{layer.name} {layer.out_features} {layer.input_index} {layer.output_energy!r}", part)
            for layer in self.layers
            for part in (
                layer.row_index, layer.rows, layer.row_mean, layer.column_mean, layer.fisher,
                *(layer.window_means[k] for k in self.kernel_sizes),
            )
        )  # fmt: skip
        inputs = (
            ("input", part) for entry in self.inputs for part in (entry.activation_norm, entry.root)
        )
        return _sha256(chain([(str(self.kernel_sizes), torch.empty(0))], layers, inputs))

    @cached_property
    def rows_sha256(self) -> str:
        """
        Hash of the sampled weights alone.

        A calibration that is done again on another machine may differ in the last digits of its
        sums, but not in these.
        """
        return _sha256((layer.name, layer.rows) for layer in self.layers)

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """The kernel sizes that candidates may use, ascending."""
        return tuple(sorted(self.layers[0].window_means))

    @property
    def weights(self) -> int:
        """Number of weights that a pruning counts over."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    def statistics(self) -> Statistics:
        """The statistics in full, to prune the model itself."""
        return Statistics(
            inputs=self.inputs,
            input_of={layer.name: layer.input_index for layer in self.layers},
            fisher={layer.name: layer.fisher for layer in self.layers},
        )

    def choose(self, linears: Linears, pattern: Pattern) -> ChosenLinears:
        """
        Find out which linears are pruned, and whether the pattern fits them.

        ``linears`` is what is said of single ones, ``pattern`` that of all others.
        """
        name = self.provenance.get("model", {}).get("name", "the model")
        chosen = linears.choose([layer.name for layer in self.layers], pattern, model=name)
        for layer in self.layers:
            if layer.name in chosen.names:
                pattern.check_width(layer.in_features, layer.name)
        return chosen

    def check_model(self, linears: Mapping[str, PrunableLinear]) -> None:
        """
        Raise BundleError unless the bundle was made from exactly these weights.

        Names, shapes and every sampled row are compared.
        """
        way_out = "Calibrate this model, or give the model that the bundle was made from."
        ours, theirs = {layer.name for layer in self.layers}, set(linears)
        if ours != theirs:
            odd = sorted(ours ^ theirs)
            raise BundleError(
                f"the bundle is of another model: {len(odd)} linears differ, such as {odd[0]}. "
                f"{way_out}"
            )
        for layer in self.layers:
            weight = linears[layer.name].weight
            shape = (layer.out_features, layer.in_features)
            if tuple(weight.shape) != shape:
                raise BundleError(
                    f"the bundle is of another model: {layer.name} is {tuple(weight.shape)}, but "
                    f"{shape} in the bundle. {way_out}"
                )
            sampled = weight[layer.row_index.to(weight.device)].float().cpu()
            if not torch.equal(sampled, layer.rows.to(weight.dtype).float()):
                raise BundleError(
                    f"the bundle is of another model: the weights of {layer.name} differ from "
                    f"those in the bundle. {way_out}"
                )


def sample_bundle(
    linears: Mapping[str, PrunableLinear],
    statistics: Statistics,
    *,
    rows_per_layer: int,
    kernel_sizes: tuple[int, ...],
    seed: int,
    provenance: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> ProxyBundle:
    """
    Sample rows of every linear, without replacement.

    Args:
        linears: In the model's order.
        rows_per_layer: Rows of each linear; 0, or more than it has, takes all.
        kernel_sizes: Odd sizes for which window means are kept.
        advance: Called with 1 after each linear.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for name, linear in linears.items():
        weight = linear.weight.float()
        out_features = weight.shape[0]
        order = torch.randperm(out_features, generator=generator)
        picked = order[: rows_per_layer or out_features].sort().values
        index = picked.to(weight.device)
        magnitude = weight.abs()
        root = statistics.inputs[statistics.input_of[name]].root.to(weight.device)
        layers.append(
            LayerSample(
                name=name,
                out_features=out_features,
                input_index=statistics.input_of[name],
                row_index=picked,
                rows=weight[index].cpu().contiguous(),
                row_mean=magnitude[index].mean(dim=1).cpu(),
                column_mean=magnitude.mean(dim=0).cpu(),
                window_means={
                    k: sampled_window_mean(magnitude, k, index).cpu() for k in kernel_sizes
                },
                fisher=statistics.fisher[name],
                output_energy=float((root @ weight.T).square().sum()),
            )
        )
        advance(1)
    return ProxyBundle(layers=layers, inputs=statistics.inputs, provenance=dict(provenance or {}))


def _sha256(parts: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in parts:
        digest.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
