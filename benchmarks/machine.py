"""What a benchmark ran on, to be printed with its numbers."""

import shutil
import subprocess

from pho_service.host.machine import conditions, machine, versions

__all__ = ["card", "conditions", "machine", "software"]


def software(*packages: str) -> str:
    """Versions of Python, of PHO and of ``packages``, in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions(*packages).items())


def card() -> str:
    """The first GPU with its memory, driver and CUDA version."""
    import torch

    about = torch.cuda.get_device_properties(0)
    return (
        f"{about.name}, {about.total_memory / 2**30:.0f} GiB, driver {_driver()}, "
        f"CUDA {torch.version.cuda}"
    )


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    return answer.stdout.partition("\n")[0] or "unknown"
