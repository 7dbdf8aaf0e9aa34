"""
How much memory is in use, and how much a piece of work takes at its peak.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """
    Watch the most memory that is in use while the block runs.

    Args:
        device: A GPU: its memory that torch handed out. The CPU: resident
            memory of this process, which Linux alone can start to watch anew.

    Yields:
        Bytes when it is called, or None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew, see man 5 proc
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


def format_bytes(count: int) -> str:
    """In GiB, or MiB below one: ``9.3 GiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
