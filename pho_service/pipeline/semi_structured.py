"""
Run a 2:4 model by torch's kernels for it, where the groups hold in the stored order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pho_service.errors import InvalidInput
from pho_service.models.loading import LanguageModel
from pho_service.models.mask_file import MASKS, read_masks
from pho_service.models.packed import as_folder
from pho_service.models.recipe_file import Recipe, read_recipe
from pho_service.models.saving import RECIPE
from pho_service.progress import Progress, silent
from pho_service.pruning.semi_structured import GROUP, KEEP, broken_groups, to_semi_structured
from pho_service.pruning.statistics import PrunableLinear

_OLDEST = (8, 0)  # compute capability of Ampere, the first with sparse tensor cores


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """
    Kernel of each linear, or the reason why it has none.

    Attributes:
        converted: Those that torch's 2:4 kernels multiply now.
        left: Why each of the others stays dense.
    """

    converted: list[str]
    left: dict[str, str]


def check_gpu(device: torch.device) -> None:
    """
    See that a device can run 2:4.

    Raises:
        InvalidInput: It is not a GPU, or too old a one.
    """
    way_out = "pho.load_model loads it anywhere, with the same outputs, as fast as a dense model."
    if device.type != "cuda":
        raise InvalidInput(
            f"2:4 needs a GPU, and the device is {device}: torch has kernels for NVIDIA Ampere and "
            f"newer alone. {way_out}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise InvalidInput(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, capability))}, but 2:4 needs {'.'.join(map(str, _OLDEST))}, which "
            f"Ampere and newer have. {way_out}"
        )


def convert_(model: LanguageModel, folder: Path, *, progress: Progress = silent) -> Conversion:
    """
    Give every linear that is 2:4 as it stands to torch's kernels; the others stay as they are.

    Args:
        model: On a GPU, as it was loaded from ``folder``; its weights are replaced.
        folder: Pruned, packed or not; a folder without a recipe is taken by its zeros alone.
        progress: Is told of each linear.

    Raises:
        InvalidInput: The model is not on a GPU that can run 2:4, or in float32.
        ConfigurationError, ModelError: Its recipe or its masks are broken.
    """
    check_gpu(model.device)
    if model.dtype is torch.float32:
        raise InvalidInput(
            f"{model.name} is in float32, but torch holds 2:4 in 16 bits. Load it with "
            'dtype="bfloat16".'
        )
    converted, left = [], {}
    with as_folder(folder) as small, progress("Converting", len(model.linears)) as advance:
        why_broken = _reasons(small)
        for name, linear in model.linears.items():
            reason = _convert_linear(linear, why_broken)
            if reason is None:
                converted.append(name)
            else:
                left[name] = reason
            advance(1)
    return Conversion(converted=converted, left=left)


def _convert_linear(linear: PrunableLinear, why_broken: Callable[[str], str]) -> str | None:
    """Convert one; returns why not."""
    module = linear.module
    if linear.transposed or not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} is not a Linear of torch"
    weight = module.weight.detach()
    if broken_groups(weight):
        return why_broken(linear.name)
    try:
        sparse = to_semi_structured(weight.contiguous())
    except RuntimeError as error:  # a shape that the kernels do not take
        return f"torch refuses it: {' '.join(str(error).split())[:200]}"
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return None


def _reasons(folder: Path) -> Callable[[str], str]:
    """Why the groups of a linear do not hold in the stored order, by what its recipe says."""
    unknown = f"not every group of {GROUP} neighbours has {GROUP - KEEP} zeros"
    if not (folder / RECIPE).is_file():
        return lambda _: unknown
    recipe: Recipe = read_recipe(folder)
    masks = read_masks(folder / MASKS)

    def reason(name: str) -> str:
        record = recipe.layers.get(name)
        if record is None:
            return "it was left dense"
        if (record.keep, record.group) != (KEEP, GROUP):
            cut = f"{record.keep}:{record.group}" if record.group else recipe.configuration.pattern
            return f"it was pruned at {cut}, and GPUs have kernels for {KEEP}:{GROUP}"
        if name in masks.shapes and masks.mask(name).order is not None:
            return (
                "its groups hold in another channel order, which could not be folded into the "
                "stored weights: prune with --deployable"
            )
        return unknown

    return reason
