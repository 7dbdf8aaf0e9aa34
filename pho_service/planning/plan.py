"""
What a job needs: peaks of memory and disk, seconds of each stage, and what would make it fit.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput, field_name
from pho_service.planning.costs import Costs, Machine, PlannedWork
from pho_service.planning.minutes import fitted, least_in_rest, sentence
from pho_service.planning.shapes import DTYPE_BYTES, ModelShapes
from pho_service.planning.stage_memory import (
    MOST,
    CalibrationPlan,
    Peak,
    Place,
    choose_run,
    confirmation_peak,
    cut_peak,
    pruning_peak,
    recovery_peak,
    saving_peak,
    shapes_footprint,
    windows_at_once,
)
from pho_service.spec.curve import first_of_kinds
from pho_service.spec.document import format_bytes
from pho_service.spec.export import file_bytes
from pho_service.spec.job import JobSpec
from pho_service.spec.minutes import OF_THE_TEXT
from pho_service.spec.recovery import Recovery
from pho_service.spec.steps import Steps
from pho_service.spec.structure import check_fewest
from storage.records import StageKind

PROCESS = 3 * 2**28  # Python with torch and transformers, before any model
_WITH_CUDA = 3 * 2**30  # the same with CUDA's libraries
CONTEXT = 2**30  # what a CUDA context and its libraries take of a card
FREE = 0.95  # of a card that can be used: the rest is lost between blocks
# What `pho pack` leaves of a kept weight's sign and exponent and of a removed weight, in bytes, in
# bfloat16.
PACKED_BYTE, PACKED_ZERO = 0.53, 0.36
# What people call the steps of a search, by the kinds of its stages.
STEPS = {
    StageKind.CALIBRATE: "calibrate", StageKind.SEARCH: "search", StageKind.POINT: "search",
    StageKind.PERPLEXITY: "confirm", StageKind.FINISH: "confirm", StageKind.PRUNE: "write",
}  # fmt: skip
RECOVER = "recover"  # the title of a stage
# What is done at each pattern.
_SEARCHING = {StageKind.POINT, StageKind.SEARCH, StageKind.CONFIRM, StageKind.PERPLEXITY}
_CARDS = (2, 4, 8, 16)  # of a machine
SEARCHED = 3  # times its bundle that a search holds at its peak


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Time and memory of one thing that a stage does."""

    kind: StageKind
    title: str  # What is done, and how often
    seconds: tuple[float, float]  # At least and at most
    peak: Peak  # Bytes at its peak, the model and the process included


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time and memory of a job on a machine."""

    spec: JobSpec  # The job, with the sizes that its minutes chose
    shapes: ModelShapes  # Shapes of the model
    machine: Machine  # Where
    work: PlannedWork  # What is asked for
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
    def costs(self) -> Costs:
        """Seconds of single steps."""
        return Costs(self.shapes, self.work, self.machine)

    @property
    def steps(self) -> dict[str, float]:
        """Seconds of what the job does itself, by :data:`STEPS`, in the middle."""
        steps: dict[str, float] = {}
        for stage in self.stages:
            name = RECOVER if stage.title == RECOVER else STEPS[stage.kind]
            if self.spec.prune or stage.kind is not StageKind.PRUNE:
                steps[name] = steps.get(name, 0.0) + math.sqrt(math.prod(stage.seconds))
        return steps

    def own_seconds(self, *, calibrated: bool = False) -> float:
        """Seconds of what the job does itself, in the middle, without a calibration behind it."""
        behind = STEPS[StageKind.CALIBRATE] if calibrated else ""
        return sum(seconds for name, seconds in self.steps.items() if name != behind)

    @property
    def pruned_bytes(self) -> tuple[int, int]:
        """Size of the pruned weights and masks, as they are saved and as they are packed."""
        shapes, bits = self.shapes, self.shapes.prunable // 8  # one for each weight
        if self.work.pattern.structured:
            kept = shapes.parameters - self.costs.cut_share * shapes.prunable
            saved = kept * DTYPE_BYTES[shapes.dtype]
            return round(saved), round(kept * (DTYPE_BYTES[shapes.dtype] - 1 + PACKED_BYTE))
        kept = shapes.parameters - self.work.pattern.sparsity * shapes.prunable
        packed = kept * (DTYPE_BYTES[shapes.dtype] - 1 + PACKED_BYTE)
        packed += (shapes.parameters - kept) * PACKED_ZERO
        return shapes.bytes() + bits, round(packed) + bits

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, those of ``POST /v1/plan``."""
        saved, packed = self.pruned_bytes
        has_share = self.work.pattern.structured and self.work.pattern.goal is None
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
            "choice": None if self.spec.minutes is None else sentence(self),
            "fits": self.fits,
            "obstacles": list(self.obstacles),
            "ways_out": list(self.ways_out),
            "stream": self.work.stream,
            "windows_at_once": self.calibration.run.windows,
            "recompute": self.calibration.run.recompute,
            "peak": asdict(self.peak),
            "pruned": {
                "saved_bytes": saved,
                "packed_bytes": packed,
                "times_smaller": self.shapes.bytes() / saved if has_share else None,
            },
            "seconds": list(self.seconds),
            "stages": [
                {"title": s.title, "seconds": list(s.seconds), "peak": asdict(s.peak)}
                for s in self.stages
            ],
        }


def plan_job(spec: JobSpec, shapes: ModelShapes, machine: Machine) -> Plan:
    """
    Plan a search job, and what would make it fit if it does not; sizes that are free are chosen.

    Raises:
        InvalidInput: The model cannot read such long windows, or have so few bytes.
    """
    check_sizes(spec, shapes, spec.model)
    if spec.free_sizes:
        sized = partial(plan_job, shapes=shapes, machine=machine)
        return fitted(spec, shapes.context, sized, 60 * (spec.minutes or 0))
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
    work = PlannedWork(
        calibration=settings,
        pattern=request.pattern,
        steps=request.steps,
        trials=spec.trials * spec.islands,
        finalists=finalists,
        in_full=request.pruned_in_full(finalists, request.pattern),
        windows=spec.confirm.windows if spec.confirm else 0,
        reported=spec.report.windows if spec.report else 0,
        dtype=_dtype(spec, shapes, machine),
        stream=spec.stream,
        validated=spec.validation.candidates if spec.validation else 0,
        by_perplexity=spec.objective.name == "perplexity",
        recovery=spec.recovery_settings(),
        files=len(spec.files),
        sized_files=spec.sized_files,
        kept=bool(spec.prune and spec.confirm and request.steps.reconstruction.wanted),
    )
    for width in {linear.in_features for linear in shapes.linears}:
        work.pattern.check_width(width, spec.model)
    plan = _plan(spec, shapes, work, machine)
    if spec.recovers_in_rest and _is_short(plan):
        plan = _plan(spec, shapes, replace(work, recovery=None), machine)
    return plan if plan.fits else replace(plan, ways_out=tuple(_ways_out(plan)))


def _is_short(plan: Plan) -> bool:
    """Whether so short a recovery is planned that the time is worth more to the search."""
    recovery, least = plan.work.recovery, least_in_rest(plan)
    return recovery is not None and plan.costs.recovered_tokens(recovery) < least


def _of_several(spec: JobSpec, shapes: ModelShapes, machine: Machine) -> Plan:
    """
    The plan of a job with several patterns: what is done at each of them takes as long as at the
    first of its kind; at each of several cuts, as at the one in the middle. The model that is
    pruned in the end is that one's.
    """
    patterns, firsts = spec.points, first_of_kinds(spec.points)
    if spec.is_cut:  # the more may leave, the longer it takes to try what is worst left out
        firsts = [patterns[len(patterns) // 2]]
    unpruned = spec.model_copy(update={"prune": False})  # nothing is kept of so many winners
    plans = [plan_job(unpruned.of_pattern(pattern), shapes, machine) for pattern in firsts]
    for width in {linear.in_features for linear in shapes.linears}:
        for pattern in patterns:
            pattern.check_width(width, spec.model)
    counts = [sum(bool(p.group) == bool(first.group) for p in patterns) for first in firsts]
    if spec.target is not None:
        counts = [spec.most_points]
    stages = []
    for alike in zip(*(plan.stages for plan in plans), strict=True):
        repeated = alike[0].kind in _SEARCHING
        times = counts if repeated else [1] + [0] * (len(plans) - 1)
        low, high = (
            sum(n * stage.seconds[end] for n, stage in zip(times, alike, strict=True))
            for end in (0, 1)
        )
        largest = max(alike, key=lambda stage: stage.peak.device + stage.peak.host)
        stage = replace(largest, title=alike[0].title, seconds=(low, high))
        if repeated:
            title = f"{stage.title}, at each of {sum(counts)} patterns"
            stage = replace(stage, kind=StageKind.POINT, title=title)
        stages.append(stage)
    lacking = next((plan for plan in plans if not plan.fits), plans[0])
    return replace(lacking, spec=spec, stages=tuple(stages))


def _dtype(spec: JobSpec, shapes: ModelShapes, machine: Machine) -> str:
    """As a model is loaded: what is stored on a GPU and where it is streamed, float32 on a CPU."""
    if spec.dtype != "auto":
        return spec.dtype
    return shapes.dtype if machine.is_gpu or spec.stream else "float32"


def _plan(spec: JobSpec, shapes: ModelShapes, work: PlannedWork, machine: Machine) -> Plan:
    memory = _Memory(shapes, work, machine)
    calibration = choose_run(
        memory.footprint, work.calibration, memory.place,
        windows=work.calibration.samples, fisher_windows=work.fisher_samples,
        device_limit=memory.card, host_limit=machine.main_bytes - PROCESS,
        device_size=machine.memory_bytes if machine.is_gpu else None,
    )  # fmt: skip
    work = replace(work, batch=calibration.run.windows)
    if work.recovery is not None:
        once = replace(work, recompute=work.recovery.train == "lora")
        peak = with_process(_Memory(shapes, once, machine).recovery(work.recovery), machine)
        if peak.device <= machine.memory_bytes and peak.host <= machine.main_bytes:
            work = once
    stages = tuple(_stages(_Memory(shapes, work, machine), calibration))
    return Plan(
        spec=spec,
        shapes=shapes,
        machine=machine,
        work=work,
        calibration=calibration,
        stages=stages,
        obstacles=tuple(obstacles({s.title: s.peak for s in stages}, machine)),
    )


def _stages(memory: "_Memory", calibration: CalibrationPlan) -> Iterator[StagePlan]:
    """All that a job with one pattern does, in order."""
    work, machine = memory.work, memory.machine
    costs = Costs(memory.shapes, work, machine)

    def stage(kind: StageKind, title: str, seconds: float, peak: Peak) -> StagePlan:
        low, high = seconds / machine.uncertainty, seconds * machine.uncertainty
        peak = with_process(peak, machine)
        return StagePlan(kind=kind, title=title, seconds=(low, high), peak=peak)

    yield stage(StageKind.CALIBRATE, "read the model", costs.reading(), memory.loaded())
    yield stage(StageKind.CALIBRATE, "hash the weights", costs.hashing(), memory.loaded())
    yield stage(StageKind.CALIBRATE, "calibrate", costs.calibration(), calibration.peak)
    if work.pattern.structured:
        if work.pattern.goal is not None:
            title = f"find what {work.pattern} takes"
            yield stage(StageKind.SEARCH, title, costs.reached(), memory.reached())
        yield stage(
            StageKind.SEARCH, "rate the splits", costs.cut() + costs.left_out(), memory.cut()
        )
        title = f"cut and measure, {work.finalists} splits at most"
        yield stage(StageKind.PERPLEXITY, title, costs.cuts(), memory.cut())
        yield from _report_stages(memory, costs, stage)
        yield stage(StageKind.PRUNE, "cut", costs.cut(), memory.cut(copied=False))
        yield from _afterwards_stages(memory, costs, stage)
        return
    title = f"search, {work.trials} trials"
    yield stage(StageKind.SEARCH, title, costs.search(), memory.search())
    if work.validated:
        title, seconds = f"validate, {work.validated} candidates", work.validated * costs.measured()
        yield stage(StageKind.PERPLEXITY, title, seconds, memory.confirmation())
    if work.finalists:
        title, seconds = "confirm by perplexity", costs.confirmation()
        yield stage(StageKind.PERPLEXITY, title, seconds, memory.confirmation())
    yield from _report_stages(memory, costs, stage)
    yield stage(StageKind.PRUNE, "prune", costs.pruned(), memory.pruned())
    yield from _afterwards_stages(memory, costs, stage)


_MakeStage = Callable[[StageKind, str, float, Peak], StagePlan]


def _report_stages(memory: "_Memory", costs: Costs, stage: _MakeStage) -> Iterator[StagePlan]:
    work = memory.work
    if work.reported:
        on_report = replace(work, windows=max(work.windows, work.reported))
        memory = _Memory(memory.shapes, on_report, memory.machine)
        peak = memory.cut() if work.pattern.structured else memory.confirmation()
        yield stage(StageKind.FINISH, "measure on the report text", costs.reported(), peak)


def _afterwards_stages(memory: "_Memory", costs: Costs, stage: _MakeStage) -> Iterator[StagePlan]:
    """What is done with a pruned model before it is there."""
    recovery = memory.work.recovery
    if recovery is not None:
        yield stage(StageKind.PRUNE, RECOVER, costs.recovery(recovery), memory.recovery(recovery))
    yield stage(StageKind.PRUNE, "save", costs.saving(), memory.saving())
    if memory.work.files:
        yield stage(StageKind.PRUNE, "export", costs.exported(), memory.exported())


def with_process(peak: Peak, machine: Machine) -> Peak:
    """What a stage holds with the process that it runs in, and the card's context."""
    device = int((peak.device + CONTEXT) / FREE) if machine.is_gpu else 0
    host = peak.host + (_WITH_CUDA if machine.is_gpu else PROCESS)
    return replace(peak, device=device, host=host)


SHORT_WINDOW = 512  # tokens of windows that a report text is counted in before the minutes choose


@dataclass(frozen=True, kw_only=True)
class ComparedWork:
    """What a comparison does on each of its calibrations."""

    rows: Sequence[Steps]  # What is pruned and measured, by what it goes through
    searches: Sequence[JobSpec]  # Those whose results have rows, too
    windows: int  # That each row is measured on
    calibrations: int

    def seconds(self, plan: Plan) -> float:
        """How long it takes with the calibration of a plan, on its machine."""
        sizes = {path: plan.spec.sizes[path] for path in OF_THE_TEXT}
        work = replace(plan.work, windows=self.windows, kept=False)
        each = plan.own_seconds() - plan.own_seconds(calibrated=True)
        for steps in self.rows:
            costs = Costs(plan.shapes, replace(work, steps=steps), plan.machine)
            each += costs.pruned() + costs.perplexity()
        for search in self.searches:
            searched = plan_job(search.sized(search.sizes | sizes), plan.shapes, plan.machine)
            each += searched.own_seconds(calibrated=True)
        return self.calibrations * each + plan.costs.perplexity()


class _Memory:
    """Peaks of what one job does on one machine, without the process and the card's context."""

    def __init__(self, shapes: ModelShapes, work: PlannedWork, machine: Machine) -> None:
        self.shapes = shapes
        self.work = work
        self.machine = machine
        self.settings = work.calibration
        self.footprint = shapes_footprint(shapes, work.dtype)
        self.place = Place(on_gpu=machine.is_gpu, stream=work.stream)
        self.card = int(FREE * machine.memory_bytes) - CONTEXT if machine.is_gpu else None
        self.stored_itemsize = DTYPE_BYTES[shapes.dtype]

    def loaded(self) -> Peak:
        block = max(sizes.weights for sizes in self.footprint.blocks)
        weights = block if self.work.stream else self.footprint.weights
        return Peak.at(self.place, device=weights, host=0)

    def search(self) -> Peak:
        bundle = self.footprint.bundle(self.settings)
        peak = Peak.at(Place(on_gpu=self.place.on_gpu), device=SEARCHED * bundle, host=bundle)
        return peak.with_(self.confirmation()) if self.work.by_perplexity else peak

    def confirmation(self) -> Peak:
        """A candidate that is pruned, measured and made dense again."""
        work, settings, card = self.work, self.settings, self.card
        if work.steps.needs_text:
            references = replace(work, steps=Steps(linears=work.steps.linears))  # Wanda and RIA
            measured = _Memory(self.shapes, references, self.machine).confirmation()
            return self.pruning(keep_dense=True).with_(measured)
        most = 1
        if card is not None and not self.place.stream:
            logits = settings.context_length * self.footprint.vocabulary
            weights = self.footprint.weights
            most = windows_at_once(logits, device_size=card, weights=weights, most=MOST)
        peaks = [
            confirmation_peak(
                self.footprint, self.place, tokens=settings.context_length, windows=work.windows,
                at_once=min(at_once, work.windows), sparsity=work.pattern.sparsity,
                removed_on_device=on_device, states_on_device=self.states_stay(work.windows),
            )
            for at_once, on_device in ((most, True), (most, False), (1, False))
        ]  # fmt: skip
        return next((peak for peak in peaks if card is None or peak.device <= card), peaks[-1])

    def pruning(self, *, keep_dense: bool) -> Peak:
        streams = 1 + self.work.steps.reconstruction.wanted
        return pruning_peak(
            self.footprint, self.place, self.work.steps,
            windows=self.settings.samples, tokens=self.settings.context_length,
            keep_dense=keep_dense,
            states_on_device=self.states_stay(streams * self.settings.samples),
        )  # fmt: skip

    def cut(self, *, copied: bool = True) -> Peak:
        """A cut of a copy while splits are compared, and of the model itself in the end."""
        return cut_peak(
            self.footprint, self.place, windows=self.settings.samples,
            tokens=self.settings.context_length, copied=copied, sets=self.work.finalists,
        ).with_(self.confirmation())  # fmt: skip

    def reached(self) -> Peak:
        """What a goal takes, found out: files of the model, or two more models that are timed."""
        goal, whole = self.work.pattern.goal, self.footprint.weights
        assert goal is not None  # or nothing is to be found out
        models, files = (2, 3) if goal.bytes is not None else (3, 2)
        peak = Peak.at(self.place, device=models * whole, host=0, disk=files * whole)
        return peak.with_(self.cut(copied=False))

    def states_stay(self, windows: int) -> bool:
        """Whether the hidden states of so many windows stay on the card."""
        if self.card is None:
            return False
        free = self.card - (0 if self.place.stream else self.footprint.weights)
        return self.footprint.states(windows, self.settings.context_length) <= free // 4

    def pruned(self) -> Peak:
        peak = self.pruning(keep_dense=False)
        if not self.work.kept:
            return peak
        trained = self.footprint.prunable * (self.stored_itemsize + 1)  # masks of a byte each
        return replace(peak, disk=peak.disk + trained)

    def recovery(self, settings: Recovery, processes: int = 1) -> Peak:
        return recovery_peak(
            self.footprint, self.place, settings, tokens=self.settings.context_length,
            asked=Costs(self.shapes, self.work, self.machine).recovered_tokens(settings),
            processes=processes, recompute=self.work.recompute,
        )  # fmt: skip

    def saving(self) -> Peak:
        return saving_peak(self.footprint, self.place, stored_itemsize=self.stored_itemsize)

    def exported(self) -> Peak:
        """The pruned model, and a file of it that is read back, in float32; files of 16 bits."""
        whole, halves = self.shapes.bytes("float32"), self.shapes.bytes("bfloat16")
        bundle = self.footprint.bundle(self.settings) if self.work.sized_files else 0
        disk = (1 + self.work.files) * halves
        return Peak.at(self.place, device=whole, host=whole + bundle, disk=disk)


def check_sizes(spec: JobSpec, shapes: ModelShapes, name: str) -> None:
    """
    See that a model's files can have as few bytes as a job asks for.

    Raises:
        InvalidInput: Even with the fewest bits for each weight one has more.
    """
    # What is written at least: a picture's tower is not, nor a head that is the embedding. A worker
    # may have llama-quantize, and the fewest bits with it.
    written = shapes.prunable + shapes.vocabulary * shapes.hidden
    for pattern in spec.points if spec.sized_files else ():
        for most in filter(None, map(file_bytes, spec.files)):
            check_fewest(
                Path(name).stem, most, pattern, parameters=written, prunable=shapes.prunable,
                llama=True,
            )  # fmt: skip


def obstacles(
    peaks: Mapping[str, Peak], machine: Machine, room: int | None = None
) -> Iterator[str]:
    """The stages that need more than there is, in words; ``room`` is what a disk has free."""
    has = {"host": machine.main_bytes} | ({} if room is None else {"disk": room})
    if machine.is_gpu:
        has = {"device": machine.memory_bytes, **has}
    named = {"device": f"the {machine.name}", "host": "main memory", "disk": "disk"}
    for place, there in has.items():
        title = max(peaks, key=lambda title: getattr(peaks[title], place))
        needed = getattr(peaks[title], place)
        if needed > there:
            yield (
                f"{title}: {format_bytes(needed)} of {named[place]} are needed, and it has "
                f"{format_bytes(there)}"
            )


def _ways_out(plan: Plan) -> Iterator[str]:
    """Changes that make it fit, each tried; the mildest first."""
    work, settings, machine = plan.work, plan.work.calibration, plan.machine

    def fits(**changes: Any) -> bool:
        return _plan(plan.spec, plan.shapes, replace(work, **changes), machine).fits

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
            yield from _afterwards(plan, recovery, option)
            break
    can_stream = not (work.stream or recovery or work.pattern.structured)
    if can_stream and fits(stream=True, dtype=plan.shapes.dtype):
        yield f"leave the weights on disk ({field_name('stream', True)}, for safetensors)"
    if not work.stream and machine.is_gpu:
        for cards in _CARDS:
            together = machine.resized(cards * machine.memory_bytes)
            if _plan(plan.spec, plan.shapes, work, together).fits:
                way = field_name("device_map", "auto") or "`pho worker --device all`"
                yield f"spread it over {cards} such cards ({way})"
                break
    device, host = plan.peak.device, plan.peak.host
    if machine.is_gpu and device > machine.memory_bytes:
        yield f"take a card with {format_bytes(device)}"
    if host > machine.main_bytes:
        yield f"take a machine with {format_bytes(host)} of main memory"


def _afterwards(plan: Plan, recovery: Recovery, option: str) -> Iterator[str]:
    """The fewest processes that a recovery fits, each with such a card."""
    memory = _Memory(plan.shapes, plan.work, plan.machine)
    for count in _CARDS:
        peak = memory.recovery(recovery, count)
        if with_process(peak, plan.machine).device <= plan.machine.memory_bytes:
            host = format_bytes(peak.host + count * _WITH_CUDA)
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
