"""
A model with narrower FFNs, fewer query heads or fewer blocks: cut in place, block after block.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pho_service.errors import InvalidInput, ModelError
from pho_service.models.blockwise import Block, split_call, walk
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import Memo, Record
from pho_service.models.structure import (
    Anatomy,
    Part,
    as_cut,
    cut_,
    keep_layers_,
    take_sizes_,
)
from pho_service.progress import Advance, Progress, silent
from pho_service.pruning.hardware import to_device
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.pruning.statistics import PrunableLinear, add_gram_, mirrored_, watched
from pho_service.pruning.steps import InputMoments
from pho_service.pruning.structured import (
    RemovalOrder,
    corrected,
    narrowed,
    removal_order,
)
from pho_service.spec.structure import BlockShapes, Structure

logger = logging.getLogger(__name__)

DAMPING = 0.01  # share of the mean second moment
TRIED = 8  # blocks that are tried out at each step, of those that change the hidden states least
KL_TOKENS = 1024  # that a block's removal is judged on
RATED_TOKENS = 4096  # of the calibration, that the costs of all cuts are worked out on


# What chooses those that stay of a part: the block, the part, how many, the moments of its input,
# and the weights of its outputs.
Choose = Callable[[Block, Part, int, InputMoments, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CutModel:
    """A model that was cut, and what was left of it."""

    model: LanguageModel  # In the place of the dense one, whose weights are gone
    layers: tuple[int, ...]  # Indices of the dense model's blocks that stayed
    neurons: dict[str, list[int]] = field(default_factory=dict)  # Kept in each block, by its name
    query_heads: dict[str, list[int]] = field(default_factory=dict)


def cut_model(
    model: LanguageModel,
    windows: Tensor,
    structure: Structure,
    *,
    fisher: Mapping[str, Tensor] | None = None,
    choose: Choose | None = None,
    update: bool = True,
    multiple: int | None = None,
    memo: Memo | None = None,
    progress: Progress = silent,
) -> CutModel:
    """
    Cut a model in place, for good, to the sizes of a structure.

    Blocks leave first. Then each block in turn loses query heads and neurons, on the calibration
    windows as the blocks cut before it leave them; what stays of ``o_proj`` and ``down_proj`` makes
    up for them by exact least squares. In front of blocks that left, ``down_proj`` then also makes
    up for these: its block gives what they gave, as nearly as its own width allows.

    Args:
        model: Not streamed.
        windows: (windows, tokens), int64: calibration.
        structure: What stays.
        fisher: (out_features,) for each linear of the dense model by name: the weights of its
            outputs' squared errors, as statistics have them. None: all outputs weigh the same.
        choose: Decides which neurons and heads stay; None: their removal costs least.
        update: Whether what stays makes up for what is gone.
        multiple: What a smaller width is a multiple of; None: by the width, at most 64.
        memo: Has what was worked out for some blocks before, and keeps what is for others.
        progress: Is told of each long step.

    Raises:
        InvalidInput: A size does not fit; said before anything is changed, but for the blocks that
            are dropped first.
        ModelError: The model's blocks cannot be cut so, or no configuration could say so.
        NumericalError: Second moments are not finite, or cannot be inverted.
    """
    anatomy = Anatomy(model)
    sized = structure.neurons is not None or structure.query_heads is not None
    if sized:  # before anything is changed
        anatomy.resized(structure.neurons, structure.query_heads, multiple=multiple)
    names = [*anatomy.blocks]
    kept: Sequence[int] | None = structure.layers
    if structure.dropped:
        with progress("Choosing blocks to drop", structure.dropped) as advance:
            kept = layers_to_keep(anatomy, windows, structure.dropped, advance)
    layers = tuple(range(len(names))) if kept is None else tuple(kept)
    gone: dict[int, list[Tensor]] = {}
    if kept is not None:
        twin = anatomy.without_layers(kept)  # before anything is run
        gone = _behind_gaps(model, windows, layers, len(names), progress) if update else {}
        keep_layers_(model.model, twin, kept)
        model = as_cut(model)
        anatomy = Anatomy(model)
    if not sized and not gone:
        return CutModel(model=model, layers=layers)
    twin = anatomy.resized(structure.neurons, structure.query_heads, multiple=multiple)
    neurons: dict[str, list[int]] = {}
    query_heads: dict[str, list[int]] = {}
    # A block's heads before its neurons, whose input then is that of the cut block.
    parts = (
        ("query_heads", anatomy.query_heads, structure.query_heads, query_heads),
        ("neurons", anatomy.neurons, structure.neurons, neurons),
    )
    with progress("Cutting", len(layers)) as advance:
        for index, block in zip(layers, walk(model, windows), strict=True):
            reader = _ffn_reader(anatomy, block.name) if index in gone else None
            before = None if memo is None else memo.read(names[index])
            made = {} if before is None else {**before.tensors}
            for what, find, count, record in parts:
                if count is None:
                    continue
                part = find(block.name)
                if what not in made:
                    weights = _row_weights(part, fisher, block.name, names[index])
                    moments = _moments(block, part)
                    made[what] = (choose or cheapest)(block, part, count, moments, weights)
                    if update:
                        columns = part.columns(made[what]).to(moments.gram.device)
                        made[f"{what}.weight"] = narrowed(
                            part.reader.weight, moments.gram, columns, damping=DAMPING,
                            layer=part.reader.name,
                        )  # fmt: skip
                cut_(model.model, twin, part, made[what], made.get(f"{what}.weight"))
                record[names[index]] = made[what].tolist()
            if index in gone and reader is not None:
                _bridge_(block, reader, gone.pop(index), made)
            if memo is not None and before is None:
                memo.keep(names[index], Record(tensors=made))
            advance(1)
    take_sizes_(model.model, twin)
    return CutModel(model=as_cut(model), layers=layers, neurons=neurons, query_heads=query_heads)


def _behind_gaps(
    model: LanguageModel, windows: Tensor, layers: Sequence[int], count: int, progress: Progress
) -> dict[int, list[Tensor]]:
    """
    What the dense model, of ``count`` blocks, hands on behind those that leave: by the block that
    stays in front of them, (1, tokens, hidden) of each window, on the CPU.
    """
    follows = dict(zip(layers, [*layers[1:], count], strict=True))
    places = {after: layer for layer, after in follows.items() if after != layer + 1}
    states: dict[int, list[Tensor]] = {}
    if not places:
        return states
    with progress("Running the dense model", count) as advance:
        for index, block in enumerate(walk(model, windows)):
            if index in places:
                states[places[index]] = [x.detach().cpu().clone() for x in block.inputs]
            if index == count - 1 and count in places:
                outputs = (block.run(window) for window in range(len(windows)))
                states[places[count]] = [output.detach().cpu() for output in outputs]
            advance(1)
    return states


@torch.no_grad()
def _bridge_(
    block: Block, reader: PrunableLinear, wanted: Sequence[Tensor], made: dict[str, Tensor]
) -> None:
    """
    Change the last linear of a block's FFN, so that the block gives what is wanted; left as it is
    where that brings its outputs no nearer, as in front of a norm.
    """
    if "bridge" not in made:
        before = reader.weight.clone()
        gram, errors, missed = _missed(block, reader, wanted)
        reader.weight.copy_(
            corrected(reader.weight, gram, errors, damping=DAMPING, layer=reader.name)
        )
        if _missed(block, reader, wanted)[2] >= missed:
            reader.weight.copy_(before)
        made["bridge"] = reader.weight.clone()
    reader.weight.copy_(made["bridge"])


def _ffn_reader(anatomy: Anatomy, block: str) -> PrunableLinear | None:
    """The linear that gives what a block's FFN adds to the hidden states; None of experts."""
    try:
        return anatomy.neurons(block).reader
    except ModelError:
        return None


def _missed(
    block: Block, reader: PrunableLinear, wanted: Sequence[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """
    H = E[x x^T] of a linear's input, E[e x^T] with e what the block's outputs lack, and E[e^T e].
    """
    width, outputs = reader.weight.shape[1], reader.weight.shape[0]
    gram = torch.zeros(width, width, device=reader.weight.device)
    errors = torch.zeros(outputs, width, device=reader.weight.device)
    total, tokens = 0.0, 0
    seen: list[Tensor] = []
    with watched({reader.name: reader}, lambda _name, x, _output: seen.append(x)):
        for window, states in enumerate(wanted):
            output = block.run(window)
            x = seen.pop().reshape(-1, width).float()
            lacking = (states.to(output.device) - output).reshape(-1, outputs).float()
            add_gram_(gram, x, from_16_bits=output.dtype.itemsize == 2)
            errors += lacking.T @ x
            total += float(lacking.square().sum())
            tokens += len(x)
    return mirrored_(gram).div_(tokens), errors.div_(tokens), total / tokens


def _row_weights(
    part: Part, fisher: Mapping[str, Tensor] | None, block: str, dense_block: str
) -> Tensor:
    """The weights of the reader's outputs, by its name in the dense model; (out_features,)."""
    weight = part.reader.weight
    if fisher is None:
        return torch.ones(weight.shape[0], device=weight.device)
    return fisher[dense_block + part.reader.name.removeprefix(block)].to(weight.device)


def _moments(block: Block, part: Part) -> InputMoments:
    (moments,), _ = block.only([part.reader.name]).moments()
    return moments


def cheapest(
    block: Block, part: Part, count: int, moments: InputMoments, row_weights: Tensor
) -> Tensor:
    """The neurons or heads that stay, (count,), ascending, when the others leave at least cost."""
    del block
    return _order(part, moments, row_weights).kept(count)


def _order(part: Part, moments: InputMoments, row_weights: Tensor) -> RemovalOrder:
    return removal_order(
        part.reader.weight.float(), moments.gram, row_weights, group=part.group,
        within=part.within, damping=DAMPING, layer=part.reader.name,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CutCosts:
    """
    What cuts of a model cost, as its own statistics tell: nats a token, none exact.

    Attributes:
        neurons: (blocks, neurons + 1), float64: what it costs that so many neurons leave a block;
            one column where none can.
        query_heads: (blocks, query heads + 1), the same.
        gone: Blocks in the order in which they leave.
        divergences: What it costs that the first so many of them leave; 0 first.
    """

    neurons: Tensor
    query_heads: Tensor
    gone: tuple[int, ...]
    divergences: tuple[float, ...]

    @classmethod
    def of_nothing(cls, shapes: BlockShapes) -> "CutCosts":
        """Return what is measured where nothing is to be cut: no costs."""
        none = torch.zeros(shapes.layers, 1, dtype=torch.float64)
        return cls(neurons=none, query_heads=none, gone=(), divergences=(0.0,))

    def kept(self, dropped: int) -> tuple[int, ...]:
        """The blocks that stay when so many leave."""
        left = {*range(len(self.neurons))} - {*self.gone[:dropped]}
        return tuple(sorted(left))

    def knows(self, structure: Structure) -> bool:
        """Whether so many blocks were left out that it can be told what a structure costs."""
        return structure.dropped <= len(self.gone)

    def of(self, structure: Structure, shapes: BlockShapes) -> float:
        """
        What a structure costs that drops the first blocks to leave: the sum of all of its cuts,
        as if none made another one worse.
        """
        kept = [*self.kept(structure.dropped)]
        neurons = 0 if structure.neurons is None else shapes.width - structure.neurons
        heads = 0
        if structure.query_heads is not None:
            heads = shapes.query_heads[0] - structure.query_heads
        narrower = self.neurons[kept, neurons] + self.query_heads[kept, heads]
        return self.divergences[structure.dropped] + float(narrower.sum())


def cut_costs(
    model: LanguageModel,
    windows: Tensor,
    shapes: BlockShapes,
    fisher: Mapping[str, Tensor],
    structures: Sequence[Structure],
    *,
    wanted: int = 1,
    memo: Memo | None = None,
    progress: Progress = silent,
) -> CutCosts:
    """
    Work out what cuts of a model cost, at every width, every number of heads and of blocks.

    A neuron or a head costs half its exact error in what its block adds to the hidden states, each
    output weighted by the square of the loss's gradient: the loss to second order. Blocks cost what
    predictions diverge without them; no more of them leave once that alone is more than the best
    structures with fewer cost.

    Args:
        model: Dense; left as it is.
        windows: (windows, tokens), int64: calibration.
        shapes: What can be cut out of it.
        fisher: (out_features,) for each linear by name: mean squares of the loss's gradient.
        structures: That are to be told apart.
        wanted: How many of the best of them are looked for.
        memo: Has what was worked out for some blocks before, and keeps what is for others.
        progress: Is told of each long step.

    Raises:
        NumericalError: Second moments are not finite, or cannot be inverted.
    """
    anatomy = Anatomy(model)
    curves: dict[str, list[Tensor]] = {"neurons": [], "query_heads": []}
    with progress("Rating cuts", len(anatomy.blocks)) as advance:
        for block in walk(model, windows[: max(1, RATED_TOKENS // windows.shape[1])]):
            before = None if memo is None else memo.read(f"costs of {block.name}")
            made = {} if before is None else {**before.tensors}
            parts = {
                what: find(block.name)
                for what, find, can_leave in (
                    ("query_heads", anatomy.query_heads, len(shapes.query_heads) > 1),
                    ("neurons", anatomy.neurons, shapes.width > 0),
                )
                if can_leave and what not in made
            }
            moments, place = block.only([part.reader.name for part in parts.values()]).moments()
            for what, part in parts.items():
                row_weights = _row_weights(part, fisher, block.name, block.name)
                order = _order(part, moments[place[part.reader.name]], row_weights)
                made[what] = order.errors / 2
            for what, curve in curves.items():
                curve.append(made.get(what, torch.zeros(1, dtype=torch.float64)))
            if memo is not None and before is None:
                memo.keep(f"costs of {block.name}", Record(tensors=made))
            advance(1)
    costs = CutCosts(
        neurons=torch.stack(curves["neurons"]),
        query_heads=torch.stack(curves["query_heads"]),
        gone=(),
        divergences=(0.0,),
    )
    most = max(structure.dropped for structure in structures)
    if most:
        with progress("Leaving blocks out", most) as advance:
            for index, divergence in layers_to_leave(anatomy, windows, most, advance):
                known = sorted(costs.of(s, shapes) for s in structures if costs.knows(s))
                if len(known) >= wanted and divergence > known[wanted - 1]:
                    break
                costs = replace(
                    costs,
                    gone=(*costs.gone, index),
                    divergences=(*costs.divergences, divergence),
                )
    return costs


def layers_to_keep(
    anatomy: Anatomy, windows: Tensor, dropped: int, advance: Advance = lambda _: None
) -> list[int]:
    """The indices of the blocks that stay where :func:`layers_to_leave` chooses."""
    gone = {index for index, _ in layers_to_leave(anatomy, windows, dropped, advance)}
    return [index for index in range(len(anatomy.blocks)) if index not in gone]


def layers_to_leave(
    anatomy: Anatomy, windows: Tensor, dropped: int, advance: Advance = lambda _: None
) -> Iterator[tuple[int, float]]:
    """
    Choose the blocks to drop, one at a time: the index of each, and the divergence without it.

    Eight are tried out at each step, those that change the direction of the hidden states least:
    1 - cos of input and output, as the blocks that are left give them. The one leaves without
    which predictions diverge least from the dense model's, on 1,024 tokens.

    Raises:
        InvalidInput: No block would be left.

    Source:
        Men et al. 2024, arXiv:2403.03853 (ShortGPT), for the cosine, in one shot there.
    """
    names = [*anatomy.blocks]
    if dropped >= len(names):
        raise InvalidInput(
            f"dropped={dropped} leaves none of the {len(names)} blocks of {anatomy.model.name}. "
            f"Drop at most {len(names) - 1}."
        )
    network = anatomy.model.model
    few = windows[: max(1, KL_TOKENS // windows.shape[1])]
    reference = dense_reference(network, few)
    left = list(names)
    with ExitStack() as stack:
        for _ in range(dropped):
            turns = _turns(anatomy, left, few)
            divergences = {}
            for name in sorted(left, key=lambda name: turns[name])[:TRIED]:
                with anatomy.skipped(name):
                    divergences[name] = rate_divergence(network, reference)
            gone = min(divergences, key=lambda name: divergences[name])
            logger.info("block dropped", extra={"block": gone, "divergence": divergences[gone]})
            stack.enter_context(anatomy.skipped(gone))
            left.remove(gone)
            advance(1)
            yield names.index(gone), divergences[gone]


@torch.no_grad()
def _turns(anatomy: Anatomy, names: Sequence[str], windows: Tensor) -> dict[str, float]:
    """How far each block turns its hidden states: 1 - cos of input and output, the mean."""
    model = anatomy.model
    turns = dict.fromkeys(names, 0.0)

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, _ = split_call(args, kwargs)
        after = output[0] if isinstance(output, tuple) else output
        cosines = cosine_similarity(hidden.float(), after.float(), dim=-1)
        turns[name] += float((1 - cosines).mean()) / len(windows)

    handles = [
        anatomy.blocks[name].register_forward_hook(
            lambda _module, args, kwargs, output, name=name: see(name, args, kwargs, output),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        for window in windows:
            model.model.base_model(input_ids=to_device(window[None], model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return turns
