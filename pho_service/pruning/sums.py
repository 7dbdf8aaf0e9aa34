"""
The sums of one shard of a calibration's windows, which several shards' are added up from.

Sums of floating-point numbers depend on their order. A calibration is cut into shards by its
settings alone, and their sums are added shard by shard: whoever gathered them, and how many at a
time, the result is the same to the bit.
"""

from dataclasses import dataclass

from torch import Tensor

APART = 2_654_435_761  # between two shards' seeds; torch's generator on the CPU reads 32 bits


@dataclass(frozen=True, kw_only=True)
class Sums:
    """
    What some windows add to the statistics, not divided by anything yet.

    Attributes:
        readers: The first linear that reads each input, in the order of their first calls.
        input_of: Index into ``readers`` for each linear that was called.
        squares: (in_features,), float32, for each input: squares summed over tokens.
        moments: (rows, in_features), float32, for each input: its projection.
        fisher: (out_features,), float32, for each linear that a gradient reached: its squares.
        gradient_tokens: How many tokens those are of.
    """

    readers: list[str]
    input_of: dict[str, int]
    squares: list[Tensor]
    moments: list[Tensor]
    fisher: dict[str, Tensor]
    gradient_tokens: dict[str, int]


def shard_seed(seed: int, shard: int) -> int:
    """
    Return the seed of a shard's projection; the first one's is the calibration's.

    The signs of different shards' tokens must be drawn apart: with the same ones, products of
    tokens at the same places would not vanish in expectation.
    """
    return seed + shard * APART
