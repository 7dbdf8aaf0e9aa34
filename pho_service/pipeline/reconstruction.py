"""
Block reconstruction of a whole model: the dense stream beside the pruned one, and what is trained.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from pho_service.models.blockwise import Block
from pho_service.progress import Advance
from pho_service.pruning.reconstruction import (
    Reconstructed,
    Trainable,
    check_windows,
    reconstruct,
)
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.reconstruction import Reconstruction


class Rebuilding:
    """
    Trains the blocks of a model one after the other, each after it was pruned.

    Args:
        settings: How.
        windows: How many calibration windows there are.

    Raises:
        InvalidInput: Too few windows.
    """

    def __init__(self, settings: Reconstruction, windows: int) -> None:
        check_windows(windows)
        self._settings = settings
        self._dense: list[Tensor] = []  # what the dense model has after the block, of each window

    def before(self, block: Block) -> None:
        """See what a block gives while it is dense. Each block's turn comes once."""
        self._dense = self._dense or [*block.inputs]
        block.replace_(self._dense)

    def after(
        self, block: Block, masks: Mapping[str, Tensor], advance: Advance = lambda _: None
    ) -> Reconstructed:
        """
        Train a block that is pruned.

        Args:
            block: Its linears are changed in place.
            masks: What each pruned linear keeps, (out_features, in_features), bool, by name. Other
                linears stay as they are.
            advance: Called with 0 after each step.
        """

        def run(window: int) -> Tensor:
            output: Tensor = block.run(window, block.inputs[window])
            return output

        weights = trainables(block.module, block.linears, masks)
        return reconstruct(weights, run, self._dense, self._settings, advance=advance)


def trainables(
    module: nn.Module, linears: Mapping[str, PrunableLinear], masks: Mapping[str, Tensor]
) -> list[Trainable]:
    """
    Find the parameters that hold linears' weights, and which of their elements may change.

    Args:
        module: That the parameters are of.
        linears: By name.
        masks: Masks of the trained linears: (out_features, in_features), bool, True = kept.

    Returns:
        One for each mask, in its order.
    """
    parameters = [*module.parameters()]
    return [
        Trainable(
            parameter=next(each for each in parameters if _holds(each, linears[name].weight)),
            weight=linears[name].weight,
            keep=mask,
        )
        for name, mask in masks.items()
    ]


def _holds(parameter: nn.Parameter, weight: Tensor) -> bool:
    """Whether a weight is a part of a contiguous parameter's memory."""
    first = weight.data_ptr() - parameter.data_ptr()
    return (
        parameter.device == weight.device
        and 0 <= first < parameter.numel() * parameter.element_size()
    )
