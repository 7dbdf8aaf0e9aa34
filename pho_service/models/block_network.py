"""
A model as its blocks, with windows on their way through them: forwards, and for gradients back.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pho_service.models.architecture import decoder_blocks
from pho_service.models.block_calls import Call, CallRecorder, has_notes, map_tensors, split_call
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import mapped_copy
from pho_service.progress import Advance
from pho_service.pruning.copies import arrived, to_device, to_main_memory
from pho_service.pruning.memory import free_memory
from pho_service.pruning.passes import forward_replaced, run_backward


class BlockNetwork:
    """
    A model as its blocks, and windows on their way through them.

    Attributes:
        blocks: Names and modules, in the order of their calls.
        hidden: (1, tokens, hidden) for each window: what the next block reads. On the device
            if they fit, otherwise in main memory. Changed in place.
    """

    def __init__(
        self,
        model: LanguageModel,
        windows: Tensor,
        on_device: bool | None = None,
        *,
        streams: int = 1,
    ) -> None:
        self.model = model
        self.windows = windows
        self._stays = _states_fit(model, windows, streams) if on_device is None else on_device
        self.blocks = decoder_blocks(model.model)
        self.hidden: list[Tensor] = []
        self._calls: list[list[Call]] = [[] for _ in self.blocks]
        self._extras: dict[type, int | None] = {}  # see _output_like
        inside = {id(t) for _, block in self.blocks for t in _tensors_of(block).values()}
        self._outside = {n: t for n, t in _tensors_of(model.model).items() if id(t) not in inside}
        self._record()

    def on_device(
        self, module: nn.Module, *, copy: bool = False
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """
        Inside, a block's weights are on the device.

        Args:
            module: A block.
            copy: Even if they were there before, so that they may be changed.

        Yields:
            By name, what the weights will be afterwards; empty if the model is not streamed.
        """
        return weights_on_device(self.model, module, copy=copy)

    def run(self, index: int, window: int, hidden: Tensor | None = None) -> Tensor:
        """The output of a block, on the device; without ``hidden``, of its stored input."""
        if hidden is None:
            with torch.no_grad():
                return self.run(index, window, self.hidden[window])
        output = self._call(index, window, hidden, self.blocks[index][1])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _call(
        self, index: int, window: int, hidden: Tensor, forward: Callable[..., Any]
    ) -> Tensor | tuple[Any, ...]:
        """All that a block returns for the arguments that it had in a window."""
        there = partial(to_device, device=self._device(index))
        args, kwargs = map_tensors(self._calls[index][window], there)
        output: Tensor | tuple[Any, ...] = forward(there(hidden), *args, **kwargs)
        return output

    def _there(self, tensor: Tensor) -> Tensor:
        """On the device that tokens come to."""
        return to_device(tensor, self.model.device)

    def _device(self, index: int) -> torch.device:
        """Where a block is run: models may lie on several GPUs."""
        return self.model.streamed_to or next(self.blocks[index][1].parameters()).device

    def _kept(self, states: Tensor) -> Tensor:
        """Where hidden states are between two blocks."""
        return states if self._stays else to_main_memory(states)

    def spilled(self, count: int, folder: Path | None) -> list[Tensor]:
        """The hidden states of the first windows, mapped from a file if there is a folder."""
        states = self.hidden[:count]
        if folder is None:
            return states
        there = {str(number): to_main_memory(state) for number, state in enumerate(states)}
        for device in self.model.devices:
            arrived(device)
        return list(mapped_copy(there, folder).values())

    def step(
        self, index: int, advance: Advance, end_of_window: Callable[[], None] = lambda: None
    ) -> None:
        """Replace the inputs of a block by its outputs."""
        for window in range(len(self.hidden)):
            self.hidden[window] = self._kept(self.run(index, window))
            end_of_window()
            advance(1)
        self._settle()

    def replace_(self, index: int, states: list[Tensor]) -> None:
        """Replace other inputs of a block, one for each window, by its outputs for them."""
        for window, hidden in enumerate(states):
            with torch.no_grad():
                states[window] = self._kept(self.run(index, window, hidden))
        self._settle()

    def loss_gradients(self, count: int) -> list[Tensor]:
        """Return the gradients of the first windows' summed losses by the last hidden states."""
        leaves = [hidden.detach().requires_grad_() for hidden in self.hidden[:count]]
        with self.ending(leaves):
            for window in self.windows[:count]:
                run_backward(self.model.model, self._there(window[None]))
        return [_gradient(leaf) for leaf in leaves]

    def step_back(
        self, index: int, inputs: list[Tensor], gradients: list[Tensor], advance: Advance
    ) -> None:
        """Replace the gradients by a block's outputs, by those by its inputs."""
        for window, hidden in enumerate(inputs):
            leaf = to_device(hidden, self._device(index)).detach().requires_grad_()
            output = self.run(index, window, leaf)
            output.backward(to_device(gradients[window], output.device))
            gradients[window] = self._kept(_gradient(leaf))
            advance(1)
        self._settle()

    @contextmanager
    def ending(self, hidden: Iterable[Tensor]) -> Iterator[None]:
        """Inside, each call of the model gives the logits of the next of these hidden states."""
        states = (self._there(state) for state in hidden)

        def hand_on(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = split_call(args, kwargs)[0]
            return self._output_like(block, next(states) if block is last else given)

        last = self.blocks[-1][1]
        with self._replaced(hand_on):
            yield

    def _record(self) -> None:
        """Run all windows past the blocks, and note what each block would be called with."""
        recorder = CallRecorder([name for name, _ in self.blocks])
        numbers = {id(block): number for number, (_, block) in enumerate(self.blocks)}

        def note(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            number = numbers[id(block)]
            hidden, call = split_call(args, kwargs)
            if number == 0:
                self.hidden.append(self._kept(hidden))
            call = recorder.keep(number, hidden, call)
            self._calls[number].append(call)
            if type(block) not in self._extras or (len(self.hidden) == 1 and has_notes(call)):
                self._try_out(number, hidden)
            return self._output_like(block, recorder.hand_on(hidden))

        with torch.no_grad(), self._replaced(note):
            for window in self.windows:
                # Without the head: only what the blocks are called with is wanted.
                self.model.model.base_model(input_ids=self._there(window[None]), use_cache=False)
                recorder.end_of_window()
        self._settle()

    def _settle(self) -> None:
        """One GPU does all in its order; what another's block reads must have come before."""
        devices = self.model.devices
        for device in devices if len(devices) > 1 else ():
            arrived(device)

    def _try_out(self, number: int, hidden: Tensor) -> None:
        """Run a block to see the form of its output, and whether it needs the others' notes."""
        block = self.blocks[number][1]
        with self.on_device(block):  # its forward is replaced: that of its class is called
            output = self._call(number, 0, hidden, partial(type(block).forward, block))
        self._extras[type(block)] = len(output) - 1 if isinstance(output, tuple) else None

    def _output_like(self, block: nn.Module, hidden: Tensor) -> Any:
        """Hidden states in the form that a block returns them: alone, or first in a tuple."""
        extras = self._extras[type(block)]
        return hidden if extras is None else (hidden, *[None] * extras)

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside, the blocks have another forward, and all other weights are on the device."""
        with ExitStack() as stack:
            if self.model.stream:
                stack.enter_context(_moved(self._outside, self.model.device))
            for _, block in self.blocks:
                stack.enter_context(forward_replaced(block, partial(forward, block)))
            yield


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None  # a block's output depends on its input
    return leaf.grad


def _states_fit(model: LanguageModel, windows: Tensor, streams: int) -> bool:
    """
    Whether the hidden states of all windows may stay on a GPU; on a CPU there is no choice.

    Args:
        model: For its devices.
        windows: (windows, tokens).
        streams: How many hidden states there are of each window.
    """
    if model.device.type != "cuda":
        return True
    embedding: Any = model.model.get_input_embeddings()
    size = streams * windows.numel() * embedding.weight.shape[1] * model.dtype.itemsize
    return bool(size <= min(map(free_memory, model.devices)) // 4)


def weights_on_device(
    model: LanguageModel, block: nn.Module, *, copy: bool
) -> AbstractContextManager[dict[str, Tensor]]:
    """Inside, a block's weights are on the device; see :meth:`BlockNetwork.on_device`."""
    if not model.stream:
        return nullcontext({})
    return _moved(_tensors_of(block), model.device, copy=copy)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


@contextmanager
def _moved(
    tensors: dict[str, Tensor], device: torch.device, *, copy: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Inside, the tensors are on the device; gives what they will be afterwards, by name."""
    home = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = tensor.data.to(device, copy=copy)
        yield home
    finally:
        for name, tensor in tensors.items():
            tensor.data = home[name]
