"""
The device that work is done on.
"""

import torch

from pho_service.errors import InvalidInput


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that exists."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(
            f"device {name!r} is not known to torch. Use auto, cpu or cuda."
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device {name!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = ", ".join(f"{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus())
        raise InvalidInput(
            f"device {name!r} does not exist: torch sees {there or 'no GPU'}. "
            + (
                "Use one of these, auto or cpu."
                if there
                else "Use --device cpu, or install a CUDA build of torch and look at nvidia-smi."
            )
        )
    return device


def gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
