"""
A pruned model as a Hugging Face folder.
"""

import json
from pathlib import Path
from typing import Any

from pho_service.files import new_folder
from pho_service.models.bundle_file import os_errors
from pho_service.models.loading import LanguageModel

RECIPE = "pruning.json"


def save_pruned(model: LanguageModel, folder: Path, recipe: dict[str, Any]) -> None:
    """
    Write a model whose masks are applied: weights in their stored dtype, tokenizer, recipe.

    The folder is made beside its place and moved there when it is complete.

    Args:
        model: Already pruned. It is cast to its stored dtype.
        folder: New or empty.
        recipe: JSON values, written as ``pruning.json``.

    Raises:
        OutputError: The folder is in use, or cannot be written.
    """
    with new_folder(folder) as partial, os_errors():
        model.model.to(model.stored_dtype)  # type: ignore[arg-type]  # as in loading.py
        model.model.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        (partial / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
