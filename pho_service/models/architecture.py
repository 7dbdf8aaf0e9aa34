"""
Which weights of a decoder can be pruned: the linears of its blocks, all of them or none.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pho_service.errors import ModelError
from pho_service.models.experts import ExpertLinear, experts_of, unfuse_experts
from pho_service.pruning.statistics import PrunableLinear


def prunable_linears(model: PreTrainedModel) -> dict[str, PrunableLinear]:
    """
    Find the linears of a decoder's blocks, in the model's own order.

    Embeddings, position embeddings, the head and whatever is beside the decoder
    (a vision tower) lie outside the blocks and are left alone. In a mixture of
    experts, every matrix of every expert is a linear of its own, and so are
    those of shared experts. What decides the routing stays dense: the router,
    and a shared expert's gate of one output. They are tiny, and an error there
    sends tokens to the wrong experts.

    Args:
        model: Fused experts are given modules of their own; see
            :func:`~pho_service.models.experts.unfuse_experts`. Nothing else changes.

    Raises:
        ModelError: No blocks are found, or a block holds matrices that are
            neither ``nn.Linear``, nor GPT-2's ``Conv1D``, nor experts in the usual
            layout: skipping them silently would report a sparsity that the
            model does not have.
    """
    unfuse_experts(model)
    linears: dict[str, PrunableLinear] = {}
    unvisited: list[str] = []
    for block_name, block in decoder_blocks(model):
        routers = _routers(block)
        of_experts = {
            matrix
            for module in block.modules()
            for expert in experts_of(module)
            for matrix in expert.children()
        }
        for name, module in block.named_modules():
            full_name = f"{block_name}.{name}" if name else block_name
            if module in routers or experts_of(module):
                continue
            if isinstance(module, (nn.Linear, Conv1D, ExpertLinear)):
                linears[full_name] = PrunableLinear(
                    name=full_name,
                    module=module,
                    transposed=isinstance(module, Conv1D),
                    siblings=_matrix_of_all(full_name) if module in of_experts else "",
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
            "(convolutions, experts with biases or transposed weights) are not supported."
        )
    if not linears:
        raise ModelError(f"{type(model).__name__} has no linears in its blocks: nothing to prune.")
    return linears


def _matrix_of_all(expert: str) -> str:
    """The name of an expert's matrix without the expert: ``model.layers.0.mlp.experts.up_proj``."""
    experts, _, matrix = expert.rpartition(".")
    return f"{experts.rpartition('.')[0]}.{matrix}"


def _routers(block: nn.Module) -> set[nn.Module]:
    """
    The modules that weigh experts: beside them, of one matrix, with a row for each expert or one.

    That it is alone tells a router from a shared expert: in Qwen3-Next both have 512 rows.
    """
    routers: set[nn.Module] = set()
    for parent in block.modules():
        counts = {len(experts_of(child)) for child in parent.children()} - {0}
        if counts:
            for child in parent.children():
                rows = [p.shape[0] for p in child.parameters() if p.dim() == 2]
                if len(rows) == 1 and rows[0] in counts | {1}:
                    routers.update(child.modules())
    return routers


def decoder_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """
    Find the blocks of the text decoder, with their names, in the model's own order.

    They are known by the class names that transformers must not split over devices.
    A multimodal model (Gemma 3) has blocks outside its decoder, which text never reaches.

    Raises:
        ModelError: There are none.
    """
    classes = set(model._no_split_modules or ())
    decoder = set(model.get_decoder().modules())
    blocks = [
        (f"{name}.{index}", child)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in decoder
        for index, child in enumerate(module)
        if type(child).__name__ in classes
    ]
    if not blocks:
        raise ModelError(
            f"{type(model).__name__}: no decoder blocks found. A causal language model of "
            "transformers 5 whose blocks form a ModuleList is needed."
        )
    return blocks
