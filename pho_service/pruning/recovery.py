"""
Recovery: train what a pruned model keeps towards what the dense model predicts, masks fixed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pho_service.pruning.perplexity import DenseReference, frozen, recomputed, window_backward
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.recovery import RANK, Trains

LEAST_SIZE = 1e-3  # so that biases of zero have a rate, too


class Recovering(nn.Module):
    """
    What is trained of a pruned model: as a module it has those parameters alone, in float32.
    """

    zeros_stay = True  # Of what is trained, what is zero was removed

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], trained: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._model = (model, [*blocks])  # not as modules of this one

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._model[0]

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """For a trainer: all of it stays where it is, on several devices if it is there."""
        return {f"{number}": each.device for number, each in enumerate(self.trained)}

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Each parameter, with a learning rate that is a share of its size."""
        # Adam moves every weight by about its rate, however large weights are: models differ.
        return [{"params": [each], "lr": rate * _size(each.detach())} for each in self.trained]

    def backward(self, reference: DenseReference, window: int) -> float:
        """
        Add the gradients of the divergence of one window to those of the trained parameters.

        Weights that were removed have none: what is zero stays zero.

        Returns:
            The mean over its predicted tokens, in nats: see
            :func:`~pho_service.pruning.perplexity.rate_divergence`.
        """
        model, blocks = self._model
        device = next(model.parameters()).device
        with frozen(model), recomputed(blocks, nullcontext), mixed(device):
            for each in self.trained:
                each.requires_grad_(True)
            value = window_backward(model, reference, window)
        for each in self.trained:
            if self.zeros_stay and each.grad is not None and each.dim() > 1:
                each.grad.mul_(each.detach() != 0)
        return value

    def round_(self, dtype: torch.dtype) -> None:
        """Round the weights as they will be stored, so that what is measured is what is saved."""
        for each in self.trained:
            each.data.copy_(each.data.to(dtype))


def _size(weights: Tensor) -> float:
    """Root mean square of those that are not zero."""
    count = max(1, int(weights.count_nonzero()))
    return max(LEAST_SIZE, math.sqrt(float(weights.float().square().sum()) / count))


def mixed(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, products are in bfloat16 whatever the weights are in; on a CPU that is slower."""
    if device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def recovering(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    linears: Mapping[str, PrunableLinear],
    what: Trains,
    seed: int,
) -> Iterator[Recovering]:
    """Find what is trained of a model. After it, low-rank changes are merged into the weights."""
    weights = {id(linear.module.weight) for linear in linears.values()}
    named = model.named_parameters()
    if what != "lora":
        found = [p for _, p in named if (p.dim() == 1 if what == "norms" else id(p) in weights)]
        for each in found:
            each.data = each.data.float()
        yield Recovering(model, blocks, found)
        return
    generator = torch.Generator().manual_seed(seed)
    places = [name.rpartition(".")[::2] for name, each in named if id(each) in weights]
    modules = [(model.get_submodule(path), own) for path, own in places]
    changes = [MaskedLowRank(getattr(module, own).detach(), generator) for module, own in modules]
    for (module, own), change in zip(modules, changes, strict=True):
        parametrize.register_parametrization(module, own, change)
    try:
        yield _LowRank(model, blocks, changes)
    finally:
        for module, own in modules:
            parametrize.remove_parametrizations(module, own)


class MaskedLowRank(nn.Module):
    """
    A weight plus the product of two thin matrices, where the weight is not zero.

    Source:
        PERP, Zimmer et al. 2023, arXiv:2312.15230 (MaskLoRA).
    """

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        right = _size(weight) * torch.randn(RANK, columns, generator=generator) / RANK**0.5
        self.left = nn.Parameter(torch.zeros(rows, RANK, device=weight.device))
        self.right = nn.Parameter(right.to(weight.device))
        self.dtype = weight.dtype  # That the sum is rounded to

    def forward(self, weight: Tensor) -> Tensor:
        """(rows, columns), as the weight."""
        change = (self.left @ self.right).to(weight.dtype)
        return (weight + change * (weight != 0)).to(self.dtype).to(weight.dtype)


class _LowRank(Recovering):
    """Low-rank changes, whose sums with the weights are rounded."""

    zeros_stay = False  # they begin as zeros, and the mask is in the sum

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], changes: Sequence[MaskedLowRank]
    ) -> None:
        super().__init__(model, blocks, [p for change in changes for p in change.parameters()])
        self._changes = (changes,)

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Rates with which each weight moves by about as much as if it was trained itself."""
        left = [{"params": [change.left], "lr": rate} for change in self._changes[0]]
        return [*left, *Recovering.groups(self, rate)[1::2]]

    def round_(self, dtype: torch.dtype) -> None:
        for change in self._changes[0]:
            change.dtype = dtype
