"""
What a model's passes, statistics and bundle take, in bytes, from its shapes alone.

A model on the ``meta`` device has all that is asked for: no weight is read. What the factors
stand for was measured on the families of the tests, which hold the estimates against what is
really taken.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from pho_service.models.architecture import decoder_blocks
from pho_service.pruning.passes import HEAD_TOKENS
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec import CalibrationSettings

FLOAT = 4  # bytes: norms, sums and scores are float32, whatever the weights are
MARGIN = 1.15  # on what passes keep, for what differs between families
ATTENTION = 3  # (heads, tokens, tokens) in a block whose attention is not fused


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """
    Sizes of a decoder block.

    Attributes:
        weights: Bytes of its parameters.
        kept: Bytes that it keeps of each token for its backward pass.
        widest: Inputs or outputs of its widest linear.
        prunable: Number of weights of its linears.
        largest: The same of its largest linear.
        widths: in_features of each linear.
        outputs: out_features of all linears.
    """

    weights: int
    kept: float
    widest: int
    prunable: int
    largest: int
    widths: tuple[int, ...]
    outputs: int

    def sums(self, rows: int) -> int:
        """Bytes of the statistics of its linears, as if each read an input of its own."""
        elements = sum(((rows or width) + 1) * width for width in self.widths)
        return FLOAT * (elements + self.outputs)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """
    Bytes that a model takes in each stage.

    Attributes:
        itemsize: Bytes of a weight, and of an activation.
        blocks: In their order.
        outside: Bytes of the parameters outside the blocks.
        hidden: Bytes of a token's hidden state.
        vocabulary: Number of a token's logits.
        heads: Of attention that is not fused; 0 if it is.
        rows: out_features of each linear.
    """

    itemsize: int
    blocks: tuple[BlockSizes, ...]
    outside: int
    hidden: int
    vocabulary: int
    heads: int
    rows: tuple[int, ...]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        linears: dict[str, PrunableLinear],
        *,
        dtype: torch.dtype | None = None,
    ) -> "Footprint":
        """
        Add up a model's shapes.

        Args:
            model: Its weights may be on the ``meta`` device.
            linears: As :func:`~pho_service.models.architecture.prunable_linears` finds them.
            dtype: That it will be loaded in; None is that of its weights.
        """
        itemsize = (dtype or model.dtype).itemsize
        config = model.config.get_text_config()
        embedding: Any = model.get_input_embeddings()
        vocabulary, width = embedding.weight.shape
        experts = Counter(linear.siblings for linear in linears.values())
        blocks = []
        for name, block in decoder_blocks(model):
            own = [each for full, each in linears.items() if full.startswith(f"{name}.")]
            shapes = [tuple(each.weight.shape) for each in own]
            reached = [_reached(each, experts[each.siblings], config) for each in own]
            blocks.append(
                BlockSizes(
                    weights=itemsize * sum(p.numel() for p in block.parameters()),
                    kept=_kept(block, shapes, reached, width, config.num_attention_heads, itemsize),
                    widest=max(max(shape) for shape in shapes),
                    prunable=sum(out * n for out, n in shapes),
                    largest=max(out * n for out, n in shapes),
                    widths=tuple(n for _, n in shapes),
                    outputs=sum(out for out, _ in shapes),
                )
            )
        parameters = itemsize * sum(p.numel() for p in model.parameters())
        return cls(
            itemsize=itemsize,
            blocks=tuple(blocks),
            outside=parameters - sum(block.weights for block in blocks),
            hidden=itemsize * width,
            vocabulary=vocabulary,
            heads=0 if config._attn_implementation == "sdpa" else config.num_attention_heads,
            rows=tuple(linear.weight.shape[0] for linear in linears.values()),
        )

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return self.outside + sum(block.weights for block in self.blocks)

    @property
    def prunable(self) -> int:
        """Number of weights of all linears."""
        return sum(block.prunable for block in self.blocks)

    def states(self, windows: int, tokens: int) -> int:
        """Bytes of the hidden states between two blocks."""
        return windows * tokens * self.hidden

    def forward(self, tokens: int, windows: int) -> int:
        """Bytes that a pass without gradients, and without the head, takes at its peak."""
        widest = max(block.widest for block in self.blocks)
        # Inputs of the widest linears, a copy and squares in float32; states beside them.
        each = (2 * FLOAT + 3 * self.itemsize) * widest + 4 * self.hidden
        return int(windows * (MARGIN * tokens * each + self._mask(tokens)))

    def backward(self, tokens: int, windows: int, *, recompute: bool) -> int:
        """
        Bytes that a pass forward and backward takes at its peak.

        Args:
            tokens: Of a window.
            windows: Run at once.
            recompute: Blocks keep only their inputs, and run again.
        """
        kept = [tokens * block.kept for block in self.blocks]
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
        widths = (width for block in self.blocks for width in block.widths)
        most = settings.rows_per_layer
        sampled = sum(
            min(most or rows, rows) * width for rows, width in zip(self.rows, widths, strict=True)
        )
        return FLOAT * sampled * (1 + len(settings.kernel_sizes))

    def sampling(self, settings: CalibrationSettings) -> int:
        """Bytes that the sampling of a linear's rows takes."""
        widest = max(width for block in self.blocks for width in block.widths)
        largest = max(block.largest for block in self.blocks)
        copies = 1 if self.itemsize == FLOAT else 2  # the weight in float32, and its magnitudes
        root = (settings.projection_rows or widest) * (widest + 2 * max(self.rows))
        rows = 4 * min(settings.rows_per_layer or max(self.rows), max(self.rows)) * widest
        return FLOAT * (copies * largest + root + rows)


def _reached(linear: PrunableLinear, experts: int, config: Any) -> float:
    """How often a token reaches a linear: always, or as often as one of these experts."""
    if not linear.siblings:
        return 1.0
    return min(1.0, getattr(config, "num_experts_per_tok", experts) / experts)


def _kept(
    block: nn.Module,
    shapes: list[tuple[int, ...]],
    reached: list[float],
    hidden: int,
    heads: int,
    itemsize: int,
) -> float:
    """
    Bytes that a block keeps of a token for its backward pass, whose weights are frozen.

    Linears keep nothing then. Their outputs are kept by what reads them, and so is the input of a
    linear that does not read the hidden states, by what makes it; norms keep theirs in float32.
    """
    kept = 0.0
    for (out, width), share in zip(shapes, reached, strict=True):
        kept += itemsize * share * (out + (width if width != hidden else 0))
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.dim() == 1 for parameter in own):
            size = own[0].numel()
            kept += FLOAT * (size if size >= hidden else size * heads)  # of a head
        if type(module).__module__ == "transformers.activations" and not own:
            more = max(0, _saved(module) - 2)  # than the outputs and inputs around it
            kept += itemsize * more * max(max(shape) for shape in shapes)
    return kept


def _saved(activation: nn.Module) -> int:
    """How many tensors of its input's size an activation keeps for its backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == 2 and not any(tensor.data_ptr() == s.data_ptr() for s in saved):
            saved.append(tensor)
        return tensor

    x = torch.zeros(2, device="cpu", requires_grad=True)
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        activation(x)
    return len(saved)
