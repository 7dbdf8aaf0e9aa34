"""
How much of a model to cut so that it writes so many times as fast: by what a cut saves here.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from pho_service.errors import InvalidInput
from pho_service.models.blockwise import Block
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import scratch_folder
from pho_service.models.structure import Part, as_cut
from pho_service.pipeline.bench import Bench, bench
from pho_service.pipeline.llama_bench import bench_llama, check_llama
from pho_service.pipeline.structured import Choose, cut_model
from pho_service.progress import Progress, silent
from pho_service.spec.structure import (
    MOST_OF_THE_BLOCKS,
    PROMPT,
    ROUNDS,
    WRITTEN,
    BlockShapes,
    Goal,
    Structure,
    split,
)
from pho_service.spec.verbs import BenchSettings, LlamaAsk, Where

SETTINGS = BenchSettings(prompt=PROMPT, new_tokens=WRITTEN, rounds=ROUNDS)
# Splits remove up to half a step more or less than a share: with nearly that much more, none is
# slower.
_HALF_A_STEP = 0.49
_SPREAD = 2.0  # times as much that the upper quartile of the rounds may save as the lower one


def check_runtime(goal: Goal) -> None:
    """
    See before any long work that the runtime of a speed is here.

    Raises:
        InvalidInput: It is not.
    """
    if goal.runtime != "torch":
        check_llama([str(Path.cwd())], SETTINGS, _ask(goal), Where())


def _ask(goal: Goal) -> LlamaAsk:
    return LlamaAsk(runtime=goal.runtime, types=(goal.type,))


def _measured(
    goal: Goal, dense: str, cut: str, *, device: str, dtype: str, progress: Progress
) -> Bench:
    """A folder beside the dense one, in rounds that take turns."""
    if goal.runtime == "torch":
        return bench([dense, cut], SETTINGS, device=device, dtype=dtype, progress=progress)
    return bench_llama([dense, cut], SETTINGS, _ask(goal), progress=progress)


def speed_sentence(goal: Goal, measured: Bench) -> str:
    """How fast a model has become, and whether that is its goal."""
    read, written = measured.ratios(measured.sides[1])
    missed = "" if median(written) >= goal.times else f", where {goal.times:g} was asked for"
    return (
        f"In {goal.where} it writes {_range(written)} times as fast as the dense model here, "
        f"and reads {_range(read)} times as fast{missed}."
    )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How many times as fast a model wrote without a share of its blocks' weights, by round."""

    share: float
    ratios: list[float]  # Sorted

    def sentence(self, goal: Goal) -> str:
        """What was measured, in words."""
        return (
            f"Without {self.share:.0%} of its blocks' weights, the model writes "
            f"{_range(self.ratios)} times as fast in {goal.where} here"
        )

    def needed(self, goal: Goal, shapes: BlockShapes) -> float:
        """
        The share to cut for a speed: time saved grows as the share does.

        Raises:
            InvalidInput: The rounds differ too much, or more than half of the blocks would go.
        """
        low, _, high = quantiles([1 - 1 / ratio for ratio in self.ratios])
        seen = self.sentence(goal)
        way_out = (
            "Say how much to cut: structured:20% of the blocks, or smaller:20% of the file. `pho "
            "bench` measures the result."
        )
        if low <= 0 or high > _SPREAD * low:
            raise InvalidInput(
                f"what {goal.pattern} takes cannot be told on this machine now. {seen}, which in "
                f"{len(self.ratios)} rounds says too little. Try again when it does nothing else. "
                f"{way_out}"
            )
        saved = median(1 - 1 / ratio for ratio in self.ratios)
        needed = (1 - 1 / goal.times) / saved * self.share
        step = _step(shapes)
        share = math.ceil(needed / step) * step
        if share > MOST_OF_THE_BLOCKS:
            most = 1 / (1 - saved * MOST_OF_THE_BLOCKS / self.share)
            raise InvalidInput(
                f"{goal.pattern} takes more than half of the blocks' weights. {seen}, so about "
                f"{math.floor(100 * most) / 100:g} times is the most. {way_out}"
            )
        return share + _HALF_A_STEP * step


def _range(values: list[float]) -> str:
    return f"{median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def _step(shapes: BlockShapes) -> float:
    """What one step of an FFN's width removes of the blocks; a hundredth where it has none."""
    if not shapes.width:
        return 0.01
    return shapes.removed_share(Structure(neurons=shapes.width - shapes.multiple))


def share_for(
    model: LanguageModel, goal: Goal, shapes: BlockShapes, *, progress: Progress = silent
) -> tuple[float, Saving]:
    """
    The share of the blocks without which a model writes so fast, and what was measured for it.

    A cut of half of the blocks, which saves more than noise does, is measured beside the dense
    model, which stays as it is. The cut keeps the first neurons and no values, which make no
    difference to the speed: a model that predicts nothing sensible would not pass as exported.

    Raises:
        InvalidInput: See :meth:`Saving.needed`; or the runtime is not here.
        OutputError: There is no room for two folders meanwhile.
    """
    check_runtime(goal)
    structure = split(MOST_OF_THE_BLOCKS, shapes)[0]
    with _scratch(model) as folder:
        dense = _written(model, folder / "dense")
        window = torch.arange(SETTINGS.new_tokens)[None] % model.vocabulary
        choose: Choose | None = None if structure.query_heads else _first
        copied = as_cut(replace(model, model=copy.deepcopy(model.model)))
        cut = cut_model(copied, window, structure, choose=choose, update=False).model
        for linear in cut.linears.values():
            linear.parameter.data.zero_()
        written = _written(cut, folder / "cut")
        del copied, cut
        dtype = str(model.dtype).removeprefix("torch.")
        measured = _measured(
            goal, dense, written, device=str(model.device), dtype=dtype, progress=progress
        )
    _, ratios = measured.ratios(measured.sides[1])
    saving = Saving(share=shapes.removed_share(structure), ratios=ratios)
    return round(saving.needed(goal, shapes), 4), saving


def speed_of(
    load: Callable[[], LanguageModel],
    name: str,
    cut: str,
    goal: Goal,
    *,
    device: str,
    dtype: str,
    progress: Progress = silent,
) -> Bench:
    """Measure how fast a cut folder is beside the dense model."""
    with ExitStack() as stack:
        dense = name
        if not Path(name).expanduser().is_dir():
            model = load()
            folder = stack.enter_context(_scratch(model))
            dense = _written(model, folder / "dense")
            del model
        measured = _measured(goal, dense, cut, device=device, dtype=dtype, progress=progress)
    side = measured.sides[0]  # of a scratch folder perhaps
    measured.sides[0] = replace(side, name=side.name.replace(dense, name))
    return measured


def _first(_block: Block, _part: Part, count: int, *_: object) -> Tensor:
    return torch.arange(count)


@contextmanager
def _scratch(model: LanguageModel) -> Iterator[Path]:
    """A folder with room for a model and a cut of it, for as long as they are measured."""
    size = sum(p.numel() * p.element_size() for p in model.model.parameters())
    with tempfile.TemporaryDirectory(prefix="faster-", dir=scratch_folder(2 * size)) as folder:
        yield Path(folder)


def _written(model: LanguageModel, folder: Path) -> str:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)
