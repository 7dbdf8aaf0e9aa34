"""
Weights as streams that compress well: which of them are zero, and each byte of the others apart.

The bytes of a 16-bit number next to each other look like noise. Apart they do not: trained weights
have few different exponents, about 3 bits' worth in bfloat16, beside mantissas that nothing makes
smaller. The first bit of a float is its sign, which is turned to the end, so that the
exponent of a bfloat16 or float32 is one byte.

Source:
    Hershcovitch et al. 2024, arXiv:2411.05239 (ZipNN), for the bytes apart. It has no stream for
    the zeros, which here are left out of the others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 2**22  # values that are split or joined at a time; a multiple of 8, for whole bytes of bits


@dataclass(frozen=True, kw_only=True)
class Layout:
    """
    How the values of one dtype are cut.

    Attributes:
        size: Bytes of a value.
        turned: Whether its first bit, the sign, is turned to the end.
    """

    size: int
    turned: bool = False

    @property
    def streams(self) -> int:
        """How many there are: one of bits, and one of each byte."""
        return 1 + self.size

    @property
    def _unsigned(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(f"<u{self.size}")

    def split(self, data: bytes) -> list[bytes]:
        """
        Cut values into their streams.

        Args:
            data: Whole values, little-endian.

        Returns:
            One bit a value, 1 where any of its bits is, the first in the highest bit; then the
            lowest byte of each such value, the next one, and so on.
        """
        values = np.frombuffer(data, self._unsigned)
        kept = values != 0
        bits = np.packbits(kept).tobytes()
        if not kept.all():
            values = values[kept]
        if self.turned:
            values = (values << 1) | (values >> (8 * self.size - 1))
        planes = values.view(np.uint8).reshape(-1, self.size)
        return [bits, *(planes[:, place].tobytes() for place in range(self.size))]

    def join(self, count: int, read: Callable[[int, int], bytes]) -> NDArray[np.unsignedinteger]:
        """
        Put values together again, bit for bit.

        Args:
            count: Number of values.
            read: Gives the next bytes of a stream: its number, and how many bytes.

        Returns:
            (count,), unsigned numbers of the values' size and bits.
        """
        bits = np.frombuffer(read(0, -(-count // 8)), np.uint8)
        kept = np.unpackbits(bits, count=count).view(np.bool_)
        number = int(np.count_nonzero(kept))
        planes = np.empty((number, self.size), np.uint8)
        for place in range(self.size):
            planes[:, place] = np.frombuffer(read(1 + place, number), np.uint8)
        values = planes.view(self._unsigned).reshape(-1)
        if self.turned:
            values = (values >> 1) | (values << (8 * self.size - 1))
        if number == count:
            return values
        whole = np.zeros(count, self._unsigned)
        whole[kept] = values
        return whole


# By the names of safetensors. All others are single bytes, whatever they mean.
_LAYOUTS = {
    "BF16": Layout(size=2, turned=True),
    "F16": Layout(size=2, turned=True),
    "F32": Layout(size=4, turned=True),
    "F64": Layout(size=8, turned=True),
    "I16": Layout(size=2),
    "I32": Layout(size=4),
    "I64": Layout(size=8),
}
_BYTES = Layout(size=1)


def layout_of(dtype: str) -> Layout:
    """How values of a dtype of safetensors are cut."""
    return _LAYOUTS.get(dtype, _BYTES)


def chunks(count: int) -> Iterator[int]:
    """The numbers of values to take at a time."""
    for start in range(0, count, CHUNK):
        yield min(CHUNK, count - start)


def difference(data: NDArray[Any] | bytes, known: bytes) -> NDArray[np.uint8]:
    """The bits in which two equally long runs of bytes differ; twice gives the first again."""
    first = np.frombuffer(data, np.uint8)
    return first ^ np.frombuffer(known, np.uint8)
