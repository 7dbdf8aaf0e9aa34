"""
What a model's passes, statistics and bundle take, in bytes, from its shapes alone.

What the factors stand for was measured on the families of the tests, which hold the estimates
against what is really taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pho_service.planning.shapes import DTYPE_BYTES, BlockShape, LinearShape, ModelShapes
from pho_service.spec.calibration import CalibrationSettings

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

        It is watched if statistics of the linears' inputs are gathered.
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

        To recompute, blocks keep only their inputs, and run again.
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
    """
    Add up a block, with what it keeps of a token for a backward pass through frozen weights.

    Linears keep nothing then. Their outputs are kept by what reads them, and so is the input of a
    linear that does not read the hidden states, by what makes it; norms keep theirs in float32.
    """
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
