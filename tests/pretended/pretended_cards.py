"""What a pretended GPU keeps account of: memory, launches, waits and copies."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch

BLOCK = 512  # bytes; torch's allocator hands out multiples of it


@dataclass
class Counts:
    """What was asked of a card."""

    launches: int = 0  # operations that a kernel does: no views, no allocations without a value
    waits: int = 0  # how often the CPU waits until the card has done all that it was asked
    h2d_copies: int = 0  # from main memory to the card
    d2h_copies: int = 0
    p2p_copies: int = 0  # from another card
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    p2p_bytes: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)  # launches
    by_cause: Counter[str] = field(default_factory=Counter)  # waits, also "h2d", "synchronize"


class Card:
    """One pretended GPU: ``cuda:0``, ``cuda:1`` and so on."""

    def __init__(self, index, memory_bytes):
        self.device = torch.device("cuda", index)
        self.memory_bytes = memory_bytes  # beyond it torch.OutOfMemoryError is raised
        self.allocated = self.peak = 0  # bytes of live tensors, each rounded up to 512
        self.reserved = self.reserved_peak = 0  # with what torch's allocator keeps
        self.others = 0  # bytes that other programs use; set it to make the card fuller
        self.counts = Counts()  # since the card exists
        self.fault = None  # raised by the next operation on the card
        self.asked = 0  # asynchronous copies so far
        self.done = 0  # of these, how many are known to have ended
        self._watched = [self.counts]
        self._lock = Lock()

    @property
    def free(self):
        """Bytes that nobody has reserved."""
        return max(0, self.memory_bytes - self.others - self.reserved)

    def allocate(self, size):
        """Take bytes for a tensor, first those that the cache has."""
        with self._lock:
            most = self.memory_bytes - self.others
            if self.allocated + size > most:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU "
                    f"{self.device.index} has a total capacity of {self.memory_bytes / 2**30:.2f} "
                    f"GiB of which {(most - self.allocated) / 2**20:.2f} MiB is free (pretended)."
                )
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            self.reserved = max(self.reserved, self.allocated)
            self.reserved_peak = max(self.reserved_peak, self.reserved)

    def release(self, size):
        self.allocated -= size

    def empty_cache(self):
        """Give back to the card what no tensor holds."""
        self.reserved = self.allocated

    def reset_peak(self):
        self.peak, self.reserved_peak = self.allocated, self.reserved

    def launch(self, operation):
        with self._lock:
            for counts in self._watched:
                counts.launches += 1
                counts.by_operation[operation] += 1

    def wait(self, cause):
        """Count a time that the CPU waits for the card; all copies have ended then."""
        self.done = self.asked
        with self._lock:
            for counts in self._watched:
                counts.waits += 1
                counts.by_cause[cause] += 1

    def copied(self, way, size):
        """Count a copy: ``h2d``, ``d2h`` or ``p2p``."""
        with self._lock:
            for counts in self._watched:
                for what, more in ((f"{way}_copies", 1), (f"{way}_bytes", size)):
                    setattr(counts, what, getattr(counts, what) + more)

    @contextmanager
    def counting(self):
        """What is asked of the card inside."""
        counts = Counts()
        self._watched.append(counts)
        try:
            yield counts
        finally:
            self._watched = [each for each in self._watched if each is not counts]


class OnCard:
    """The label of a storage that lies on a card; its bytes are given back when it is deleted."""

    def __init__(self, card, size):
        self.card = card
        self.size = 0
        self.resize(size)

    def resize(self, size):
        rounded = -(-size // BLOCK) * BLOCK
        if rounded == self.size:
            return
        if rounded > self.size:
            self.card.allocate(rounded - self.size)
        else:
            self.card.release(self.size - rounded)
        self.size = rounded

    def __del__(self):
        self.card.release(self.size)


@dataclass
class InMain:
    """The label of a storage in main memory that a card was told of; others have none."""

    pinned: bool = False  # copies from and to it may go on while the CPU does other things
    written: tuple[Card, int] | None = None  # the card that writes to it, number of that copy
    read: tuple[Card, int] | None = None

    def check(self, *, writes):
        """Refuse what would meet a copy that has not ended."""
        for copy, says in ((self.written, "is not there yet"), (self.read, "is still read")):
            if copy is None or (copy is self.read and not writes):
                continue
            card, number = copy
            if card.done < number:
                raise RuntimeError(
                    f"what a copy without waiting moves {says}: {card.device} was not waited for"
                )


def label_of(tensor):
    """The label of a tensor's storage: ``OnCard``, ``InMain``, or None. Without modes around."""
    try:
        return getattr(tensor.untyped_storage(), "pretended", None)
    except (NotImplementedError, RuntimeError):  # it has none: sparse, functorch
        return None


def set_label(tensor, label):
    """Label a tensor's storage, and so all views of it. Without modes around."""
    storage = tensor.untyped_storage()
    storage.pretended = label
