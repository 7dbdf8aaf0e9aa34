"""
One model over several GPUs: which module lies on which, by accelerate.
"""

from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pho_service.errors import InvalidInput, ModelError
from pho_service.models.devices import gpus
from pho_service.pruning.memory import format_bytes, free_memory

DEVICE_MAPS = ("auto",)
USED = 0.9  # of what is free on a card; the rest is lost between blocks of torch's allocator


def spread(
    name: str, config: PreTrainedConfig, dtype: torch.dtype | None
) -> dict[str, torch.device]:
    """
    Say for each module of a model which GPU it lies on, before any weight is read.

    Each card gets about as much, so that all have room left to work in, and no decoder
    block is cut.

    Args:
        name: Name of the model, for messages.
        config: Configuration of the model.
        dtype: Dtype of the weights once they are loaded; None is the stored one.

    Returns:
        Cards by the names of modules, as ``from_pretrained`` takes them.

    Raises:
        InvalidInput: There is no GPU.
        ModelError: The cards are too small: a part would lie in main memory or on disk.
    """
    cards = gpus()
    if not cards:
        raise InvalidInput("--device-map needs a GPU, and torch sees none. Leave it out.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    model.tie_weights()
    room = {card.index: int(USED * free_memory(card)) for card in cards}
    blocks = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, dict(room), no_split_module_classes=blocks)
    found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=blocks)
    elsewhere = [module for module, place in found.items() if not isinstance(place, int)]
    if elsewhere:
        size = sum(parameter.nbytes for parameter in model.parameters())
        places = ", ".join(f"cuda:{card} {format_bytes(free)}" for card, free in room.items())
        raise ModelError(
            f"{name} takes {format_bytes(size)} in {str(model.dtype).removeprefix('torch.')}, but "
            f"the GPUs have room for: {places}. {len(elsewhere)} modules, {elsewhere[0]} first, "
            "would lie in main memory or on disk, where nothing is computed. Use more or "
            "freer GPUs, --dtype bfloat16, or --stream."
        )
    return {module: torch.device("cuda", place) for module, place in found.items()}


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that a model's parameters lie on, the first parameter's first."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
