"""
How much of a model to cut so that it writes so many times as fast: by what a cut saves here.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from pho_service.models.structure import Anatomy, Part, block_shapes
from pho_service.pipeline.bench import Bench, bench
from pho_service.pipeline.llama_bench import bench_llama, check_llama
from pho_service.pipeline.structured import Choose, cut_model
from pho_service.progress import Progress, silent
from pho_service.spec.export import GgufType
from pho_service.spec.structure import (
    MOST_OF_THE_BLOCKS,
    BlockShapes,
    Structure,
    split,
    structured_pattern,
)
from pho_service.spec.verbs import BenchSettings, LlamaAsk, RuntimeName, Where

SETTINGS = BenchSettings(prompt=128, new_tokens=64, rounds=9)
_MOST_TIMES = 10.0
# Splits remove up to half a step more or less than a share: with nearly that much more, none is
# slower.
_HALF_A_STEP = 0.49
_SPREAD = 2.0  # times as much that the upper quartile of the rounds may save as the lower one


@dataclass(frozen=True, kw_only=True)
class WantedSpeed:
    """How many times as fast as the dense model a smaller one is to write, and in what."""

    times: float
    runtime: RuntimeName = "torch"
    type: GgufType = "q8_0"  # Of the files, in llama.cpp

    @classmethod
    def of(cls, words: str, runtime: RuntimeName, gguf_type: GgufType | None) -> "WantedSpeed":
        """
        Read ``1.2x``.

        Raises:
            InvalidInput: It is no number of times above 1, or the runtime is not here.
        """
        try:
            times = float(words.removesuffix("x"))
        except ValueError:
            times = 0.0
        if not 1 < times <= _MOST_TIMES:
            raise InvalidInput(
                f"--faster {words} is no number of times above 1 and up to "
                f"{_MOST_TIMES:g}. Write 1.2x for a model that writes 1.2 times as fast."
            )
        if runtime == "torch" and gguf_type is not None:
            raise InvalidInput(
                f"--type {gguf_type}: only for --runtime llama.cpp. Leave it out, or give that."
            )
        return cls(times=times, runtime=runtime, type=gguf_type or cls.type)

    def check(self) -> None:
        """See before any long work that the runtime is here."""
        if self.runtime != "torch":
            check_llama([str(Path.cwd())], SETTINGS, self._ask, Where())

    @property
    def _ask(self) -> LlamaAsk:
        return LlamaAsk(runtime=self.runtime, types=(self.type,))

    @property
    def where(self) -> str:
        """The runtime, in words."""
        return self.runtime if self.runtime == "torch" else f"{self.runtime} at {self.type}"

    def measured(
        self, dense: str, cut: str, *, device: str, dtype: str, progress: Progress = silent
    ) -> Bench:
        """A folder beside the dense one, in rounds that take turns."""
        if self.runtime == "torch":
            return bench([dense, cut], SETTINGS, device=device, dtype=dtype, progress=progress)
        return bench_llama([dense, cut], SETTINGS, self._ask, progress=progress)

    def result(self, measured: Bench) -> str:
        """How fast a model has become, in a sentence."""
        read, written = measured.ratios(measured.sides[1])
        missed = "" if median(written) >= self.times else f", where {self.times:g} was asked for"
        return (
            f"In {self.where} it writes {_range(written)} times as fast as the dense model here, "
            f"and reads {_range(read)} times as fast{missed}."
        )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """How many times as fast a model wrote without a share of its blocks' weights, by round."""

    share: float
    ratios: list[float]  # Sorted

    def sentence(self, wanted: WantedSpeed) -> str:
        """What was measured, in words."""
        return (
            f"Without {self.share:.0%} of its blocks' weights, the model writes "
            f"{_range(self.ratios)} times as fast in {wanted.where} here"
        )

    def needed(self, wanted: WantedSpeed, shapes: BlockShapes) -> float:
        """
        The share to cut for a speed: time saved grows as the share does.

        Raises:
            InvalidInput: The rounds differ too much, or more than half of the blocks would go.
        """
        low, _, high = quantiles([1 - 1 / ratio for ratio in self.ratios])
        asked, seen = f"--faster {wanted.times:g}x", self.sentence(wanted)
        way_out = (
            "Say how much to cut: --pattern structured:20%, or --smaller 20%. `pho bench` measures "
            "the result."
        )
        if low <= 0 or high > _SPREAD * low:
            raise InvalidInput(
                f"what {asked} takes cannot be told on this machine now. {seen}, which in "
                f"{len(self.ratios)} rounds says too little. Try again when it does nothing else. "
                f"{way_out}"
            )
        saved = median(1 - 1 / ratio for ratio in self.ratios)
        needed = (1 - 1 / wanted.times) / saved * self.share
        step = _step(shapes)
        share = math.ceil(needed / step) * step
        if share > MOST_OF_THE_BLOCKS:
            most = 1 / (1 - saved * MOST_OF_THE_BLOCKS / self.share)
            raise InvalidInput(
                f"{asked} takes more than half of the blocks' weights. {seen}, so about "
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


def pattern_for(
    load: Callable[[], LanguageModel],
    name: str,
    wanted: WantedSpeed,
    *,
    device: str,
    dtype: str,
    progress: Progress = silent,
) -> tuple[str, Saving]:
    """
    The pattern with which a model writes so many times as fast, and what was measured for it.

    A cut of half of the blocks, which saves more than noise does, is measured beside the dense
    model. It keeps the first neurons and no values, which make no difference to the speed: a model
    that predicts nothing sensible would not pass as exported.

    Raises:
        InvalidInput: See :meth:`Saving.needed`.
        ModelError: The model's blocks cannot be cut.
    """
    model = load()
    shapes = block_shapes(Anatomy(model))
    structure = split(MOST_OF_THE_BLOCKS, shapes)[0]
    with _scratch(model) as folder:
        dense = name if _is_folder(name) else _written(model, folder / "dense")
        window = torch.arange(SETTINGS.new_tokens)[None] % model.vocabulary
        choose: Choose | None = None if structure.query_heads else _first
        cut = cut_model(model, window, structure, choose=choose, update=False).model
        for linear in cut.linears.values():
            linear.parameter.data.zero_()
        written = _written(cut, folder / "cut")
        del model, cut
        measured = wanted.measured(dense, written, device=device, dtype=dtype, progress=progress)
    _, ratios = measured.ratios(measured.sides[1])
    saving = Saving(share=shapes.removed_share(structure), ratios=ratios)
    return structured_pattern(round(saving.needed(wanted, shapes), 4)), saving


def chosen_before(file: Path, asked: Mapping[str, object]) -> str | None:
    """The pattern that was measured for the same speed, by what an interrupted run has kept."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text())
    return str(kept["pattern"]) if kept["asked"] == asked else None


def speed_of(
    load: Callable[[], LanguageModel],
    name: str,
    cut: str,
    wanted: WantedSpeed,
    *,
    device: str,
    dtype: str,
    progress: Progress = silent,
) -> Bench:
    """Measure how fast a cut folder is beside the dense model."""
    with ExitStack() as stack:
        dense = name
        if not _is_folder(name):
            model = load()
            folder = stack.enter_context(_scratch(model))
            dense = _written(model, folder / "dense")
            del model
        measured = wanted.measured(dense, cut, device=device, dtype=dtype, progress=progress)
    side = measured.sides[0]  # of a scratch folder perhaps
    measured.sides[0] = replace(side, name=side.name.replace(dense, name))
    return measured


def _first(_block: Block, _part: Part, count: int, *_: object) -> Tensor:
    return torch.arange(count)


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


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
