"""
The footprint of a model of transformers; its weights may be on the ``meta`` device.
"""

import torch
from transformers import PreTrainedModel

from pho_service.planning.footprint import Footprint, shapes_footprint
from pho_service.planning.shapes import Header, Stored, model_shapes


def footprint_of(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> Footprint:
    """Add up a model's shapes; by default as it would be loaded in the dtype of its weights."""
    config = model.config.get_text_config()
    tensors = {name: Stored(tuple(p.shape), "F32") for name, p in model.named_parameters()}
    shapes = model_shapes(type(model).__name__, Header(config=config.to_dict(), tensors=tensors))
    fused = config._attn_implementation == "sdpa"
    loaded = str(dtype or model.dtype).removeprefix("torch.")
    return shapes_footprint(shapes, loaded, heads=0 if fused else config.num_attention_heads)
