"""
Rate candidates on a proxy bundle: by how much does pruning change each linear's output?
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.layer_errors import BATCH, LayerErrors, Stack, require_finite
from pho_service.pruning.scores import TINY
from pho_service.spec.objective import Weighting
from pho_service.spec.pattern import Linears, Pattern, Scope
from pho_service.spec.steps import Candidate


@dataclass(frozen=True, kw_only=True)
class ProxyRating:
    """
    Ratings of one candidate by the proxies. Lower is better for all but Gini.

    Attributes:
        fisher: Sum over layers and rows of g_i * (D H D^T)_i: up to a factor, a second-order
            estimate of the rise of the loss, in nats a token.
        relative: Sum over layers of error / output energy.
        absolute: Sum over layers and rows of the error.
        blend: As ``fisher``, each row times the square root of its relative
            error (D H D^T)_i / (W H W^T)_i. A second-order estimate holds for
            small errors and flatters scores that use g; this makes ruined
            rows count more.
        geometric: Sum over layers of sqrt(fisher * relative) of the layer, the geometric mean of
            the rise of the loss and of how much of its output is lost. It does not let a layer
            with a small g lose nearly all of its weights, as allocations may.
        gini: Gini coefficient of the scores with the removed ones at 0, mean
            over layers by number of weights; None if it was not asked for.
            Higher went with lower perplexity in our measurements.
        error_by_kind: Mean relative error of the layers of each kind (q_proj ...).

    Source:
        MOONSHOT (Afriat et al. 2026, arXiv:2604.13287) minimises a linear's output error and a
        second-order estimate of the loss together; ``blend`` and ``geometric`` multiply the two,
        to rate only.
    """

    fisher: float
    relative: float
    absolute: float
    blend: float
    geometric: float
    gini: float | None
    error_by_kind: dict[str, float]


class ProxyEvaluator:
    """
    Rates candidates on one bundle, in memory, on one device; in one thread at a time.

    Candidates of one pattern are rated up to eight at a time, which changes
    nothing in their ratings: nothing is added up over candidates. Linears that a candidate
    leaves out do not count in its rating.

    Args:
        bundle: What to rate on. On the CPU it shares memory with the evaluator.
        device: Where the tensors are kept and the sums are done.
        dtype: Dtype of the matrix products, which take most of the time. Scores,
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
        self._device, self._dtype = torch.device(device), dtype
        self._errors_of: dict[tuple[str, ...], LayerErrors] = {}
        self._chosen = lru_cache(maxsize=256)(bundle.choose)

    @property
    def stacks(self) -> list[Stack]:
        """All linears of the bundle as they are rated."""
        return self._errors([layer.name for layer in self.bundle.layers]).stacks

    def evaluate(
        self, candidates: Sequence[Candidate], *, with_gini: bool = False
    ) -> list[ProxyRating]:
        """
        Rate candidates; each rating is independent of the others in the list.

        Kernel sizes must be among the bundle's. The Gini statistic needs a sort.

        Raises:
            BundleError: A kernel size that the bundle has no window means for.
            InvalidInput: N:M does not divide an input width, or what a candidate says of linears
                does not fit the model.
            NumericalError: A rating is NaN or infinite; names the layer.
        """
        ratings = []
        for _, alike in groupby(candidates, key=_kind):
            together = list(alike)
            for start in range(0, len(together), BATCH):
                layers, sums = self._sums(together[start : start + BATCH], with_gini)
                ratings += [_summary(layers, candidate_sums, with_gini) for candidate_sums in sums]
        return ratings

    def layer_errors(self, candidate: Candidate) -> dict[str, float]:
        """
        The error of each linear relative to the energy of its output, by name; 0 if it stays dense.

        Raises:
            BundleError, InvalidInput: As :meth:`evaluate`.
        """
        dense = dict.fromkeys((layer.name for layer in self.bundle.layers), 0.0)
        layers, (sums,) = self._sums([candidate], with_gini=False)
        errors = _losses(layers, sums)["relative"].tolist()
        return {**dense, **{la.name: error for la, error in zip(layers, errors, strict=True)}}

    def layer_sparsities(self, candidate: Candidate) -> dict[str, float]:
        """
        The share of its weights that each linear loses, by name; 0 if it stays dense.

        In scope ``global`` and with an allocation it is that of the sampled rows, which the whole
        linear comes near; otherwise it is exact.

        Raises:
            InvalidInput: What the candidate says of linears does not fit the model.
            NumericalError: A score is NaN or infinite; names the layer.
        """
        chosen = self._chosen(candidate.steps.linears, candidate.pattern)
        lost = self._errors(chosen.shared).shares(candidate) if chosen.shared else None
        shares = {} if lost is None else dict(zip(chosen.shared, lost.tolist(), strict=True))
        return {
            layer.name: _sparsity(
                layer, chosen.patterns.get(layer.name, candidate.pattern), shares.get(layer.name)
            )
            if layer.name in chosen.names
            else 0.0
            for layer in self.bundle.layers
        }

    def _sums(
        self, candidates: Sequence[Candidate], with_gini: bool
    ) -> tuple[list[LayerSample], list["_Sums"]]:
        """The linears that are pruned, and what each of up to eight candidates does to them."""
        first = candidates[0]
        chosen = self._chosen(first.steps.linears, first.pattern)
        layers: list[LayerSample] = []
        sums: list[Tensor] = []
        if chosen.shared:
            errors = self._errors(chosen.shared)
            layers += errors.bundle.layers
            sums.append(errors.sums(candidates, errors.candidate_shares(candidates), with_gini))
        if chosen.patterns:
            errors = self._errors(tuple(chosen.patterns))
            layers += errors.bundle.layers
            lost = errors.pattern_shares(list(chosen.patterns.values()))
            sums.append(errors.sums(candidates, [lost] * len(candidates), with_gini))
        return layers, [_Sums(*values.T) for values in torch.cat(sums).unbind(dim=1)]

    def _errors(self, names: Sequence[str]) -> LayerErrors:
        """The errors of some linears of the bundle, in its order."""
        key = tuple(names)
        if key not in self._errors_of:
            chosen = set(key)
            places = [i for i, layer in enumerate(self.bundle.layers) if layer.name in chosen]
            part = self.bundle
            if len(places) < len(part.layers):
                part = replace(part, layers=[part.layers[place] for place in places])
            self._errors_of[key] = LayerErrors(part, self._device, self._dtype)
            for place, layer in zip(places, part.layers, strict=True):
                self.bundle.layers[place] = layer  # a view of the stack's, so it is held once
        return self._errors_of[key]


def _kind(candidate: Candidate) -> tuple[Pattern, bool, Linears]:
    """Pattern, allocation and linears, which candidates that are rated together share."""
    steps = candidate.steps
    return candidate.pattern, steps.allocation.is_even, steps.linears


def _sparsity(layer: LayerSample, pattern: Pattern, lost: int | None) -> float:
    """The share of a linear that is removed: by its pattern, or what an allocation takes."""
    if pattern.group:
        return 1 - (pattern.keep if lost is None else lost) / pattern.group
    if lost is not None:
        return lost / layer.rows.numel()
    weights = layer.in_features * (1 if pattern.scope is Scope.ROW else layer.out_features)
    return pattern.removed(weights) / weights


@dataclass(frozen=True)
class _Sums:
    """The sums of a candidate for each layer, in the order of the linears: each (layers,)."""

    highest: Tensor  # score
    gini: Tensor
    fisher: Tensor
    absolute: Tensor
    blend: Tensor


def _losses(layers: Sequence[LayerSample], sums: _Sums) -> dict[Weighting, Tensor]:
    """Losses of the linears that a rating adds up, by its weighting: each (layers,)."""
    energy = torch.tensor([layer.output_energy for layer in layers])
    relative = sums.absolute / energy.clamp_min(TINY)
    return {
        "blend": sums.blend,
        "geometric": sums.fisher.sqrt() * relative.sqrt(),
        "fisher": sums.fisher,
        "relative": relative,
        "absolute": sums.absolute,
    }


def _summary(layers: Sequence[LayerSample], sums: _Sums, with_gini: bool) -> ProxyRating:
    losses = _losses(layers, sums)
    highest = torch.stack(list(losses.values())).amax(dim=0)
    require_finite(layers, highest, "the proxy's error of a candidate")
    by_kind: dict[str, list[float]] = {}
    for layer, value in zip(layers, losses["relative"].tolist(), strict=True):
        by_kind.setdefault(layer.kind, []).append(value)
    mean_gini = None
    if with_gini:
        sizes = torch.tensor([float(la.out_features * la.in_features) for la in layers])
        mean_gini = float((sums.gini * sizes).sum() / sizes.sum())
    return ProxyRating(
        **{weighting: float(loss.double().sum()) for weighting, loss in losses.items()},
        gini=mean_gini,
        error_by_kind={kind: sum(v) / len(v) for kind, v in by_kind.items()},
    )
