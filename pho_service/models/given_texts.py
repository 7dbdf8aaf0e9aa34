"""
Texts that a program has in memory: documents, or windows that are cut already.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, TextError

SHORTEST = 8  # tokens of a window


@dataclass(frozen=True, kw_only=True)
class GivenText:
    """
    Documents in memory.

    Attributes:
        documents: Can be iterated over again and again.
        name: For messages, and what is stored with a number that was measured on it.
    """

    documents: Iterable[str] = field(repr=False)
    name: str = "a text in memory"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class GivenWindows:
    """
    Tokens in memory, one window a row; they are taken as they are, in their order.

    Attributes:
        tokens: (windows, context_length), whole numbers.
        name: As of :class:`GivenText`.
    """

    tokens: Tensor
    name: str = "token windows in memory"

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype is torch.bool:
            raise InvalidInput(
                f"{self.name}: a tensor {tuple(tokens.shape)} of {tokens.dtype} is given, but "
                "windows are (windows, context_length), int64."
            )
        if not len(tokens) or tokens.shape[1] < SHORTEST:
            raise TextError(
                f"{self.name}: {tuple(tokens.shape)} is {len(tokens)} windows of "
                f"{tokens.shape[1]} tokens, but at least one of {SHORTEST} is needed."
            )

    def __str__(self) -> str:
        return self.name

    def windows(self, context_length: int, vocabulary: int) -> Tensor:
        """
        (windows, context_length), int64, on the CPU.

        Raises:
            InvalidInput: They have another length.
            TextError: A token is not one of the vocabulary.
        """
        if self.tokens.shape[1] != context_length:
            raise InvalidInput(
                f"{self.name} have {self.tokens.shape[1]} tokens each, but "
                f"context_length={context_length} is asked for. Leave it out, or cut them again."
            )
        windows = self.tokens.detach().to("cpu", torch.int64).contiguous()
        lowest, highest = int(windows.min()), int(windows.max())
        if lowest < 0 or highest >= vocabulary:
            odd = lowest if lowest < 0 else highest
            raise TextError(
                f"{self.name}: token {odd} is not in 0..{vocabulary - 1}, the model's vocabulary: "
                "the tokenizer was of another model."
            )
        return windows

    @property
    def sha256(self) -> str:
        """Hash of the tokens, in their order."""
        tokens = self.tokens.detach().to("cpu", torch.int64).contiguous()
        return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
