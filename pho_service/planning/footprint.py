"""
What a model's passes, statistics and bundle take, in bytes, from its shapes alone.

What the factors stand for was measured on the families of the tests, which hold the estimates
against what is really taken.
"""

from dataclasses import dataclass

from pho_service.planning.layouts import LinearShape
from pho_service.planning.shapes import DTYPE_BYTES, ModelShapes
from pho_service.spec.calibration import CalibrationSettings

FLOAT = 4  # bytes: norms, sums and scores are float32, whatever the weights are
MARGIN = 1.15  # on what passes keep, for what differs between families
ATTENTION = 3  # (heads, tokens, tokens) in a block whose attention is not fused
HEAD_TOKENS = 256  # whose logits a backward pass holds at a time, see pruning.passes


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
        heads: Number of attention heads if attention is not fused; 0 if it is.
        rows: out_features of each linear.
    """

    itemsize: int
    blocks: tuple[BlockSizes, ...]
    outside: int
    hidden: int
    vocabulary: int
    heads: int
    rows: tuple[int, ...]

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

    def forward(self, tokens: int, windows: int, *, watched: bool = True) -> int:
        """
        Bytes that a pass without gradients, and without the head, takes at its peak.

        Args:
            tokens: Number of tokens of a window.
            windows: Run at once.
            watched: Whether statistics of the linears' inputs are gathered.
        """
        widest = max(block.widest for block in self.blocks)
        # Inputs of the widest linears, and states beside them; a copy and squares in float32.
        each = 3 * self.itemsize * widest + 4 * self.hidden
        if watched:
            each += 2 * FLOAT * widest
        return int(windows * (MARGIN * tokens * each + self._mask(tokens)))

    def backward(self, tokens: int, windows: int, *, recompute: bool) -> int:
        """
        Bytes that a pass forward and backward takes at its peak.

        Args:
            tokens: Number of tokens of a window.
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


def shapes_footprint(shapes: ModelShapes, dtype: str) -> Footprint:
    """
    The footprint of a model of which only the configuration is known.

    Args:
        shapes: Shapes of the model; its attention is taken to be fused.
        dtype: That it will be loaded in.
    """
    itemsize = DTYPE_BYTES[dtype]
    blocks = tuple(_block_sizes(shapes, block, itemsize) for block in shapes.blocks)
    return Footprint(
        itemsize=itemsize,
        blocks=blocks,
        outside=shapes.bytes(dtype) - sum(block.weights for block in blocks),
        hidden=itemsize * shapes.hidden,
        vocabulary=shapes.vocabulary,
        heads=0,
        rows=tuple(li.out_features for block in shapes.blocks for li in block
                   for _ in range(li.count)),
    )  # fmt: skip


def _block_sizes(shapes: ModelShapes, block: tuple[LinearShape, ...], itemsize: int) -> BlockSizes:
    kept = float(FLOAT * shapes.norms)  # what norms read is kept in float32
    for linear in block:
        width = linear.in_features if linear.in_features != shapes.hidden else 0
        kept += itemsize * linear.count * linear.share * (linear.out_features + width)
    largest = max(max(linear.out_features, linear.in_features) for linear in block)
    kept += itemsize * shapes.activations * largest
    return BlockSizes(
        weights=itemsize * (sum(linear.weights for linear in block) + shapes.beside),
        kept=kept,
        widest=largest,
        prunable=sum(linear.weights for linear in block),
        largest=max(linear.out_features * linear.in_features for linear in block),
        widths=tuple(li.in_features for li in block for _ in range(li.count)),
        outputs=sum(linear.count * linear.out_features for linear in block),
    )
