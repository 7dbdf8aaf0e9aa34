"""
Run a decoder block by block.

So each block can be pruned on what the pruned blocks before it give, and a
model that is larger than the memory can be measured and pruned. Only one
block of a streamed model at a time is on the device; all other weights stay mapped
from their files.

No family is known by name. What comes before and after the blocks is the
model's own forward, run while its blocks hand on what they get.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pho_service.models.architecture import decoder_blocks
from pho_service.models.block_network import BlockNetwork, weights_on_device
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import mapped_copy, scratch_folder
from pho_service.progress import Advance
from pho_service.pruning.input_groups import InputGroups
from pho_service.pruning.passes import frozen
from pho_service.pruning.perplexity import Perplexity, rate_perplexity
from pho_service.pruning.second_moments import add_gram_, mirrored_
from pho_service.pruning.statistics import (
    Collector,
    PrunableLinear,
    Statistics,
    check_fisher_windows,
    require_finite,
    watched,
)
from pho_service.pruning.steps import InputMoments


@dataclass(frozen=True, kw_only=True)
class Block:
    """
    A block whose turn it is in :func:`walk`; of use in that turn only.

    Attributes:
        linears: Its linears by full name. Their weights are on the device and
            may be changed in place.
        inputs: (1, tokens, hidden) for each window: what the blocks before it give. On a GPU
            if they fit, otherwise in main memory.
        run: The output of the block, as it now is, for the window of a number:
            (1, tokens, hidden), on the device. With another input after the number, its output
            for that, and gradients go through it.
        replace_: Replaces other inputs, one for each window, by the outputs for them.
    """

    name: str
    module: nn.Module
    linears: dict[str, PrunableLinear]
    inputs: list[Tensor]
    run: Callable[..., Tensor]
    replace_: Callable[[list[Tensor]], None]

    def only(self, names: Collection[str]) -> "Block":
        """The same with these of its linears."""
        return replace(
            self, linears={name: each for name, each in self.linears.items() if name in names}
        )

    def moments(self) -> tuple[list[InputMoments], dict[str, int]]:
        """
        Run the block, as it is, over all windows and give the moments of its linears' inputs.

        Linears that read the very same tensor share one entry. A token that
        does not reach a linear (of an expert) counts as zeros.

        Returns:
            The entries, on the device, and the index of each linear's.

        Raises:
            NumericalError: An activation is NaN or infinite.
        """
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
        return [each.finish(len(self.inputs), tokens) for each in sums], groups.input_of


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
    """
    Give one block after the other, each with the inputs that the blocks before it now give.

    When the loop asks for the next block, this one is run over all windows with
    whatever weights it then has. If the loop is left early, a streamed block
    whose turn it was forgets its changes, and any other model keeps them.

    Args:
        model: In evaluation mode. It is left with the weights that the loop's
            body gave it.
        windows: (windows, tokens), int64.
        store: Folder for the changed weights of a streamed model, on a disk with
            room for all of them; None is that of the user's cache. Its files have no name: they
            go when the model goes, however the process ends.
        streams: How many hidden states of each window the loop's body keeps where ``inputs`` are,
            those counted.
        advance: Called with 1 for each window of each block.

    Raises:
        ModelError: The model does more than calling its blocks one by one.
        OutputError: Changed weights cannot be written, or there is no room for them.
    """
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


def changed_blocks(
    model: LanguageModel, *, store: Path | None = None
) -> Iterator[dict[str, PrunableLinear]]:
    """
    Give the linears of one block after the other, to be changed in place; no text runs.

    Args:
        model: Streamed. It is left with the weights that the loop's body gave it.
        store: As for :func:`walk`.

    Raises:
        OutputError: As :func:`walk`.
    """
    store = store or _store_of(model)
    for name, module in decoder_blocks(model.model):
        with weights_on_device(model, module, copy=True) as home:
            yield _linears_of(model, name)
            home.update(_stored(_changed(module, home), store))


def _linears_of(model: LanguageModel, block: str) -> dict[str, PrunableLinear]:
    return {name: each for name, each in model.linears.items() if name.startswith(f"{block}.")}


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
def dense_afterwards(model: LanguageModel) -> Iterator[None]:
    """
    Put the weights of all blocks back in the end, whatever was done to them inside.

    A streamed model's are still in their files. All blocks of any other model
    are copied to the CPU first.
    """
    parameters = [p for _, block in decoder_blocks(model.model) for p in block.parameters()]
    if model.stream:
        dense = [p.data for p in parameters]
    else:
        dense = [p.data.to("cpu", copy=True) for p in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, dense, strict=True):
            if model.stream:
                parameter.data = data
            else:
                parameter.data.copy_(data)


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
    """
    Gather the same statistics as :func:`collect_statistics`, one block at a time.

    The loss's gradient goes back through the blocks in reverse, each of them
    run again from its stored input.

    Args:
        model: In evaluation mode. Nothing of it changes.
        windows: (windows, tokens), int64.
        fisher_windows: 1 <= fisher_windows <= windows.
        projection_rows: Rows of the random projection of the activations;
            0 gathers the full Gram matrix.
        seed: Seed of the random projection.
        spill: Folder on a disk for the blocks' inputs, (blocks, fisher_windows,
            tokens, hidden) values; None keeps them in memory.
        states_on_device: Whether the windows' hidden states between two blocks stay on a GPU;
            None: where they take no more than a quarter of what is free there.
        advance: Called with 1 for each window of each block, forward and
            backward: ``blocks * (windows + fisher_windows)`` in all.

    Raises:
        InvalidInput: ``fisher_windows`` out of range.
        ModelError: A linear was never called, or the model does more than
            calling its blocks one by one.
        NumericalError: An activation or a gradient is NaN or infinite.
        OutputError: ``spill`` cannot be written.
    """
    check_fisher_windows(fisher_windows, len(windows))
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
    """
    Measure what :func:`rate_perplexity` measures, one block at a time.

    Args:
        model: In evaluation mode. Nothing of it changes.
        windows: (windows, context_length), int64.
        change: Called with the linears of each block before it is run, to be changed in place;
            afterwards they are as before. Streamed models only.
        advance: Called with 1 for each window of each block.

    Raises:
        ModelError: The model does more than calling its blocks one by one.
        NumericalError: A loss is NaN or infinite.
    """
    network = BlockNetwork(model, windows)
    for index, (name, module) in enumerate(network.blocks):
        with network.on_device(module, copy=change is not None):
            if change is not None:
                change(_linears_of(model, name))
            network.step(index, advance)
    with network.ending(network.hidden):
        return rate_perplexity(model.model, windows, most=1)


def measure_perplexity(
    model: LanguageModel,
    windows: Tensor,
    *,
    change: Callable[[Mapping[str, PrunableLinear]], None] | None = None,
    advance: Advance = lambda _: None,
) -> Perplexity:
    """
    Measure a model's perplexity as a whole, or block by block if it is streamed.

    Args:
        model: In evaluation mode.
        windows: (windows, context_length), int64.
        change: As for :func:`rate_perplexity_blockwise`.
        advance: Called with 1 for each window.

    Raises:
        ModelError, NumericalError: As :func:`rate_perplexity_blockwise`.
    """
    if not model.stream:
        return rate_perplexity(model.model, windows, advance=advance)
    blocks, runs = len(decoder_blocks(model.model)), 0

    def advance_block(count: int) -> None:
        nonlocal runs
        runs += count
        advance(int(runs % blocks == 0))

    return rate_perplexity_blockwise(model, windows, change=change, advance=advance_block)
