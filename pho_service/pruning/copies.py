"""
Copies between main memory and a GPU that nobody waits for.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """
    The same values on a device; on the CPU, or if it is there already, the tensor itself.

    Towards a GPU it goes through pinned memory, so the CPU need not wait for what the GPU still
    does: the copy takes its turn after that.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_main_memory(tensor: Tensor) -> Tensor:
    """
    The same values in main memory; a tensor of the CPU itself.

    From a GPU they come into pinned memory, and are there once :func:`arrived` was called, or the
    GPU reads them again.
    """
    return tensor.to("cpu", non_blocking=True)


def arrived(device: torch.device) -> None:
    """Wait until all that :func:`to_main_memory` was given has come from a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
