"""
How a calibration stays within a memory: estimated before the work starts, from the shapes alone.

The estimate is meant to be above the truth. What its factors stand for was measured on
the families of the tests, which check that it holds.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from pho_service.errors import InvalidInput
from pho_service.memory import format_bytes, memory_in_use
from pho_service.models.architecture import decoder_blocks
from pho_service.models.loading import LanguageModel
from pho_service.pruning.passes import HEAD_TOKENS
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec import CalibrationSettings

FLOAT = 4  # bytes: norms and sums are float32, whatever the weights are
KEPT = 1.5  # that a block keeps for its backward pass, in inputs and outputs of its linears
RUNNING = 2.0  # the same that live for a moment while a block runs, forward or backward
ATTENTION = 3  # (heads, tokens, tokens) in a block whose attention is not fused
LOGITS = 5  # (tokens, vocabulary): logits, logarithms, and the gradients of both
AT_ONCE = 8192  # tokens that a GPU runs at once, if they fit
LIBRARIES = 96 * 2**20  # what the matrix library keeps for itself on a CPU


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """
    How a calibration is run. What it gives is the same but for rounding, and on a CPU the same.

    Attributes:
        windows: That are run at once.
        recompute: Each block keeps only its input for the backward pass, and runs again when it
            comes to it: a third more work for the windows that are run backward.
        memory_bytes: Estimate of the peak on the model's device, the model and all that was
            there before included; pages of a streamed model's files are not.
    """

    windows: int
    recompute: bool
    memory_bytes: int


def plan_calibration(
    model: LanguageModel, settings: CalibrationSettings, *, windows: int, fisher_windows: int
) -> CalibrationPlan:
    """
    The fastest plan that fits into ``settings.memory_bytes``, or, without it, into a GPU.

    On a CPU windows are run one by one: more at once are not faster there.

    Args:
        model: Loaded, so that what is in use counts it.
        settings: Of the calibration.
        windows: How many there are.
        fisher_windows: How many of them are run backward.

    Raises:
        InvalidInput: Not even the most frugal plan fits; says what would.
    """
    on_gpu = model.device.type == "cuda"
    in_use = memory_in_use(model.device)
    limit = settings.memory_bytes
    if limit is None and on_gpu:
        limit = in_use + int(0.9 * torch.cuda.mem_get_info(model.device)[0])
    needs = Needs.of(model, settings)
    most = max(1, AT_ONCE // settings.context_length) if on_gpu and not model.stream else 1
    counts = [
        count for count in (2**i for i in reversed(range(most.bit_length()))) if count <= most
    ]
    tries = [(count, False) for count in counts] + [(1, True)]
    if model.stream:
        tries = [(1, True)]  # as it is always run
    for count, recompute in tries:
        needed = in_use + needs.peak(settings.context_length, count, recompute=recompute)
        if model.stream:
            needed += needs.host(settings.context_length, windows, fisher_windows, on_gpu=on_gpu)
        if limit is None or needed <= limit:
            return CalibrationPlan(windows=count, recompute=recompute, memory_bytes=needed)
    assert limit is not None  # with no limit the first plan is taken
    raise InvalidInput(
        f"the calibration of {model.name} on windows of {settings.context_length} tokens needs up "
        f"to {format_bytes(needed)} of memory, {format_bytes(in_use)} of them in use already, but "
        f"may take {format_bytes(limit)}. " + _way_out(model, needs, settings, limit - in_use)
    )


def _way_out(model: LanguageModel, needs: "Needs", settings: CalibrationSettings, free: int) -> str:
    """What would fit."""
    ways = ["allow it more (--calibration-memory; memory_bytes of a job)"]
    shorter = settings.context_length // 2
    while shorter >= 64 and not model.stream and needs.peak(shorter, 1, recompute=True) > free:
        shorter //= 2
    if shorter >= 64:
        ways.append(f"take shorter windows (--context-length {shorter})")
    if needs.sums > free // 2 and not settings.projection_rows:
        ways.append("project the activations (--projection-rows 128)")
    if not model.stream:
        ways.append("leave the weights on disk (--stream, for safetensors)")
    else:
        ways.append("take fewer windows (--samples, --fisher-samples)")
    return f"A{', or '.join(ways)[1:]}."


@dataclass(frozen=True, kw_only=True)
class Needs:
    """
    Bytes that a model's calibration takes beside what is there before.

    Attributes:
        block: Inputs and outputs of the linears of the largest block, a token.
        blocks: The same of all blocks.
        count: Of blocks.
        heads: Of attention that is not fused; 0 if it is.
        hidden: Hidden states of a token.
        vocabulary: Logits of a token.
        sums: Statistics that are gathered at a time.
        results: The bundle, and what its making takes.
        casts: Weights in bfloat16 that mixed precision keeps for the backward pass.
        block_casts: The same of the largest block.
        weights: That a streamed model moves to a GPU at a time.
    """

    block: int
    blocks: int
    count: int
    heads: int
    hidden: int
    vocabulary: int
    sums: int
    results: int
    casts: int
    block_casts: int
    weights: int

    @classmethod
    def of(cls, model: LanguageModel, settings: CalibrationSettings) -> "Needs":
        """What the shapes of a model and its settings come to."""
        config = model.model.config.get_text_config()
        blocks = decoder_blocks(model.model)
        experts = Counter(linear.siblings for linear in model.linears.values())
        features, sums = [0.0] * len(blocks), [0] * len(blocks)
        for number, (block_name, _) in enumerate(blocks):
            for name, linear in model.linears.items():
                if name.startswith(f"{block_name}."):
                    features[number] += _features(linear, experts[linear.siblings], config)
                    sums[number] += _sums(linear, settings.projection_rows)
        embedding: Any = model.model.get_input_embeddings()
        vocabulary, hidden = embedding.weight.shape
        shapes = [linear.weight.shape for linear in model.linears.values()]
        rows = settings.rows_per_layer or max(shape[0] for shape in shapes)
        sampled = sum(min(rows, shape[0]) * shape[1] for shape in shapes)
        roots = 0 if settings.projection_rows else 24 * max(shape[1] for shape in shapes) ** 2
        sizes = [sum(p.nbytes for p in block.parameters()) for _, block in blocks]
        outside = sum(p.nbytes for p in model.model.parameters()) - sum(sizes)
        streamed_to_gpu = model.stream and model.device.type == "cuda"
        return cls(
            block=int(FLOAT * max(features)),
            blocks=int(FLOAT * sum(features)),
            count=len(blocks),
            heads=0 if config._attn_implementation == "sdpa" else config.num_attention_heads,
            hidden=FLOAT * hidden,
            vocabulary=FLOAT * vocabulary,
            sums=max(sums) if streamed_to_gpu else sum(sums),
            results=FLOAT * sampled * (2 + len(settings.kernel_sizes))
            + max(6 * FLOAT * max(shape.numel() for shape in shapes), roots),
            casts=sum(sizes) // 2 if settings.mixed_precision else 0,
            block_casts=max(sizes) // 2 if settings.mixed_precision else 0,
            weights=max(sizes) + outside if streamed_to_gpu else 0,
        )

    def peak(self, tokens: int, windows: int, *, recompute: bool) -> int:
        """Of all, when so many windows are run at once."""
        passes = self.passes(tokens, windows, recompute=recompute)
        return self.sums + self.weights + max(passes, self.results) + LIBRARIES

    def passes(self, tokens: int, windows: int, *, recompute: bool) -> int:
        """Of one pass forward and backward."""
        attention = FLOAT * ATTENTION * self.heads * tokens * tokens
        running = tokens * RUNNING * self.block + attention
        if recompute:
            kept = tokens * (2 * self.hidden * self.count + KEPT * self.block) + attention
        else:
            kept = tokens * KEPT * self.blocks + attention * self.count
        mask = FLOAT * tokens * tokens
        head = LOGITS * min(windows * tokens, max(HEAD_TOKENS, windows)) * self.vocabulary
        casts = self.block_casts if recompute else self.casts
        return int(windows * (kept + running + mask) + head + casts)

    def host(self, tokens: int, windows: int, fisher_windows: int, *, on_gpu: bool) -> int:
        """Of the hidden states that a streamed model keeps on the CPU; they are no GPU's."""
        if on_gpu:
            return 0
        return tokens * self.hidden * (2 * windows + fisher_windows * (self.count + 2))


def _features(linear: PrunableLinear, experts: int, config: Any) -> float:
    """A linear's inputs and outputs for a token, as often as it reaches one of these experts."""
    share = 1.0
    if linear.siblings:
        share = min(1.0, getattr(config, "num_experts_per_tok", experts) / experts)
    return share * sum(linear.weight.shape)


def _sums(linear: PrunableLinear, projection_rows: int) -> int:
    """Of a linear's input, as if no other linear read it."""
    out_features, width = linear.weight.shape
    return FLOAT * ((projection_rows or width) * width + width + out_features)
