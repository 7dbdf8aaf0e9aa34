"""The mode that sees each operation of ATen, below autograd, so those of a backward pass too."""

import torch
from pretended_cards import InMain, OnCard, label_of
from pretended_machine import CPU
from pretended_rules import COPYING, INDEX_WRITING, INDEXING, mixed, rule_of, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode


def _only_card(tensors):
    """The card that all of these tensors lie on, if there is one."""
    cards = {label.card if isinstance(label, OnCard) else None for label in map(label_of, tensors)}
    return cards.pop() if len(cards) == 1 else None


class Dispatch(TorchDispatchMode):
    """Runs each operation on the CPU, if CUDA would run it, and counts it for its card."""

    def __init__(self, cards):
        super().__init__()
        self.cards = cards

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Check, run, label, count."""
        rule = rule_of(func)
        with torch._C.DisableTorchFunction():
            if rule.composite:
                with self:
                    return func.decompose(*args, **(kwargs or {}))
            return self._run(func, rule, args, kwargs or {})

    def _run(self, func, rule, args, kwargs):
        given = tensors_of(args)
        if kwargs:
            given += tensors_of(kwargs)
        target = getattr(self.cards.here, "target", None)
        card = None if target or rule.moves else _only_card(given)
        if card is None:
            self._check_copies(rule, args, kwargs)
            if rule.name in COPYING:
                return self._copy(func, rule, args, kwargs)
            device = target or self._device(rule, args, kwargs, given)
            if device.type != "cuda":
                return func(*args, **kwargs)
            card = self.cards.at(device)
        if card.fault is not None:
            raise card.fault
        result = func(*args, **kwargs)
        made = tensors_of(result)
        for tensor in made:
            if label_of(tensor) is None and tensor.device.type == "cpu":
                self.cards.put(tensor, card.device)
        if rule.written:
            for tensor in given:
                label = label_of(tensor)
                if isinstance(label, OnCard):
                    label.resize(tensor.untyped_storage().nbytes())
        self._count(card, rule, args, given if rule.written else made)
        return result

    def _count(self, card, rule, args, results):
        if rule.launches and (rule.waits or any(tensor.numel() for tensor in results)):
            card.launch(rule.name)
        if rule.waits:
            card.wait(rule.name)
        if rule.moves:
            for index in tensors_of(args[1]):
                self._count_index(card, rule, args, index)

    def _count_index(self, card, rule, args, index):
        at = self.cards.device_of(index)
        if at != card.device:
            way = "h2d" if at == CPU else "p2p"
            card.copied(way, index.numel() * index.element_size())
            if at == CPU:
                card.wait("h2d")
        elif index.dtype in (torch.bool, torch.uint8):
            fills = rule.name in INDEX_WRITING and args[2].numel() == 1
            if not (fills and self.cards.device_of(args[2]) == CPU):  # else as masked_fill_
                card.wait("nonzero")  # how many are marked

    def _check_copies(self, rule, args, kwargs):
        """Refuse to read, or to overwrite, what an asynchronous copy has not ended with."""
        if rule.view or (not rule.launches and not rule.waits):
            return
        for key, value in [*enumerate(args), *kwargs.items()]:
            for tensor in tensors_of(value):
                label = label_of(tensor)
                if isinstance(label, InMain):
                    label.check(writes=key in rule.written)

    def _device(self, rule, args, kwargs, given):
        """The device that an operation runs on, if it may."""
        if rule.name in INDEXING or rule.name in INDEX_WRITING:
            return self._indexed(rule, args)
        devices = {self.cards.device_of(tensor) for tensor in given}
        if len(devices) < 2:
            return devices.pop() if devices else CPU
        devices.discard(torch.device("meta"))
        if rule.pointwise and CPU in devices and len(devices) == 2:
            scalars = [t for t in given if self.cards.device_of(t) == CPU]
            written = [args[key] for key in rule.written if key in range(len(args))]
            written += [kwargs[key] for key in rule.written & kwargs.keys()]
            most = len(scalars) if rule.name == "where" else 1
            if len(scalars) <= most and all(
                t.dim() == 0 and not any(t is each for each in written) for t in scalars
            ):
                devices.discard(CPU)
        if len(devices) > 1:
            raise mixed(rule, devices)
        return devices.pop()

    def _indexed(self, rule, args):
        at = self.cards.device_of(args[0])
        if rule.name in INDEXING:
            if {self.cards.device_of(index) for index in tensors_of(args[1])} - {CPU, at}:
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    f"({at})"
                )
            return at
        values = args[2]
        if self.cards.device_of(values) != at and values.dim() > 0:
            raise mixed(rule, {at, self.cards.device_of(values)})
        return at

    def _copy(self, func, rule, args, kwargs):
        to, source = args[0], args[1]
        origin, target = self.cards.device_of(source), self.cards.device_of(to)
        result = func(*args, **kwargs)
        if rule.name == "copy":  # it gives a new tensor, where the first one lies
            self.cards.put(result, target)
        if origin != target and "meta" not in (origin.type, target.type):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.cards.move(to, source, non_blocking=bool(non_blocking))
        elif target.type == "cuda" and to.numel():
            self.cards.at(target).launch(rule.name)
        return result
