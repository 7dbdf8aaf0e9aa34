"""
How long the stages of a job take, and what machines can do: named GPUs by their makers' sheets,
this CPU by a measurement of a moment.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from pho_service.errors import InvalidInput, field_name
from pho_service.planning.shapes import DTYPE_BYTES, LinearShape, ModelShapes
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.configuration import NEW_TOKENS
from pho_service.spec.export import BITS_WINDOWS, LEVELS, OUTER_TOKENS
from pho_service.spec.pattern import Pattern
from pho_service.spec.recovery import BEGINNING, WRITTEN_AT_ONCE, Recovery
from pho_service.spec.steps import Steps
from pho_service.spec.structure import PROMPT, ROUNDS, WRITTEN

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates that a stage can count on, below what data sheets promise."""

    name: str  # As it is asked for
    is_gpu: bool  # Whether models lie on a card of its own memory
    memory_bytes: int  # Memory of the card; for a CPU, the main memory
    products: float  # FLOP/s of matrix products in bfloat16; on a CPU in float32
    float_products: float  # FLOP/s of matrix products in float32
    bandwidth: float  # Bytes/s that are read or written where the model lies
    copies: float  # Bytes/s between the card and main memory; on a CPU as its bandwidth
    launch_s: float  # What starting an operation takes; a card computes meanwhile, a CPU does not
    disk: float  # Bytes/s of the files
    cores: int  # Cores of the host
    main_bytes: int  # Main memory of the host
    uncertainty: float  # A stage may take so many times less or more
    quick: float = 1.0  # Times a CPU's float32 that training reaches, where it may be in bfloat16

    def resized(self, memory_bytes: int | None, main_bytes: int | None = None) -> "Machine":
        for size in (memory_bytes, main_bytes):
            if size is not None and size < 10**9:
                raise InvalidInput(
                    f"a memory of {size} bytes holds no model. Give a size with a unit: 80GiB."
                )
        main = main_bytes or (self.main_bytes if self.is_gpu else memory_bytes) or self.main_bytes
        models = memory_bytes or (self.memory_bytes if self.is_gpu else main)
        return replace(self, memory_bytes=models, main_bytes=main)

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "gpu": self.is_gpu,
            "memory_bytes": self.memory_bytes,
            "main_bytes": self.main_bytes,
            "measured": not self.is_gpu,
        }


def _card(
    name: str, gib: float, products: float, float_products: float, bandwidth: float
) -> Machine:
    """A GPU in a host of 16 cores and 128 GiB with an NVMe disk."""
    return Machine(
        name=name,
        is_gpu=True,
        memory_bytes=int(gib * GIB),
        products=products * 1e12,
        float_products=float_products * 1e12,
        bandwidth=bandwidth * 1e12,
        copies=12e9,
        launch_s=7e-6,
        disk=3e9,
        cores=16,
        main_bytes=128 * GIB,
        uncertainty=2.0,
    )


# TFLOP/s in bfloat16 and float32 and TB/s: 40 % to 75 % of the data sheets' dense figures, as
# large products reach them. Nothing here was measured by us: no such card was at hand.
CARDS = {
    card.name: card
    for card in (
        _card("H200", 140, 400, 45, 3.6),
        _card("H100", 79, 400, 45, 2.5),
        _card("A100", 79, 200, 15, 1.5),
        _card("A100-40GB", 39, 200, 15, 1.2),
        _card("L40S", 44, 150, 50, 0.7),
        _card("4090", 23.5, 120, 45, 0.8),
    )
}


def named_machine(name: str) -> Machine:
    """The machine of a name: ``H100``, ``a100``, or ``cpu`` for this one."""
    if name.lower() == "cpu":
        return this_cpu()
    card = next((card for card in CARDS.values() if card.name.lower() == name.lower()), None)
    if card is None:
        raise InvalidInput(
            f"the card {name!r} is not known. Known are {', '.join(CARDS)}, and cpu for this "
            f"machine without one; {field_name('device_memory')} says how much memory "
            "another card has."
        )
    return card


@cache
def this_cpu() -> Machine:
    """This machine's CPU, measured for about half a second."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    matrix = np.ones((768, 768), dtype=np.float32)
    products = REACHED * 2 * 768**3 / _fastest(lambda: matrix @ matrix)
    block = np.ones(2**24, dtype=np.float32)
    target = np.empty_like(block)
    bandwidth = 2 * block.nbytes / _fastest(lambda: np.copyto(target, block))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = Path("/proc/cpuinfo")  # of Linux
    has_units = about.is_file() and "amx_bf16" in about.read_text()
    return Machine(
        name="cpu",
        is_gpu=False,
        memory_bytes=memory,
        products=products,
        float_products=products,
        bandwidth=bandwidth,
        copies=bandwidth,
        launch_s=10e-6,
        disk=1e9,
        cores=cores or 1,
        main_bytes=memory,
        uncertainty=2.0,
        quick=QUICK if has_units else 1.0,
    )


def _fastest(work: Callable[[], object], rounds: int = 4) -> float:
    """Seconds of the fastest of some rounds: others may use the machine, too."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


# The constants were fitted to what jobs on a CPU took: benchmarks/planned.py.
STARTED_S = 6.0  # until a process has its libraries
WINDOWS_S = 0.1  # until a text of some hundred kilobytes is cut into windows
REACHED = 0.7  # of a CPU's products that a model's own reach
QUICK = 3.0  # see Machine.quick; with what is beside the products
FLOAT = 4  # bytes of statistics and scores
HASHED = 1.2e9  # bytes/s of SHA-256 on a core
TRIED_BLOCKS, TRIED_TOKENS = 8, 1024  # before one of them leaves
BASELINES = 6  # that a search begins with and confirms beside what it finds
COMPARED_TOKENS = 512  # that finalists are compared with the dense model on
MEASURED = 3  # perplexities that the race of finalists takes after its first look
REFERENCES = 3  # perplexities that a result is judged by: dense, Wanda, RIA
LOOKS = 12  # at which those that are left are pruned once more
READINGS = 8.0  # of its bundle that the rating of a candidate costs, on a CPU
RATED_S = 0.6e-4  # of the host for a linear of a candidate that is rated
BEGUN_S = 0.5  # until a search rates its first candidate
CONFIRMED_S = 0.3  # what a confirmation takes beside the model
TRIAL_S = 0.0035  # writing a trial to its study
BACKWARD = 3.0  # forward passes with their head that one to and fro takes
SCORED = 60.0  # bytes that scoring and selecting a weight moves
SWAPPED = 8e3  # the same for exact swaps, in some fifty rounds
REFINED = 1.2e3  # the same for DSnoT
UPDATED = 700.0  # the same for OBS
OBS_LAUNCHES = 0.6  # a column, sixteen of them solved for at once
REMEMBERED = 2.0  # numbers moved for one of a hidden state: keys and values, of a whole window
TRAINED = 60.0  # bytes that a step of Adam moves for a weight, its mask included
INVERSE_FLOPS = 4.0  # times the cube of a width, in float64
SWEPT_FLOPS = 24.0  # times the cube of a width: its inverse, and what leaves in turn; as in float32
SWEPT_LAUNCHES = 25  # of a column that leaves
CG_STEPS = 10
REFINE_STEPS, REFINE_INVERSES = 48, 8  # of re-pruning by ADMM
ADMM_STEPS = 20
ALPS_STEPS, ALPS_INVERSES = 36, 20  # about, until a mask settles; inverses of an input
SPECTRUM_FLOPS = 12.0  # times the cube of a width, for eigenvectors in float64
CHOSEN = 100.0  # bytes that an iteration of ADMM moves for a weight: its mask is chosen again
GAINED = 100.0  # bytes moved for a row, a channel and a group that it may go to, all sweeps
GAINED_ROWS = 1024  # that a permutation looks at
ASSIGNED_S = 1.6e-4  # of a core of the host for a group: matching the best pairs, all sweeps
ROUNDED = 60.0  # bytes moved for one of a model that is converted and read back
TRIED_TYPE = 250.0  # the same for a weight that is rounded to a type, to see what that costs
PACKED = 60.0  # bytes that checking, packing and hashing a saved weight moves
BLOCK_LAUNCHES = 90  # of a block forward, with the sums over its inputs


@dataclass(frozen=True, kw_only=True)
class PlannedWork:
    """What a job asks for, as far as it costs."""

    calibration: CalibrationSettings  # Its settings
    pattern: Pattern  # What is pruned
    steps: Steps  # What every candidate goes through
    trials: int  # Candidates that the proxy rates, of all islands
    finalists: int  # That are confirmed; 0 if there is no confirmation
    in_full: int  # Of these, if pruning one runs a text through the model
    windows: int  # That each is confirmed on
    reported: int = 0  # Windows that the result is reported on
    dtype: str  # That the model computes in
    stream: bool  # Whether its weights stay on disk
    batch: int = 1  # Windows that are run at once
    validated: int = 0  # Candidates that say how far the proxy can be trusted
    by_perplexity: bool = False  # Whether candidates are rated by perplexity, not by the proxy
    recovery: Recovery | None = None  # Of the pruned model
    recompute: bool = True  # Whether it runs blocks again for the backward pass
    files: int = 0  # GGUF files that are made of the pruned model
    sized_files: int = 0  # Of these, files of so many bytes
    kept: bool = False  # Whether the blocks that the confirmation has trained are kept for pruning

    @property
    def fisher_samples(self) -> int:
        """Windows that are run backward."""
        return self.calibration.fisher_samples or max(1, self.calibration.samples // 4)

    @property
    def tokens(self) -> int:
        return self.calibration.samples * self.calibration.context_length


class Costs:
    """Seconds of what one job does on one machine."""

    def __init__(self, shapes: ModelShapes, work: PlannedWork, machine: Machine) -> None:
        self.shapes = shapes
        self.work = work
        self.machine = machine
        self.is_half = DTYPE_BYTES[work.dtype] == 2

    @property
    def products(self) -> float:
        """FLOP/s of the model's products."""
        half = self.is_half or self.work.calibration.mixed_precision
        return self.machine.products if half else self.machine.float_products

    def reading(self) -> float:
        """Its files, to the card."""
        size = self.shapes.bytes()
        return STARTED_S + size / self.machine.disk + size / self.machine.copies

    def hashing(self) -> float:
        return self.shapes.bytes(self.work.dtype) / (HASHED * min(self.machine.cores, 8))

    def streaming(self, passes: float) -> float:
        """The weights of a streamed model, read and copied again in each pass."""
        if not self.work.stream:
            return 0.0
        size = self.shapes.bytes(self.work.dtype)
        return passes * (size / self.machine.disk + size / self.machine.copies)

    def forward(self, tokens: int, context: int, *, head: bool) -> float:
        """The model over tokens; it waits for products, for reading weights, or for launches."""
        attention = 2 * context * self.shapes.hidden * len(self.shapes.blocks)  # half is masked
        flops = tokens * (2 * self.shapes.active + attention)
        flops += tokens * 2 * self.shapes.vocabulary * self.shapes.hidden * head
        batches = max(1, tokens // (context * self.work.batch))
        reads = batches * self.shapes.bytes(self.work.dtype) / self.machine.bandwidth
        launches = batches * len(self.shapes.blocks) * BLOCK_LAUNCHES * self.machine.launch_s
        if not self.machine.is_gpu:
            return max(flops / self.products, reads) + launches
        return max(flops / self.products, reads, launches)

    def calibration(self) -> float:
        """Forward and backward passes, and the sums over the inputs of linears."""
        settings, context = self.work.calibration, self.work.calibration.context_length
        backward = self.work.fisher_samples * context
        seconds = WINDOWS_S + self.forward(self.work.tokens, context, head=False)
        seconds += BACKWARD * self.forward(backward, context, head=True)
        seconds += self.forward(backward, context, head=False) * self.work.stream  # run again
        if settings.projection_rows:
            moved = sum(8 * FLOAT * i.in_features * i.share * i.count for i in self.inputs())
            seconds += self.work.tokens * moved / self.machine.bandwidth
        else:
            seconds += self.grams()
            seconds += sum(
                INVERSE_FLOPS * i.count * i.in_features**3 / self.machine.float_products
                for i in self.inputs()
            )
        return seconds + self.streaming(2) + self.bundle() * 3 / self.machine.disk

    def inputs(self) -> Iterator[LinearShape]:
        """One linear for each distinct input of a block, of all blocks."""
        for block in self.shapes.blocks:
            yield from {linear.reads: linear for linear in block.linears}.values()

    def grams(self) -> float:
        """Second moments of all inputs: half of the products of a square matrix."""
        flops = sum(i.share * i.count * i.in_features**2 for i in self.inputs())
        rate = self.machine.products if self.is_half else self.machine.float_products
        return self.work.tokens * flops / rate

    def bundle(self) -> float:
        """Bytes: sampled rows with their window means, and roots of the second moments."""
        settings = self.work.calibration
        sampled = sum(
            linear.count * linear.in_features
            * min(settings.rows_per_layer or linear.out_features, linear.out_features)
            for linear in self.shapes.linears
        )  # fmt: skip
        roots = sum(i.count * (settings.projection_rows or i.in_features) * i.in_features
                    for i in self.inputs())  # fmt: skip
        return FLOAT * (sampled * (2 + len(settings.kernel_sizes)) + roots)

    def search(self) -> float:
        """Each candidate reads its share of the bundle, or runs through the model."""
        if self.work.by_perplexity:
            return self.work.trials * (TRIAL_S + self.measured())
        rating = READINGS * self.bundle() / (2 + len(self.work.calibration.kernel_sizes)) * 2
        curves = 8.0 if self.work.steps.allocation.method == "curves" else 1.0
        rating = (
            RATED_S * sum(li.count for li in self.shapes.linears) + rating / self.machine.bandwidth
        )
        return BEGUN_S + self.work.trials * (TRIAL_S + curves * rating)

    def perplexity(self) -> float:
        """The model over the windows that perplexities are measured on."""
        context = self.work.calibration.context_length
        measured = self.forward(self.work.windows * context, context, head=True)
        return measured + self.streaming(1)

    def measured(self) -> float:
        """The perplexity of a candidate, which is pruned for it."""
        return self.perplexity() + self.pruning(self.work.steps.before_reconstruction)

    def measured_in_full(self, count: int) -> float:
        """The perplexities of so many finalists; the only one is measured as it is trained."""
        return 0.0 if self.work.steps.trained_at_once(count) else count * self.measured()

    def confirmation(self) -> float:
        """A race where it pays, otherwise perplexities; and what the result is judged by."""
        context = self.work.calibration.context_length
        measured = self.perplexity()
        steps = self.work.steps.before_reconstruction
        pruned = self.pruning(steps)
        # The winner is pruned once more, and writes as the dense model does.
        winner = 0.0 if self.work.stream else pruned + self.written()
        if self.work.steps.reconstruction.wanted:
            winner = self.training() + measured
        winner += CONFIRMED_S + REFERENCES * (measured + self.masks())
        finalists, in_full = self.work.finalists, 0.0
        masks_alone = steps.needs_text and self.work.in_full < finalists
        if masks_alone:
            in_full = self.measured_in_full(self.work.in_full)
            pruned = self.masks()
        elif steps.needs_text:
            return self.measured_in_full(finalists) + winner
        if self.work.stream:
            return finalists * (measured + pruned) + in_full + winner
        compared = self.forward(max(COMPARED_TOKENS, context), context, head=True)
        if not masks_alone:
            finalists += BASELINES
        raced = MEASURED * measured + LOOKS * pruned
        return finalists * (compared + pruned) + raced + in_full + winner

    def reported(self) -> float:
        """The result and what it is judged by on the report text; trained blocks are kept."""
        kept = self.work.steps.reconstruction.wanted
        work = replace(self.work, windows=self.work.reported, kept=kept)
        costs = Costs(self.shapes, work, self.machine)
        if not work.reported:
            return 0.0
        if work.pattern.structured:
            return self.cut() + 2 * costs.perplexity()
        return (
            costs.pruned() + costs.perplexity() + REFERENCES * (costs.perplexity() + self.masks())
        )

    def written(self) -> float:
        """What two models write: for each token all weights are read."""
        return 2 * NEW_TOKENS * self.shapes.bytes(self.work.dtype) / self.machine.bandwidth

    def masks(self) -> float:
        """One candidate's, by its score alone."""
        moved = SCORED * (1 + 3 * (not self.work.steps.allocation.is_even))
        return self.shapes.prunable * moved / self.machine.bandwidth

    def recovery(self, settings: Recovery) -> float:
        """What it may take; or the dense model, and the steps of the pruned one."""
        if settings.tokens is None:
            return settings.time_s
        return self.recovered(settings.tokens) + self.written_windows(settings.written)

    def recovered_tokens(self, settings: Recovery) -> int:
        """Tokens that a recovery trains on: as many as asked for, or as its time allows."""
        if settings.tokens is not None:
            return settings.tokens
        context = self.work.calibration.context_length
        return context * max(1, int(settings.time_s / self.recovered(context)))

    def written_windows(self, tokens: int) -> float:
        """What the dense model writes, a token of some windows at once."""
        context, blocks = self.work.calibration.context_length, len(self.shapes.blocks)
        steps = -(-tokens // WRITTEN_AT_ONCE) * context * (1 - 1 / BEGINNING)
        weights = self.shapes.bytes(self.work.dtype) / self.machine.bandwidth
        launches = blocks * BLOCK_LAUNCHES * self.machine.launch_s
        before = REMEMBERED * DTYPE_BYTES[self.work.dtype] * self.shapes.hidden * blocks
        before *= tokens * context / self.machine.bandwidth
        return self.forward(tokens, context, head=True) + steps * (weights + launches) + before

    def recovered(self, tokens: int) -> float:
        """A pass of the dense model; one or two forward and one backward, and what Adam moves."""
        context = self.work.calibration.context_length
        steps = max(1, tokens // context)
        moved = steps * TRAINED * self.shapes.prunable / self.machine.bandwidth
        passes = 5 if self.work.recompute else 4
        return passes * self.forward(tokens, context, head=True) + moved

    def reconstruction(self) -> float:
        """The dense model's stream, and the passes that train; nothing where none is asked for."""
        settings = self.work.steps.reconstruction
        if not settings.wanted:
            return 0.0
        context, windows = self.work.calibration.context_length, self.work.calibration.samples
        # A backward pass is two forward ones.
        blocks = range(max(1, len(self.shapes.blocks)))
        each = sum(map(settings.passes_of, blocks)) / len(blocks)
        passes = 2 + 3 * each / self.machine.quick
        moved = each * windows * TRAINED * self.shapes.prunable
        forward = self.forward(self.work.tokens, context, head=False)
        return passes * forward + moved / self.machine.bandwidth

    def training(self) -> float:
        """A winner's blocks, pruned and trained."""
        return self.pruning(self.work.steps) + self.reconstruction()

    def pruned(self) -> float:
        """The winner's weights: from the dense model, or where its blocks were kept from these."""
        if self.work.kept:
            return self.streaming(1)
        streamed = self.streaming(0 if self.work.steps.needs_text else 1)
        return self.training() + streamed

    def pruning(self, steps: Steps) -> float:
        """One candidate's masks, and its weights where a step before a reconstruction does."""
        machine = self.machine
        seconds = self.masks()
        if steps.permutation != "none":
            seconds += self.assignments()
        if not steps.needs_text:
            return seconds
        context = self.work.calibration.context_length
        seconds += 2 * self.forward(self.work.tokens, context, head=False) + self.grams()
        seconds += self.streaming(1)
        if steps.repruning == "swaps":
            seconds += self.shapes.prunable * SWAPPED / machine.bandwidth
        if steps.repruning == "dsnot":
            seconds += self.shapes.prunable * REFINED / machine.bandwidth
        if steps.repruning == "admm":
            seconds += self.iterations(REFINE_STEPS, quick=machine.quick)
            seconds += REFINE_INVERSES * self.cubes() / machine.float_products
        if steps.update == "admm":
            seconds += self.iterations(ADMM_STEPS) + self.cubes() / machine.float_products
        elif steps.update == "alps":
            seconds += self.iterations(ALPS_STEPS) + CG_STEPS * self.products_of_weights()
            flops = SPECTRUM_FLOPS + 2 * ALPS_INVERSES
            seconds += 2 * flops * self.cubes() / machine.float_products  # in float64
        elif steps.update == "least-squares" and steps.repruning == "admm":
            seconds += CG_STEPS * self.products_of_weights()
        elif steps.update != "none":
            seconds += self.updates()
        return seconds

    def cubes(self) -> float:
        """The cubes of the widths of all inputs, added up."""
        return sum(i.count * i.in_features**3 for i in self.inputs())

    def products_of_weights(self) -> float:
        """Each linear's weights times its second moments, once."""
        flops = sum(
            2 * li.count * li.out_features * li.in_features**2 for li in self.shapes.linears
        )
        return flops / self.machine.float_products

    def iterations(self, number: int, quick: float = 1.0) -> float:
        """Return the seconds of ADMM over all linears: a product each, and a mask."""
        chosen = self.shapes.prunable * CHOSEN / self.machine.bandwidth
        return number * (self.products_of_weights() / quick + chosen)

    def updates(self) -> float:
        """Inverses of the second moments, and what is done with them."""
        machine = self.machine
        columns = sum(li.count * li.in_features for li in self.shapes.linears)
        seconds = INVERSE_FLOPS * self.cubes() * 2 / machine.float_products
        seconds += columns * OBS_LAUNCHES * machine.launch_s
        seconds += self.shapes.prunable * UPDATED / machine.bandwidth
        if self.work.steps.update == "least-squares":
            seconds += CG_STEPS * self.products_of_weights()
        return seconds

    def cut(self) -> float:
        """One cut of all blocks: what reads their widest inputs, in the order of what it costs."""
        context, machine = self.work.calibration.context_length, self.machine
        columns = sum(
            max(li.count * li.in_features for li in b.linears) for b in self.shapes.blocks
        )
        seconds = 3 * self.forward(self.work.tokens, context, head=False) + self.grams()
        seconds += SWEPT_FLOPS * self.cubes() / machine.float_products
        return seconds + columns * SWEPT_LAUNCHES * machine.launch_s

    def cuts(self) -> float:
        """The cuts of all finalists, and their perplexities and texts beside the dense model's."""
        measured = self.perplexity() + self.written() / 2
        return self.work.finalists * (self.cut() + measured) + measured

    @property
    def cut_share(self) -> float:
        """The share of the blocks' weights that is cut out."""
        shapes = self.shapes
        return self.work.pattern.cut_share(parameters=shapes.parameters, prunable=shapes.prunable)

    def reached(self) -> float:
        """What a goal takes, found out: bits of all linears beside cuts, or speeds."""
        goal, machine, size = self.work.pattern.goal, self.machine, self.shapes.bytes("float32")
        assert goal is not None  # or nothing is to be found out
        seconds = 2 * STARTED_S + 4 * size / machine.disk
        if goal.bytes is not None:
            return seconds + self.tried_types() + self.left_out()  # each block's rates are kept
        written = WRITTEN * self.shapes.bytes(self.work.dtype) / machine.bandwidth
        return seconds + 2 * ROUNDS * (written + self.forward(PROMPT, PROMPT, head=True))

    def left_out(self) -> float:
        """The model without each of eight blocks, for each of those that may leave."""
        dropped = int(self.cut_share * len(self.shapes.blocks))
        context = self.work.calibration.context_length
        tokens = max(context, TRIED_TOKENS)
        return dropped * TRIED_BLOCKS * self.forward(tokens, context, head=True)

    def assignments(self) -> float:
        """What each channel gains in each group, and the best of that on a core of the host."""
        group = self.work.pattern.group
        seconds = 0.0
        for i in self.inputs():
            groups, rows = i.in_features / group, min(GAINED_ROWS, i.out_features)
            seconds += i.count * rows * groups**2 * GAINED / self.machine.bandwidth
            seconds += i.count * groups * ASSIGNED_S
        return seconds

    def exported(self) -> float:
        """GGUF files: converted, read back; and what each type would cost each linear, once."""
        work, machine, size = self.work, self.machine, self.shapes.bytes("bfloat16")
        each = 2 * STARTED_S + 3 * size / machine.disk + ROUNDED * size / machine.bandwidth
        seconds = work.files * each
        if work.sized_files:
            few = replace(
                work.calibration, samples=min(BITS_WINDOWS, work.calibration.samples),
                fisher_samples=None,
            )  # fmt: skip
            seconds += Costs(self.shapes, replace(work, calibration=few), machine).calibration()
            seconds += self.tried_types()  # which the first one keeps for the others
        return seconds

    def tried_types(self) -> float:
        """Each matrix rounded to each type, and the model run with each of its outer ones."""
        shapes, context = self.shapes, self.work.calibration.context_length
        outer = (shapes.parameters - shapes.prunable) // (shapes.vocabulary * shapes.hidden)
        tokens = max(context, OUTER_TOKENS)
        run = (1 + len(LEVELS) * outer) * self.forward(tokens, context, head=True)
        return run + len(LEVELS) * shapes.parameters * TRIED_TYPE / self.machine.bandwidth

    def saving(self) -> float:
        """Weights, packed masks and hashes."""
        return self.shapes.prunable * PACKED / self.machine.bandwidth + self.shapes.bytes() / min(
            self.machine.disk, HASHED * min(self.machine.cores, 8)
        )
