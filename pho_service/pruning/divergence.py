"""
How far a pruned model's predictions are from the dense model's: far fewer tokens than a perplexity.

A perplexity looks at the one token that the text went on with, so on few
tokens it is mostly luck. The dense model's whole distribution says at every
position what the pruned model should have kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pho_service.planning.stage_memory import MOST
from pho_service.pruning.perplexity import (
    log_probabilities,
    require_finite_loss,
    window_logits,
)

TOP_K = 64
TINY = 1e-6  # smallest probability of all other tokens: what float32 leaves of 1 minus a sum


@dataclass(frozen=True, kw_only=True)
class DenseReference:
    """
    The dense model's most likely next tokens at every position of a text.

    Attributes:
        windows: (windows, context_length), int64: the text.
        tokens: (windows, context_length - 1, k), int64: ids, on the CPU.
        log_probabilities: The same shape, float32: theirs.
    """

    windows: Tensor
    tokens: Tensor
    log_probabilities: Tensor

    @property
    def predictions(self) -> int:
        """Number of predicted tokens in all windows."""
        return self.tokens[..., 0].numel()


def dense_reference(
    model: nn.Module, windows: Tensor, *, top_k: int = TOP_K, most: int = MOST
) -> DenseReference:
    """
    Keep what the dense model predicts, to compare pruned ones with.

    Args:
        model: Dense, in evaluation mode.
        windows: (windows, context_length), int64.
        top_k: Tokens kept at each position, 12 bytes each; all if the vocabulary is smaller.
        most: Windows that may be run at once: see :func:`window_logits`.

    Raises:
        NumericalError: A logit is NaN or infinite.
    """
    tokens, logs = [], []
    with torch.inference_mode():
        for logits in window_logits(model, windows, most=most):
            for _, all_logs in log_probabilities(logits[:-1]):
                top = all_logs.topk(min(top_k, all_logs.shape[1]), dim=-1)
                tokens.append(top.indices.cpu())
                logs.append(top.values.cpu())
    shape = (len(windows), windows.shape[1] - 1, -1)
    kept = torch.cat(logs)
    require_finite_loss(float(kept[:, 0].sum()))
    return DenseReference(
        windows=windows,
        tokens=torch.cat(tokens).view(shape),
        log_probabilities=kept.view(shape),
    )


def rate_divergence(
    model: nn.Module,
    reference: DenseReference,
    *,
    most: int = MOST,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """
    Measure the Kullback-Leibler divergence of a model's predictions from the dense model's.

    At each position the dense model gives its k most likely tokens the
    probabilities p_1 .. p_k, and this model gives the same tokens q_1 .. q_k.
    All other tokens count as one event: p_0 = 1 - sum p_i and q_0 = 1 - sum q_i:

        KL = sum over i = 0 .. k of p_i * log(p_i / q_i)

    By the log-sum inequality that is never more than the divergence over the
    whole vocabulary, and never less than 0, which it is for the dense model.

    Args:
        model: In evaluation mode.
        reference: Reference from the dense model.
        most: Windows that may be run at once: see :func:`window_logits`.
        advance: Called with 1 after each window.

    Returns:
        The mean over all predicted tokens, in nats.

    Raises:
        NumericalError: A logit is NaN or infinite.

    Source:
        Kullback & Leibler 1951; log-sum inequality: Cover & Thomas 2006, theorem 2.7.1.
    """
    total = 0.0
    with torch.inference_mode():
        for number, logits in enumerate(window_logits(model, reference.windows, most=most)):
            total += window_divergence(logits, reference, number)
            advance(1)
    return require_finite_loss(total / reference.predictions)


def window_divergence(logits: Tensor, reference: DenseReference, number: int) -> float:
    """
    The divergence that :func:`rate_divergence` gives, summed over the tokens of one window.

    Args:
        logits: (context_length, vocabulary), any floating dtype, of the window.
        reference: Reference from the dense model.
        number: Which of its windows.
    """
    tokens = reference.tokens[number].to(logits.device)
    dense = reference.log_probabilities[number].to(logits.device)
    return sum(
        float(_divergence(dense[rows], logs.gather(1, tokens[rows])).sum())
        for rows, logs in log_probabilities(logits[:-1])
    )


def _divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """
    Return the divergence at each position, by the formula of :func:`rate_divergence`.

    Args:
        dense: (positions, k), float32: log p_i.
        pruned: (positions, k), float32: log q_i.

    Returns:
        (positions,), float64.
    """
    log_p, log_q = dense.double(), pruned.double()
    p = log_p.exp()
    rest_p = (1 - p.sum(dim=-1)).clamp_min(TINY)
    rest_q = (1 - log_q.exp().sum(dim=-1)).clamp_min(TINY)
    return (p * (log_p - log_q)).sum(dim=-1) + rest_p * (rest_p / rest_q).log()
