"""
A pruned model as a Hugging Face folder.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pho_service.host.files import new_folder
from pho_service.models.bundle_file import os_errors
from pho_service.models.loading import LanguageModel
from pho_service.models.mask_file import MASKS, PackedMask, write_masks
from pho_service.models.model_card import CARD, licence_of, model_card
from pho_service.models.shared_recipe import shareable

RECIPE = "pruning.json"
SHARD = "2GB"  # a file is put together in memory


def save_pruned(
    model: LanguageModel,
    folder: Path,
    masks: Iterable[tuple[str, PackedMask]],
    recipe: dict[str, Any],
) -> None:
    """
    Write a model whose masks are applied: weights, tokenizer, masks, recipe, and a card.

    The folder is made beside its place and moved there when it is complete.

    Args:
        model: Already pruned, in the dtype that it is to be stored in.
        folder: New or empty.
        masks: Masks of each linear, in the model's order; written as ``pruning/masks.safetensors``.
        recipe: JSON values, written as ``pruning.json``; its ``layers`` get
            the hash of each mask.

    Raises:
        OutputError: The folder is in use, or cannot be written.
    """
    with new_folder(folder) as partial, os_errors():
        model.model.save_pretrained(partial, max_shard_size=SHARD)
        model.tokenizer.save_pretrained(partial)
        (partial / MASKS).parent.mkdir()
        hashes = write_masks(masks, partial / MASKS, metadata={"model": shareable(recipe["model"])})
        layers = {
            name: {**entry, "mask_sha256": hashes[name]} for name, entry in recipe["layers"].items()
        }
        text = json.dumps({**recipe, "layers": layers}, indent=2) + "\n"
        (partial / RECIPE).write_text(text, encoding="utf-8")
        card = model_card(recipe, licence_of(model.name, model.revision))
        (partial / CARD).write_text(card, encoding="utf-8")
