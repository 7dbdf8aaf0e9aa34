"""
A decoder run block by block: what blocks are called with, forwards and backwards.
"""

from collections import UserDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pho_service.errors import ModelError
from pho_service.models.architecture import decoder_blocks
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import mapped_copy, scratch_folder
from pho_service.progress import Advance
from pho_service.pruning.hardware import arrived, free_memory, to_device, to_main_memory
from pho_service.pruning.perplexity import (
    forward_replaced,
    frozen,
    rate_perplexity,
    run_backward,
)
from pho_service.pruning.statistics import (
    Collector,
    InputGroups,
    PrunableLinear,
    Statistics,
    add_gram_,
    mirrored_,
    require_finite,
    watched,
)
from pho_service.pruning.steps import InputMoments
from pho_service.spec.perplexity import Perplexity

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block gets besides its hidden states


class CallRecorder:
    """Checks that blocks are called one after the other, and keeps their arguments."""

    # Arguments that are equal in all windows (position embeddings, masks) are kept once and on the
    # device, others on the CPU.

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._handed_on: list[Tensor] = []  # in this window
        self._common: list[Tensor] | None = None  # arguments of the first window, once it is over
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # this window's, alive, so ids are unique

    def keep(self, number: int, hidden: Tensor, call: Call) -> Call:
        """The arguments of a block; its turn must be now, and its input what the last one gave."""
        if number != len(self._handed_on):
            raise _not_a_chain(self._names[number], "is not called once and in its order")
        if self._handed_on and hidden is not self._handed_on[-1]:
            raise _not_a_chain(
                self._names[number], "does not read just what the block before it gives"
            )
        map_tensors(call, lambda tensor: self._independent(number, tensor))
        args, kwargs = map_tensors(call, self._keep)
        name = self._names[number]
        return (
            tuple(_notes_or(value, name) for value in args),
            {key: _notes_or(value, name) for key, value in kwargs.items()},
        )

    def hand_on(self, hidden: Tensor) -> Tensor:
        self._handed_on.append(hidden.view_as(hidden))
        return self._handed_on[-1]

    def end_of_window(self) -> None:
        """Forget what is of one window; each block must have been called."""
        if len(self._handed_on) < len(self._names):
            raise _not_a_chain(self._names[len(self._handed_on)], "is not called")
        if self._common is None:
            self._common = [tensor for tensor, _ in self._kept.values()]
        self._handed_on, self._kept = [], {}

    def _independent(self, number: int, tensor: Tensor) -> Tensor:
        if any(tensor is output for output in self._handed_on):
            raise _not_a_chain(
                self._names[number], "reads more than what the block before it gives"
            )
        return tensor

    def _keep(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = (tensor, self._shared(tensor))
        return self._kept[id(tensor)][1]

    def _shared(self, tensor: Tensor) -> Tensor:
        if self._common is None:
            return tensor
        for common in self._common:
            if common.dtype == tensor.dtype and torch.equal(common, tensor):
                return common
        return tensor.cpu()


class _Notes(UserDict[Any, Any]):
    """An empty mapping that blocks leave things in for later ones; whoever reads it is refused."""

    # Gemma 3n's later blocks attend with the keys and values of an earlier one.

    def __init__(self, block: str) -> None:
        super().__init__()
        self._block = block

    def __setitem__(self, key: Any, item: Any) -> None:
        pass  # kept, it would hold a block's activations for nothing

    def __getitem__(self, key: Any) -> Any:
        raise _not_a_chain(self._block, "reads more than what the block before it gives")

    def __contains__(self, key: object) -> bool:
        return bool(self[key])


def _notes_or(value: Any, block: str) -> Any:
    return _Notes(block) if isinstance(value, MutableMapping) and not value else value


def has_notes(call: Call) -> bool:
    """Return whether a block gets a mapping that other blocks might write to."""
    args, kwargs = call
    return any(isinstance(value, _Notes) for value in (*args, *kwargs.values()))


def _not_a_chain(block: str, what: str) -> ModelError:
    return ModelError(
        f"{block} {what}, so the model cannot be run block by block. Load it without streaming, "
        "and use only steps that need no text."
    )


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, and what else a block is called with; caches are left out."""
    if args:
        hidden, *more_args = args
    else:
        kwargs = dict(kwargs)
        hidden, more_args = kwargs.pop("hidden_states"), []
    return hidden, (
        tuple(None if isinstance(value, Cache) else value for value in more_args),
        {k: v for k, v in kwargs.items() if not isinstance(v, Cache)},
    )


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


class BlockNetwork:
    """A model as its blocks, and windows on their way through them, forwards and back."""

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
        """Inside, a block's weights are on the device."""
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
        onto_device = partial(to_device, device=self._device(index))
        args, kwargs = map_tensors(self._calls[index][window], onto_device)
        output: Tensor | tuple[Any, ...] = forward(onto_device(hidden), *args, **kwargs)
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
        copies = {str(number): to_main_memory(state) for number, state in enumerate(states)}
        for device in self.model.devices:
            arrived(device)
        return list(mapped_copy(copies, folder).values())

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
            state = split_call(args, kwargs)[0]
            return self._output_like(block, next(states) if block is last else state)

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
    """Return whether the hidden states of all windows may stay on a GPU; on a CPU they do."""
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


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block whose turn it is in :func:`walk`; of use in that turn only."""

    name: str
    module: nn.Module
    # Its linears by full name. Their weights are on the device and may be changed in place.
    linears: dict[str, PrunableLinear]
    # (1, tokens, hidden) for each window: what the blocks before it give. On a GPU if they fit,
    # otherwise in main memory.
    inputs: list[Tensor]
    # The output of the block, as it now is, for the window of a number: (1, tokens, hidden), on the
    # device. With another input after the number, its output for that, and gradients go through it.
    run: Callable[..., Tensor]
    # Replaces other inputs, one for each window, by the outputs for them.
    replace_: Callable[[list[Tensor]], None]

    def only(self, names: Collection[str]) -> "Block":
        return replace(
            self, linears={name: linear for name, linear in self.linears.items() if name in names}
        )

    def moments(self) -> tuple[list[InputMoments], dict[str, int]]:
        """Run the block, as it is, over all windows and give the moments of its linears' inputs."""
        # Linears that read the very same tensor share one entry. A token that does not reach a
        # linear (of an expert) counts as zeros.
        groups = InputGroups()
        sums: list[_InputSums] = []

        def see(name: str, x: Tensor, _output: Tensor) -> None:
            index = groups.see(name, x)
            if index is None:
                return
            if index == len(sums):
                sums.append(_InputSums(x.shape[-1], x.device))
            sums[index].add(x.detach().reshape(-1, x.shape[-1]))  # (tokens, in_features)

        with watched(self.linears, see):
            for window in range(len(self.inputs)):
                self.run(window)
                groups.end_of_window()
        for name, linear in self.linears.items():
            if name not in groups.input_of:
                groups.input_of[name] = len(sums)
                sums.append(_InputSums(linear.weight.shape[1], linear.weight.device))
        tokens = sum(x.shape[1] for x in self.inputs)
        for name, index in groups.input_of.items():
            require_finite(sums[index].gram.diagonal(), name, "activations")
        return [input_sums.finish(len(self.inputs), tokens) for input_sums in sums], groups.input_of


class _InputSums:
    """Sums over the tokens of one input."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.total = torch.zeros(width, device=device)
        self.seen = 0

    def add(self, x: Tensor) -> None:
        """x: (tokens, in_features), any floating dtype."""
        exact = x.float()
        add_gram_(self.gram, exact, from_16_bits=x.dtype.itemsize == 2)
        self.total += exact.sum(dim=0)
        self.seen += len(x)

    def finish(self, sequences: int, tokens: int) -> InputMoments:
        norm = (self.gram.diagonal() / sequences).sqrt()
        return InputMoments(
            gram=mirrored_(self.gram).div_(tokens),
            mean=self.total.div_(tokens),
            activation_norm=norm,
            seen=self.seen,
        )


def walk(
    model: LanguageModel,
    windows: Tensor,
    *,
    store: Path | None = None,
    streams: int = 1,
    advance: Advance = lambda _: None,
) -> Iterator[Block]:
    """Give one block after the other, each with the inputs that the blocks before it now give."""
    # When the loop asks for the next block, this one is run over all windows with whatever weights
    # it then has. If the loop is left early, a streamed block whose turn it was forgets its
    # changes, and any other model keeps them.
    network = BlockNetwork(model, windows, streams=streams)
    store = store or _store_of(model)
    for index, (name, module) in enumerate(network.blocks):
        with network.on_device(module, copy=True) as home:
            yield Block(
                name=name,
                module=module,
                linears=_linears_of(model, name),
                inputs=network.hidden,
                run=partial(network.run, index),
                replace_=partial(network.replace_, index),
            )
            if index < len(network.blocks) - 1:
                network.step(index, advance)
            else:  # nothing reads what it would give
                advance(len(windows))
            home.update(_stored(_changed(module, home), store))


def changed_blocks(model: LanguageModel) -> Iterator[dict[str, PrunableLinear]]:
    """Give the linears of one block after the other, to be changed in place; no text runs."""
    store = _store_of(model)
    for name, module in decoder_blocks(model.model):
        with weights_on_device(model, module, copy=True) as home:
            yield _linears_of(model, name)
            home.update(_stored(_changed(module, home), store))


def linears_by_block(model: LanguageModel) -> dict[str, dict[str, PrunableLinear]]:
    """The linears of each block, by name; their weights are where they are."""
    return {name: _linears_of(model, name) for name, _ in decoder_blocks(model.model)}


def _linears_of(model: LanguageModel, block: str) -> dict[str, PrunableLinear]:
    return {name: linear for name, linear in model.linears.items() if name.startswith(f"{block}.")}


def _store_of(model: LanguageModel) -> Path | None:
    """Where the weights of a streamed model may be written, all of its linears; None for others."""
    if not model.stream:
        return None
    weights = [linear.weight for linear in model.linears.values()]
    return scratch_folder(sum(weight.numel() * weight.element_size() for weight in weights))


def _stored(tensors: dict[str, Tensor], store: Path | None) -> dict[str, Tensor]:
    return mapped_copy(tensors, store) if store else {}


def _changed(module: nn.Module, home: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a streamed block that differ from what is mapped, on the CPU."""
    parameters = ((name, p.data.cpu()) for name, p in module.named_parameters() if name in home)
    return {name: data for name, data in parameters if not torch.equal(data, home[name])}


@contextmanager
def dense_afterwards(model: LanguageModel, *, if_it_fails: bool = False) -> Iterator[None]:
    """Put the weights of all blocks back in the end, or only if anything is raised inside."""
    # A streamed model's are still in their files. All blocks of any other model are copied to the
    # CPU first.
    parameters = [p for _, block in decoder_blocks(model.model) for p in block.parameters()]
    if model.stream:
        dense = [p.data for p in parameters]
    else:
        dense = [p.data.to("cpu", copy=True) for p in parameters]

    def put_back() -> None:
        for parameter, data in zip(parameters, dense, strict=True):
            if model.stream:
                parameter.data = data
            else:
                parameter.data.copy_(data)

    with ExitStack() as stack:
        stack.callback(put_back)
        yield
        if if_it_fails:  # it did not
            stack.pop_all()


def collect_statistics_blockwise(
    model: LanguageModel,
    windows: Tensor,
    *,
    fisher_windows: int,
    projection_rows: int,
    seed: int,
    spill: Path | None = None,
    states_on_device: bool | None = None,
    advance: Advance = lambda _: None,
) -> Statistics:
    """Gather the statistics that a pass of the whole model gives, one block at a time."""
    # The loss's gradient goes back through the blocks in reverse, each of them run again from its
    # stored input.
    collector = Collector(model.linears, projection_rows, seed)
    network = BlockNetwork(model, windows, states_on_device)
    inputs: list[list[Tensor]] = []  # of each block, for each Fisher window
    with collector.reading_inputs():
        for index, (_, module) in enumerate(network.blocks):
            inputs.append(network.spilled(fisher_windows, spill))
            with network.on_device(module):
                network.step(index, advance, collector.end_of_window)
            collector.finish_inputs(sequences=len(windows), tokens=windows.numel())
    with frozen(model.model):
        gradients = network.loss_gradients(fisher_windows)
        with collector.reading_gradients():
            for index, (_, module) in reversed(list(enumerate(network.blocks))):
                with network.on_device(module):
                    network.step_back(index, inputs.pop(), gradients, advance)
    return collector.finish()


def rate_perplexity_blockwise(
    model: LanguageModel,
    windows: Tensor,
    *,
    change: Callable[[Mapping[str, PrunableLinear]], None] | None = None,
    advance: Advance = lambda _: None,
) -> Perplexity:
    """Measure what :func:`rate_perplexity` measures, one block at a time."""
    network = BlockNetwork(model, windows)
    for index, (name, module) in enumerate(network.blocks):
        with network.on_device(module, copy=change is not None):
            if change is not None:
                change(_linears_of(model, name))
            network.step(index, advance)
    with network.ending(network.hidden):
        return rate_perplexity(model.model, windows, most=1)


@contextmanager
def told_by_block(model: LanguageModel, advance: Advance) -> Iterator[Advance]:
    """
    Tell windows that run through a model block by block, for a long one takes minutes.

    Gives what ends a window: it tells what is left of it. A backward pass is two thirds of one.
    """
    blocks = [block for _, block in decoder_blocks(model.model)]
    told = 0.0

    def see(_module: nn.Module, _args: object, output: Any) -> None:
        nonlocal told
        states = output[0] if isinstance(output, tuple) else output
        part = len(states) / len(blocks) / (3 if torch.is_grad_enabled() else 1)
        told += part
        advance(part)

    def end(count: float) -> None:
        nonlocal told
        advance(max(0.0, count - told))
        told = max(0.0, told - count)

    handles = [block.register_forward_hook(see) for block in blocks]
    try:
        yield end
    finally:
        for handle in handles:
            handle.remove()


def measure_perplexity(
    model: LanguageModel,
    windows: Tensor,
    *,
    change: Callable[[Mapping[str, PrunableLinear]], None] | None = None,
    advance: Advance = lambda _: None,
) -> Perplexity:
    """Measure a model's perplexity as a whole, or block by block if it is streamed."""
    if not model.stream:
        with told_by_block(model, advance) as end:
            return rate_perplexity(model.model, windows, advance=end)
    blocks, runs = len(decoder_blocks(model.model)), 0.0

    def advance_block(count: float) -> None:
        nonlocal runs
        runs += count
        advance(int(runs % blocks == 0))

    return rate_perplexity_blockwise(model, windows, change=change, advance=advance_block)
