"""
The weights of a decoder that can be pruned: the linears of its blocks and of its experts.
"""

import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from pho_service.errors import ModelError
from pho_service.planning.shapes import Header, TensorHeader, model_shapes
from pho_service.planning.stage_memory import Footprint, shapes_footprint
from pho_service.pruning.statistics import PrunableLinear


class _Owner:
    """A module, which this does not keep alive: circles wait for the garbage collector."""

    # In a deep copy of the module it is the copy; a copy of less than the module keeps the old one.

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the experts' own module is gone: keep the model while it is used")
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Owner":
        module = self()
        return _Owner(memo.get(id(module), module))


class ExpertLinear(nn.Module):
    """One matrix of one expert, as a linear without bias."""

    def __init__(self, experts: nn.Module, parameter: str, expert: int, rows: slice) -> None:
        super().__init__()
        self._owner = _Owner(experts)
        self.parameter = parameter
        self.expert = expert
        self.rows = rows

    @property
    def held_by(self) -> nn.Parameter:
        """(experts, rows, in_features): the weights of all experts."""
        return self._owner().get_parameter(self.parameter)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a view, cut again each time, so casts and moves are seen."""
        return self.held_by[self.expert, self.rows]

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in_features) to (tokens, out_features)."""
        return linear(x, self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """In a copy of the fused module a view of it; alone a linear with a weight of its own."""
        experts = self._owner()
        if id(experts) in memo:
            return ExpertLinear(memo[id(experts)], self.parameter, self.expert, self.rows)
        weight = self.weight.detach()
        out_features, in_features = weight.shape
        alone = nn.Linear(in_features, out_features, bias=False, device="meta")
        alone.weight = nn.Parameter(weight.clone())
        return alone


class Expert(nn.Module):
    """One expert of three linears without bias."""

    # A deep copy of it alone has three linears of its own, not all experts.

    def __init__(
        self, experts: nn.Module, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module
    ) -> None:
        super().__init__()
        self._owner = _Owner(experts)
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to (..., hidden), not yet weighed by the router."""
        both = torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1)
        gated = self._owner()._apply_gate(both)  # type: ignore[operator]  # see _is_fused
        output: Tensor = self.down_proj(gated)
        return output


def unfuse_experts(model: nn.Module) -> None:
    """Give every fused expert modules of its own, called with the tokens routed to it."""
    # Outputs, parameters and state dict stay what they were. An expert that no token is routed to
    # is not called. Doing it again changes nothing. Experts that are stored in another layout are
    # left fused.
    for module in list(model.modules()):
        if _is_fused(module) and not experts_of(module):
            count, _, width = module.get_parameter("down_proj").shape
            for index in range(count):
                gate = ExpertLinear(module, "gate_up_proj", index, slice(0, width))
                up = ExpertLinear(module, "gate_up_proj", index, slice(width, None))
                down = ExpertLinear(module, "down_proj", index, slice(None))
                _add_expert(module, index, gate, up, down)
            module.forward = partial(_forward, _Owner(module))


def separate_experts(model: nn.Module) -> None:
    """Give every fused expert of a model linears of its own, instead of the fused parameters."""
    # The model computes the same, but its state dict has the names of the matrices
    # (``...experts.0.gate_proj.weight``).
    for module in list(model.modules()):
        if _is_fused(module):
            down_proj = module.get_parameter("down_proj")
            count, hidden, width = down_proj.shape
            new = partial(nn.Linear, bias=False, device=down_proj.device, dtype=down_proj.dtype)
            for index in range(count):
                matrices = new(hidden, width), new(hidden, width), new(width, hidden)
                _add_expert(module, index, *matrices)
            del module.gate_up_proj, module.down_proj
            vars(module)["_is_hf_initialized"] = True  # so transformers does not look for them
            module.forward = partial(_forward, _Owner(module))


def _add_expert(module: nn.Module, index: int, *matrices: nn.Module) -> None:
    # New modules are in training mode, and what is part of a model is as the model is.
    module.add_module(str(index), Expert(module, *matrices).train(module.training))


def experts_of(module: nn.Module) -> list[Expert]:
    """The experts that one of the two above gave a module, in their order; none to any other."""
    return [child for child in module.children() if isinstance(child, Expert)]


def separate_weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model by name, those of fused experts one by one."""
    # A fused parameter is replaced by its matrices (``...experts.0.gate_proj.weight``), views of
    # it.
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            experts = name.rsplit(".", 2)[0]  # without the expert and the matrix
            weights.pop(f"{experts}.{module.parameter}", None)
            weights[f"{name}.weight"] = module.weight
    return weights


def _is_fused(module: nn.Module) -> bool:
    """Return whether a module keeps to transformers' contract for experts, in its plainest form."""
    # The flags are set by ``use_experts_implementation``; whatever has them takes (hidden_states,
    # top_k_index, top_k_weights) and gates with ``_apply_gate``.
    shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
    if set(shapes) != {"gate_up_proj", "down_proj"} or {len(s) for s in shapes.values()} != {3}:
        return False
    experts, hidden, width = shapes["down_proj"]
    plain = {
        "has_gate": True, "is_concatenated": True,
        "has_bias": False, "is_transposed": False, "has_post_expert_norm": False,
    }  # fmt: skip
    return shapes["gate_up_proj"] == (experts, 2 * width, hidden) and all(
        getattr(module, flag, None) is value for flag, value in plain.items()
    )


def _forward(
    owner: _Owner, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute what the fused module computes, expert by expert."""
    experts = experts_of(owner())
    routes = top_k_index.flatten()  # (tokens * k,)
    by_expert = routes.argsort(stable=True)
    counts = routes.bincount(minlength=len(experts)).tolist()  # the only wait for the device
    output = torch.zeros_like(hidden_states)
    for expert, chosen in zip(experts, by_expert.split(counts), strict=False):
        if len(chosen) == 0:
            continue
        token = chosen // top_k_index.shape[1]
        y = expert(hidden_states[token])  # (tokens of this expert, hidden)
        y = y * top_k_weights.flatten()[chosen, None]
        output.index_add_(0, token, y.to(output.dtype))
    return output


def prunable_linears(model: PreTrainedModel) -> dict[str, PrunableLinear]:
    """Find the linears of a decoder's blocks, in the model's own order."""
    # Embeddings, position embeddings, the head and whatever is beside the decoder (a vision tower)
    # lie outside the blocks and are left alone. In a mixture of experts, every matrix of every
    # expert is a linear of its own, and so are those of shared experts. What decides the routing
    # stays dense: the router, and a shared expert's gate of one output. They are tiny, and an error
    # there sends tokens to the wrong experts.
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
    for layer in linears.values():
        if not layer.weight.numel():
            raise ModelError(
                f"{layer.name} has no weights: its shape is {tuple(layer.weight.shape)}. Check the "
                "sizes in the model's config.json."
            )
    return linears


def _matrix_of_all(expert: str) -> str:
    """The name of an expert's matrix without the expert: ``model.layers.0.mlp.experts.up_proj``."""
    experts, _, matrix = expert.rpartition(".")
    return f"{experts.rpartition('.')[0]}.{matrix}"


def _routers(block: nn.Module) -> set[nn.Module]:
    """The modules that weigh experts: of one matrix beside them, a row for each expert or one."""
    # That it is alone tells a router from a shared expert: in Qwen3-Next both have 512 rows.
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
    """Find the blocks of the text decoder, with their names, in the model's own order."""
    # They are known by the class names that transformers must not split over devices. A multimodal
    # model (Gemma 3) has blocks outside its decoder, which text never reaches.
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


@dataclass(frozen=True, kw_only=True)
class ExpertFiles:
    """The way from a checkpoint's tensors to the weights of a mixture that stay in its files."""

    # Parameters that transformers would make of several tensors, and that cannot be kept apart.
    # Empty: all weights can be mapped.
    converted: list[str]
    # The model's class, with experts that are kept apart; None where no tensor of the checkpoint is
    # an expert's.
    separate: type[PreTrainedModel] | None
    # For ``from_pretrained``: from a stored name of an expert's matrix, as a regular expression, to
    # its name in ``separate``.
    key_mapping: dict[str, str]


def expert_files(config: PreTrainedConfig, stored: Iterable[str]) -> ExpertFiles:
    """Find out how the tensors of a checkpoint are to be read."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_source = {source: c for c in converters for source in c.source_patterns}
    parameters = model.state_dict()
    converted: dict[str, WeightConverter] = {}  # what several tensors become, and how
    for name in stored:
        target, source = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if source is not None and target in parameters:
            converted[target] = by_source[source]
    names = {target: _matrices(converter) for target, converter in converted.items()}
    key_mapping = {source: name for mapping in names.values() for source, name in mapping.items()}
    separate_experts(model)
    separate = model.state_dict()  # without what became matrices
    return ExpertFiles(
        converted=sorted(target for target in converted if target in separate or not names[target]),
        separate=_with_separate_experts(type(model)) if key_mapping else None,
        key_mapping={s: name for s, name in key_mapping.items() if not _same(s, name)},
    )


def _matrices(converter: WeightConverter) -> dict[str, str]:
    """Return the key mapping of a converter that stacks plain experts, or an empty one."""
    operations = [(type(o), getattr(o, "dim", None)) for o in converter.operations]
    sources, (target, *more_targets) = converter.source_patterns, converter.target_patterns
    experts, _, parameter = target.rpartition(".")
    kinds = {
        ("gate_up_proj", 2): ([(MergeModulelist, 0), (Concatenate, 1)], ("gate_proj", "up_proj")),
        ("down_proj", 1): ([(MergeModulelist, 0)], ("down_proj",)),
    }
    expected, matrices = kinds.get((parameter, len(sources)), ([], ()))
    if more_targets or operations != expected or any(source.count("*") != 1 for source in sources):
        return {}
    return {
        re.escape(source).replace(r"\*", r"(\d+)"): rf"{experts}.\1.{matrix}.weight"
        for source, matrix in zip(sources, matrices, strict=True)
    }


def _same(source: str, name: str) -> bool:
    """Return whether a matrix is stored under the name that it has in the model."""
    return source == re.escape(name).replace(r"\\1", r"(\d+)")


def _with_separate_experts(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def initialise(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)  # type: ignore[arg-type]  # a subclass of it
        separate_experts(self)

    names = {"__init__": initialise, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), names)


def footprint_of(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> Footprint:
    """Add up a model's shapes, of weights on any device; by default in the dtype of its weights."""
    config = model.config.get_text_config()
    tensors = {name: TensorHeader(tuple(p.shape), "F32") for name, p in model.named_parameters()}
    shapes = model_shapes(type(model).__name__, Header(config=config.to_dict(), tensors=tensors))
    fused = config._attn_implementation == "sdpa"
    loaded = str(dtype or model.dtype).removeprefix("torch.")
    return shapes_footprint(shapes, loaded, heads=0 if fused else config.num_attention_heads)
