"""
How likely a model finds the end of a sequence of tokens, given its beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.models.block_network import BlockNetwork
from pho_service.models.loading import LanguageModel
from pho_service.progress import Advance
from pho_service.pruning.perplexity import window_logits

AT_ONCE = 128  # sequences that are padded to the same length, on a GPU
STREAMED = 2**16  # tokens for which a streamed model is read once


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """
    Tokens whose end is rated.

    Attributes:
        tokens: The context and after it the continuation: no more than the model can read, and one.
        length: Length of the continuation, at least 1 and less than all.
    """

    tokens: tuple[int, ...]
    length: int


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """
    Attributes:
        log: Log-probability of a continuation, in nats: the sum over its tokens.
        greedy: Whether each of its tokens is the likeliest where it stands.
    """

    log: float
    greedy: bool


def rate_continuations(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    *,
    advance: Advance = lambda _: None,
) -> list[Likelihood]:
    """
    Rate continuations, in any number and of any lengths.

    What differs in its last token alone is read once. Long sequences come first, so a GPU whose
    memory is not enough says so at once.

    Args:
        model: In evaluation mode, as a whole or streamed.
        continuations: Their order does not matter.
        advance: Called with the number of continuations that are rated.

    Returns:
        In the same order.

    Raises:
        NumericalError: A likelihood is NaN.
        OutOfMemory: As :func:`~pho_service.pruning.perplexity.window_logits`.
    """
    asked: dict[tuple[int, ...], list[int]] = {}  # what is read, and who asks for it
    for number, each in enumerate(continuations):
        asked.setdefault(each.tokens[:-1], []).append(number)
    inputs = sorted(asked, key=lambda tokens: (-len(tokens), tokens))
    found: dict[int, Likelihood] = {}
    for batch in _batches(model, inputs):
        for tokens, logits in zip(batch, _logits(model, batch), strict=True):
            for number in asked[tokens]:
                found[number] = _rated(logits[: len(tokens)], continuations[number])
            advance(len(asked[tokens]))
    return [found[number] for number in range(len(continuations))]


def _batches(
    model: LanguageModel, inputs: Sequence[tuple[int, ...]]
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Cut what is sorted by length; a CPU is given one by one, without padding."""
    begin = 0
    while begin < len(inputs):
        size = AT_ONCE if model.device.type == "cuda" else 1
        if model.stream:
            size = max(1, STREAMED // len(inputs[begin]))
        yield inputs[begin : begin + size]
        begin += size


def _logits(model: LanguageModel, batch: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """
    Yield for each sequence (longest of the batch, vocabulary).

    Shorter ones are padded at their end, which no token before sees.
    """
    longest = len(batch[0])
    windows = torch.tensor([tokens + (0,) * (longest - len(tokens)) for tokens in batch])
    if not model.stream:
        yield from window_logits(model.model, windows)
        return
    network = BlockNetwork(model, windows)
    for index, (_, module) in enumerate(network.blocks):
        with network.on_device(module):
            network.step(index, lambda _: None)
    with network.ending(network.hidden):
        yield from window_logits(model.model, windows, most=1)


def _rated(logits: Tensor, continuation: Continuation) -> Likelihood:
    """
    Rate one continuation by the logits of its input.

    Args:
        logits: (tokens - 1, vocabulary).
        continuation: Its last token is not among them.
    """
    wanted = torch.tensor(continuation.tokens[-continuation.length :], device=logits.device)
    ending = logits[-continuation.length :].log_softmax(dim=-1, dtype=torch.float32)
    chosen = ending.gather(1, wanted[:, None])  # (length, 1)
    log = float(chosen.double().sum())
    if log != log:
        raise NumericalError(
            "the log-likelihood of an answer is NaN: the model's weights overflow in this dtype. "
            "Use --dtype float32."
        )
    return Likelihood(log=log, greedy=bool((ending.argmax(dim=-1) == wanted).all()))
