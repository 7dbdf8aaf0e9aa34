"""
A candidate applied to a model, block reconstruction included.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import islice

from torch import Tensor

from pho_service.errors import InvalidInput, OutputError, field_name
from pho_service.models.blockwise import (
    Block,
    changed_blocks,
    dense_afterwards,
    linears_by_block,
    measure_perplexity,
    walk,
)
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import Memo, Record
from pho_service.progress import Advance
from pho_service.pruning.masks import (
    LinearMask,
    Losses,
    linear_losses,
    linear_masks,
    masks_of,
    pruned,
)
from pho_service.pruning.reconstruction import Reconstructed, Trainable, check_windows, reconstruct
from pho_service.pruning.statistics import PrunableLinear, Statistics
from pho_service.pruning.steps import InputMoments, MaskedLinear, finish
from pho_service.spec.perplexity import Perplexity
from pho_service.spec.steps import Candidate, Reconstruction

logger = logging.getLogger(__name__)

# The reconstruction of a winner from the block of a number on, which may be shorter than it was.
Shorten = Callable[[int, Reconstruction], Reconstruction]


# Block reconstruction of a whole model: the dense stream beside the pruned one, and what is
# trained.
class Rebuilding:
    """Trains the blocks of a model one after the other, each after it was pruned."""

    def __init__(self, settings: Reconstruction, windows: int) -> None:
        check_windows(windows)
        self._settings = settings
        self._dense: list[Tensor] = []  # what the dense model has after the block, of each window

    def before(self, block: Block) -> None:
        """See what a block gives while it is dense. Each block's turn comes once."""
        self._dense = self._dense or [*block.inputs]
        block.replace_(self._dense)

    def after(
        self, block: Block, masks: Mapping[str, Tensor], passes: int, advance: Advance
    ) -> Reconstructed:
        if not passes:
            return Reconstructed(before=None, after=None, passes=0, kept=False)
        inputs, linears = block.inputs, block.linears
        return reconstruct(
            [Trainable(linear=linears[name], keep=keep) for name, keep in masks.items()],
            lambda window: block.run(window, inputs[window]),
            self._dense, replace(self._settings, passes=passes, blocks=()), advance=advance,
        )  # fmt: skip


def prune_model(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    calibration: Tensor | None,
    advance: Advance = lambda _: None,
    kept: Callable[[str, LinearMask], None] = lambda _name, _mask: None,
    *,
    memo: Memo | None = None,
    rebuilt: Callable[[str, Reconstructed], None] = lambda _name, _result: None,
    shorten: Shorten | None = None,
) -> dict[str, float]:
    """Prune a model in place, and give the share that each pruned linear has lost."""
    # A candidate whose steps need a text is applied block by block: each block sees the calibration
    # windows as the pruned blocks before it leave them. The allocation always comes from the dense
    # model's statistics, and so do the scores, unless the steps say ``sequential``.
    if candidate.steps.needs_text:
        windows = _given(calibration, candidate)
        if few := few_tokens(model.linears, candidate, windows):
            warn_once(few)
        if candidate.steps.reconstruction.wanted:
            masks = _rebuilt(model, statistics, candidate, windows, memo, rebuilt, advance, shorten)
        else:
            masks = _block_by_block(model, statistics, candidate, windows)
    elif model.stream:
        masks = _streamed_by_score(model, statistics, candidate)
    else:
        masks = _zeroed(model.linears, whole_masks(model, statistics, candidate))
    shares = {}
    for name, mask in masks:
        kept(name, mask)
        shares[name] = _share(mask)
        advance(1)
    return shares


def _given(calibration: Tensor | None, candidate: Candidate) -> Tensor:
    if calibration is None:
        steps = candidate.steps
        raise InvalidInput(
            f"statistics {steps.statistics!r}, permutation {steps.permutation!r}, repruning "
            f"{steps.repruning!r} and update {steps.update!r} need a calibration text, not only "
            f"its statistics. Give {field_name('calibration/text')}."
        )
    return calibration


def whole_masks(
    model: LanguageModel, statistics: Statistics, candidate: Candidate
) -> Iterator[tuple[str, LinearMask]]:
    """:func:`~pho_service.pruning.masks.linear_masks` of all linears of a model."""
    return linear_masks(model.linears, statistics, candidate, _movable(model, candidate))


def _movable(model: LanguageModel, candidate: Candidate) -> frozenset[str] | None:
    """The linears whose inputs may be permuted; None is all."""
    return model.foldable if candidate.steps.gives_up_orders else None


def _streamed_by_score(
    model: LanguageModel, statistics: Statistics, candidate: Candidate
) -> Iterator[tuple[str, LinearMask]]:
    masks = whole_masks(model, statistics, candidate)
    names = _pruned_names(model, candidate)
    for linears in changed_blocks(model):
        yield from _zeroed(linears, masks, len(names & linears.keys()))


def trained_blocks(model: LanguageModel, candidate: Candidate) -> list[str]:
    """The names of the blocks that a candidate with a reconstruction changes."""
    names = _pruned_names(model, candidate)
    return [name for name, li in linears_by_block(model).items() if not names.isdisjoint(li)]


def _record_name(block: str, number: int, how: Reconstruction) -> str:
    """What the record of a block is called: those behind others see what these became."""
    firsts = [str(first) for first in how.blocks if number >= first]
    return ".shorter-after-".join([block, "-".join(firsts)]) if firsts else block


def _pruned_names(model: LanguageModel, candidate: Candidate) -> frozenset[str]:
    return candidate.steps.linears.choose(list(model.linears), candidate.pattern).names


def _zeroed(
    linears: Mapping[str, PrunableLinear],
    masks: Iterator[tuple[str, LinearMask]],
    count: int | None = None,
) -> Iterator[tuple[str, LinearMask]]:
    """Apply the next ``count`` masks, or all: those of a block come together."""
    for name, mask in islice(masks, count):
        linears[name].weight.masked_fill_(~mask.keep, 0)
        yield name, mask


def _block_by_block(
    model: LanguageModel, statistics: Statistics, candidate: Candidate, windows: Tensor
) -> Iterator[tuple[str, LinearMask]]:
    losses = linear_losses(model.linears, statistics, candidate, _movable(model, candidate))
    for whole in walk(model, windows):
        block = whole.only(losses.names)
        if block.linears:
            yield from _pruned_block(block, statistics, candidate, losses)


def _rebuilt(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    windows: Tensor,
    memo: Memo | None,
    rebuilt: Callable[[str, Reconstructed], None],
    advance: Advance,
    shorten: Shorten | None,
) -> Iterator[tuple[str, LinearMask]]:
    """As :func:`_block_by_block`, and each block is trained before the next is pruned."""
    how = candidate.steps.reconstruction
    numbers = {name: number for number, name in enumerate(trained_blocks(model, candidate))}
    kept_as = {name: _record_name(name, number, how) for name, number in numbers.items()}
    if memo is not None and all(map(memo.holds, kept_as.values())):
        yield from _all_put_back(model, memo, kept_as, rebuilt, advance)
        return
    rebuilding = Rebuilding(how, len(windows))
    losses = linear_losses(model.linears, statistics, candidate, _movable(model, candidate))
    for whole in walk(model, windows, streams=2):
        number = numbers.get(whole.name)
        if number is None:  # nothing of it is pruned
            rebuilding.before(whole)
            advance(0)
            continue
        block = whole.only(losses.names)
        record = memo.read(_record_name(block.name, number, how)) if memo else None
        if record is None and shorten is not None:
            how = shorten(number, how)
        passes = how.passes_of(number)
        if passes:
            rebuilding.before(whole)
        advance(0)
        if record is None:
            masks = dict(_pruned_block(block, statistics, candidate, losses))
            keeps = {name: mask.keep for name, mask in masks.items()}
            result = rebuilding.after(block, keeps, passes, advance)
            if memo:
                made = _block_record(block.linears, masks, result)
                memo.keep(_record_name(block.name, number, how), made)
        else:
            masks, result = _put_back(record, block.linears)
        rebuilt(block.name, result)
        yield from masks.items()


def _all_put_back(
    model: LanguageModel,
    memo: Memo,
    kept_as: Mapping[str, str],
    rebuilt: Callable[[str, Reconstructed], None],
    advance: Advance,
) -> Iterator[tuple[str, LinearMask]]:
    """Give a model all of its trained blocks: no text runs through it."""
    for name, linears in zip(linears_by_block(model), changed_blocks(model), strict=True):
        advance(0)
        if name not in kept_as:
            continue
        record = memo.read(kept_as[name])
        if record is None:
            raise OutputError(
                f"the record of {name} was removed from {memo.folder} while others were read. Do "
                "it once more."
            )
        masks, result = _put_back(record, linears)
        rebuilt(name, result)
        yield from masks.items()


def _block_record(
    linears: Mapping[str, PrunableLinear], masks: Mapping[str, LinearMask], result: Reconstructed
) -> Record:
    """A trained block as it is kept until its model is saved."""
    group_keep = {name: mask.group_keep for name, mask in masks.items()}
    tensors: dict[str, Tensor] = {}
    for name, mask in masks.items():
        tensors |= {f"{name}:weight": linears[name].weight, f"{name}:keep": mask.keep}
        if mask.order is not None:
            tensors[f"{name}:order"] = mask.order
    return Record(
        values={"group_keep": group_keep, "result": result.to_dict()},
        # Copies: experts are parts of one tensor, and linears share an order.
        tensors={name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()},
    )


def _put_back(
    record: Record, linears: Mapping[str, PrunableLinear]
) -> tuple[dict[str, LinearMask], Reconstructed]:
    """Give the linears of a block their trained weights; the mask of each, and how it went."""
    tensors, masks = record.tensors, {}
    for name, group_keep in record.values["group_keep"].items():
        linears[name].weight.copy_(tensors[f"{name}:weight"])
        keep, order = tensors[f"{name}:keep"], tensors.get(f"{name}:order")
        masks[name] = LinearMask(keep=keep, order=order, group_keep=group_keep)
    return masks, Reconstructed(**record.values["result"])


def _pruned_block(
    block: Block, statistics: Statistics, candidate: Candidate, losses: Losses
) -> Iterator[tuple[str, LinearMask]]:
    """Take the linears of a block through all steps; gives the name and the mask of each."""
    moments, input_of = block.moments()
    current_statistics = statistics
    if candidate.steps.statistics == "sequential":
        current_statistics = with_norms(statistics, moments, input_of)
    masks = masks_of(block.linears, current_statistics, candidate, losses)
    for name, mask, weight in finished_block(
        block.linears, current_statistics, candidate, masks, moments, input_of
    ):
        block.linears[name].weight.copy_(weight)
        yield name, mask


def with_norms(
    statistics: Statistics, moments: Sequence[InputMoments], input_of: Mapping[str, int]
) -> Statistics:
    """The statistics of a block's linears with the activation norms that its inputs now have."""
    readers = {index: name for name, index in input_of.items()}
    return Statistics(
        inputs=[
            replace(
                statistics.inputs[statistics.input_of[readers[index]]],
                activation_norm=input_moments.activation_norm,
            )
            for index, input_moments in enumerate(moments)
        ],
        input_of=dict(input_of),
        fisher=statistics.fisher,
    )


def finished_block(
    linears: Mapping[str, PrunableLinear],
    statistics: Statistics,
    candidate: Candidate,
    masks: Iterable[tuple[str, LinearMask]],
    moments: Sequence[InputMoments],
    input_of: Mapping[str, int],
) -> Iterator[tuple[str, LinearMask, Tensor]]:
    """Take the linears of a block through a candidate's steps, those of one input together."""
    readers: dict[int, list[MaskedLinear]] = {}
    for name, mask in masks:
        linear = linears[name]
        readers.setdefault(input_of[name], []).append(
            MaskedLinear(
                name=name,
                weight=linear.weight.float(),
                fisher=statistics.fisher[name].to(linear.weight.device),
                mask=mask,
            )
        )
    for index, of_input in readers.items():
        yield from finish(of_input, moments[index], candidate.pattern, candidate.steps)


@contextmanager
def pruned_model(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    calibration: Tensor | None,
    advance: Advance = lambda _: None,
    memo: Memo | None = None,
    shorten: Shorten | None = None,
) -> Iterator[Mapping[str, float]]:
    """A model pruned with a candidate, and dense again afterwards."""
    if not (candidate.steps.needs_text or model.stream):
        masks = whole_masks(model, statistics, candidate)
        with pruned(model.linears, ((name, mask.keep) for name, mask in masks)) as sparsity:
            advance(len(sparsity))
            yield sparsity
        return
    with dense_afterwards(model):
        yield prune_model(
            model, statistics, candidate, calibration, advance, memo=memo, shorten=shorten
        )


def rate_streamed(
    model: LanguageModel,
    statistics: Statistics,
    candidate: Candidate,
    windows: Tensor,
    advance: Advance = lambda _: None,
) -> tuple[Perplexity, Mapping[str, float]]:
    """Prune and measure a streamed model in one pass: each block is pruned, run, and forgotten."""
    # Nothing is written, and no calibration text is run.
    masks = whole_masks(model, statistics, candidate)
    names = _pruned_names(model, candidate)
    sparsity: dict[str, float] = {}

    def prune(linears: Mapping[str, PrunableLinear]) -> None:
        zeroed = _zeroed(linears, masks, len(names & linears.keys()))
        sparsity.update((name, _share(mask)) for name, mask in zeroed)

    return measure_perplexity(model, windows, change=prune, advance=advance), sparsity


def _share(mask: LinearMask) -> float:
    return 1 - int(mask.keep.count_nonzero()) / mask.keep.numel()


# What to say of a calibration with fewer tokens than a step needs.
def few_tokens(
    linears: Mapping[str, PrunableLinear], candidate: Candidate, windows: Tensor | None
) -> str | None:
    """Say that weights are fitted to fewer tokens than they have inputs, and how many would do."""
    # The second moments of so few tokens are singular. Damping makes weights computable all the
    # same, but they fit what they see more than the text that it stands for.
    if windows is None or candidate.steps.update == "none":
        return None
    chosen = candidate.steps.linears.choose(list(linears), candidate.pattern).names
    widths = {name: linears[name].weight.shape[1] for name in linears if name in chosen}
    name = max(widths, key=lambda name: widths[name])
    if windows.numel() >= widths[name]:
        return None
    enough = -(-widths[name] // windows.shape[1])
    return (
        f"The calibration has {windows.numel()} tokens, fewer than the {widths[name]} inputs of "
        f"{name}: update {candidate.steps.update!r} fits them, held back only by damping. Take "
        f"{enough} windows of {windows.shape[1]} tokens or more "
        f"({field_name('calibration/samples', enough)})."
    )


@cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that this process has it: finalists share a calibration."""
    logger.warning(message)
