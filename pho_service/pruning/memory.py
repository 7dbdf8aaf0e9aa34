"""
How much memory is in use, and how much a piece of work takes at its peak.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # of the container that this process runs in


@contextmanager
def peak_memory(*devices: torch.device) -> Iterator[Callable[[], int | None]]:
    """
    Watch the most memory that is in use while the block runs.

    Args:
        devices: GPUs: their memory that torch handed out, added up. The CPU: resident
            memory of this process, which Linux alone can start to watch again.

    Yields:
        Bytes when it is called, or None where the system does not tell.
    """
    if devices[0].type == "cuda":
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        yield lambda: sum(map(torch.cuda.max_memory_allocated, devices))
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM again, see man 5 proc
    except OSError:
        yield lambda: None
        return
    yield _high_water_mark


def _high_water_mark() -> int | None:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None


def memory_in_use(device: torch.device) -> int:
    """Bytes: of a GPU, what torch handed out; of the CPU, what of this process is resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """
    Bytes of a GPU that can be had: those that nobody has, and those that torch keeps for later.

    Torch's allocator gives nothing back to the card: what an earlier stage had counts as used
    there, though the next one gets it.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available_memory() -> int:
    """Bytes of main memory that can be had: the system's, or what is left to this container."""
    available = int(psutil.virtual_memory().available)
    try:  # version 2, which docker, Kubernetes and SLURM set
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat["file"])  # pages of files are dropped when others need the room
    except (OSError, ValueError, KeyError):  # "max" is no limit
        return available
    return min(available, max(0, limit - used))


def format_bytes(count: int) -> str:
    """In GiB, or MiB below one: ``9.31 GiB``."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
