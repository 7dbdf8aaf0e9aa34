"""
Prune a model for good and save it.
"""

from dataclasses import dataclass
from pathlib import Path

from pho_service.configuration import Configuration
from pho_service.models.loading import LanguageModel
from pho_service.models.saving import save_pruned
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import model_masks, model_sparsity
from pho_service.versions import versions


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """
    Attributes:
        sparsity: Over all prunable weights.
        layers: Sparsity of each linear.
    """

    sparsity: float
    layers: dict[str, float]


def prune_job(
    model: LanguageModel,
    bundle: ProxyBundle,
    configuration: Configuration,
    folder: Path,
    progress: Progress = silent,
) -> Pruned:
    """
    Zero the weights that a configuration removes, and write a Hugging Face folder.

    Args:
        model: Dense; it is left pruned.
        bundle: Of this model, for its activation norms and Fisher weights.
        configuration: What to remove.
        folder: New or empty. ``pruning.json`` in it has the recipe.
        progress: Is told of each linear.

    Raises:
        BundleError: The bundle is of another model.
        InvalidInput: The pattern does not fit the model.
        OutputError: The folder is in use, or cannot be written.
    """
    bundle.check_model(model.linears)
    origin = model.to_dict()  # of the dense weights
    layers: dict[str, float] = {}
    masks = model_masks(model.linears, bundle.statistics(), configuration.candidate())
    with progress("Pruning", len(model.linears)) as advance:
        for name, keep in masks:
            model.linears[name].weight.masked_fill_(~keep, 0)
            layers[name] = float((~keep).float().mean())
            advance(1)
    sparsity = model_sparsity(model.linears, layers)
    recipe = {
        "format": "pho-pruning",
        "version": 1,
        "configuration": configuration.model_dump(mode="json"),
        "model": origin,
        "calibration": {k: v for k, v in bundle.provenance.items() if k != "model"},
        "sparsity": sparsity,
        "layers": layers,
        "versions": versions("torch", "transformers"),
    }
    save_pruned(model, folder, recipe)
    return Pruned(sparsity=sparsity, layers=layers)
