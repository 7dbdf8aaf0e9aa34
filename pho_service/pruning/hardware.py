"""
Devices, their memory, threads, and pieces of work that fit a CPU's caches or a GPU.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from pho_service.errors import InvalidInput

CGROUP = Path("/sys/fs/cgroup")  # of the container that this process runs in
GPU_CHUNK = 1 << 28  # values: all rows of a linear of 4,096 x 16,384 where 4 are held for a weight
BYTES = 64  # of a GPU's free memory for each value; all temporaries of a chunk take 10 to 50

Piece = TypeVar("Piece")
Done = TypeVar("Done")


@contextmanager
def peak_memory(*devices: torch.device) -> Iterator[Callable[[], int | None]]:
    """Watch the most memory that is in use inside: bytes when called, None if nobody tells."""
    # Of GPUs what torch handed out, added up; of the CPU what is resident of this process, which
    # Linux alone can start to watch again.
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
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else None


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


def cards_memory(devices: Sequence[torch.device]) -> tuple[int, int] | None:
    """Bytes of GPUs that are used, by whomever, and that there are; None before torch uses one."""
    if devices[0].type != "cuda" or not torch.cuda.is_initialized():
        return None
    try:
        free, total = map(sum, zip(*map(torch.cuda.mem_get_info, devices), strict=True))
    except RuntimeError:  # a card that fails: who works with it says so
        return None
    return total - free, total


def main_memory() -> int:
    """Bytes of main memory that there are: the system's, or those of this container."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # "max" is no limit
        return total


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


def in_threads(work: Callable[[Piece], Done], pieces: Sequence[Piece]) -> list[Done]:
    """Do pieces of work side by side; most of it must release the interpreter."""
    # In the threads torch itself takes one thread, so a piece gives the same bits however many
    # there are. That is faster than threads within each operation where operations are small, and
    # where some of them are not torch's.
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) < 2:
        return [work(piece) for piece in pieces]
    results = list(_pool(threads).map(work, pieces))
    torch.set_num_threads(threads)  # a new thread of the pool sets what others begin with
    return results


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pho-pruning", initializer=_alone)


def _alone() -> None:
    """Let torch take one thread in this one, whatever is said elsewhere from now on."""
    torch.get_num_threads()  # until it is asked, torch takes what another thread has set last
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def multiplies_halves() -> bool:
    """Whether this CPU has units for products in bfloat16 (AMX); older versions of torch say no."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def quick_dtype(device: torch.device) -> torch.dtype:
    """The type of factors whose product may be a little off, with its sums in float32."""
    return torch.bfloat16 if device.type == "cpu" and multiplies_halves() else torch.float32


def quick_products(device: torch.device) -> AbstractContextManager[object]:
    """Inside, linears multiply in :func:`quick_dtype`. For training: what decides is in float32."""
    if quick_dtype(device) is torch.float32:
        return nullcontext()
    # What autocast keeps in bfloat16 of the weights is theirs until it ends, after many steps.
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def chunk_size(device: torch.device, on_cpu: int) -> int:
    """
    Give the number of values of a temporary tensor: ``on_cpu``, or more on a GPU.

    A GPU works on so many that a linear of a large model is one piece, for
    each piece costs the same hundreds of launches, whatever its height. Where
    its free memory is short, on a power of two that fits.
    """
    if device.type != "cuda":
        return on_cpu
    fitting = max(1, free_memory(device) // BYTES)
    return max(on_cpu, min(GPU_CHUNK, 1 << fitting.bit_length() - 1))


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
        existing = ", ".join(f"{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus())
        raise InvalidInput(
            f"device {name!r} does not exist: torch sees {existing or 'no GPU'}. "
            + (
                "Use one of these, auto or cpu."
                if existing
                else "Use auto or cpu, or install a CUDA build of torch and look at nvidia-smi."
            )
        )
    return device


def gpus() -> list[torch.device]:
    """All that torch sees."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
