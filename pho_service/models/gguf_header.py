"""
GGUF files, read without doing the same work again and again, or more than they hold.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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


class _HeaderReadEnough(Exception):
    """What comes now is as large as the vocabulary."""


class _FirstFields(BoundedReader):
    """The fields before those of the tokenizer, which writers put at the end."""

    def __init__(self, path: Path) -> None:
        self.found: dict[str, Any] = {}
        with suppress(_HeaderReadEnough):
            super().__init__(path)

    def _push_field(self, field: Any, skip_sum: bool = False) -> Any:
        if field.name.startswith("tokenizer."):
            raise _HeaderReadEnough
        size = super()._push_field(field, skip_sum)
        self.found[field.name] = field
        return size


def text_fields(path: Path, names: Iterable[str]) -> dict[str, str]:
    """
    Read texts from the beginning of a header, without the vocabulary after them.

    Args:
        path: A GGUF file.
        names: Names of the fields that are wanted.

    Returns:
        Those of them that are there and are texts.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a whole GGUF file.
    """
    try:
        found = _FirstFields(path).found
    except (KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file") from error
    contents = {name: found[name].contents() for name in names if name in found}
    return {name: value for name, value in contents.items() if isinstance(value, str)}


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
