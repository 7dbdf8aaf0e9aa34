"""
Perplexity over windows of one length: the protocol of the pruning literature.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pho_service.errors import NumericalError, TextError


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """
    Attributes:
        perplexity: exp of the mean loss over predicted tokens.
        tokens: Predicted tokens: every window predicts all but its first.
        windows: Windows rated.
    """

    perplexity: float
    tokens: int
    windows: int


def cut_windows(tokens: Tensor, context_length: int, prefix: list[int]) -> Tensor:
    """
    Cut a text into windows that do not overlap; the tail is dropped.

    Args:
        tokens: (tokens,), int64. The whole text, tokenised once.
        context_length: Tokens of a window, the prefix included.
        prefix: Token ids that every window starts with (BOS, or nothing).

    Returns:
        (windows, context_length), int64, in the order of the text.

    Raises:
        TextError: The text does not fill one window.
    """
    body = context_length - len(prefix)
    count = len(tokens) // body
    if count == 0:
        raise TextError(
            f"the text has {len(tokens)} tokens, which do not fill one window of "
            f"{context_length}. Give a longer text, or a smaller --context-length."
        )
    windows = tokens[: count * body].view(count, body)
    start = torch.tensor(prefix, dtype=torch.int64).expand(count, -1)
    return torch.cat([start, windows], dim=1)


def rate_perplexity(
    model: nn.Module, windows: Tensor, *, advance: Callable[[int], None] = lambda _: None
) -> Perplexity:
    """
    Measure a causal language model's perplexity.

    Windows are run one by one, so the result does not depend on the memory of
    the machine; on two CPU cores larger batches were not faster.

    Args:
        model: In evaluation mode.
        windows: (windows, context_length), int64.
        advance: Called with 1 after each window.

    Raises:
        NumericalError: A loss is NaN or infinite.

    Source:
        Frantar & Alistarh 2023 (SparseGPT) and its successors: non-overlapping
        windows, mean negative log-likelihood, exp. All windows have the same
        length, so the mean over windows is the mean over tokens.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode():
        for window in windows:
            batch = window[None].to(device)  # (1, context_length)
            logits = model(input_ids=batch, use_cache=False).logits
            loss = cross_entropy(logits[0, :-1].float(), batch[0, 1:], reduction="sum")
            total += loss.double().cpu()
            advance(1)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    mean = float(total) / predicted
    if not math.isfinite(mean):
        raise NumericalError(
            "the loss is NaN or infinite: the model's weights overflow in this dtype. "
            "Use --dtype float32."
        )
    return Perplexity(perplexity=math.exp(min(mean, 700.0)), tokens=predicted, windows=len(windows))
