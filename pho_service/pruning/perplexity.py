"""
Perplexity over windows of one length, and the divergence of a pruned model from the dense one.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pho_service.errors import ModelError, NumericalError, OutOfMemory, TextError, field_name
from pho_service.host.machine import first_words, let_go_of_memory, ran_out_of_memory
from pho_service.planning.stage_memory import FLOAT, MOST, ROOM, windows_at_once
from pho_service.pruning.hardware import free_memory
from pho_service.spec.perplexity import BLOCK, Perplexity

logger = logging.getLogger(__name__)

CHUNK = 2**21  # log-probabilities that are computed at a time: 8 MiB, which caches hold
FEW = 16  # windows below which runs of tokens, not windows, are what chance is judged by


def cut_windows(
    tokens: Tensor, context_length: int, prefix: list[int], name: str = "given"
) -> Tensor:
    """
    Cut a tokenised text of a name into windows that do not overlap, each with the prefix (BOS, or
    nothing) before it; the tail is dropped.

    Returns:
        (windows, context_length), int64, in the order of the text.

    Raises:
        TextError: The text does not fill one window.
    """
    body = context_length - len(prefix)
    count = len(tokens) // body
    if count == 0:
        raise TextError(
            f"the text {name.removeprefix('a text ')} has {len(tokens)} tokens, which do not fill "
            f"one window of {context_length}. Give a longer text, or a smaller "
            f"{field_name('calibration/context_length')}."
        )
    windows = tokens[: count * body].view(count, body)
    start = torch.tensor(prefix, dtype=torch.int64).expand(count, -1)
    return torch.cat([start, windows], dim=1)


def windows_key(windows: Tensor) -> str:
    """Hash of tokenised windows: text, tokenizer and the way it is cut."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def window_logits(model: nn.Module, windows: Tensor, *, most: int = MOST) -> Iterator[Tensor]:
    """
    Run a causal language model, in evaluation mode, over windows (windows, context_length).

    On a CPU windows are run one by one: a window of some hundred tokens keeps
    its cores busy, two at once were not faster, and so nothing depends on the
    memory of the machine. On a CUDA device the first window shows how large
    the logits are. Batches differ from single windows in the last digits, so how many are run at
    once depends on the model and the size of the card: a power of two that fits, with
    eight times the size of their logits in float32, into half of what the model leaves, at most
    ``most``. Only where less than that is free, as many as fit are run. Where they do not fit
    all the same, half as many are tried, once.

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
        if isinstance(parameter, DTensor):
            most = 1  # processes that share a model run it as often as each other
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
                    f"{first_words(error)}. Take shorter windows "
                    f"({field_name('calibration/context_length')}), "
                    f"{field_name('dtype', 'bfloat16')}, or leave the weights on disk "
                    f"({field_name('stream', True)})."
                ) from error
            most, halved = len(batch) // 2, True
        if halved and size > most:  # after the error, which holds on to what was computed
            logger.warning("memory ran out: %d windows at once instead of %d", most, size)
            size = most
            let_go_of_memory()
            continue
        begin += len(batch)
        size = min(  # what the fullest card has room for
            batch_size(logits[0].numel(), card, weights=weight_bytes, most=most)
            for card, weight_bytes in weights.items()
        )
        yield from logits
        del logits  # before the next are made


def batch_size(logits: int, device: torch.device, *, weights: int, most: int) -> int:
    """Number of windows of so many logits to run at once, by :func:`window_logits`'s rule."""
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

    Returns:
        Which positions, and their log-probabilities: (those positions, vocabulary), float32.
    """
    step = max(16, CHUNK // logits.shape[1])
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        yield rows, logits[rows].log_softmax(dim=-1, dtype=torch.float32)


def block_losses(logits: Tensor, window: Tensor) -> list[float]:
    """
    The losses of a causal language model on one window, whose logits are (context_length,
    vocabulary).

    Returns:
        The loss summed over each run of :data:`BLOCK` predicted tokens, in nats; the last run may
        be shorter. Not necessarily finite.
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
    advance: Callable[[float], None] = lambda _: None,
) -> Perplexity:
    """
    Measure a causal language model's perplexity on windows, (windows, context_length), int64.

    Arguments are those of :func:`window_logits`; ``advance`` is called with 1 after each window.

    Raises:
        NumericalError: A loss is NaN or infinite.

    Source:
        Frantar & Alistarh 2023 (SparseGPT) and its successors: non-overlapping
        windows, mean negative log-likelihood, exp. All windows have the same
        length, so the mean over windows is the mean over tokens.
    """
    losses = []
    with torch.inference_mode():
        for window, logits in zip(windows, window_logits(model, windows, most=most), strict=True):
            losses.append(block_losses(logits, window))
            advance(1)
    return perplexity_of(losses, windows)


def perplexity_of(losses: Sequence[Sequence[float]], windows: Tensor) -> Perplexity:
    """The perplexity of windows from the :func:`block_losses` of each."""
    tokens = len(windows) * (windows.shape[1] - 1)
    mean = require_finite_loss(sum(sum(blocks) for blocks in losses) / tokens)
    runs = losses if len(losses) < FEW else [[sum(blocks)] for blocks in losses]
    return Perplexity(
        perplexity=math.exp(min(mean, 700.0)),
        tokens=tokens,
        windows=len(windows),
        text_sha256=windows_key(windows),
        losses=tuple(float(f"{loss:.7g}") for blocks in runs for loss in blocks),
    )


def require_finite_loss(mean: float) -> float:
    """Return a mean loss, or raise NumericalError."""
    if not math.isfinite(mean):
        raise NumericalError(
            "the loss is NaN or infinite: the model's weights overflow in this dtype. "
            f"Use {field_name('dtype', 'float32')}."
        )
    return mean


TOP_K = 64  # next tokens that a divergence compares
TINY = 1e-6  # smallest probability of all other tokens: what float32 leaves of 1 minus a sum


@dataclass(frozen=True, kw_only=True)
class DenseReference:
    """The dense model's most likely next tokens at every position of a text."""

    windows: Tensor  # (windows, context_length), int64: the text
    tokens: Tensor  # (windows, context_length - 1, k), int32: ids, on the CPU
    log_probabilities: Tensor  # The same shape, float32: theirs

    def first(self, windows: int) -> "DenseReference":
        """What is kept of the first windows."""
        return DenseReference(
            windows=self.windows[:windows],
            tokens=self.tokens[:windows],
            log_probabilities=self.log_probabilities[:windows],
        )

    @property
    def predictions(self) -> int:
        """Number of predicted tokens in all windows."""
        return self.tokens[..., 0].numel()


def dense_reference(
    model: nn.Module,
    windows: Tensor,
    *,
    top_k: int = TOP_K,
    most: int = MOST,
    advance: Callable[[float], None] = lambda _: None,
) -> DenseReference:
    """
    Keep what the dense model predicts, to compare pruned ones with: ``top_k`` tokens at each
    position, 8 bytes each, or all if the vocabulary is smaller.

    Raises:
        NumericalError: A logit is NaN or infinite.
    """
    tokens, logs = [], []
    with torch.inference_mode():
        for logits in window_logits(model, windows, most=most):
            for _, all_logs in log_probabilities(logits[:-1]):
                top = all_logs.topk(min(top_k, all_logs.shape[1]), dim=-1)
                tokens.append(top.indices.int().cpu())
                logs.append(top.values.cpu())
            advance(1)
    shape = (len(windows), windows.shape[1] - 1, -1)
    top_logs = torch.cat(logs)
    require_finite_loss(float(top_logs[:, 0].sum()))
    return DenseReference(
        windows=windows,
        tokens=torch.cat(tokens).view(shape),
        log_probabilities=top_logs.view(shape),
    )


def rate_divergence(
    model: nn.Module,
    reference: DenseReference,
    *,
    most: int = MOST,
    advance: Callable[[float], None] = lambda _: None,
) -> float:
    """
    Measure the Kullback-Leibler divergence of a model's predictions from the dense model's.

    At each position the dense model gives its k most likely tokens the
    probabilities p_1 .. p_k, and this model gives the same tokens q_1 .. q_k.
    All other tokens count as one event: p_0 = 1 - sum p_i and q_0 = 1 - sum q_i:

        KL = sum over i = 0 .. k of p_i * log(p_i / q_i)

    By the log-sum inequality that is never more than the divergence over the
    whole vocabulary, and never less than 0, which it is for the dense model.

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
    """The divergence of :func:`rate_divergence`, summed over a window with logits (tokens, all)."""
    tokens = reference.tokens[number].to(logits.device, torch.int64)
    dense = reference.log_probabilities[number].to(logits.device)
    return sum(
        float(divergence(dense[rows], logs.gather(1, tokens[rows])).sum())
        for rows, logs in log_probabilities(logits[:-1])
    )


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """Return the divergence at each position, by the formula of :func:`rate_divergence`."""
    log_p, log_q = dense.double(), pruned.double()
    p = log_p.exp()
    rest_p = (1 - p.sum(dim=-1)).clamp_min(TINY)
    rest_q = (1 - log_q.exp().sum(dim=-1)).clamp_min(TINY)
    return (p * (log_p - log_q)).sum(dim=-1) + rest_p * (rest_p / rest_q).log()


HEAD_TOKENS = 256  # whose logits are held at a time

# The summed loss of some positions: their logits, (windows, positions, vocabulary), and the first
# and the last but one of them.
Loss = Callable[[Tensor, int, int], Tensor]


def run_backward(model: nn.Module, batch: Tensor, loss: Loss | None = None) -> Tensor:
    """
    Run a model forward, and the loss of every predicted token backward.

    Logits are made for 256 tokens at a time, each with its way back to the
    head's input, so a large vocabulary takes little memory.

    Returns:
        The loss summed over all positions, that of the next token by default, on the device of the
        logits.

    Raises:
        ModelError: Its logits do not come from what its decoder gives.
    """
    if loss is None:

        def loss(logits: Tensor, start: int, stop: int) -> Tensor:
            following = batch[:, start + 1 : stop + 1].flatten()
            return cross_entropy(
                logits.flatten(end_dim=1).float(), following.to(logits.device), reduction="sum"
            )

    decoder = cast(Any, model).get_decoder()
    outputs: list[Any] = []
    handle = decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        model.base_model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    finally:
        handle.remove()
    (output,) = outputs
    total, gradient = _loss_gradient(model, decoder, output, batch, loss)
    output.last_hidden_state.backward(gradient)
    return total


def window_backward(model: nn.Module, reference: DenseReference, window: int) -> float:
    """
    Run the divergence from the dense model backward on one window, to all that want a gradient.

    Returns:
        The mean over its predicted tokens, in nats, as :func:`rate_divergence`.
    """
    batch = reference.windows[window : window + 1].to(next(model.parameters()).device)
    tokens, dense = reference.tokens[window], reference.log_probabilities[window]

    def loss(logits: Tensor, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        logs = logits[0].log_softmax(dim=-1, dtype=torch.float32)  # (positions, vocabulary)
        log_q = logs.gather(1, tokens[rows].to(logs.device, torch.int64))  # (positions, k)
        return divergence(dense[rows].to(logs.device), log_q).sum() / len(tokens)

    return float(run_backward(model, batch, loss))


def _loss_gradient(
    model: nn.Module, decoder: nn.Module, output: Any, batch: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """
    The summed loss, and its gradient by the hidden states in a decoder's output, (windows, tokens,
    hidden).
    """
    losses = []
    hidden = output.last_hidden_state.detach()
    gradient = torch.zeros_like(hidden)
    windows, tokens = batch.shape
    step = max(1, HEAD_TOKENS // windows)
    for start in range(0, tokens - 1, step):  # the last token predicts nothing
        stop = min(start + step, tokens - 1)
        # With strides of its own, or the head would be copied to be multiplied.
        leaf = hidden[:, start:stop].clone(memory_format=torch.contiguous_format).requires_grad_()
        decoded = type(output)(**{**output, "last_hidden_state": leaf})
        with forward_replaced(decoder, lambda *_args, decoded=decoded, **_kwargs: decoded):
            logits = model(input_ids=batch[:, start:stop], use_cache=False).logits
        summed = loss(logits, start, stop)
        (leaf_gradient,) = torch.autograd.grad(summed, leaf, allow_unused=True)
        if leaf_gradient is None:
            raise ModelError(
                f"{type(model).__name__}: its logits do not come from what its decoder "
                f"({type(decoder).__name__}) gives, so their gradients are not known. This "
                "model's architecture is not supported."
            )
        gradient[:, start:stop] = leaf_gradient
        losses.append(summed.detach())  # nobody waits for it here
    return torch.stack(losses).sum(), gradient


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has another forward."""
    own_forward = vars(module).get("forward")  # of the module alone: it hides that of its class
    module.forward = forward
    try:
        yield
    finally:
        if own_forward is None:
            del module.forward
        else:
            module.forward = own_forward


@contextmanager
def recomputed(
    blocks: Iterable[nn.Module], again: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """
    Inside, blocks keep only their inputs for a backward pass, and run again, inside ``again``,
    when it comes to them.
    """
    with ExitStack() as stack:
        for block in blocks:
            forward = partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again()),
            )
            stack.enter_context(forward_replaced(block, forward))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Weights get no gradients; activations do, from the embedding on."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    embedding = model.get_input_embeddings()  # type: ignore[operator]  # of PreTrainedModel
    handle = embedding.register_forward_hook(
        lambda _module, _args, output: output.requires_grad_() if torch.is_grad_enabled() else None
    )
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
