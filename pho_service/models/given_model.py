"""
A model that a program has loaded already, taken as it is: nothing of it changes here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pho_service.errors import InvalidInput
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import LanguageModel, check_weights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def given_model(model: PreTrainedModel, tokenizer: Any = None) -> LanguageModel:
    """
    Take a model in memory, on whatever device it lies.

    Fused experts are given modules of their own, see :func:`~experts.unfuse_experts`;
    what the model computes stays the same.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokenizer: Its own; None where only tokens are given.

    Raises:
        InvalidInput: It is in training mode, has hooks or adapters, is quantised, or a weight has
            no value or a dtype that is not computed in.
        ModelError: It cannot be pruned as a whole.
        NumericalError: A weight is NaN or infinite.
    """
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidInput(
            f"tokenizer is a {type(tokenizer).__name__}, not a tokenizer of transformers. Give "
            f"what AutoTokenizer.from_pretrained({name!r}) loads."
        )
    for fault in _faults(model):
        raise InvalidInput(f"the model {name} {fault}")
    linears = prunable_linears(model)
    for linear, found in linears.items():
        weight = found.weight
        if weight.is_meta or weight.dtype not in _DTYPES:
            raise InvalidInput(
                f"the model {name} has a weight, {linear}, "
                + (
                    "on the device meta, which holds no values. Load the model without offloading."
                    if weight.is_meta
                    else f"of {weight.dtype}. Only float32, bfloat16 and float16 can be pruned: "
                    "load the model in one of them, without quantisation."
                )
            )
    check_weights(linears)
    return LanguageModel(
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        model=model,
        tokenizer=tokenizer,
        stored_dtype=model.dtype,
        linears=linears,
    )


def _faults(model: PreTrainedModel) -> Iterator[str]:
    """What keeps a model from being measured as it is, each with the way out."""
    modules = dict(model.named_modules())
    training = [path or "the whole model" for path, module in modules.items() if module.training]
    if training:
        yield (
            f"is in training mode ({training[0]}), in which dropout would change what is "
            "measured. Call model.eval() first."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        yield (
            "has adapters beside its weights, which would be pruned as weights of their own. "
            "Merge them first: merge_and_unload() of peft."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        yield (
            "is quantised already, and its weights can no longer be pruned one by one. Prune "
            "the model that it was made from, then quantise."
        )
    parametrised = [path for path, module in modules.items() if hasattr(module, "parametrizations")]
    if parametrised:
        yield (
            f"has parametrised weights ({parametrised[0]}), which cannot be changed in place. "
            "Make them plain first: torch.nn.utils.parametrize.remove_parametrizations."
        )
    hooked = [path or "the whole model" for path, module in modules.items() if _hooked(module)]
    if hooked:
        yield (
            f"has hooks ({hooked[0]}), which may change what it computes, or see passes that "
            "they are not meant for. Remove them first: handle.remove(), or load it again."
        )


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)
