"""
What machines can do: named GPUs by their makers' sheets, this CPU by a measurement of a moment.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from pho_service.errors import InvalidInput

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """
    Rates that a stage can count on, below what data sheets promise.

    Attributes:
        name: As it is asked for.
        is_gpu: Whether models lie on a card of its own memory.
        memory_bytes: Memory of the card; for a CPU, the main memory.
        products: FLOP/s of matrix products in bfloat16; on a CPU in float32.
        float_products: FLOP/s of matrix products in float32.
        bandwidth: Bytes/s that are read or written where the model lies.
        copies: Bytes/s between the card and main memory; on a CPU as its bandwidth.
        launch_s: What starting an operation takes at least.
        disk: Bytes/s of the files.
        cores: Cores of the host.
        main_bytes: Main memory of the host.
        uncertainty: A stage may take so many times less or more.
    """

    name: str
    is_gpu: bool
    memory_bytes: int
    products: float
    float_products: float
    bandwidth: float
    copies: float
    launch_s: float
    disk: float
    cores: int
    main_bytes: int
    uncertainty: float

    def resized(self, memory_bytes: int | None, main_bytes: int | None = None) -> "Machine":
        """
        The same with other memories; None keeps one.

        Raises:
            InvalidInput: Less than a gigabyte.
        """
        for size in (memory_bytes, main_bytes):
            if size is not None and size < 10**9:
                raise InvalidInput(
                    f"a memory of {size} bytes holds no model. Give a size with a unit: 80GiB."
                )
        main = main_bytes or (self.main_bytes if self.is_gpu else memory_bytes) or self.main_bytes
        own = memory_bytes or (self.memory_bytes if self.is_gpu else main)
        return replace(self, memory_bytes=own, main_bytes=main)

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "name": self.name,
            "gpu": self.is_gpu,
            "memory_bytes": self.memory_bytes,
            "main_bytes": self.main_bytes,
            "measured": not self.is_gpu,
        }


def _card(
    name: str, gib: float, products: float, float_products: float, bandwidth: float
) -> Machine:
    """A GPU in a host of 16 cores and 128 GiB with an NVMe disk."""
    return Machine(
        name=name,
        is_gpu=True,
        memory_bytes=int(gib * GIB),
        products=products * 1e12,
        float_products=float_products * 1e12,
        bandwidth=bandwidth * 1e12,
        copies=12e9,
        launch_s=7e-6,
        disk=3e9,
        cores=16,
        main_bytes=128 * GIB,
        uncertainty=2.0,
    )


# TFLOP/s in bfloat16 and float32 and TB/s: 40 % to 75 % of the data sheets' dense figures, as
# large products reach them. Nothing here was measured by us: no such card was at hand.
CARDS = {
    card.name: card
    for card in (
        _card("H200", 140, 400, 45, 3.6),
        _card("H100", 79, 400, 45, 2.5),
        _card("A100", 79, 200, 15, 1.5),
        _card("A100-40GB", 39, 200, 15, 1.2),
        _card("L40S", 44, 150, 50, 0.7),
        _card("4090", 23.5, 120, 45, 0.8),
    )
}


def named_machine(name: str) -> Machine:
    """
    The machine of a name: ``H100``, ``a100``, or ``cpu`` for this one.

    Raises:
        InvalidInput: It is not known.
    """
    if name.lower() == "cpu":
        return this_cpu()
    found = {known.lower(): card for known, card in CARDS.items()}.get(name.lower())
    if found is None:
        raise InvalidInput(
            f"the card {name!r} is not known. Known are {', '.join(CARDS)}, and cpu for this "
            "machine without one; --device-memory says how much memory another card has."
        )
    return found


@cache
def this_cpu() -> Machine:
    """This machine's CPU, measured for about half a second."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    matrix = np.ones((768, 768), dtype=np.float32)
    products = 2 * 768**3 / _fastest(lambda: matrix @ matrix)
    block = np.ones(2**24, dtype=np.float32)
    target = np.empty_like(block)
    bandwidth = 2 * block.nbytes / _fastest(lambda: np.copyto(target, block))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        name="cpu",
        is_gpu=False,
        memory_bytes=memory,
        products=products,
        float_products=products,
        bandwidth=bandwidth,
        copies=bandwidth,
        launch_s=5e-6,
        disk=1e9,
        cores=cores or 1,
        main_bytes=memory,
        uncertainty=2.0,
    )


def _fastest(work: Callable[[], object], rounds: int = 4) -> float:
    """Seconds of the fastest of some rounds: others may use the machine, too."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
