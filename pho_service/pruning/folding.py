"""
Put an order of hidden channels into a model's weights, so that no input is permuted at run time.

The hidden channels of an MLP have no order of their own: renumber the output
rows of the linears that write them and the input channels of the one that reads
them, and the MLP computes the same. Whether a module is of this kind is not
told by its name but proven, by running it both ways.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from pho_service.pruning.statistics import PrunableLinear

_TOKENS = 16  # of the random input that a module is tried on
_TOLERANCE = 1e-9  # of the output's norm; float64 sums in another order differ by about 1e-15


def find_writers(
    model: nn.Module, reader: PrunableLinear, linears: Mapping[str, PrunableLinear]
) -> list[PrunableLinear]:
    """
    The linears beside ``reader`` that may write its input: by place and width only.

    Args:
        model: The model that ``reader`` is a part of.
        reader: Its ``name`` is dotted, as from ``model.named_modules()``.
        linears: Linears of the model, by name.

    Returns:
        Direct children of the same parent module, in its order, with as many
        outputs as ``reader`` has inputs.
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
    found = set()
    for name, reader in linears.items():
        writers = find_writers(model, reader, linears)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(reader.weight.shape[1], generator=generator)
        if writers and _is_exact(model, reader, writers, order):
            found.add(name)
    return frozenset(found)


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

    Args:
        model: Changed in place.
        reader: The linear whose input channels move.
        linears: Linears of the model, by name; the writers are among them.
        order: (in_features,), int64, a permutation of the reader's input channels.

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
    """Whether the parent module computes the same in this order."""
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
    """The same linear in a copy of its parent."""
    _, _, name = linear.name.rpartition(".")
    return PrunableLinear(
        name=name, module=parent.get_submodule(name), transposed=linear.transposed
    )


@torch.no_grad()
def _output(module: nn.Module, tokens: Tensor) -> Tensor | None:
    """What the module gives for one tensor, or None if it isn't a function of one tensor."""
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
