"""
A model with narrower FFNs, fewer query heads or fewer blocks: cut in place, block after block.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pho_service.errors import InvalidInput
from pho_service.models.blockwise import Block, split_call, walk
from pho_service.models.loading import LanguageModel
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
from pho_service.pruning.statistics import watched
from pho_service.pruning.steps import InputMoments
from pho_service.pruning.structured import (
    activation_score,
    fluctuation_score,
    kept_by_score,
    magnitude_score,
    narrowed,
    removal_order,
    spread_score,
)
from pho_service.spec.structure import Structure, StructureScore

logger = logging.getLogger(__name__)

DAMPING = 0.01  # share of the mean second moment
TRIED = 8  # blocks that are tried out at each step, of those that change the hidden states least
KL_TOKENS = 1024  # that a block's removal is judged on


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
    score: StructureScore = "obs",
    update: bool = True,
    multiple: int | None = None,
    progress: Progress = silent,
) -> CutModel:
    """
    Cut a model in place, for good, to the sizes of a structure.

    Blocks leave first. Then each block in turn loses query heads and neurons, on the calibration
    windows as the blocks cut before it leave them; what stays of ``o_proj`` and ``down_proj`` makes
    up for them by exact least squares.

    Args:
        model: Not streamed.
        windows: (windows, tokens), int64: calibration.
        structure: What stays.
        fisher: (out_features,) for each linear of the dense model by name: the weights of its
            outputs' squared errors, as statistics have them. None: all outputs weigh the same.
        score: What decides which neurons and heads stay.
        update: Whether what stays makes up for what is gone.
        multiple: What a smaller width is a multiple of; None: by the width, at most 64.
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
    if kept is not None:
        keep_layers_(model.model, anatomy.without_layers(kept), kept)
        model = as_cut(model)
        anatomy = Anatomy(model)
    layers = tuple(range(len(names))) if kept is None else tuple(kept)
    if not sized:
        return CutModel(model=model, layers=layers)
    twin = anatomy.resized(structure.neurons, structure.query_heads, multiple=multiple)
    neurons: dict[str, list[int]] = {}
    query_heads: dict[str, list[int]] = {}
    with progress("Cutting", len(layers)) as advance:
        for index, block in zip(layers, walk(model, windows), strict=True):
            # A block's heads before its neurons, whose input then is that of the cut block.
            for find, count, record in (
                (anatomy.query_heads, structure.query_heads, query_heads),
                (anatomy.neurons, structure.neurons, neurons),
            ):
                if count is None:
                    continue
                part = find(block.name)
                weights = _row_weights(part, fisher, block.name, names[index])
                moments = _moments(block, part)
                chosen = _chosen(block, part, count, moments, weights, score)
                weight = None
                if update:
                    columns = part.columns(chosen).to(moments.gram.device)
                    weight = narrowed(
                        part.reader.weight, moments.gram, columns, damping=DAMPING,
                        layer=part.reader.name,
                    )  # fmt: skip
                cut_(model.model, twin, part, chosen, weight)
                record[names[index]] = chosen.tolist()
            advance(1)
    take_sizes_(model.model, twin)
    return CutModel(model=as_cut(model), layers=layers, neurons=neurons, query_heads=query_heads)


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


def _chosen(
    block: Block,
    part: Part,
    count: int,
    moments: InputMoments,
    row_weights: Tensor,
    score: StructureScore,
) -> Tensor:
    """The neurons or heads that stay, (count,), ascending, on the CPU."""
    reader = part.reader.weight.float()
    writers = [writer.weight.float() for writer in part.writers]
    if score == "obs":
        order = removal_order(
            reader, moments.gram, row_weights, group=part.group, within=part.within,
            damping=DAMPING, layer=part.reader.name,
        )  # fmt: skip
        return order.kept(count)
    if score == "magnitude":
        values = magnitude_score(reader, writers)
    elif score == "activation":
        values = activation_score(_mean_magnitudes(block, part))
    elif score == "fluctuation":
        values = fluctuation_score(reader, moments.gram, moments.mean)
    else:
        values = spread_score(writers)
    return kept_by_score(values, count, group=part.group, within=part.within)


def _mean_magnitudes(block: Block, part: Part) -> Tensor:
    """(windows, in_features): the mean size of each input of a part's reader."""
    means: list[Tensor] = []

    def see(_name: str, x: Tensor, _output: Tensor) -> None:
        means.append(x.detach().float().abs().flatten(end_dim=-2).mean(dim=0))

    with watched({part.reader.name: part.reader}, see):
        for window in range(len(block.inputs)):
            block.run(window)
    return torch.stack(means)


def layers_to_keep(
    anatomy: Anatomy, windows: Tensor, dropped: int, advance: Advance = lambda _: None
) -> list[int]:
    """
    Choose the blocks to drop, one at a time, and give the indices of the others.

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
    return [names.index(name) for name in left]


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
