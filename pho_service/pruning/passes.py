"""
Forward and backward passes of a causal language model that compute no more than is asked for.

No family is known by name: a model's head is the model's own forward, run while
its decoder hands on what it is given.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pho_service.errors import ModelError

HEAD_TOKENS = 256  # whose logits are held at a time


def run_decoder(model: nn.Module, batch: Tensor) -> None:
    """
    Run a model without gradients and without its head, for what hooks see.

    Args:
        model: A causal language model of transformers.
        batch: (windows, tokens), int64.
    """
    with torch.no_grad():
        model.base_model(input_ids=batch, use_cache=False)  # type: ignore[operator]


def run_backward(model: nn.Module, batch: Tensor) -> None:
    """
    Run a model forward, and the loss of every predicted token backward.

    Logits are made for 256 tokens at a time, each with its way back to the
    head's input, so a large vocabulary takes little memory.

    Args:
        model: A causal language model of transformers.
        batch: (windows, tokens), int64.

    Raises:
        ModelError: Its logits do not come from what its decoder gives.
    """
    decoder = cast(Any, model).get_decoder()
    outputs: list[Any] = []
    handle = decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        model.base_model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    finally:
        handle.remove()
    (output,) = outputs
    output.last_hidden_state.backward(_loss_gradient(model, decoder, output, batch))


def _loss_gradient(model: nn.Module, decoder: nn.Module, output: Any, batch: Tensor) -> Tensor:
    """(windows, tokens, hidden): of the summed loss, by the hidden states in a decoder's output."""
    hidden = output.last_hidden_state.detach()
    gradient = torch.zeros_like(hidden)
    windows, tokens = batch.shape
    step = max(1, HEAD_TOKENS // windows)
    for start in range(0, tokens - 1, step):  # the last token predicts nothing
        stop = min(start + step, tokens - 1)
        leaf = hidden[:, start:stop].clone().requires_grad_()
        given = type(output)(**{**output, "last_hidden_state": leaf})
        with forward_replaced(decoder, lambda *_args, given=given, **_kwargs: given):
            logits = model(input_ids=batch[:, start:stop], use_cache=False).logits
        loss = cross_entropy(
            logits.flatten(end_dim=1).float(),  # (windows * step, vocabulary)
            batch[:, start + 1 : stop + 1].flatten(),
            reduction="sum",
        )
        (found,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if found is None:
            raise ModelError(
                f"{type(model).__name__}: its logits do not come from what its decoder "
                f"({type(decoder).__name__}) gives, so their gradients are not known. This "
                "model's architecture is not supported."
            )
        gradient[:, start:stop] = found
    return gradient


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has another forward."""
    own = vars(module).get("forward")  # of the module alone: it hides that of its class
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def recomputed(
    blocks: Iterable[nn.Module], again: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """
    Inside, blocks keep only their inputs for a backward pass, and run again when it comes to them.

    Args:
        blocks: Modules.
        again: What their second runs happen in.
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
