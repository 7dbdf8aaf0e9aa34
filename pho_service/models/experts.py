"""
The experts of a mixture, one linear for each matrix.

transformers 5 keeps all experts of a block in two 3D parameters and multiplies
slices of them, so no hook ever sees an expert. Here each matrix becomes a
module that owns nothing and cuts its slice when it is asked: parameters, state
dict and files on disk stay those of the fused module.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class _Owner:
    """
    A module that does not live for this: parameters in a circle wait for the garbage collector.

    In a deep copy of the module it is the copy; a copy of less than the module keeps the old one.
    """

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
    """
    One matrix of one expert, as a linear without bias.

    Args:
        experts: The fused module.
        parameter: Its 3D parameter, (experts, out_features, in_features).
        expert: Index into the first dimension.
        rows: Output rows of the parameter that are this matrix.
    """

    def __init__(self, experts: nn.Module, parameter: str, expert: int, rows: slice) -> None:
        super().__init__()
        self._owner = _Owner(experts)
        self.parameter = parameter
        self.expert = expert
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a view, cut again each time, so casts and moves are seen."""
        return self._owner().get_parameter(self.parameter)[self.expert, self.rows]

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
    """
    One expert of three linears without bias.

    A deep copy of it alone has three linears of its own, not all experts.

    Args:
        experts: The module of all experts, which knows how to gate.
        gate_proj: (hidden) to (width).
        up_proj: (hidden) to (width).
        down_proj: (width) to (hidden).
    """

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
    """
    Give every fused expert of a model modules of its own, called with the tokens routed to it.

    Outputs, parameters and state dict stay what they were. An expert that no
    token is routed to is not called. Doing it again changes nothing. Experts
    that are stored in another layout are left fused.

    Args:
        model: A model of transformers. Changed in place: the fused modules get the
            children ``0``, ``1``, ... and a forward that calls them.
    """
    for module in list(model.modules()):
        if _is_fused(module) and not experts_of(module):
            count, _, width = module.get_parameter("down_proj").shape
            for index in range(count):
                gate = ExpertLinear(module, "gate_up_proj", index, slice(0, width))
                up = ExpertLinear(module, "gate_up_proj", index, slice(width, None))
                down = ExpertLinear(module, "down_proj", index, slice(None))
                module.add_module(str(index), Expert(module, gate, up, down))
            module.forward = partial(_forward, _Owner(module))


def separate_experts(model: nn.Module) -> None:
    """
    Give every fused expert of a model linears of its own, instead of the fused parameters.

    The model computes the same, but its state dict has the names of the matrices
    (``...experts.0.gate_proj.weight``).

    Args:
        model: A model of transformers on the device ``meta``; no values move. Changed in place.
    """
    for module in list(model.modules()):
        if _is_fused(module):
            down_proj = module.get_parameter("down_proj")
            count, hidden, width = down_proj.shape
            new = partial(nn.Linear, bias=False, device=down_proj.device, dtype=down_proj.dtype)
            for index in range(count):
                matrices = new(hidden, width), new(hidden, width), new(width, hidden)
                module.add_module(str(index), Expert(module, *matrices))
            del module.gate_up_proj, module.down_proj
            vars(module)["_is_hf_initialized"] = True  # so transformers does not look for them
            module.forward = partial(_forward, _Owner(module))


def experts_of(module: nn.Module) -> list[Expert]:
    """The experts that one of the two above gave a module, in their order; none to any other."""
    return [child for child in module.children() if isinstance(child, Expert)]


def separate_weights(model: nn.Module) -> dict[str, Tensor]:
    """
    All parameters of a model by name, those of fused experts one by one.

    A fused parameter is replaced by its matrices (``...experts.0.gate_proj.weight``), views of it.
    """
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            experts = name.rsplit(".", 2)[0]  # without the expert and the matrix
            weights.pop(f"{experts}.{module.parameter}", None)
            weights[f"{name}.weight"] = module.weight
    return weights


def _is_fused(module: nn.Module) -> bool:
    """
    Whether a module keeps to transformers' contract for experts, in its plainest layout.

    The flags are set by ``use_experts_implementation``; whatever has them takes
    (hidden_states, top_k_index, top_k_weights) and gates with ``_apply_gate``.
    """
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
    """
    What the fused module computes, expert by expert.

    Args:
        owner: The module of experts.
        hidden_states: (tokens, hidden), floating point.
        top_k_index: (tokens, k), int64: the experts of each token. An index
            beyond the last expert stands for none.
        top_k_weights: (tokens, k): what each expert's output is multiplied by.

    Returns:
        (tokens, hidden), the dtype of ``hidden_states``.
    """
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
