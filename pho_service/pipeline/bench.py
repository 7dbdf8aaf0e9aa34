"""
How fast models are on the machine at hand, and 2:4 models on torch's kernels for them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pho_service.errors import InvalidInput, field_name
from pho_service.host.machine import conditions, versions
from pho_service.host.model_files import is_packed
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.mask_file import MASKS, read_masks
from pho_service.models.packed import as_folder
from pho_service.models.saving import RECIPE, Recipe, read_recipe
from pho_service.progress import Advance, Progress, silent
from pho_service.pruning.hardware import pick_device
from pho_service.pruning.masks import GROUP, KEEP, broken_groups, to_semi_structured
from pho_service.pruning.statistics import PrunableLinear
from pho_service.shown.parts import Shown, Table
from pho_service.spec.document import with_error
from pho_service.spec.verbs import BenchSettings

# Run a 2:4 model by torch's kernels for it, where the groups hold in the stored order.
_OLDEST = (8, 0)  # compute capability of Ampere, the first with sparse tensor cores


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Kernel of each linear, or the reason why it has none."""

    converted: list[str]  # Those that torch's 2:4 kernels multiply now
    left: dict[str, str]  # Why each of the others stays dense


def check_gpu(device: torch.device) -> None:
    """See that a device can run 2:4."""
    way_out = "pho.load_model loads it anywhere, with the same outputs, as fast as a dense model."
    if device.type != "cuda":
        raise InvalidInput(
            f"2:4 needs a GPU, and the device is {device}: torch has kernels for NVIDIA Ampere and "
            f"newer alone. {way_out}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise InvalidInput(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, capability))}, but 2:4 needs {'.'.join(map(str, _OLDEST))}, which "
            f"Ampere and newer have. {way_out}"
        )


def convert_(model: LanguageModel, folder: Path, *, progress: Progress = silent) -> Conversion:
    """Give linears that are 2:4 as they stand to torch's kernels; the others stay as they are."""
    check_gpu(model.device)
    if model.dtype is torch.float32:
        raise InvalidInput(
            f"{model.name} is in float32, but torch holds 2:4 in 16 bits. Load it with "
            'dtype="bfloat16".'
        )
    converted, left = [], {}
    with as_folder(folder) as small, progress("Converting", len(model.linears)) as advance:
        why_broken = _reasons(small)
        for name, linear in model.linears.items():
            reason = _convert_linear(linear, why_broken)
            if reason is None:
                converted.append(name)
            else:
                left[name] = reason
            advance(1)
    return Conversion(converted=converted, left=left)


def _convert_linear(linear: PrunableLinear, why_broken: Callable[[str], str]) -> str | None:
    """Convert one; returns why not."""
    module = linear.module
    if linear.transposed or not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} is not a Linear of torch"
    weight = module.weight.detach()
    if broken_groups(weight):
        return why_broken(linear.name)
    try:
        sparse = to_semi_structured(weight.contiguous())
    except RuntimeError as error:  # a shape that the kernels do not take
        return f"torch refuses it: {' '.join(str(error).split())[:200]}"
    module.weight = nn.Parameter(sparse, requires_grad=False)
    return None


def _reasons(folder: Path) -> Callable[[str], str]:
    """Why the groups of a linear do not hold in the stored order, by what its recipe says."""
    unknown = f"not every group of {GROUP} neighbours has {GROUP - KEEP} zeros"
    if not (folder / RECIPE).is_file():
        return lambda _: unknown
    recipe: Recipe = read_recipe(folder)
    if not recipe.layers:
        return lambda _: unknown
    masks = read_masks(folder / MASKS)

    def reason(name: str) -> str:
        record = recipe.layers.get(name)
        if record is None:
            return "it was left dense"
        if (record.keep, record.group) != (KEEP, GROUP):
            pattern = recipe.configuration.pattern if recipe.configuration else "no groups"
            cut = f"{record.keep}:{record.group}" if record.group else pattern
            return f"it was pruned at {cut}, and GPUs have kernels for {KEEP}:{GROUP}"
        if name in masks.shapes and masks.mask(name).order is not None:
            return (
                "its groups hold in another channel order, which could not be folded into the "
                f"stored weights: prune with {field_name('steps/deployable', True)}"
            )
        return unknown

    return reason


LOADS = 3  # of each model; the first brings its files into the memory of the system


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one model."""

    name: str  # As it was given; with ``, 2:4`` where torch's kernels multiply its linears
    bytes: int  # Size in bytes of its files
    note: str = ""  # What is to be known of it
    load_s: list[float] = field(default_factory=list)  # Seconds of each loading
    # Seconds to read the prompts, up to the first new token, by round.
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)  # Seconds to write the new tokens, by round
    base: int = 0  # Which side it is compared with
    # Of a file in llama.cpp: what PHO reads in it has this perplexity and its standard error, this
    # mean divergence in nats from the first model, and next-token probabilities that are at most
    # so far from llama.cpp's.
    perplexity: float | None = None
    error: float | None = None
    divergence: float | None = None
    runtime_gap: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Bench(Shown):
    """
    A measurement: ``sides`` has the seconds of each load and round, ``conditions`` the machine.
    """

    sides: list[Side]  # In the order in which they were given; ratios are to the first
    settings: BenchSettings  # What was run
    conditions: list[str]  # Machine, device, dtype and versions, in one line each

    def tokens_per_s(self, side: Side) -> tuple[float, float]:
        """Tokens a second that are read, and that are written: of the median round."""
        batch = self.settings.batch
        return (
            batch * self.settings.prompt / median(side.prefill_s),
            batch * self.settings.new_tokens / median(side.decode_s),
        )

    def ratios(self, side: Side) -> tuple[list[float], list[float]]:
        """How many times as fast as its base, of reading and writing, round by round, sorted."""
        first = self.sides[side.base]
        return (
            sorted(a / b for a, b in zip(first.prefill_s, side.prefill_s, strict=True)),
            sorted(a / b for a, b in zip(first.decode_s, side.decode_s, strict=True)),
        )

    def _row(self, side: Side) -> tuple[str, ...]:
        read, written = self.tokens_per_s(side)
        times = ["", ""]
        if side is not self.sides[side.base]:
            times = [f"{median(r):.2f} ({r[0]:.2f}-{r[-1]:.2f})" for r in self.ratios(side)]
        size = f"{side.bytes / 1e6:.1f}" if side.bytes else ""
        load_s = f"{median(side.load_s):.2f}" if side.load_s else ""
        quality = []
        if self._has_quality:
            nats = "" if side.divergence is None else f"{side.divergence:.4f}"
            gap = "" if side.runtime_gap is None else f"{side.runtime_gap:.4f}"
            quality = [with_error(side.perplexity, side.error), nats, gap]
        return (
            side.name, size, load_s, f"{read:.1f}", times[0],
            f"{written:.1f}", times[1], *quality, side.note,
        )  # fmt: skip

    @property
    def _has_quality(self) -> bool:
        return any(side.perplexity is not None for side in self.sides)

    @property
    def table(self) -> Table:
        """A row for each model, with the conditions of the numbers."""
        run = self.settings
        return Table(
            (
                "model", "MB", "load s", "read tokens/s", "times", "written tokens/s", "times",
                *(("perplexity", "KL", "runtime gap") if self._has_quality else ()), "note",
            ),
            [self._row(side) for side in self.sides],
            title=f"{run.prompt} tokens read and {run.new_tokens} written, batch {run.batch}, "
            f"{run.rounds} rounds",
            notes=(
                *self.conditions,
                f"Medians; times as fast as {self._compared_with}: median (least to most) of the "
                "rounds. Loads with the files in the system's memory.",
            ),
        )  # fmt: skip

    @property
    def _compared_with(self) -> str:
        if any(side.base for side in self.sides):
            return "the first model in the same type, which is compared with its first type"
        return "the first"

    def _shown(self) -> Table:
        return self.table


def bench(
    models: Sequence[str],
    settings: BenchSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Bench:
    """Measure models beside each other."""
    # All of them are in memory at once. Every round runs each of them, in one order and then in the
    # other, so that what else the machine does meets them alike. On a GPU a model with 2:4 linears
    # is measured a second time, with torch's kernels for them.
    if len({*models}) < len(models):
        raise InvalidInput("a model is given twice. Give each once.")
    where = pick_device(device)
    loaded: dict[str, LanguageModel] = {}
    sides: list[Side] = []
    with progress("Loading", LOADS * len(models)) as advance:
        seconds = _loads(models, device, dtype, loaded, advance)
    settings = _fitted(settings, loaded)
    for name in models:
        sides.append(Side(name=name, bytes=_size(Path(name)), load_s=seconds[name]))
    if where.type == "cuda":
        for side in list(sides):
            sparse = _semi_structured(side, loaded[side.name].dtype, device, dtype)
            if sparse is not None:
                loaded[f"{side.name}, 2:4"] = sparse[0]
                sides.append(sparse[1])
    with progress("Measuring", (settings.rounds + 1) * len(sides)) as advance:
        for turn in range(-1, settings.rounds):  # the first one warms up
            for side in sides if turn % 2 else reversed(sides):
                prefill, decode = _run(loaded[side.name], settings)
                if turn >= 0:
                    side.prefill_s.append(prefill)
                    side.decode_s.append(decode)
                advance(1)
    dtypes = {str(model.dtype).removeprefix("torch.") for model in loaded.values()}
    return Bench(sides=sides, settings=settings, conditions=_conditions(where, sorted(dtypes)))


def _fitted(settings: BenchSettings, loaded: Mapping[str, LanguageModel]) -> BenchSettings:
    """Prompts that every model has room for beside the new tokens."""
    longest = {name: model.longest for name, model in loaded.items() if model.longest is not None}
    name = min(longest, key=longest.__getitem__, default=None)
    if name is None or longest[name] >= settings.prompt + settings.new_tokens:
        return settings
    if longest[name] <= settings.new_tokens:
        raise InvalidInput(
            f"{field_name('new_tokens', settings.new_tokens)} leaves no room for a prompt: "
            f"{name} reads {longest[name]} tokens. Give fewer."
        )
    return replace(settings, prompt=longest[name] - settings.new_tokens)


def _loads(
    models: Sequence[str],
    device: str,
    dtype: str,
    loaded: dict[str, LanguageModel],
    advance: Advance,
) -> dict[str, list[float]]:
    """Load each model some times, in turn; the last ones stay in ``loaded``."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(LOADS):
        for name in models:
            loaded.pop(name, None)
            begin = time.perf_counter()
            loaded[name] = load_model(name, device=device, dtype=dtype)
            # Those of a folder are pages of its files until they are read.
            for parameter in loaded[name].model.parameters():
                parameter.detach().sum(dtype=torch.float32).item()
            seconds[name].append(time.perf_counter() - begin)
            advance(1)
    return seconds


def _size(path: Path) -> int:
    """Bytes of a model's files; 0 of one on the hub."""
    path = path.expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0


def _semi_structured(
    side: Side, loaded_as: torch.dtype, device: str, dtype: str
) -> tuple[LanguageModel, Side] | None:
    path = Path(side.name).expanduser()
    if loaded_as is torch.float32 or not (path.is_dir() or is_packed(path)):
        return None
    model = load_model(side.name, device=device, dtype=dtype)
    done = convert_(model, path)
    if not done.converted:
        return None
    linears = len(done.converted) + len(done.left)
    note = f"{len(done.converted)} of {linears} linears run as 2:4"
    return model, Side(name=f"{side.name}, 2:4", bytes=side.bytes, note=note, load_s=side.load_s)


def _run(model: LanguageModel, settings: BenchSettings) -> tuple[float, float]:
    """Seconds to read the prompts, the first token included, and to write the others after it."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch, settings.prompt)
    tokens = torch.randint(model.vocabulary, shape, generator=generator).to(model.device)
    count = 1 + settings.new_tokens
    times: list[float] = []

    def tell(_tokens: Tensor, _scores: Tensor, **_more: object) -> Tensor:
        times.append(_now(model.device))
        return torch.zeros(settings.batch, dtype=torch.bool, device=model.device)

    begin = _now(model.device)
    network: Any = model.model
    network.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,  # the end of a text is not the end of the measurement
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[tell],
    )
    return times[0] - begin, times[-1] - times[0]


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _conditions(device: torch.device, dtypes: Sequence[str]) -> list[str]:
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    used = ", ".join(f"{k} {v}" for k, v in versions("torch", "transformers").items())
    return [
        f"{conditions()}{gpu}; {torch.get_num_threads()} threads",
        f"{', '.join(dtypes)}; {used}",
    ]
