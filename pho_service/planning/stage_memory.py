"""
How much memory each stage of a job takes at its peak, from the model's shapes, and the fastest way
to run a calibration that fits a memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from pho_service.planning.shapes import DTYPE_BYTES, BlockShape, LinearShape, ModelShapes
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.recovery import RANK, WRITTEN_AT_ONCE, Recovery
from pho_service.spec.steps import Steps

FLOAT = 4  # bytes: norms, sums and scores are float32, whatever the weights are
MARGIN = 1.15  # on what passes keep, for what differs between families
ATTENTION = 3  # (heads, tokens, tokens) in a block whose attention is not fused
HEAD_TOKENS = 256  # whose logits a backward pass holds at a time, see pruning.passes


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Sizes of a decoder block."""

    linears: tuple[LinearShape, ...]
    weights: int  # bytes of its parameters
    kept: float  # bytes of each token, for its backward pass
    widest: int  # inputs or outputs of a linear
    width: int  # inputs of a linear
    prunable: int  # weights of its linears
    largest: int  # weights of a linear

    def sums(self, rows: int) -> int:
        """Bytes of the statistics of its linears, as if each read an input of its own."""
        return FLOAT * sum(
            li.count * (((rows or li.in_features) + 1) * li.in_features + li.out_features)
            for li in self.linears
        )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a model takes in each stage."""

    itemsize: int  # of a weight, and of an activation
    blocks: tuple[BlockSizes, ...]
    outside: int  # bytes of the parameters outside the blocks
    hidden: int  # bytes of a token's hidden state
    vocabulary: int  # logits of a token
    heads: int  # where attention is not fused; 0 where it is

    @property
    def linears(self) -> Iterator[LinearShape]:
        """What can be pruned, of all blocks."""
        return (linear for block in self.blocks for linear in block.linears)

    @property
    def weights(self) -> int:
        return self.outside + sum(block.weights for block in self.blocks)

    @property
    def prunable(self) -> int:
        return sum(block.prunable for block in self.blocks)

    def states(self, windows: int, tokens: int) -> int:
        """Bytes of the hidden states between two blocks."""
        return windows * tokens * self.hidden

    def forward(self, tokens: int, windows: int, *, watched: bool = True) -> int:
        """Bytes that a pass without gradients, and without the head, takes at its peak."""
        # It is watched if statistics of the linears' inputs are gathered.
        widest = max(block.widest for block in self.blocks)
        # Inputs of the widest linears, and states beside them; a copy and squares in float32.
        each = 3 * self.itemsize * widest + 4 * self.hidden
        if watched:
            each += 2 * FLOAT * widest
        return int(windows * (MARGIN * tokens * each + self._mask(tokens)))

    def backward(self, tokens: int, windows: int, *, recompute: bool, trained: bool = False) -> int:
        """Bytes that a pass forward and backward takes at its peak."""
        # To recompute, blocks keep only their inputs, and run again. Linears that are trained keep
        # their inputs, too, which are the hidden states twice where nobody else keeps them.
        inputs = 2 * self.hidden * trained
        kept = [tokens * (block.kept + inputs) for block in self.blocks]
        attention = FLOAT * ATTENTION * self.heads * tokens * tokens
        running = self._running(tokens) + attention
        head = self.head(tokens, windows) / windows
        if recompute:
            passing = max(max(kept) + attention + running, head) + tokens * self.hidden * len(kept)
        else:
            passing = sum(kept) + attention * len(kept) + max(running, head)
        states = 2 * tokens * self.hidden
        return int(windows * (MARGIN * (passing + states) + self._mask(tokens)))

    def block_backward(self, tokens: int) -> int:
        """Bytes that one block, alone, takes for one window forward and backward."""
        kept = tokens * max(block.kept for block in self.blocks)
        attention = FLOAT * ATTENTION * self.heads * tokens * tokens
        return int(MARGIN * (kept + attention + self._running(tokens)) + self._mask(tokens))

    def _running(self, tokens: int) -> float:
        """Bytes that live for a moment while a block runs backward."""
        widest = max(block.widest for block in self.blocks)
        return tokens * (3 * FLOAT + 4 * self.itemsize) * widest

    def head(self, tokens: int, windows: int) -> int:
        """Bytes of some tokens' logits, their logarithms, and the gradients of both."""
        at_once = min(windows * tokens, max(HEAD_TOKENS, windows))
        return at_once * self.vocabulary * (4 * FLOAT + self.itemsize)

    @staticmethod
    def _mask(tokens: int) -> int:
        return FLOAT * tokens * tokens

    def bundle(self, settings: CalibrationSettings) -> int:
        """Bytes of a proxy bundle, in memory and on disk."""
        sums = sum(block.sums(settings.projection_rows) for block in self.blocks)
        return self._samples(settings) + sums

    def _samples(self, settings: CalibrationSettings) -> int:
        """Bytes of sampled rows and their window means."""
        most = settings.rows_per_layer
        sampled = sum(
            li.count * min(most or li.out_features, li.out_features) * li.in_features
            for li in self.linears
        )
        return FLOAT * sampled * (1 + len(settings.kernel_sizes))

    def sampling(self, settings: CalibrationSettings) -> int:
        """Bytes that the sampling of a linear's rows takes."""
        widest = max(block.width for block in self.blocks)
        largest = max(block.largest for block in self.blocks)
        most = max(linear.out_features for linear in self.linears)
        copies = 1 if self.itemsize == FLOAT else 2  # the weight in float32, and its magnitudes
        root = (settings.projection_rows or widest) * (widest + 2 * most)
        rows = 4 * min(settings.rows_per_layer or most, most) * widest
        return FLOAT * (copies * largest + root + rows)


def shapes_footprint(shapes: ModelShapes, dtype: str, *, heads: int = 0) -> Footprint:
    """Add up the shapes of a model, as it will be loaded."""
    itemsize = DTYPE_BYTES[dtype]
    blocks = tuple(_block_sizes(shapes, block, itemsize) for block in shapes.blocks)
    return Footprint(
        itemsize=itemsize,
        blocks=blocks,
        outside=shapes.bytes(dtype) - sum(block.weights for block in blocks),
        hidden=itemsize * shapes.hidden,
        vocabulary=shapes.vocabulary,
        heads=heads,
    )


def _block_sizes(shapes: ModelShapes, block: BlockShape, itemsize: int) -> BlockSizes:
    """Add up a block, with what it keeps of a token for a backward pass through frozen weights."""
    # Linears keep nothing then. Their outputs are kept by what reads them, and so is the input of a
    # linear that does not read the hidden states, by what makes it; norms keep theirs in float32.
    kept = float(FLOAT * block.norms)
    for linear in block.linears:
        width = linear.in_features if linear.in_features != shapes.hidden else 0
        kept += itemsize * linear.count * linear.share * (linear.out_features + width)
    widest = max(max(linear.out_features, linear.in_features) for linear in block.linears)
    return BlockSizes(
        linears=block.linears,
        weights=itemsize * block.parameters,
        kept=kept + itemsize * shapes.activations * widest,
        widest=widest,
        width=max(linear.in_features for linear in block.linears),
        prunable=sum(linear.weights for linear in block.linears),
        largest=max(linear.out_features * linear.in_features for linear in block.linears),
    )


LIBRARIES = 96 * 2**20  # what the matrix library keeps for itself, on either device
ROOT = 32  # bytes of a Gram matrix's element while its root is taken, in float64
SCORES = 10  # of a linear's size in float32, while it is scored and its weights are selected
# Of a linear's size in float32, in each of the steps: as measured at commit 7b7fffb.
STEPS = {
    "none": 1,
    "score": 4,
    "swaps": 14, "dsnot": 8,
    "obs": 4, "least-squares": 11, "sparsegpt": 4, "admm": 10, "alps": 12,
}  # fmt: skip
REFINED = 3  # of the same for each linear of an input, which re-pruning by ADMM holds together
TRAINED = 21  # bytes of a weight while its block is trained: gradient, Adam, best so far, mask
INVERSE = 7  # of a Gram matrix's size in float32
SPECTRUM = 14  # the same for eigenvectors, in float64
SHARD = 2 * 10**9  # bytes of a file of weights, which is put together in main memory
MASK = 1 / 8  # bytes of a mask's element where it is packed
MOST = 16  # windows at once for a perplexity, where a GPU has room for them
ROOM = 8  # bytes of a batch for each byte of its logits in float32: they, a copy, activations
HELD = 2**30  # inputs of blocks beyond it are written to disk; 70B has 86 GB of them
LOGITS_AT_ONCE = 2**21  # log-probabilities that are held at a time, see pruning.perplexity


@dataclass(frozen=True, kw_only=True)
class Place:
    on_gpu: bool  # On a GPU; otherwise on the CPU
    stream: bool = False  # Its weights stay on disk, and one block at a time is on the device


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a stage holds at its peak, in bytes, the model included."""

    device: int = 0  # On the GPU; 0 on a CPU
    host: int = 0  # In main memory, without the pages of mapped files
    disk: int = 0  # In files that it writes, temporary ones included

    @classmethod
    def at(cls, place: Place, *, device: int, host: int, disk: int = 0) -> Self:
        """On a CPU what would be the device's is in main memory, too."""
        if place.on_gpu:
            return cls(device=device + LIBRARIES, host=host, disk=disk)
        return cls(host=device + host + LIBRARIES, disk=disk)

    def with_(self, other: Self) -> Self:
        """The peak of one run after the other: the most of each."""
        return type(self)(
            device=max(self.device, other.device),
            host=max(self.host, other.host),
            disk=max(self.disk, other.disk),
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationRun:
    """Way in which a calibration is run."""

    windows: int = 1  # Run forward and backward at once
    forward_windows: int = 1  # Run at once of those that are run forward only
    recompute: bool = False  # Each block keeps only its input for the backward pass, and runs again
    states_on_device: bool = False  # A streamed model's hidden states stay on the GPU
    spill: bool = False  # The inputs of a streamed model's blocks are written to disk

    def halved(self) -> "CalibrationRun | None":
        """A run that takes less memory, by half the windows first; None if nothing does."""
        if max(self.windows, self.forward_windows) > 1:
            return replace(
                self,
                windows=max(1, self.windows // 2),
                forward_windows=max(1, self.forward_windows // 2),
            )
        if not self.recompute:
            return replace(self, recompute=True)
        return replace(self, states_on_device=False) if self.states_on_device else None


def calibration_peak(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    run: CalibrationRun,
    *,
    windows: int,
    fisher_windows: int,
) -> Peak:
    """The peak of a calibration, its bundle's file included."""
    if place.stream:
        return _streamed_calibration(
            footprint, settings, place, run, windows=windows, fisher_windows=fisher_windows
        )
    tokens, rows = settings.context_length, settings.projection_rows
    sums = sum(block.sums(rows) for block in footprint.blocks)
    if settings.shards(stream=False) > 1:
        sums *= 2  # those of a shard, and what they are added to
    casts = 0
    if settings.mixed_precision:  # weights in bfloat16 that are kept for the backward pass
        each = [block.weights // 2 for block in footprint.blocks]
        casts = max(each) if run.recompute else sum(each)
    forward = footprint.forward(tokens, run.forward_windows) if windows > fisher_windows else 0
    passes = max(casts + footprint.backward(tokens, run.windows, recompute=run.recompute), forward)
    sampling = footprint.sampling(settings)
    bundle = footprint.bundle(settings)
    if place.on_gpu:
        device = footprint.weights + max(sums + max(passes, _roots(footprint, rows)), sampling)
        return Peak.at(place, device=device, host=bundle, disk=bundle)
    device = max(sums + max(passes, _roots(footprint, rows)), bundle + sampling)
    return Peak.at(place, device=footprint.weights + device, host=0, disk=bundle)


def _streamed_calibration(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    run: CalibrationRun,
    *,
    windows: int,
    fisher_windows: int,
) -> Peak:
    tokens, rows = settings.context_length, settings.projection_rows
    forward = footprint.forward(tokens, 1)
    roots = _roots(footprint, rows)
    sums = max(block.sums(rows) for block in footprint.blocks)
    turn = sums + max(forward, roots, footprint.block_backward(tokens))
    head = footprint.head(tokens, 1) + footprint.forward(tokens, 1)
    device = turn
    if place.on_gpu:
        block = max(block.weights for block in footprint.blocks)
        device = max(block + turn, footprint.outside + max(block + forward, head))
    else:
        device = max(turn, head)
    states = footprint.states(windows, tokens)
    gradients = 2 * footprint.states(fisher_windows, tokens)
    inputs = block_inputs(footprint, tokens, fisher_windows)
    bundle = footprint.bundle(settings)
    kept = states + gradients + (0 if run.spill else inputs)
    if run.states_on_device:
        device += kept
        kept = footprint.states(fisher_windows, tokens) if run.spill else 0
    return Peak.at(
        place,
        device=device,
        host=kept + bundle + footprint.sampling(settings),
        disk=bundle + (inputs if run.spill else 0),
    )


def block_inputs(footprint: Footprint, tokens: int, fisher_windows: int) -> int:
    """Bytes of all blocks' inputs, which a streamed backward pass runs each block again from."""
    return len(footprint.blocks) * footprint.states(fisher_windows, tokens)


def _roots(footprint: Footprint, rows: int) -> int:
    """Bytes that the root of a Gram matrix takes; a projection is its own."""
    if rows:
        return 0
    return ROOT * max(block.width for block in footprint.blocks) ** 2


def pruning_peak(
    footprint: Footprint,
    place: Place,
    steps: Steps,
    *,
    windows: int,
    tokens: int,
    states_on_device: bool = False,
    keep_dense: bool,
) -> Peak:
    largest = max(block.largest for block in footprint.blocks)
    scoring = SCORES * FLOAT * largest
    block = max(block.weights for block in footprint.blocks)
    blocks = footprint.weights - footprint.outside
    there = footprint.weights
    if place.stream:
        there = block  # a copy of it, on a CPU too, since it is changed
    host = disk = 0
    work = scoring
    if steps.needs_text:
        work = _text_steps(footprint, steps, scoring) + footprint.forward(tokens, 1)
        states = footprint.states(windows, tokens)
        if steps.reconstruction.wanted:
            work = max(work, _training(footprint, tokens))
            states *= 2  # the dense model's, too
        if states_on_device:
            work += states
        else:
            host += states
        if keep_dense and not place.stream:
            host += blocks
    if place.stream and not (keep_dense and not steps.needs_text):
        disk = footprint.itemsize * footprint.prunable
        host += block  # on its way to the disk
    if place.stream and place.on_gpu:
        there = max(there, footprint.outside)
    if steps.reconstruction.wanted and not keep_dense:
        disk += (footprint.itemsize + 1) * footprint.prunable  # finished blocks, until it is saved
    return Peak.at(place, device=there + work, host=host, disk=disk)


SWEPT = 5 * 8 + 4 * FLOAT  # bytes of a column squared, while columns leave


def cut_peak(
    footprint: Footprint, place: Place, *, windows: int, tokens: int, copied: bool, sets: int
) -> Peak:
    """A cut of all blocks, or of a copy; ``sets`` of cut blocks are kept meanwhile."""
    widest = max(block.width for block in footprint.blocks)
    work = SWEPT * widest**2 + footprint.forward(tokens, 1)
    blocks = footprint.weights - footprint.outside
    there = footprint.weights + (footprint.weights if copied else blocks // len(footprint.blocks))
    states = 2 * footprint.states(windows, tokens)  # with those behind blocks that leave
    return Peak.at(place, device=there + work, host=states, disk=FLOAT * sets * footprint.prunable)


TOP_K = 512  # next tokens that the dense model is asked for; all others are one event
CUT = 40  # bytes of a token that is trained on: its text's, those of its windows, and of their cuts


def answers_bytes(tokens: int, vocabulary: int = TOP_K) -> int:
    """What the dense model predicts of so many tokens, and how likely: on disk, in a recovery."""
    return 8 * min(TOP_K, vocabulary) * tokens


def recovery_peak(
    footprint: Footprint,
    place: Place,
    recovery: Recovery,
    *,
    tokens: int,
    asked: int,
    processes: int = 1,
    recompute: bool = True,
) -> Peak:
    """
    A recovery: the pruned model in training; or with the dense one, which is asked before. Where
    several processes share it, the device is that of one, and the host that of all.
    """
    half = footprint.itemsize != FLOAT and place.on_gpu
    if recovery.train == "kept":
        trained, beside = footprint.prunable, FLOAT - footprint.itemsize if half else 0
    else:
        sides = sum(li.count * (li.in_features + li.out_features) for li in footprint.linears)
        trained, beside = RANK * sides if recovery.train == "lora" else sides // 4, 0
    weights = footprint.weights + trained * beside
    moments = 2 * recovery.adam_bits // 8 * trained
    state = FLOAT * trained + moments  # with the gradients
    read = gathered = 0
    if processes > 1:
        read = processes * weights
        weights = FLOAT * footprint.prunable // processes + footprint.outside
        state //= processes
        # A block, the next one, and the gradients of one.
        gathered = 3 * FLOAT * max(block.prunable for block in footprint.blocks)
    passes = gathered + footprint.backward(tokens, 1, recompute=recompute, trained=True)
    if not recompute:
        passes += trained * beside  # in 16 bits, as they are multiplied
    # Of each token that is written, keys and values of all blocks.
    remembered = 2 * footprint.hidden * len(footprint.blocks) * WRITTEN_AT_ONCE
    # One window is asked of the dense model; trained on beside it is one for a time alone.
    asking = footprint.forward(tokens, 1, watched=False)
    asking += tokens * footprint.vocabulary * (FLOAT + footprint.itemsize)
    meanwhile = [asking, passes * (recovery.tokens is None), remembered * (recovery.written > 0)]
    both = footprint.weights + weights + max(meanwhile)
    return Peak.at(
        place,
        device=max(both, weights + state + passes),
        host=max(read, processes * CUT * asked),
        # The best state, the last, and the next.
        disk=3 * (FLOAT * trained + moments) + answers_bytes(asked, footprint.vocabulary),
    )


def _training(footprint: Footprint, tokens: int) -> int:
    """Bytes of a reconstruction, in the block where it takes most."""
    exact = 0 if footprint.itemsize == FLOAT else FLOAT + footprint.itemsize
    weights = (TRAINED + exact) * max(block.prunable for block in footprint.blocks)
    return weights + footprint.block_backward(tokens)


def _text_steps(footprint: Footprint, steps: Steps, scoring: int) -> int:
    """Bytes of the steps that see a text, in the block where they take most."""
    most = 0
    for block in footprint.blocks:
        widest = block.width
        grams = FLOAT * sum(li.count * li.in_features**2 for li in block.linears)
        grams += FLOAT * widest**2 if steps.shrinkage else 0
        # Weights in float32 and masks of all linears that read an input.
        copies = 0 if footprint.itemsize == FLOAT else FLOAT * block.prunable
        factor = max(STEPS[step] for step in (steps.permutation, steps.repruning, steps.update))
        working = FLOAT * factor * block.largest
        if steps.repruning == "admm":
            working += FLOAT * REFINED * min(block.prunable, 3 * block.largest)
        if steps.update != "none":
            inverse = SPECTRUM if steps.update == "alps" else INVERSE
            held = {"alps": 6, "admm": 2}.get(steps.update, 1)
            working = max(working + held * FLOAT * widest**2, inverse * FLOAT * widest**2)
        most = max(most, grams + block.prunable + max(scoring, copies + working))
    return most


def confirmation_peak(
    footprint: Footprint,
    place: Place,
    *,
    tokens: int,
    windows: int,
    at_once: int = 1,
    sparsity: float = 0.5,
    removed_on_device: bool = True,
    states_on_device: bool = False,
) -> Peak:
    """The peak of measuring a candidate whose steps need no text: pruned, measured, dense again."""
    # Candidates with other steps take :func:`pruning_peak` before, and are measured in less.
    largest = max(block.largest for block in footprint.blocks)
    scoring = SCORES * FLOAT * largest
    logits = footprint.itemsize * tokens * footprint.vocabulary
    logarithms = 3 * FLOAT * min(LOGITS_AT_ONCE, tokens * footprint.vocabulary)
    forward = footprint.forward(tokens, at_once, watched=False)
    head = at_once * (logits + 2 * tokens * footprint.hidden) + logarithms
    running = max(forward, head)
    if place.stream:
        block = max(block.weights for block in footprint.blocks)
        outside = footprint.outside if place.on_gpu else 0
        device = max(block + max(scoring, forward), outside + running)
        if place.on_gpu:
            device = max(device, outside + block + forward)
        states = footprint.states(windows, tokens)
        if states_on_device:
            return Peak.at(place, device=device + states, host=0)
        return Peak.at(place, device=device, host=states)
    removed = footprint.itemsize * footprint.prunable
    if place.on_gpu:
        removed = int(sparsity * removed)
    device, host = footprint.weights + max(scoring, running), 0
    if place.on_gpu and not removed_on_device:
        host = removed
    else:
        device += removed
    return Peak.at(place, device=device, host=host)


def windows_at_once(logits: int, *, device_size: int, weights: int, most: int) -> int:
    """How many windows a GPU is given at once for a perplexity, if they fit into what is free."""
    fitting = min(most, (device_size - weights) // 2 // (ROOM * FLOAT * logits))
    return 1 << max(0, fitting.bit_length() - 1) if fitting > 0 else 1


def saving_peak(footprint: Footprint, place: Place, *, stored_itemsize: int) -> Peak:
    """The peak of writing a pruned model and its masks."""
    stored = footprint.weights // footprint.itemsize * stored_itemsize
    masks = int(MASK * footprint.prunable)
    largest = max(block.largest for block in footprint.blocks)
    host = 2 * min(stored, SHARD) + 2 * masks + 2 * FLOAT * largest
    disk = stored + masks
    if place.stream:
        disk += footprint.itemsize * footprint.prunable  # changed weights, until it is closed
        return Peak(host=host, disk=disk)
    return Peak.at(place, device=max(footprint.weights, stored), host=host, disk=disk)


AT_ONCE = 8192  # tokens that a GPU runs at once, if they fit
BATCHED = 0.75  # of a card, for more windows than one at once: so its other users matter little


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """How a calibration is run: results differ by rounding alone, on a CPU not at all."""

    run: CalibrationRun  # How
    peak: Peak  # What it takes, the model included
    fits: bool  # Whether that is within the limits


def choose_run(
    footprint: Footprint,
    settings: CalibrationSettings,
    place: Place,
    *,
    windows: int,
    fisher_windows: int,
    device_limit: int | None = None,
    host_limit: int | None = None,
    device_size: int | None = None,
) -> CalibrationPlan:
    """The fastest run that fits, or the most frugal one if none does; no model need be loaded."""
    # On a CPU windows are run one by one: more at once are not faster there.
    plans = []
    for run in _runs(footprint, settings, place, fisher_windows):
        peak = calibration_peak(
            footprint, settings, place, run, windows=windows, fisher_windows=fisher_windows
        )
        fits = _within(peak.device, device_limit) and _within(peak.host, host_limit)
        if max(run.windows, run.forward_windows) > 1 and device_size is not None:
            fits = fits and peak.device <= BATCHED * device_size
        plans.append(CalibrationPlan(run=run, peak=peak, fits=fits))
        if fits:
            break
    return plans[-1]


def _within(needed: int, limit: int | None) -> bool:
    return limit is None or needed <= limit


def _runs(
    footprint: Footprint, settings: CalibrationSettings, place: Place, fisher_windows: int
) -> list[CalibrationRun]:
    """Ways to run a calibration, the fastest first."""
    if place.stream:
        inputs = block_inputs(footprint, settings.context_length, fisher_windows)
        run = CalibrationRun(recompute=True, spill=inputs > HELD)
        return [replace(run, states_on_device=True), run] if place.on_gpu else [run]
    most = max(1, AT_ONCE // settings.context_length) if place.on_gpu else 1
    counts = [2**i for i in reversed(range(most.bit_length()))]
    both = [CalibrationRun(windows=count, forward_windows=counts[0]) for count in counts]
    few = [CalibrationRun(forward_windows=count) for count in counts]
    recomputing = [replace(run, recompute=True) for run in few]
    return [*both, *few, *recomputing]
