"""
GGUF files, read without doing the same work again and again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import gguf


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """
    Inside, the header of a GGUF file is parsed once, and so is the table of its tensors' names.

    transformers parses the header (with all tokens, one by one) for the config,
    the weights and the tokenizer, and makes the table for each module of the
    model. For a small model that is most of the time that loading takes.
    """
    names = ("GGUFReader", "get_tensor_name_map")  # transformers looks them up at each call
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(gguf, name, cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
