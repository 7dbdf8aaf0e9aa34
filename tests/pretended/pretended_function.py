"""The mode that answers for a card what a CPU build of torch cannot."""

from contextlib import nullcontext

import torch
from pretended_cards import InMain, OnCard, label_of, set_label
from pretended_machine import CPU, Move
from pretended_rules import tensors_of
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.overrides import TorchFunctionMode


class Function(TorchFunctionMode):
    """Answers what depends on where a tensor lies."""

    def __init__(self, cards):
        super().__init__()
        self.cards = cards
        tensor = torch.Tensor
        self._answers = {
            tensor.device.__get__: self._device,
            tensor.is_cuda.__get__: lambda t: self._device(t).type == "cuda",
            tensor.is_cpu.__get__: lambda t: self._device(t).type == "cpu",
            tensor.get_device: lambda t: -1 if (at := self._device(t)) == CPU else at.index,
            tensor.to: self._to,
            tensor.cuda: lambda t, device=None, non_blocking=False, memory_format=None: self._moved(
                t, self.cards.at(device).device, non_blocking=non_blocking
            ),
            tensor.cpu: lambda t, memory_format=None: self._moved(t, CPU),
            tensor.numpy: self._numpy,
            tensor.__array__: self._array,
            tensor.__dlpack__: self._refused,
            tensor.tolist: self._tolist,
            tensor.pin_memory: self._pin_memory,
            tensor.is_pinned: self._is_pinned,
            tensor.record_stream: lambda _tensor, _stream: None,
            tensor.__deepcopy__: self._deepcopy,
            tensor.new_tensor: self._new_tensor,
            tensor.backward: self._backward,
            torch.tensor: self._tensor,
            torch.as_tensor: self._as_tensor,
            torch.asarray: self._as_tensor,
            embedding_bag: self._embedding_bag,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Answer, or let torch, with new tensors on the card that was asked for."""
        kwargs = kwargs or {}
        answer = self._answers.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self._check_generator(args, kwargs)
        if kwargs.get("device") is None and not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        pinned = kwargs.pop("pin_memory", False)
        device = self.cards.whole(kwargs.pop("device", None) or CPU)
        if device.type == "meta":
            return func(*args, **kwargs, device=device)
        with self.cards.making(device):
            made = func(*args, **kwargs, device=CPU)
        if pinned:
            with torch._C.DisableTorchFunction():
                set_label(made, InMain(pinned=True))
        return made

    def _check_generator(self, args, kwargs):
        """Refuse one of another device than the numbers that it is asked for."""
        device, found = kwargs.get("device"), kwargs["generator"].device.type
        tensors = tensors_of(args[:1])
        if device is None and tensors:
            device = self._device(tensors[0])
        wanted = self.cards.whole(device or CPU).type
        if found != wanted:
            raise RuntimeError(
                f"Expected a '{wanted}' device type for generator but found '{found}'"
            )

    def _device(self, tensor):
        return self.cards.device_of(tensor)

    def _to(self, tensor, *args, **kwargs):
        if args and isinstance(args[0], Tensor):  # as another tensor is
            kwargs = {"device": self._device(args[0]), "dtype": args[0].dtype, **kwargs}
            args = args[1:]
            kwargs |= dict(zip(("non_blocking", "copy"), args, strict=False))
            args = ()
        elif "other" in kwargs:
            other = kwargs.pop("other")
            kwargs = {"device": self._device(other), "dtype": other.dtype, **kwargs}
        if args and isinstance(args[0], torch.dtype):
            kwargs |= dict(zip(("dtype", "non_blocking", "copy"), args, strict=False))
        else:
            kwargs |= dict(zip(("device", "dtype", "non_blocking", "copy"), args, strict=False))
        return self._moved(tensor, **kwargs)

    def _moved(
        self,
        tensor,
        device=None,
        dtype=None,
        non_blocking=False,
        copy=False,
        *,
        memory_format=torch.preserve_format,
    ):
        here = self._device(tensor)
        target = here if device is None else self.cards.whole(device)
        if target == here or "meta" in (target.type, here.type):
            if target.type == "meta":
                return tensor.to(target, dtype or tensor.dtype)
            with self.cards.making(target) if here.type == "meta" else nullcontext():
                return tensor.to(
                    CPU, dtype or tensor.dtype, non_blocking, copy, memory_format=memory_format
                )
        options = {
            "dtype": dtype or tensor.dtype,
            "non_blocking": non_blocking,
            "memory_format": memory_format,
        }
        with torch._C._DisableTorchDispatch():
            if torch.is_grad_enabled() and tensor.requires_grad:
                moved = Move.apply(tensor, self.cards, target, options)
                return moved
            return self.cards.copied(tensor, target, **options)

    def _host(self, tensor):
        """Refuse what the CPU cannot read."""
        label = label_of(tensor)
        if isinstance(label, OnCard):
            raise TypeError(
                f"can't convert {label.card.device} device type tensor to numpy. Use Tensor.cpu() "
                "to copy the tensor to host memory first."
            )
        if isinstance(label, InMain):
            label.check(writes=False)

    def _numpy(self, tensor, *, force=False):
        if force:
            tensor = self._moved(tensor.detach(), CPU)
        self._host(tensor)
        return tensor.numpy(force=force)

    def _array(self, tensor, dtype=None):
        self._host(tensor)
        return tensor.__array__(dtype)

    def _refused(self, tensor, *args, **kwargs):
        self._host(tensor)
        return tensor.__dlpack__(*args, **kwargs)

    def _tolist(self, tensor):
        return self._moved(tensor.detach(), CPU).tolist()

    def _pin_memory(self, tensor, device=None):
        if self._device(tensor) != CPU:
            raise RuntimeError("cannot pin this tensor: only dense CPU tensors can be pinned")
        if self._is_pinned(tensor):
            return tensor
        made = tensor.clone()
        set_label(made, InMain(pinned=True))
        return made

    def _is_pinned(self, tensor, device=None):
        label = label_of(tensor)
        return isinstance(label, InMain) and label.pinned

    def _deepcopy(self, tensor, memo):
        if id(tensor) in memo:
            known = memo[id(tensor)]
            return known
        made = tensor.__deepcopy__(memo)
        return self.cards.put(made, self._device(tensor))

    def _new_tensor(self, tensor, data, *, device=None, **kw):
        kw = {"dtype": tensor.dtype, **kw}
        return self._tensor(data, device=device or self._device(tensor), **kw)

    def _backward(self, tensor, gradient=None, **kwargs):
        with self:  # hooks ask where their tensors lie
            torch.autograd.backward(tensor, gradient, **kwargs)

    def _tensor(self, data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
        if isinstance(data, Tensor):
            made = self._moved(data.detach(), device, dtype, copy=True)
        else:
            # A list may hold tensors of a card, each of which is waited for.
            made = torch.tensor(data, dtype=dtype)
            if device is not None:
                made = self._moved(made, device)
        if pin_memory:
            made = self._pin_memory(made)
        return made.requires_grad_(requires_grad)

    def _as_tensor(self, data, dtype=None, device=None, **kwargs):
        if isinstance(data, Tensor):
            return self._moved(data, device, dtype, **kwargs)
        made = torch.asarray(data, dtype=dtype, **kwargs)
        return made if device is None else self._moved(made, device)

    def _embedding_bag(self, rows, *args, **kwargs):
        # It makes the offsets of its bags itself, where its input lies.
        with self.cards.making(self._device(rows)):
            return embedding_bag(rows, *args, **kwargs)
