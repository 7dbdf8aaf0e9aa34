"""
Where each tensor lies in a safetensors file, so that the file is read, and made again, in pieces.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from pho_service.errors import ModelError
from pho_service.host.plain import shown

MAX_HEADER = 100_000_000  # bytes; the limit of the library safetensors
_LENGTH = 8  # bytes that say how long the header is


@dataclass(frozen=True, kw_only=True)
class Span:
    """
    One tensor of a file.

    Attributes:
        name: Name of the tensor.
        dtype: As safetensors names it: BF16.
        shape: Shape of the tensor.
        start, end: Offsets of its bytes, counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Number of its values."""
        return self.end - self.start


def read_header(file: BinaryIO, name: str) -> bytes:
    """
    Read the header of a safetensors file, with the bytes that say its length.

    Raises:
        ModelError: The file is cut short, or is something else.
    """
    prefix = file.read(_LENGTH)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH or not 0 < length <= MAX_HEADER:
        raise _damaged(name, "it has no header")
    header = file.read(length)
    if len(header) < length:
        raise _damaged(name, "its header is cut short")
    return prefix + header


def spans_of(header: bytes, name: str) -> list[Span]:
    """
    Find the tensors that a header lists, in the order of their bytes.

    Raises:
        ModelError: It is not JSON, or its tensors do not follow one another without a gap.
    """
    try:
        document = json.loads(header[_LENGTH:])
        document.pop("__metadata__", None)
        spans = [_span(tensor, entry) for tensor, entry in document.items()]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(name, f"its header cannot be read: {shown(str(error))}") from error
    spans.sort(key=lambda span: (span.start, span.end))
    expected = 0
    for span in spans:
        if span.start != expected or span.end < span.start:
            raise _damaged(name, f"{shown(span.name)} does not begin where the one before ends")
        expected = span.end
    return spans


def _span(name: str, entry: Mapping[str, Any]) -> Span:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(each) is int for each in (start, end, *shape)):
        raise TypeError("a size is not a whole number")
    return Span(name=name, dtype=str(entry["dtype"]), shape=shape, start=start, end=end)


def _damaged(name: str, reason: str) -> ModelError:
    return ModelError(f"{name} is damaged or cut short: {reason}. Get the file again.")
