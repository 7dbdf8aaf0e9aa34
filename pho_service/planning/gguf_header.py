"""
GGUF files, read without doing the same work again and again, or more than they hold.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

MAX_READS = 2**22  # values of a header, some 400 bytes each in memory; Gemma's has two million


class BoundedReader(gguf.GGUFReader):
    """
    gguf's reader, but what a header declares must be in the file.

    gguf itself reads on beyond the end, value by value: 60 bytes that declare
    an array of 2**60 values would fill the memory.
    """

    _reads = 0

    def __init__(self, path: Any, mode: Any = "r") -> None:
        super().__init__(path, mode)
        parts = self.get_field("split.count")
        if parts is not None and int(parts.contents()) > 1:  # transformers reads this file alone
            raise ValueError(
                f"it is one of {int(parts.contents())} parts. Put them together first, with "
                "`llama-gguf-split --merge` of llama.cpp"
            )

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        self._reads += 1
        if isinstance(self.data, np.memmap):  # which takes several times as long for each slice
            self.data: Any = self.data.view(np.ndarray)
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError(f"the file ends in what is declared at byte {int(offset)}")
        if self._reads > MAX_READS:
            raise ValueError(f"its header has more than {MAX_READS} values")
        return values


class _WithoutArrays(BoundedReader):
    """The header alone: of an array the number of its values, which are passed over."""

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        length = self._get(orig_offs + 4, np.uint64)
        count, end = int(length[0]), orig_offs + 12
        if kind in self.gguf_scalar_to_np:
            end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        elif kind == gguf.GGUFValueType.STRING:
            self._reads += count
            if self._reads > MAX_READS:
                raise ValueError(f"its header has more than {MAX_READS} values")
            text_length = struct.Struct("<Q" if self.byte_order == "I" else ">Q")
            for _ in range(count):
                end += 8 + text_length.unpack_from(self.data, end)[0]
        else:
            raise ValueError("its header has arrays of arrays")
        if end > len(self.data):
            raise ValueError(f"the file ends in what is declared at byte {int(orig_offs)}")
        return end - orig_offs, [length], [0], [gguf.GGUFValueType.UINT64]

    def _build_tensors(self, _start_offs: Any, fields: Any) -> None:
        """Nothing of the weights is looked at."""
        self.shapes = {
            bytes(field.parts[1]).decode(): tuple(map(int, field.parts[3][8::-1]))  # 9 at most
            for field in fields
        }


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """
    Read the fields of a header, of an array the number of its values, and the tensors' shapes.

    What is not a whole GGUF file is a ValueError.
    """
    try:
        reader = _WithoutArrays(path)
    except (KeyError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(str(error)) from error
    return {name: field.contents() for name, field in reader.fields.items()}, reader.shapes


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """
    Inside, the header of a GGUF file is parsed once, and so is the table of its tensors' names.

    transformers parses the header (with all tokens, one by one) for the config,
    the weights and the tokenizer, and makes the table for each module of the
    model. For a small model that is most of the time that loading takes.
    """
    ours = {  # transformers looks them up at each call
        "GGUFReader": cache(BoundedReader),
        "get_tensor_name_map": cache(gguf.get_tensor_name_map),
    }
    originals = {name: getattr(gguf, name) for name in ours}
    try:
        for name, replacement in ours.items():
            setattr(gguf, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
