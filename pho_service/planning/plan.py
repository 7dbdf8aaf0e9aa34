"""
What a job needs: peaks of memory and disk, seconds of each stage, and what would make it fit.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pho_service.errors import InvalidInput, field_name
from pho_service.planning.costs import Machine, Work, recovered_tokens, stage_seconds
from pho_service.planning.shapes import DTYPE_BYTES, ModelShapes
from pho_service.planning.stage_memory import (
    MOST,
    CalibrationPlan,
    Footprint,
    Peak,
    Place,
    choose_run,
    confirmation_peak,
    pruning_peak,
    recovery_peak,
    saving_peak,
    shapes_footprint,
    windows_at_once,
)
from pho_service.spec.curve import first_of_kinds
from pho_service.spec.document import format_bytes
from pho_service.spec.job import JobSpec
from pho_service.spec.steps import Steps

PROCESS = 2**30  # Python with torch and transformers, before any model; thrice with CUDA
CONTEXT = 2**30  # what a CUDA context and its libraries take of a card
FREE = 0.95  # of a card that can be used: the rest is lost between blocks
# What `pho pack` leaves of a kept weight's sign and exponent and of a removed weight, in bytes, in
# bfloat16.
PACKED_BYTE, PACKED_ZERO = 0.53, 0.36
# Stages, by their titles up to the first comma: at each pattern, and what ends in a pruned model.
SEARCHING = ("search", "correct", "validate", "confirm by perplexity")
PRUNING = ("prune", "recover", "save")
_CARDS = (2, 4, 8, 16)  # of a machine
SEARCHED = 3  # times its bundle that a search holds at its peak


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Time and memory of one stage."""

    title: str  # What is done
    seconds: tuple[float, float]  # At least and at most
    peak: Peak  # Bytes at its peak, the model and the process included


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time and memory of a job on a machine."""

    shapes: ModelShapes  # Shapes of the model
    machine: Machine  # Where
    work: Work  # What is asked for
    calibration: CalibrationPlan  # How the calibration would be run
    stages: tuple[StagePlan, ...]  # In their order
    obstacles: tuple[str, ...]  # Why it does not fit; none if it does
    ways_out: tuple[str, ...] = ()  # What would make it fit, as options

    @property
    def fits(self) -> bool:
        """Tell whether the machine has the memory for it."""
        return not self.obstacles

    @property
    def peak(self) -> Peak:
        peaks = [stage.peak for stage in self.stages]
        return Peak(
            device=max(p.device for p in peaks),
            host=max(p.host for p in peaks),
            disk=sum(p.disk for p in peaks),
        )

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of all stages together, at least and at most."""
        low, high = zip(*(stage.seconds for stage in self.stages), strict=True)
        return sum(low), sum(high)

    @property
    def pruned_bytes(self) -> tuple[int, int]:
        """Size of the pruned weights and masks, as they are saved and as they are packed."""
        shapes, bits = self.shapes, self.shapes.prunable // 8  # one for each weight
        kept = shapes.parameters - self.work.pattern.sparsity * shapes.prunable
        packed = kept * (DTYPE_BYTES[shapes.dtype] - 1 + PACKED_BYTE)
        packed += (shapes.parameters - kept) * PACKED_ZERO
        return shapes.bytes() + bits, round(packed) + bits

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, those of ``POST /v1/plan``."""
        saved, packed = self.pruned_bytes
        return {
            "model": {
                "family": self.shapes.family,
                "parameters": self.shapes.parameters,
                "prunable": self.shapes.prunable,
                "dtype": self.work.dtype,
                "weights_bytes": self.shapes.bytes(self.work.dtype),
                "context_length": self.shapes.context,
            },
            "machine": self.machine.to_dict(),
            "fits": self.fits,
            "obstacles": list(self.obstacles),
            "ways_out": list(self.ways_out),
            "stream": self.work.stream,
            "windows_at_once": self.calibration.run.windows,
            "recompute": self.calibration.run.recompute,
            "peak": asdict(self.peak),
            "pruned": {"saved_bytes": saved, "packed_bytes": packed},
            "seconds": list(self.seconds),
            "stages": [
                {"title": s.title, "seconds": list(s.seconds), "peak": asdict(s.peak)}
                for s in self.stages
            ],
        }


def plan_job(spec: JobSpec, shapes: ModelShapes, machine: Machine) -> Plan:
    """Plan a search job, and what would make it fit if it does not."""
    if spec.several:
        return _of_several(spec, shapes, machine)
    settings = spec.calibration.fitted(shapes.context).settings()
    if shapes.context is not None and settings.context_length > shapes.context:
        raise InvalidInput(
            f"context_length={settings.context_length} is more than {spec.model} can read: "
            f"{shapes.context}. Use {field_name('calibration/context_length', shapes.context)} or "
            "less."
        )
    request, finalists = spec.request(0), spec.confirm.finalists if spec.confirm else 0
    work = Work(
        calibration=settings,
        pattern=request.pattern,
        steps=request.steps,
        trials=spec.trials * spec.islands,
        finalists=finalists,
        in_full=request.pruned_in_full(finalists, request.pattern),
        windows=spec.confirm.windows if spec.confirm else 0,
        dtype=_dtype(spec, shapes, machine),
        stream=spec.stream,
        corrections=spec.corrections,
        validated=spec.validation.candidates if spec.validation else 0,
        by_perplexity=spec.objective.name == "perplexity",
        recovery=None if spec.recovery is None else spec.recovery.settings(),
        kept=bool(spec.prune and spec.confirm and request.steps.reconstruction.wanted),
    )
    for width in {linear.in_features for linear in shapes.linears}:
        work.pattern.check_width(width, spec.model)
    plan = _plan(shapes, work, machine)
    return plan if plan.fits else replace(plan, ways_out=tuple(_ways_out(plan)))


def _of_several(spec: JobSpec, shapes: ModelShapes, machine: Machine) -> Plan:
    """
    The plan of a job with several patterns: what is done at each of them takes as long as at the
    first of its kind. The model that is pruned in the end is that of the first.
    """
    points, kinds = spec.points, first_of_kinds(spec.points)
    one = spec.model_copy(update={"prune": False})  # nothing is kept of so many winners
    plans = [plan_job(one.of_pattern(each), shapes, machine) for each in kinds]
    for width in {linear.in_features for linear in shapes.linears}:
        for each in points:
            each.check_width(width, spec.model)
    counts = [sum(bool(p.group) == bool(kind.group) for p in points) for kind in kinds]
    if spec.target is not None:
        counts = [spec.most_points]
    stages = []
    for alike in zip(*(plan.stages for plan in plans), strict=True):
        repeated = alike[0].title.partition(",")[0] in SEARCHING
        times = counts if repeated else [1] + [0] * (len(plans) - 1)
        low, high = (
            sum(n * stage.seconds[end] for n, stage in zip(times, alike, strict=True))
            for end in (0, 1)
        )
        title = alike[0].title
        stages.append(
            replace(
                max(alike, key=lambda stage: stage.peak.device + stage.peak.host),
                title=f"{title}, at each of {sum(counts)} patterns" if repeated else title,
                seconds=(low, high),
            )
        )
    lacking = next((plan for plan in plans if not plan.fits), plans[0])
    return replace(lacking, stages=tuple(stages))


def _dtype(spec: JobSpec, shapes: ModelShapes, machine: Machine) -> str:
    """As a model is loaded: what is stored on a GPU and where it is streamed, float32 on a CPU."""
    if spec.dtype != "auto":
        return spec.dtype
    return shapes.dtype if machine.is_gpu or spec.stream else "float32"


def _plan(shapes: ModelShapes, work: Work, machine: Machine) -> Plan:
    footprint = shapes_footprint(shapes, work.dtype)
    place = Place(on_gpu=machine.is_gpu, stream=work.stream)
    card = int(FREE * machine.memory_bytes) - CONTEXT if machine.is_gpu else None
    calibration = choose_run(
        footprint, work.calibration, place,
        windows=work.calibration.samples, fisher_windows=work.fisher_samples,
        device_limit=card, host_limit=machine.main_bytes - PROCESS,
        device_size=machine.memory_bytes if machine.is_gpu else None,
    )  # fmt: skip
    work = replace(work, batch=calibration.run.windows)
    peaks = _peaks(footprint, place, work, calibration, card, DTYPE_BYTES[shapes.dtype])
    if work.recovery is not None:
        plain = replace(work, recompute=work.recovery.train == "lora")
        peak = _with_process(_recovery(footprint, shapes, plain, machine), machine)
        if peak.device <= machine.memory_bytes and peak.host <= machine.main_bytes:
            work = plain
        peaks["recover"] = _recovery(footprint, shapes, work, machine)
    stages = tuple(
        StagePlan(
            title=title,
            seconds=(took / machine.uncertainty, took * machine.uncertainty),
            peak=_with_process(peaks[title.partition(",")[0]], machine),
        )
        for title, took in stage_seconds(shapes, work, machine).items()
    )
    return Plan(
        shapes=shapes,
        machine=machine,
        work=work,
        calibration=calibration,
        stages=stages,
        obstacles=tuple(_obstacles(stages, machine)),
    )


def _recovery(
    footprint: Footprint, shapes: ModelShapes, work: Work, machine: Machine, processes: int = 1
) -> Peak:
    assert work.recovery is not None
    return recovery_peak(
        footprint, Place(on_gpu=machine.is_gpu, stream=work.stream), work.recovery,
        tokens=work.calibration.context_length, asked=recovered_tokens(shapes, work, machine),
        processes=processes, recompute=work.recompute,
    )  # fmt: skip


def _with_process(peak: Peak, machine: Machine) -> Peak:
    device = int((peak.device + CONTEXT) / FREE) if machine.is_gpu else 0
    return replace(peak, device=device, host=peak.host + PROCESS * (3 if machine.is_gpu else 1))


def _peaks(
    footprint: Footprint,
    place: Place,
    work: Work,
    calibration: CalibrationPlan,
    card: int | None,
    stored_itemsize: int,
) -> dict[str, Peak]:
    """What each stage holds, by its title, without the process and the card's context."""
    settings = work.calibration
    block = max(sizes.weights for sizes in footprint.blocks)
    loaded = Peak.at(place, device=block if work.stream else footprint.weights, host=0)
    bundle = footprint.bundle(settings)
    searching = Place(on_gpu=place.on_gpu)
    streams = 1 + work.steps.reconstruction.wanted
    pruning = pruning_peak(
        footprint, place, work.steps,
        windows=settings.samples, tokens=settings.context_length, keep_dense=False,
        states_on_device=_stay(footprint, place, streams * settings.samples, work, card),
    )  # fmt: skip
    peaks = {
        "read the model": loaded,
        "hash the weights": loaded,
        "calibrate": calibration.peak,
        "search": Peak.at(searching, device=SEARCHED * bundle, host=bundle),
        "prune": pruning,
        "save": saving_peak(footprint, place, stored_itemsize=stored_itemsize),
    }
    if work.kept:  # weights and masks, of a byte each
        trained = footprint.prunable * (stored_itemsize + 1)
        peaks["prune"] = replace(pruning, disk=pruning.disk + trained)
    if work.corrections:
        rated = replace(work, steps=work.steps.rated, windows=1)
        measured = _confirmation(footprint, place, rated, card)
        run_back = footprint.backward(settings.context_length, 1, recompute=True)
        on_gpu, on_cpu = (run_back, 0) if place.on_gpu else (0, run_back)
        peaks["correct"] = replace(
            measured, device=measured.device + on_gpu, host=measured.host + on_cpu
        )
    if work.finalists:
        peaks["confirm by perplexity"] = _confirmation(footprint, place, work, card)
        peaks["validate"] = peaks["confirm by perplexity"]
        if work.by_perplexity:
            peaks["search"] = peaks["search"].with_(peaks["validate"])
    return peaks


def _confirmation(footprint: Footprint, place: Place, work: Work, card: int | None) -> Peak:
    """Return the peak for a candidate that is pruned, measured and made dense again."""
    settings = work.calibration
    if work.steps.needs_text:
        streams = 1 + work.steps.reconstruction.wanted
        pruned = pruning_peak(
            footprint, place, work.steps,
            windows=settings.samples, tokens=settings.context_length, keep_dense=True,
            states_on_device=_stay(footprint, place, streams * settings.samples, work, card),
        )  # fmt: skip
        scores = replace(work, steps=Steps(linears=work.steps.linears))  # Wanda and RIA
        return pruned.with_(_confirmation(footprint, place, scores, card))
    most = 1
    if card is not None and not place.stream:
        logits = settings.context_length * footprint.vocabulary
        most = windows_at_once(logits, device_size=card, weights=footprint.weights, most=MOST)
    peaks = [
        confirmation_peak(
            footprint, place, tokens=settings.context_length, windows=work.windows,
            at_once=min(at_once, work.windows), sparsity=work.pattern.sparsity,
            removed_on_device=on_device,
            states_on_device=_stay(footprint, place, work.windows, work, card),
        )
        for at_once, on_device in ((most, True), (most, False), (1, False))
    ]  # fmt: skip
    return next((peak for peak in peaks if card is None or peak.device <= card), peaks[-1])


def _stay(footprint: Footprint, place: Place, windows: int, work: Work, card: int | None) -> bool:
    if card is None:
        return False
    free = card - (0 if place.stream else footprint.weights)
    return footprint.states(windows, work.calibration.context_length) <= free // 4


def _obstacles(stages: tuple[StagePlan, ...], machine: Machine) -> Iterator[str]:
    """The stages that need more than there is, in words."""
    for place, has in (("device", machine.memory_bytes), ("host", machine.main_bytes)):
        if place == "device" and not machine.is_gpu:
            continue
        stage = max(stages, key=lambda s: getattr(s.peak, place))
        needed = getattr(stage.peak, place)
        if needed > has:
            where = f"the {machine.name}" if place == "device" else "main memory"
            yield (
                f"{stage.title}: {format_bytes(needed)} of {where} are needed, and it has "
                f"{format_bytes(has)}"
            )


def _ways_out(plan: Plan) -> Iterator[str]:
    """Changes that make it fit, each tried; the mildest first."""
    work, settings, machine = plan.work, plan.work.calibration, plan.machine

    def fits(**changes: Any) -> bool:
        return _plan(plan.shapes, replace(work, **changes), machine).fits

    projected = replace(settings, projection_rows=128)
    if not settings.projection_rows and fits(calibration=projected):
        yield f"project the activations ({field_name('calibration/projection_rows', 128)})"
    shorter = settings.context_length // 2
    while shorter >= 64 and not fits(calibration=replace(settings, context_length=shorter)):
        shorter //= 2
    if shorter >= 64:
        yield f"take shorter windows ({field_name('calibration/context_length', shorter)})"
    if DTYPE_BYTES[work.dtype] > 2 and not work.stream and fits(dtype="bfloat16"):
        yield f"load it in 16 bits ({field_name('dtype', 'bfloat16')})"
    recovery = work.recovery
    if recovery is not None and fits(recovery=replace(recovery, adam_bits=8)):
        yield f"let Adam remember 8 bits a number ({field_name('recovery/adam_bits', 8)})"
    # The experts of a block lie in one parameter: neither low-rank changes nor processes part it.
    parts = all(linear.share == 1 for linear in plan.shapes.linears)
    if recovery is not None and parts and fits(recovery=replace(recovery, train="lora")):
        yield f"train a low-rank change of each linear ({field_name('recovery/train', 'lora')})"
    streamed = {"stream": True, "dtype": plan.shapes.dtype}
    for option, changes in (("", {}), (f" and with {field_name('stream', True)}", streamed)):
        if recovery and parts and machine.is_gpu and fits(recovery=None, **changes):
            yield from _afterwards(plan, option)
            break
    if not work.stream and recovery is None and fits(stream=True, dtype=plan.shapes.dtype):
        yield f"leave the weights on disk ({field_name('stream', True)}, for safetensors)"
    if not work.stream and machine.is_gpu:
        for cards in _CARDS:
            together = machine.resized(cards * machine.memory_bytes)
            if _plan(plan.shapes, work, together).fits:
                way = field_name("device_map", "auto") or "`pho worker --device all`"
                yield f"spread it over {cards} such cards ({way})"
                break
    device, host = plan.peak.device, plan.peak.host
    if machine.is_gpu and device > machine.memory_bytes:
        yield f"take a card with {format_bytes(device)}"
    if host > machine.main_bytes:
        yield f"take a machine with {format_bytes(host)} of main memory"


def _afterwards(plan: Plan, option: str) -> Iterator[str]:
    """The fewest processes that a recovery fits, each with such a card."""
    footprint = shapes_footprint(plan.shapes, plan.work.dtype)
    for count in _CARDS:
        peak = _recovery(footprint, plan.shapes, plan.work, plan.machine, count)
        if _with_process(peak, plan.machine).device <= plan.machine.memory_bytes:
            host = format_bytes(peak.host + 3 * count * PROCESS)
            yield (
                f"prune without the recovery{option}, and recover the folder on {count} such cards "
                f"and {host} of main memory (torchrun --nproc-per-node {count} -m pho_service "
                "recover)"
            )
            return


def format_span(low: float, high: float) -> str:
    """Two times in one unit: ``under 1 s``, ``7 to 30 s``, ``2 to 8 min``, ``1.3 to 5.0 h``."""
    if high < 1:
        return "under 1 s"
    if high < 120:
        return f"{low:.0f} to {high:.0f} s"
    if high < 7200:
        return f"{low / 60:.0f} to {high / 60:.0f} min"
    return f"{low / 3600:.1f} to {high / 3600:.1f} h"
