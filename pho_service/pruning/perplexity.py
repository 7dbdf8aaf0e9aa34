"""
Perplexity over windows of one length: the protocol of the pruning literature.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pho_service.errors import NumericalError, OutOfMemory, TextError
from pho_service.host.faults import first_words, let_go_of_memory, ran_out_of_memory
from pho_service.planning.footprint import FLOAT
from pho_service.planning.stage_memory import MOST, ROOM, windows_at_once
from pho_service.pruning.memory import free_memory

logger = logging.getLogger(__name__)

CHUNK = 2**21  # log-probabilities that are computed at a time: 8 MiB, which caches hold
BLOCK = 64  # tokens whose losses are added up before they are looked at


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


def window_logits(model: nn.Module, windows: Tensor, *, most: int = MOST) -> Iterator[Tensor]:
    """
    Run a causal language model over windows.

    On a CPU windows are run one by one: a window of some hundred tokens keeps
    its cores busy, two at once were not faster, and so nothing depends on the
    memory of the machine. On a CUDA device the first window shows how large
    the logits are. Batches differ from single windows in the last digits, so how many are run at
    once depends on the model and the size of the card: a power of two that fits, with
    eight times the size of their logits in float32, into half of what the model leaves, at most
    ``most``. Only where less than that is free, as many as fit are run. Where they do not fit
    all the same, half as many are tried, once.

    Args:
        model: In evaluation mode.
        windows: (windows, context_length), int64.
        most: Windows that are run at once, on a CUDA device.

    Returns:
        The logits of one window after the other, (context_length, vocabulary), in the
        model's dtype and on its device.

    Raises:
        OutOfMemory: Not even so.
    """
    device = next(model.parameters()).device
    weights: Counter[torch.device] = Counter()
    for parameter in model.parameters():
        weights[parameter.device] += parameter.nbytes
    begin, size, halved = 0, 1, False
    while begin < len(windows):
        batch = windows[begin : begin + size]
        try:
            with torch.inference_mode():
                logits: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            if halved or len(batch) == 1:
                raise OutOfMemory(
                    f"{device} has no memory for {len(batch)} windows of {batch.shape[1]} tokens"
                    f"{first_words(error)}. Take shorter windows (--context-length), "
                    "--dtype bfloat16, or leave the weights on disk (--stream)."
                ) from error
            most, halved = len(batch) // 2, True
        if halved and size > most:  # after the error, which holds on to what was computed
            logger.warning("memory ran out: %d windows at once instead of %d", most, size)
            size = most
            let_go_of_memory()
            continue
        begin += len(batch)
        size = min(  # what the fullest card has room for
            batch_size(logits[0].numel(), each, weights=its_weights, most=most)
            for each, its_weights in weights.items()
        )
        yield from logits
        del logits  # before the next are made


def batch_size(logits: int, device: torch.device, *, weights: int, most: int) -> int:
    """
    How many windows to run at once; the rule is that of :func:`window_logits`.

    Args:
        logits: Logits of one window: context length times vocabulary.
        device: Where the model runs.
        weights: Bytes of the model there.
        most: The answer is 1 to ``most``; 1 on any device other than CUDA.
    """
    if device.type != "cuda":
        return 1
    _, total = torch.cuda.mem_get_info(device)
    size = windows_at_once(logits, device_size=total, weights=weights, most=most)
    while size > 1 and size * ROOM * FLOAT * logits > free_memory(device):
        size //= 2
    return size


def log_probabilities(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """
    The log-probabilities of all next tokens, some positions at a time.

    In float32 those of a whole window are hundreds of megabytes where the vocabulary is large.

    Args:
        logits: (positions, vocabulary), any floating dtype.

    Returns:
        Which positions, and their log-probabilities: (those positions, vocabulary), float32.
    """
    step = max(16, CHUNK // logits.shape[1])
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        yield rows, logits[rows].log_softmax(dim=-1, dtype=torch.float32)


def window_losses(model: nn.Module, windows: Tensor, *, most: int = MOST) -> Iterator[list[float]]:
    """
    Measure a causal language model's loss on one window after the other.

    Args:
        model: In evaluation mode.
        windows: (windows, context_length), int64.
        most: Windows that may be run at once: see :func:`window_logits`.

    Yields:
        For each window, the loss summed over each run of :data:`BLOCK` predicted tokens, in nats;
        the last run may be shorter. Not necessarily finite.
    """
    with torch.inference_mode():
        for window, logits in zip(windows, window_logits(model, windows, most=most), strict=True):
            yield block_losses(logits, window)


def block_losses(logits: Tensor, window: Tensor) -> list[float]:
    """
    The losses that :func:`window_losses` gives of a window.

    Args:
        logits: (context_length, vocabulary), any floating dtype.
        window: (context_length,), int64.
    """
    following = window[1:, None].to(logits.device)  # (context_length - 1, 1)
    losses = [-logs.gather(1, following[rows]) for rows, logs in log_probabilities(logits[:-1])]
    blocks = torch.cat(losses)[:, 0].double().split(BLOCK)
    return [float(total) for total in torch.stack([block.sum() for block in blocks]).cpu()]


def rate_perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    most: int = MOST,
    advance: Callable[[int], None] = lambda _: None,
) -> Perplexity:
    """
    Measure a causal language model's perplexity.

    Args:
        model: In evaluation mode.
        windows: (windows, context_length), int64.
        most: Windows that may be run at once: see :func:`window_logits`.
        advance: Called with 1 after each window.

    Raises:
        NumericalError: A loss is NaN or infinite.

    Source:
        Frantar & Alistarh 2023 (SparseGPT) and its successors: non-overlapping
        windows, mean negative log-likelihood, exp. All windows have the same
        length, so the mean over windows is the mean over tokens.
    """
    losses = []
    for blocks in window_losses(model, windows, most=most):
        losses.append(blocks)
        advance(1)
    return perplexity_of(losses, windows.shape[1] - 1)


def perplexity_of(losses: Sequence[Sequence[float]], predicted: int) -> Perplexity:
    """
    The perplexity that losses of windows make.

    Args:
        losses: What :func:`window_losses` gave of each window, in the order of the text.
        predicted: Tokens that each window predicts.

    Raises:
        NumericalError: A loss is NaN or infinite.
    """
    tokens = len(losses) * predicted
    mean = require_finite_loss(sum(sum(blocks) for blocks in losses) / tokens)
    return Perplexity(perplexity=math.exp(min(mean, 700.0)), tokens=tokens, windows=len(losses))


def require_finite_loss(mean: float) -> float:
    """
    The same.

    Raises:
        NumericalError: It is NaN or infinite.
    """
    if not math.isfinite(mean):
        raise NumericalError(
            "the loss is NaN or infinite: the model's weights overflow in this dtype. "
            "Use --dtype float32."
        )
    return mean
