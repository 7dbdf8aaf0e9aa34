"""
What of a recipe, and of masks, cannot be true of a model.
"""

from collections.abc import Mapping

from pho_service.models.mask_file import MaskFile
from pho_service.models.recipe_file import Recipe
from pho_service.pruning.statistics import PrunableLinear


def recipe_problems(recipe: Recipe, linears: Mapping[str, PrunableLinear]) -> list[str]:
    """Find what a recipe says that cannot be true of a model with these linears."""
    said = [*recipe.layers, *recipe.dense]
    problems = [f"{name} is not in it" for name in linears if name not in {*said}]
    problems += [f"the model has no {name}" for name in said if name not in linears]
    problems += [f"{name} is both pruned and dense" for name in recipe.dense.keys() & recipe.layers]
    if ":" in recipe.configuration.pattern:
        problems += [
            f"{name} has no groups, but the pattern is {recipe.configuration.pattern}"
            for name, record in recipe.layers.items()
            if record.group is None
        ]
    seen: set[tuple[str, int]] = set()
    for folded in recipe.folded:
        # What reads the channels has them in dimension 1, what writes them in dimension 0.
        for name, dim in [(folded.reader, 1), *((writer, 0) for writer in folded.writers)]:
            if name not in linears:
                problems.append(f"folded {name} is not a linear of the model")
            elif (name, dim) in seen:
                problems.append(f"{name} is folded twice")
            elif sorted(folded.order) != list(range(linears[name].weight.shape[dim])):
                problems.append(
                    f"the order folded into {name} is not a permutation of its "
                    f"{linears[name].weight.shape[dim]} channels"
                )
            seen.add((name, dim))
    return problems


def mask_problems(masks: MaskFile, linears: Mapping[str, PrunableLinear]) -> list[str]:
    """Why masks cannot be those of a model with these linears."""
    problems = [f"{name} has no mask" for name in linears if name not in masks.shapes]
    for name, shape in masks.shapes.items():
        if name not in linears:
            problems.append(f"{name} has a mask, but is not a pruned linear of the model")
        elif shape != tuple(linears[name].weight.shape):
            problems.append(
                f"{name} has the shape {tuple(linears[name].weight.shape)}, its mask {shape}"
            )
    return problems
