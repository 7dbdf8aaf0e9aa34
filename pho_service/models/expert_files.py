"""
Mixtures of experts whose weights stay in their files.

Published mixtures store each matrix of each expert as a tensor of its own.
transformers stacks them into fused parameters when it reads them, which takes
memory for the whole model. Here the experts are kept apart instead, so each
matrix is mapped from its file, and moved to a device alone.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from pho_service.models.experts import separate_experts


@dataclass(frozen=True, kw_only=True)
class ExpertFiles:
    """
    How a checkpoint's tensors become a model's weights.

    Attributes:
        converted: Parameters that transformers would make of several tensors, and that cannot be
            kept apart. Empty: all weights can be mapped.
        separate: The model's class, with experts that are kept apart; None where no tensor of
            the checkpoint is an expert's.
        key_mapping: For ``from_pretrained``: from a stored name of an expert's matrix, as a regular
            expression, to its name in ``separate``.
    """

    converted: list[str]
    separate: type[PreTrainedModel] | None
    key_mapping: dict[str, str]


def expert_files(config: PreTrainedConfig, stored: Iterable[str]) -> ExpertFiles:
    """
    Find out how the tensors of a checkpoint are to be read.

    Args:
        config: Configuration of the model.
        stored: Names of the tensors in its files.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_source = {source: each for each in converters for source in each.source_patterns}
    parameters = model.state_dict()
    made: dict[str, WeightConverter] = {}  # what several tensors become, and how
    for name in stored:
        target, source = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if source is not None and target in parameters:
            made[target] = by_source[source]
    names = {target: _matrices(converter) for target, converter in made.items()}
    key_mapping = {source: name for each in names.values() for source, name in each.items()}
    separate_experts(model)
    left = model.state_dict()  # without what became matrices
    return ExpertFiles(
        converted=sorted(target for target in made if target in left or not names[target]),
        separate=_with_separate_experts(type(model)) if key_mapping else None,
        key_mapping={s: name for s, name in key_mapping.items() if not _same(s, name)},
    )


def _matrices(converter: WeightConverter) -> dict[str, str]:
    """Return the key mapping of a converter that stacks plain experts, or an empty one."""
    operations = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    sources, (target, *others) = converter.source_patterns, converter.target_patterns
    experts, _, parameter = target.rpartition(".")
    kinds = {
        ("gate_up_proj", 2): ([(MergeModulelist, 0), (Concatenate, 1)], ("gate_proj", "up_proj")),
        ("down_proj", 1): ([(MergeModulelist, 0)], ("down_proj",)),
    }
    expected, matrices = kinds.get((parameter, len(sources)), ([], ()))
    if others or operations != expected or any(source.count("*") != 1 for source in sources):
        return {}
    return {
        re.escape(source).replace(r"\*", r"(\d+)"): rf"{experts}.\1.{matrix}.weight"
        for source, matrix in zip(sources, matrices, strict=True)
    }


def _same(source: str, name: str) -> bool:
    """Whether a matrix is stored under the name that it has in the model."""
    return source == re.escape(name).replace(r"\\1", r"(\d+)")


def _with_separate_experts(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class, under the same name, but its experts are kept apart from the start."""

    def initialise(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)  # type: ignore[arg-type]  # a subclass of it
        separate_experts(self)

    names = {"__init__": initialise, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), names)
