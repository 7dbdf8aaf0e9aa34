"""
A GPU that is not there, for tests: tensors stay on the CPU and carry the label of a card.

What CUDA refuses is refused with CUDA's words: tensors of two devices in one operation, a tensor of
a card as a numpy array, an allocation beyond the card's memory, a generator of the CPU for numbers
on the card. What costs time or memory there is counted. All values are computed by the CPU build of
torch, and are the same to the bit as without a pretended card.

**How to use it.** Ask for the fixture ``pretended_gpu`` (one card of 80 GiB, ``cuda:0``) or
``pretended_gpus`` (two of them), and say ``device="cuda"`` wherever the product takes a device::

    def test_a_product_waits_for_nothing(pretended_gpu):
        '''A product is two launches and no wait; what it makes is counted as memory.'''
        x = torch.ones(8, 8, device="cuda")
        with pretended_gpu.counting() as counts:
            y = (x @ x).sum()

        assert (counts.launches, counts.waits) == (2, 0)
        assert y.device == pretended_gpu.device

A :class:`~pretended_cards.Card` has ``allocated``, ``peak``, ``reserved`` (bytes), ``counts``
(since it exists) and ``counting()`` (inside a ``with``): launches, waits, copies and their bytes,
see :class:`~pretended_cards.Counts`, whose ``by_operation`` and ``by_cause`` say what they were.
``card.memory_bytes = ...`` makes it small, ``card.others = ...`` fills it with what other programs
hold, and ``card.fault = error`` lets its next operation fail. ``torch.cuda`` answers for the cards:
``is_available``, ``mem_get_info``, ``max_memory_allocated``, ``empty_cache``, streams, events and
so on. Threads that are started inside know the cards; those of pools that were there before do not.

Pinned memory is followed: a copy with ``non_blocking=True`` from or to it is no wait, every other
copy between a card and main memory is one. Reading what such a copy brings to main memory, or
overwriting what it still reads, before the card was waited for raises RuntimeError.

**What it cannot show.** Kernels: their speed, their rounding, their own workspace in memory, the
limits of their shapes and dtypes. An operation of ATen counts as one launch, where CUDA may need
several. Streams: all happens in one order, so nothing is seen of a missing wait between two
streams. Fragmented memory. ``torch.autocast("cuda")`` is that of the CPU, whose lists of operations
differ a little. Tensors that C++ reads without an operation (``data_ptr``).
"""

from contextlib import contextmanager

from pretended_cuda import stand_ins
from pretended_machine import Cards

GIB = 1 << 30


@contextmanager
def pretend(cards=1, *, memory_bytes=80 * GIB):
    """Inside, this machine has so many pretended GPUs, of so many bytes each; they are given."""
    these = Cards(cards, memory_bytes)
    with stand_ins(these):
        yield these
