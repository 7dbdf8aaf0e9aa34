"""
Which weights of a decoder can be pruned: the linears of its blocks, all of them or none.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pho_service.errors import ModelError
from pho_service.pruning.statistics import PrunableLinear


def prunable_linears(model: PreTrainedModel) -> dict[str, PrunableLinear]:
    """
    Find the linears of a decoder's blocks, in the model's own order.

    Embeddings and the head lie outside the blocks and are left alone.

    Raises:
        ModelError: No blocks are found, or a block holds matrices that are
            neither ``nn.Linear`` nor GPT-2's ``Conv1D`` (fused experts of a
            mixture of experts, say): skipping them in silence would report a
            sparsity that the model does not have.
    """
    linears: dict[str, PrunableLinear] = {}
    unvisited: list[str] = []
    for block_name, block in _blocks(model):
        for name, module in block.named_modules():
            full_name = f"{block_name}.{name}" if name else block_name
            if isinstance(module, (nn.Linear, Conv1D)):
                linears[full_name] = PrunableLinear(
                    name=full_name, module=module, transposed=isinstance(module, Conv1D)
                )
            else:
                unvisited += [
                    f"{full_name}.{parameter_name} {tuple(parameter.shape)}"
                    for parameter_name, parameter in module.named_parameters(recurse=False)
                    if parameter.dim() > 1
                ]
    if unvisited:
        raise ModelError(
            f"{len(unvisited)} weights in the blocks are neither nn.Linear nor Conv1D, so they "
            f"would stay unpruned: {', '.join(unvisited[:4])}. Models with such weights "
            "(fused experts, convolutions) are not supported."
        )
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linears in its blocks: nothing to prune.")
    return linears


def _blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder blocks, by the class names that transformers must not split over devices."""
    classes = set(model._no_split_modules or ())
    blocks = [
        (f"{name}.{index}", child)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, child in enumerate(module)
        if type(child).__name__ in classes
    ]
    if not blocks:
        raise ModelError(
            f"{type(model).__name__}: no decoder blocks found. A causal language model of "
            "transformers 5 whose blocks form a ModuleList is needed."
        )
    return blocks
