"""
What the blocks of a decoder are called with, kept so that each can be called by itself.
"""

from collections import UserDict
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pho_service.errors import ModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block gets besides its hidden states


class CallRecorder:
    """
    Checks that blocks are called one after the other, and keeps their arguments.

    Arguments that are equal in all windows (position embeddings, masks) are
    kept once and on the device, others on the CPU.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._handed_on: list[Tensor] = []  # in this window
        self._common: list[Tensor] | None = None  # arguments of the first window, once it is over
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # this window's, alive, so ids are unique

    def keep(self, number: int, hidden: Tensor, call: Call) -> Call:
        """The arguments of a block; its turn must be now, and its input what the last one gave."""
        if number != len(self._handed_on):
            raise _not_a_chain(self._names[number], "is not called once and in its order")
        if self._handed_on and hidden is not self._handed_on[-1]:
            raise _not_a_chain(
                self._names[number], "does not read just what the block before it gives"
            )
        map_tensors(call, lambda tensor: self._independent(number, tensor))
        args, kwargs = map_tensors(call, self._keep)
        name = self._names[number]
        return (
            tuple(_notes_or(value, name) for value in args),
            {key: _notes_or(value, name) for key, value in kwargs.items()},
        )

    def hand_on(self, hidden: Tensor) -> Tensor:
        """The same values as a new tensor, to tell the blocks' outputs apart."""
        self._handed_on.append(hidden.view_as(hidden))
        return self._handed_on[-1]

    def end_of_window(self) -> None:
        """Forget what is of one window; each block must have been called."""
        if len(self._handed_on) < len(self._names):
            raise _not_a_chain(self._names[len(self._handed_on)], "is not called")
        if self._common is None:
            self._common = [tensor for tensor, _ in self._kept.values()]
        self._handed_on, self._kept = [], {}

    def _independent(self, number: int, tensor: Tensor) -> Tensor:
        if any(tensor is output for output in self._handed_on):
            raise _not_a_chain(
                self._names[number], "reads more than what the block before it gives"
            )
        return tensor

    def _keep(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = (tensor, self._shared(tensor))
        return self._kept[id(tensor)][1]

    def _shared(self, tensor: Tensor) -> Tensor:
        if self._common is None:
            return tensor
        for known in self._common:
            if known.dtype == tensor.dtype and torch.equal(known, tensor):
                return known
        return tensor.cpu()


class _Notes(UserDict[Any, Any]):
    """
    An empty mapping that blocks leave things in for later ones; whoever reads it is refused.

    Gemma 3n's later blocks attend with the keys and values of an earlier one.
    """

    def __init__(self, block: str) -> None:
        super().__init__()
        self._block = block

    def __setitem__(self, key: Any, item: Any) -> None:
        pass  # kept, it would hold a block's activations for nothing

    def __getitem__(self, key: Any) -> Any:
        raise _not_a_chain(self._block, "reads more than what the block before it gives")

    def __contains__(self, key: object) -> bool:
        return bool(self[key])


def _notes_or(value: Any, block: str) -> Any:
    return _Notes(block) if isinstance(value, MutableMapping) and not value else value


def has_notes(call: Call) -> bool:
    """Whether a block gets a mapping that other blocks might write to."""
    args, kwargs = call
    return any(isinstance(value, _Notes) for value in (*args, *kwargs.values()))


def _not_a_chain(block: str, what: str) -> ModelError:
    return ModelError(
        f"{block} {what}, so the model cannot be run block by block. Load it without streaming, "
        "and use only steps that need no text."
    )


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, and what else a block is called with; caches are left out."""
    if args:
        hidden, *others = args
    else:
        kwargs = dict(kwargs)
        hidden, others = kwargs.pop("hidden_states"), []
    return hidden, (
        tuple(None if isinstance(value, Cache) else value for value in others),
        {k: v for k, v in kwargs.items() if not isinstance(v, Cache)},
    )


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with each tensor replaced, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(each, function) for each in value)
    if isinstance(value, dict):
        return {key: map_tensors(each, function) for key, each in value.items()}
    return value
