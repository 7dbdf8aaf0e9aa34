"""
A candidate applied to a model: score, allocation, permutation, re-pruning, weight update.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.models.blockwise import dense_afterwards, walk
from pho_service.models.loading import LanguageModel
from pho_service.progress import Advance
from pho_service.pruning.masks import LinearMask, layer_score, linear_masks, pruned
from pho_service.pruning.statistics import Statistics
from pho_service.pruning.steps import ScoredLinear, finish
from pho_service.spec import Candidate


def prune_model(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    calibration: Tensor | None,
    advance: Advance = lambda _: None,
) -> Iterator[tuple[str, LinearMask]]:
    """
    Prune a model in place, linear by linear, and give the mask of each.

    A candidate whose steps need a text is applied block by block, and so is
    any to a streamed model: each block sees the calibration windows as the
    pruned blocks before it leave them. Scores and allocation always come from
    the dense model's statistics.

    Args:
        model: Dense; it is left pruned.
        statistics: Of the dense model.
        candidate: What to remove, and how.
        calibration: (windows, tokens), int64; only needed block by block.
        advance: Called with 1 after each linear.

    Raises:
        InvalidInput: The steps need a text, and there is none; or the pattern
            does not fit the model.
        NumericalError: A score is NaN, or a second moment cannot be inverted.
    """
    if candidate.steps.needs_text or model.stream:
        masks = _block_by_block(model, statistics, candidate, _given(calibration, candidate))
    else:
        masks = _by_score(model, statistics, candidate)
    for name, mask in masks:
        yield name, mask
        advance(1)


def _given(calibration: Tensor | None, candidate: Candidate) -> Tensor:
    if calibration is None and not candidate.steps.needs_text:
        raise InvalidInput(
            "a streamed model is pruned while a text runs through it, block by block. Give --text."
        )
    if calibration is None:
        steps = candidate.steps
        raise InvalidInput(
            f"permutation {steps.permutation!r}, repruning {steps.repruning!r} and update "
            f"{steps.update!r} need a calibration text, not only its statistics. Give --text."
        )
    return calibration


def _by_score(
    model: LanguageModel, statistics: Statistics, candidate: Candidate
) -> Iterator[tuple[str, LinearMask]]:
    for name, mask in linear_masks(model.linears, statistics, candidate):
        model.linears[name].weight.masked_fill_(~mask.keep, 0)
        yield name, mask


def _block_by_block(
    model: LanguageModel, statistics: Statistics, candidate: Candidate, windows: Tensor
) -> Iterator[tuple[str, LinearMask]]:
    masks = linear_masks(model.linears, statistics, candidate)
    for block in walk(model, windows):
        moments, input_of = block.moments()
        readers: dict[int, list[ScoredLinear]] = {}
        for name, mask in islice(masks, len(block.linears)):  # an input is of one block
            linear = block.linears[name]
            readers.setdefault(input_of[name], []).append(
                ScoredLinear(
                    name=name,
                    weight=linear.weight.float(),
                    score=layer_score(block.linears, statistics, name, candidate.coefficients)
                    if candidate.steps.permutation == "error"
                    else None,
                    fisher=statistics.fisher[name].to(linear.weight.device),
                    mask=mask,
                )
            )
        for index, linears in readers.items():
            for name, mask, weight in finish(
                linears, moments[index], candidate.pattern, candidate.steps
            ):
                block.linears[name].weight.copy_(weight)
                yield name, mask


@contextmanager
def pruned_model(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    calibration: Tensor | None,
    advance: Advance = lambda _: None,
) -> Iterator[Mapping[str, float]]:
    """
    A model pruned with a candidate, and dense again afterwards.

    Args:
        model, statistics, candidate, calibration, advance: As for :func:`prune_model`.

    Yields:
        The achieved sparsity of each linear.
    """
    if not (candidate.steps.needs_text or model.stream):
        masks = linear_masks(model.linears, statistics, candidate)
        with pruned(model.linears, ((name, mask.keep) for name, mask in masks)) as sparsity:
            advance(len(sparsity))
            yield sparsity
        return
    with dense_afterwards(model):
        yield {
            name: float((~mask.keep).float().mean())
            for name, mask in prune_model(model, statistics, candidate, calibration, advance)
        }
