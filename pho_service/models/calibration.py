"""
From a model and a text to a proxy bundle, within the memory that is there.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pho_service.errors import BundleError, InvalidInput, OutOfMemory, OutputError, field_name
from pho_service.host.machine import first_words, let_go_of_memory, ran_out_of_memory, versions
from pho_service.models.architecture import decoder_blocks, footprint_of
from pho_service.models.blockwise import (
    collect_statistics_blockwise,
    measure_perplexity,
    told_by_block,
)
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.loading import LanguageModel
from pho_service.models.scratch import Record, scratch_folder
from pho_service.models.texts import (
    MixedText,
    Text,
    TextRecord,
    apart,
    record_to_dict,
    sample_windows,
)
from pho_service.planning.stage_memory import (
    CalibrationPlan,
    CalibrationRun,
    Footprint,
    Place,
    block_inputs,
    choose_run,
)
from pho_service.progress import Advance, Progress, silent
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.hardware import available_memory, free_memory, memory_in_use
from pho_service.pruning.statistics import APART, Collector, Statistics, Sums, gather
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.document import format_bytes

logger = logging.getLogger(__name__)

USED = 0.9  # of what is free; the rest is lost between blocks of torch's allocator

T = TypeVar("T")


def plan_calibration(
    model: LanguageModel, settings: CalibrationSettings, *, windows: int, fisher_windows: int
) -> CalibrationPlan:
    """The fastest plan that fits into ``settings.memory_bytes``, or, without it, into a GPU."""
    # What torch's allocator holds and no tensor uses counts as free. For a model on several GPUs
    # the memory of all counts, since each has about as many blocks.
    footprint = footprint_of(model.model)
    place = Place(on_gpu=model.device.type == "cuda", stream=model.stream)
    in_use = sum(map(memory_in_use, model.devices))
    loaded = 0 if model.stream else footprint.weights  # of what is in use
    limit, size, host_limit = settings.memory_bytes, None, None
    if place.on_gpu:
        size = sum(torch.cuda.mem_get_info(device)[1] for device in model.devices)
        if limit is None:
            limit = in_use + int(USED * free_for(model))
        host_limit = available_memory()
    ours = None if limit is None else limit - in_use + loaded
    plan = choose_run(
        footprint, settings, place, windows=windows, fisher_windows=fisher_windows,
        device_limit=ours if place.on_gpu else None,
        host_limit=host_limit if place.on_gpu else ours,
        device_size=size,
    )  # fmt: skip
    if plan.fits:
        return plan
    needed = plan.peak.device if place.on_gpu else plan.peak.host
    what, needed, used, allowed = "memory", needed - loaded + in_use, in_use, limit
    if host_limit is not None and plan.peak.host > host_limit:
        what, needed, used, allowed = "main memory", plan.peak.host, 0, host_limit
    assert allowed is not None  # with no limit the first plan is taken
    ways = _ways_out(footprint, settings, place, ours or 0, fisher_windows)
    raise InvalidInput(
        f"the calibration of {model.name} on windows of {settings.context_length} tokens needs up "
        f"to {format_bytes(needed)} of {what}, {format_bytes(used)} of them in use already, but "
        f"may take {format_bytes(allowed)}. {ways}"
    )


def would_fit(model: LanguageModel, settings: CalibrationSettings, *, fisher_windows: int) -> str:
    """What would fit, in words, where a plan that should have fitted ran out of memory."""
    footprint = footprint_of(model.model)
    place = Place(on_gpu=model.device.type == "cuda", stream=model.stream)
    limit = free_for(model)
    limit += 0 if model.stream else footprint.weights
    return _ways_out(footprint, settings, place, limit, fisher_windows)


def free_for(model: LanguageModel) -> int:
    """Bytes that a model's GPUs have for work that each does as much of: the fullest one counts."""
    if model.device.type != "cuda":
        return available_memory()
    return len(model.devices) * min(map(free_memory, model.devices))


def _ways_out(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    limit: int,
    fisher_windows: int,
) -> str:
    def fits(changed: CalibrationSettings) -> bool:
        plan = choose_run(
            footprint, changed, place, windows=changed.samples, fisher_windows=fisher_windows,
            device_limit=limit if place.on_gpu else None,
            host_limit=None if place.on_gpu else limit,
        )  # fmt: skip
        return plan.fits

    ways = [f"allow it more ({field_name('calibration/memory_bytes')})"]
    shorter = settings.context_length // 2
    while shorter >= 64 and not fits(replace(settings, context_length=shorter)):
        shorter //= 2
    if shorter >= 64:
        ways.append(f"take shorter windows ({field_name('calibration/context_length', shorter)})")
    if not settings.projection_rows and fits(replace(settings, projection_rows=128)):
        ways.append(f"project the activations ({field_name('calibration/projection_rows', 128)})")
    if not place.stream:
        ways.append(f"leave the weights on disk ({field_name('stream', True)}, for safetensors)")
    else:
        counts = f"{field_name('calibration/samples')}, {field_name('calibration/fisher_samples')}"
        ways.append(f"take fewer windows ({counts})")
    return f"A{', or '.join(ways)[1:]}."


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some of a calibration's windows, whose sums are gathered together."""

    windows: Tensor  # (windows, context_length), int64; those that are run backward too come first
    fisher_windows: int  # How many of them are
    seed: int  # Seed of the random projection


@dataclass(frozen=True, kw_only=True)
class CalibrationTry:
    """One try at a calibration."""

    model: LanguageModel
    settings: CalibrationSettings
    plan: CalibrationRun
    fisher_windows: int
    progress: Progress

    def products(self) -> AbstractContextManager[None]:
        """Inside, matrix products are in the precision that is asked for."""
        return torch.autocast(
            self.model.device.type, dtype=torch.bfloat16, enabled=self.settings.mixed_precision
        )

    def gather(self, shard: Shard, advance: Advance) -> Collector:
        blocks = [block for _, block in decoder_blocks(self.model.model)]
        with self.products(), told_by_block(self.model, advance) as end:
            return gather(
                self.model.model,
                self.model.linears,
                shard.windows,
                fisher_windows=shard.fisher_windows,
                projection_rows=self.settings.projection_rows,
                seed=shard.seed,
                batch_windows=self.plan.windows,
                forward_windows=self.plan.forward_windows,
                recompute=blocks if self.plan.recompute else (),
                advance=end,
            )


def _within_memory(
    model: LanguageModel,
    text: "CalibrationText",
    settings: CalibrationSettings,
    progress: Progress,
    run: Callable[[CalibrationTry], T],
) -> T:
    """Run over a text's windows, planned to fit; if it does not, once more in small pieces."""
    if settings.mixed_precision and model.dtype != torch.float32:
        raise InvalidInput(
            f"mixed precision is for float32 models, but {model.name} is loaded as "
            f"{str(model.dtype).removeprefix('torch.')}, which is as fast. Leave "
            f"{field_name('calibration/mixed_precision')} out."
        )
    windows, fisher_windows = len(text.calibration), _fisher_windows(text, settings)
    plan = plan_calibration(model, settings, windows=windows, fisher_windows=fisher_windows)
    logger.info("calibration planned", extra={**asdict(plan.run), **asdict(plan.peak)})
    how, smaller = plan.run, plan.run.halved()
    while True:
        try:
            return run(
                CalibrationTry(
                    model=model, settings=settings, plan=how, fisher_windows=fisher_windows,
                    progress=progress,
                )
            )  # fmt: skip
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            if smaller is None:
                ways = would_fit(model, settings, fisher_windows=fisher_windows)
                raise OutOfMemory(
                    f"the calibration of {model.name} on windows of {settings.context_length} "
                    f"tokens ran out of memory{first_words(error)}. {ways}"
                ) from error
        # After the error, which holds on to what was computed.
        logger.warning("memory ran out: calibrating in smaller pieces", extra=asdict(smaller))
        how, smaller = smaller, None
        let_go_of_memory()


ALGORITHM = 2  # goes up when the same settings give a bundle other numbers
DENSE_TOKENS = 512  # that tell whether the dense model predicts anything at all
HELD_OUT = 16  # windows that are drawn besides, to confirm candidates with


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """The windows that a model is calibrated on, and some that were held out."""

    calibration: Tensor  # (samples or fewer, context_length), int64
    beside: Tensor  # (up to 16, context_length), int64: other windows of the same text
    record: TextRecord  # The text
    # Names the bundle that these windows and settings give: hash of the model's weights, the
    # windows, the settings and the version of the algorithm.
    bundle_key: str

    @cached_property
    def held_out(self) -> Tensor:
        """
        (up to 16, context_length), int64: those of ``beside`` without a passage that is among the
        calibration's; empty if the text had no more.
        """
        return apart(self.beside, self.calibration)


def calibration_text(
    model: LanguageModel, source: Text | MixedText, settings: CalibrationSettings
) -> CalibrationText:
    windows, record = drawn_windows(model, source, settings)
    calibration = windows[: settings.samples]
    shards = settings.shards(stream=model.stream)
    identity = [
        ALGORITHM,
        model.weights_sha256,
        str(model.dtype),
        model.device.type,
        settings.to_dict(),
        versions("torch", "transformers"),
        *(["streamed"] if model.stream else []),  # the same but for the last digits of sums
        *([f"{shards} shards"] if shards > 1 else []),  # other signs, in another order of sums
    ]
    digest = hashlib.sha256(json.dumps(identity).encode())
    digest.update(calibration.contiguous().numpy().tobytes())
    return CalibrationText(
        calibration=calibration,
        beside=windows[settings.samples :],
        record=record,
        bundle_key=digest.hexdigest(),
    )


def drawn_windows(
    model: LanguageModel, source: Text | MixedText, settings: CalibrationSettings
) -> tuple[Tensor, TextRecord]:
    """Draw the windows of a calibration, and after them those that are held out."""
    return sample_windows(
        model,
        source,
        count=settings.samples,
        beside=HELD_OUT,
        context_length=settings.context_length,
        bos=settings.bos,
        seed=settings.seed,
    )


def cut(text: CalibrationText, settings: CalibrationSettings, *, stream: bool) -> list[Shard]:
    """The shards of a calibration, in the order in which their sums are added up."""
    windows = text.calibration
    fisher = _fisher_windows(text, settings)
    count = min(settings.shards(stream=stream), len(windows))
    return [
        Shard(
            windows=windows[number::count],
            fisher_windows=len(range(number, fisher, count)),
            seed=settings.seed + number * APART,
        )
        for number in range(count)
    ]


def measure(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress = silent,
    stored_sums: Callable[[int], Sums | None] = lambda _: None,
) -> Statistics:
    """Run the dense model once over the calibration windows."""
    # Where memory runs out although the plan said that it is enough, half as many windows are run
    # at once, or the activations are computed again instead of kept; that is tried once.
    shards = cut(text, settings, stream=model.stream)

    def run(how: CalibrationTry) -> Statistics:
        count = len(text.calibration)
        if model.stream:
            return _measured_blockwise(how, text)
        with how.progress("Calibrating the dense model", count) as advance:
            if len(shards) == 1:
                total = how.gather(shards[0], advance)
            else:
                total = Collector(model.linears, settings.projection_rows, settings.seed)
                for number, shard in enumerate(shards):
                    sums = stored_sums(number)
                    if sums is None:
                        sums = how.gather(shard, advance).sums()
                    else:
                        advance(len(shard.windows))
                    total.add(sums)
        return total.statistics(text.calibration)

    return _within_memory(model, text, settings, progress, run)


def measure_shard(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    number: int,
    progress: Progress = silent,
) -> Sums:
    """Run the dense model over the windows of one shard, for :func:`measure` to add up."""
    shard = cut(text, settings, stream=model.stream)[number]

    def run(how: CalibrationTry) -> Sums:
        with how.progress(f"Calibrating, shard {number}", len(shard.windows)) as advance:
            return how.gather(shard, advance).sums()

    return _within_memory(model, text, settings, progress, run)


def sums_record(sums: Sums) -> Record:
    """The sums of a shard as they are kept until the bundle is made."""
    return Record(
        values={
            "readers": sums.readers,
            "input_of": sums.input_of,
            "gradient_tokens": {name: sums.gradient_tokens[name] for name in sums.fisher},
        },
        tensors={
            **{f"squares.{i}": tensor for i, tensor in enumerate(sums.squares)},
            **{f"moments.{i}": tensor for i, tensor in enumerate(sums.moments)},
            **{f"fisher.{name}": tensor for name, tensor in sums.fisher.items()},
        },
    )


def sums_of(record: Record) -> Sums:
    # Copies: a map of a file dies with the process if the file shrinks.
    tensors = {name: tensor.clone() for name, tensor in record.tensors.items()}
    inputs = range(len(record.values["readers"]))
    return Sums(
        **record.values,
        squares=[tensors[f"squares.{i}"] for i in inputs],
        moments=[tensors[f"moments.{i}"] for i in inputs],
        fisher={name: tensors[f"fisher.{name}"] for name in record.values["gradient_tokens"]},
    )


def _measured_blockwise(how: CalibrationTry, text: CalibrationText) -> Statistics:
    model = how.model
    blocks = len(decoder_blocks(model.model))
    steps = blocks * (len(text.calibration) + how.fisher_windows)
    title = "Calibrating the dense model, block by block"
    spill = None
    if how.plan.spill:
        footprint, tokens = footprint_of(model.model), how.settings.context_length
        spill = scratch_folder(block_inputs(footprint, tokens, how.fisher_windows))
    with how.progress(title, steps) as advance, how.products():
        return collect_statistics_blockwise(
            model,
            text.calibration,
            fisher_windows=how.fisher_windows,
            projection_rows=how.settings.projection_rows,
            seed=how.settings.seed,
            spill=spill,
            states_on_device=how.plan.states_on_device,
            advance=advance,
        )


def _fisher_windows(text: CalibrationText, settings: CalibrationSettings) -> int:
    samples = settings.fisher_samples or max(1, settings.samples // 4)
    return min(samples, len(text.calibration))


def calibrate(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    progress: Progress = silent,
    stored_sums: Callable[[int], Sums | None] = lambda _: None,
) -> ProxyBundle:
    """Make the proxy bundle of a model: one pass of the dense model, then a sample of rows."""
    statistics = measure(model, text, settings, progress, stored_sums)
    with progress("Sampling rows", len(model.linears)) as advance:
        return sample_bundle(
            model.linears,
            statistics,
            rows_per_layer=settings.rows_per_layer,
            kernel_sizes=tuple(sorted(set(settings.kernel_sizes))),
            seed=settings.seed,
            provenance={
                "key": text.bundle_key,
                "model": model.to_dict(),
                "text": record_to_dict(text.record, windows=len(text.calibration)),
                "settings": settings.to_dict(),
                "dense": _dense(model, text),
                "prefix": model.window_prefix(settings.bos),
                "device": model.device.type,
                "versions": versions("torch", "transformers"),
            },
            advance=advance,
        )


def _dense(model: LanguageModel, text: CalibrationText) -> dict[str, Any]:
    """The dense model's perplexity on the first windows, beside chance: its vocabulary."""
    count = max(1, DENSE_TOKENS // text.calibration.shape[1])
    rating = measure_perplexity(model, text.calibration[:count])
    return {
        "perplexity": rating.perplexity,
        "tokens": rating.tokens,
        "vocabulary": model.model.config.get_text_config().vocab_size,
    }


def bundle_path(cache_dir: Path, key: str) -> Path:
    return cache_dir.expanduser() / "bundles" / f"{key}.safetensors"


def kept_bundle(cache_dir: Path, key: str) -> ProxyBundle:
    path = bundle_path(cache_dir, key)
    bundle = read_bundle(path)
    if bundle.key != key:
        raise BundleError(
            f"the bundle {path.name} is another one, {bundle.key[:12]}: somebody has renamed or "
            "replaced it. Delete the file; it is made again."
        )
    return bundle


def cached_bundle(
    model: LanguageModel,
    text: CalibrationText,
    settings: CalibrationSettings,
    cache_dir: Path,
    progress: Progress = silent,
    stored_sums: Callable[[int], Sums | None] = lambda _: None,
) -> ProxyBundle:
    """Calibrate, or take the bundle of an earlier calibration with the same inputs."""
    # The file's name is the hash of weights, windows, settings and versions, so a bundle in the
    # cache is never stale.
    path = bundle_path(cache_dir, text.bundle_key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {path.parent} cannot be made: {error.strerror}. Set PHO_CACHE_DIR."
        ) from error
    if path.is_file():
        try:
            return kept_bundle(cache_dir, text.bundle_key)
        except BundleError:
            path.unlink()  # a damaged copy: what was stored is made again
    bundle = calibrate(model, text, settings, progress, stored_sums)
    model.check_unchanged()
    write_bundle(bundle, path)
    return kept_bundle(cache_dir, text.bundle_key)  # exactly what the next search will see
