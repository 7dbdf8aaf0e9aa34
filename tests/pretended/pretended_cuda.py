"""``torch.cuda`` and what else asks torch for a GPU, answered for pretended cards."""

import threading
import types
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch
from uuid import UUID

import torch
from pretended_dispatch import Dispatch
from pretended_function import Function
from torch.overrides import _get_current_function_mode_stack

CAPABILITY = (9, 0)
HIDING = {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}


def cuda_of(cards):
    """What stands in for the functions and classes of ``torch.cuda``, by their names."""

    def memory_stats(device=None):
        card = cards.at(device)
        return {
            "allocated_bytes.all.current": card.allocated,
            "allocated_bytes.all.peak": card.peak,
            "reserved_bytes.all.current": card.reserved,
            "reserved_bytes.all.peak": card.reserved_peak,
        }

    def properties(device=None):
        card = cards.at(device)
        return SimpleNamespace(
            name=f"pretended GPU {card.device.index}",
            total_memory=card.memory_bytes,
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            multi_processor_count=132,
            uuid=UUID(int=card.device.index + 1),
        )

    def set_device(device):
        cards.current = cards.at(device).device.index

    class Device:
        """As ``torch.cuda.device``: another current card inside."""

        def __init__(self, device):
            self.index = cards.at(device).device.index

        def __enter__(self):
            self.before, cards.current = cards.current, self.index

        def __exit__(self, *_error):
            cards.current = self.before

    class Event:
        """As ``torch.cuda.Event``: it can be waited for, and has no times."""

        def __init__(self, **_options):
            self.card, self.number = cards.at(), 0

        def record(self, stream=None):
            self.card = cards.at() if stream is None else stream.card
            self.number = self.card.asked

        def synchronize(self):
            self.card.wait("synchronize")

        def wait(self, stream=None):
            """The card waits, not the CPU."""

        def query(self):
            return self.card.done >= self.number

    class Stream:
        """As ``torch.cuda.Stream``: all of it happens in one order, nothing beside anything."""

        def __init__(self, device=None, **_options):
            self.card = cards.at(device)
            self.device = self.card.device

        def synchronize(self):
            self.card.wait("synchronize")

        def wait_stream(self, stream):
            """The card waits, not the CPU."""

        def wait_event(self, event):
            """The card waits, not the CPU."""

        def record_event(self, event=None):
            event = event or Event()
            event.record(self)
            return event

        def query(self):
            return self.card.done >= self.card.asked

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            pass

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: len(cards),
        "current_device": lambda: cards.current,
        "set_device": set_device,
        "device": Device,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: CAPABILITY,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: ((card := cards.at(device)).free, card.memory_bytes),
        "memory_allocated": lambda device=None: cards.at(device).allocated,
        "max_memory_allocated": lambda device=None: cards.at(device).peak,
        "memory_reserved": lambda device=None: cards.at(device).reserved,
        "max_memory_reserved": lambda device=None: cards.at(device).reserved_peak,
        "reset_peak_memory_stats": lambda device=None: cards.at(device).reset_peak(),
        "memory_stats": memory_stats,
        "empty_cache": lambda: [card.empty_cache() for card in cards] and None,
        "synchronize": lambda device=None: cards.at(device).wait("synchronize"),
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(device),
        "default_stream": lambda device=None: Stream(device),
        "stream": lambda stream: stream or Stream(),
    }


class Autocast(torch.amp.autocast_mode.autocast):
    """``torch.autocast``, whose ``cuda`` is that of the CPU: the tensors are the CPU's."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _generator(cards):
    class Generator(torch.Generator):
        """A generator of the CPU that says where it is."""

        def __new__(cls, device="cpu"):
            made = super().__new__(cls)
            made._at = cards.whole(device)
            return made

        def __init__(self, device="cpu"):
            pass

        @property
        def device(self):
            return self._at

    return Generator


def _grouped(lists):
    """Lists of tensors by the device and dtype of the first list's: torch asks in C++."""
    found = {}
    for number, tensor in enumerate(lists[0]):
        key = tensor.device, tensor.dtype
        groups, numbers = found.setdefault(key, ([[] for _ in lists], []))
        for group, tensors in zip(groups, lists, strict=True):
            group.append(tensors[number])
        numbers.append(number)
    return found


@contextmanager
def stand_ins(cards):
    """Inside, torch says that it has these cards, and tensors lie on them, in new threads too."""
    run = threading.Thread.run
    hooks = torch.autograd.graph.saved_tensors_hooks.__init__
    is_autocast, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def run_in_modes(thread):
        with Function(cards), Dispatch(cards):
            run(thread)

    def hooks_in_modes(self, pack, unpack):
        # torch calls them from inside of an operation, where the function mode is away.
        hooks(self, _within(cards, pack), _within(cards, unpack))

    def autocast_enabled(device_type="cuda"):
        return is_autocast("cpu" if device_type == "cuda" else device_type)

    def dtype_of_autocast(device_type):
        return autocast_dtype("cpu" if device_type == "cuda" else device_type)

    with ExitStack() as stack:
        for name, stand_in in cuda_of(cards).items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
            if name in ("get_rng_state", "set_rng_state"):  # where a trainer asks for them
                stack.enter_context(patch.object(torch.cuda.random, name, stand_in))
        # As in torch's builds for the CPU: in others, optimizers ask the driver for a stream.
        none = patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None)
        stack.enter_context(none)
        for where in (torch, torch.amp, torch.amp.autocast_mode):
            stack.enter_context(patch.object(where, "autocast", Autocast))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", autocast_enabled))
        stack.enter_context(patch.object(torch, "get_autocast_dtype", dtype_of_autocast))
        stack.enter_context(patch.object(torch, "Generator", _generator(cards)))
        stack.enter_context(patch.object(threading.Thread, "run", run_in_modes))
        saved = torch.autograd.graph.saved_tensors_hooks
        stack.enter_context(patch.object(saved, "__init__", hooks_in_modes))
        clipping = torch.nn.utils.clip_grad
        stack.enter_context(patch.object(clipping, "_group_tensors_by_device_and_dtype", _grouped))
        # Functions in Python ask whether a mode is around, and would hide it from what they call.
        for module in (torch.autograd, torch.functional, torch.nn.functional):
            for name in HIDING & vars(module).keys():
                stack.enter_context(patch.object(module, name, lambda *_tensors: False))
        _forget_whether_cuda_is_there()
        try:
            with Function(cards), Dispatch(cards):
                yield
        finally:
            _forget_whether_cuda_is_there()


def _within(cards, hook):
    def call(value):
        if any(isinstance(mode, Function) for mode in _get_current_function_mode_stack()):
            return hook(value)
        with Function(cards):
            return hook(value)

    return call


def _forget_whether_cuda_is_there():
    """transformers and accelerate ask once, and remember what they were told."""
    import sys

    for name in ("transformers.utils.import_utils", "accelerate.utils.imports"):
        for function in vars(sys.modules.get(name, types.ModuleType(name))).copy().values():
            while function is not None:
                if hasattr(function, "cache_clear") and "cuda" in getattr(function, "__name__", ""):
                    function.cache_clear()
                function = getattr(function, "__wrapped__", None)
