"""
The footprint of a model of transformers; its weights may be on the ``meta`` device.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from pho_service.models.architecture import decoder_blocks
from pho_service.planning.footprint import FLOAT, BlockSizes, Footprint
from pho_service.pruning.statistics import PrunableLinear


def footprint_of(
    model: PreTrainedModel,
    linears: dict[str, PrunableLinear],
    *,
    dtype: torch.dtype | None = None,
) -> Footprint:
    """
    Add up a model's shapes.

    Args:
        model: Its weights may be on the ``meta`` device.
        linears: As :func:`~pho_service.models.architecture.prunable_linears` finds them.
        dtype: That it will be loaded in; None is that of its weights.
    """
    itemsize = (dtype or model.dtype).itemsize
    config = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    vocabulary, width = embedding.weight.shape
    experts = Counter(linear.siblings for linear in linears.values())
    blocks = []
    for name, block in decoder_blocks(model):
        own = [each for full, each in linears.items() if full.startswith(f"{name}.")]
        shapes = [tuple(each.weight.shape) for each in own]
        reached = [_reached(each, experts[each.siblings], config) for each in own]
        blocks.append(
            BlockSizes(
                weights=itemsize * sum(p.numel() for p in block.parameters()),
                kept=_kept(block, shapes, reached, width, config.num_attention_heads, itemsize),
                widest=max(max(shape) for shape in shapes),
                prunable=sum(out * n for out, n in shapes),
                largest=max(out * n for out, n in shapes),
                widths=tuple(n for _, n in shapes),
                outputs=sum(out for out, _ in shapes),
            )
        )
    parameters = itemsize * sum(p.numel() for p in model.parameters())
    return Footprint(
        itemsize=itemsize,
        blocks=tuple(blocks),
        outside=parameters - sum(block.weights for block in blocks),
        hidden=itemsize * width,
        vocabulary=vocabulary,
        heads=0 if config._attn_implementation == "sdpa" else config.num_attention_heads,
        rows=tuple(linear.weight.shape[0] for linear in linears.values()),
    )


def _reached(linear: PrunableLinear, experts: int, config: Any) -> float:
    """How often a token reaches a linear: always, or as often as one of these experts."""
    if not linear.siblings:
        return 1.0
    return min(1.0, getattr(config, "num_experts_per_tok", experts) / experts)


def _kept(
    block: nn.Module,
    shapes: list[tuple[int, ...]],
    reached: list[float],
    hidden: int,
    heads: int,
    itemsize: int,
) -> float:
    """
    Bytes that a block keeps of a token for its backward pass, whose weights are frozen.

    Linears keep nothing then. Their outputs are kept by what reads them, and so is the input of a
    linear that does not read the hidden states, by what makes it; norms keep theirs in float32.
    """
    kept = 0.0
    for (out, width), share in zip(shapes, reached, strict=True):
        kept += itemsize * share * (out + (width if width != hidden else 0))
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.dim() == 1 for parameter in own):
            size = own[0].numel()
            kept += FLOAT * (size if size >= hidden else size * heads)  # of a head
        if type(module).__module__ == "transformers.activations" and not own:
            more = max(0, _saved(module) - 2)  # than the outputs and inputs around it
            kept += itemsize * more * max(max(shape) for shape in shapes)
    return kept


def _saved(activation: nn.Module) -> int:
    """How many tensors of its input's size an activation keeps for its backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 2 and not any(tensor.data_ptr() == s.data_ptr() for s in saved):
            saved.append(tensor)
        return tensor

    x = torch.zeros(2, device="cpu", requires_grad=True)
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        activation(x)
    return len(saved)
