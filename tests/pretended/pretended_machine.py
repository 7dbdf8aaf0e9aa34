"""A machine with pretended cards: where tensors lie, and how they come from one to another."""

from collections.abc import Sequence
from contextlib import contextmanager
from threading import local

import torch
from pretended_cards import Card, InMain, OnCard, label_of, set_label

CPU = torch.device("cpu")


class Cards(Sequence[Card]):
    """The pretended cards of this machine, and which of them is the current one."""

    def __init__(self, count, memory_bytes):
        self._cards = [Card(index, memory_bytes) for index in range(count)]
        self.current = 0
        self.here = local()  # .target: the device of what a factory makes in this thread

    def __getitem__(self, index):
        return self._cards[index]

    def __len__(self):
        return len(self._cards)

    def at(self, device=None):
        """The card that a device, its name or its index means; without one the current."""
        if isinstance(device, str):
            device = torch.device(device)
        if isinstance(device, torch.device):
            if device.type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")
            device = device.index
        index = self.current if device is None or device == -1 else int(device)
        if not 0 <= index < len(self._cards):
            raise RuntimeError("CUDA error: invalid device ordinal (pretended)")
        return self._cards[index]

    def whole(self, device):
        """A device with its index, if it is a GPU; an integer is one."""
        if isinstance(device, int):
            return self.at(device).device
        device = torch.device(device)
        return self.at(device).device if device.type == "cuda" else device

    def device_of(self, tensor):
        label = label_of(tensor)
        return label.card.device if isinstance(label, OnCard) else tensor.device

    @contextmanager
    def making(self, device):
        before = getattr(self.here, "target", None)
        self.here.target = device
        try:
            yield
        finally:
            self.here.target = before

    def put(self, tensor, device):
        """Label a new tensor of the CPU, so that it lies on a card. Without modes around."""
        storage = tensor.untyped_storage()
        if device.type == "cuda" and label_of(tensor) is None:
            set_label(tensor, OnCard(self.at(device), storage.nbytes()))
        return tensor

    def copied(
        self, source, device, *, dtype=None, non_blocking=False, memory_format=torch.preserve_format
    ):
        """A copy on another device, without a gradient's way back. Without modes around."""
        label = label_of(source)
        with torch.no_grad():
            made = source.detach().to(dtype, copy=True, memory_format=memory_format)
        if device.type == "cuda":
            self.put(made, device)
        elif isinstance(label, OnCard) and non_blocking:
            set_label(made, InMain(pinned=True))  # as torch does for such a copy
        self.move(made, source, non_blocking=non_blocking)
        return made

    def move(self, to, source, *, non_blocking):
        """Account for a copy between devices, whose values are there. Without modes around."""
        target, origin = label_of(to), label_of(source)
        size = to.numel() * to.element_size()
        if isinstance(target, OnCard) and isinstance(origin, OnCard):
            target.card.copied("p2p", size)
            return
        if isinstance(target, OnCard):
            card, host, way = target.card, source, "h2d"
        else:
            card, host, way = origin.card, to, "d2h"
            if to.dtype != source.dtype or not source.is_contiguous():
                OnCard(card, size)  # for a moment: it is cast or packed on the card first
                card.launch("copy_")
        if size == 0:
            return
        memory = label_of(host)
        if isinstance(memory, InMain):
            copies = (memory.written, memory.read if way == "d2h" else None)
            if any(copy and copy[0] is not card for copy in copies):  # its own come in their order
                memory.check(writes=way == "d2h")
        card.copied(way, size)
        if not (non_blocking and isinstance(memory, InMain) and memory.pinned):
            card.wait(way)
            return
        card.asked += 1
        if way == "h2d":
            memory.read = (card, card.asked)
        else:
            memory.written = (card, card.asked)


class Move(torch.autograd.Function):
    """A copy to another device; its gradient goes back to where it came from."""

    @staticmethod
    def forward(ctx, source, cards, device, options):
        ctx.cards, ctx.home, ctx.dtype = cards, cards.device_of(source), source.dtype
        return cards.copied(source, device, **options)

    @staticmethod
    def backward(ctx, *gradients):
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            moved = ctx.cards.copied(gradients[0], ctx.home, dtype=ctx.dtype)
        return moved, None, None, None
