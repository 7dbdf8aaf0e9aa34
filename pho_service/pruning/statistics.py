"""
What a dense model's activations and gradients say about its linears, in one pass.

Per input of linears: the activation norm and a second moment, either the Gram
matrix H = E[x x^T] or a random projection S of it with E[S^T S] = H. Per
output row: the Fisher weight g = E[(dL/dy)^2]. All sums over tokens are
float32, streamed sample by sample; nothing grows with the number of samples.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pho_service.errors import InvalidInput, ModelError, NumericalError


@dataclass(frozen=True, kw_only=True)
class PrunableLinear:
    """
    One linear of a model.

    Attributes:
        module: The module whose hooks see the input and the output.
        transposed: True where the module stores (in, out), as GPT-2's Conv1D.
    """

    name: str
    module: nn.Module
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a view, so writing to it changes the model."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """
    What is known of one input, shared by all linears that read it.

    Attributes:
        activation_norm: (in_features,), float32. Square root of the mean over
            sequences of the squares summed over tokens.
        root: (rows, in_features), float32: ``root.T @ root`` is the second
            moment E[x x^T] (in expectation, for a random projection).
    """

    activation_norm: Tensor
    root: Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """
    Attributes:
        inputs: One entry a distinct input.
        input_of: Index into ``inputs`` for each linear.
        fisher: (out_features,), float32, for each linear.
    """

    inputs: list[InputStatistics]
    input_of: dict[str, int]
    fisher: dict[str, Tensor]

    def activation_norm(self, name: str) -> Tensor:
        """(in_features,), float32: the activation norm at the input of linear ``name``."""
        return self.inputs[self.input_of[name]].activation_norm


class _SecondMoment:
    """Streams one input's activation norm and second moment."""

    def __init__(self, width: int, device: torch.device, projection_rows: int, seed: int) -> None:
        self.squares = torch.zeros(width, device=device)
        self.rows = projection_rows
        height = projection_rows or width
        self.moment = torch.zeros(height, width, device=device)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor) -> None:
        """x: (tokens, in_features), one sequence or several, any floating dtype."""
        x = x.float()
        self.squares += x.square().sum(dim=0)
        if self.rows:
            self.moment += self._signs(len(x)).to(x.device) @ x
        else:
            self.moment += x.T @ x

    def _signs(self, tokens: int) -> Tensor:
        """(rows, tokens) of -1 and 1; drawn on the CPU, so they are the same on every device."""
        count = self.rows * tokens
        packed = torch.randint(
            256, ((count + 7) // 8,), generator=self.generator, dtype=torch.uint8
        )
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        signs: Tensor = bits.flatten()[:count].view(self.rows, tokens).float() * 2 - 1
        return signs

    def finish(self, sequences: int, tokens: int) -> InputStatistics:
        norm = (self.squares / sequences).sqrt()
        if self.rows:
            root = self.moment / (tokens * self.rows) ** 0.5
        else:
            root = _square_root(self.moment / tokens)
        return InputStatistics(activation_norm=norm.cpu(), root=root.cpu())


def _square_root(gram: Tensor) -> Tensor:
    """(n, n) L with ``L.T @ L == gram``; singular matrices are fine, rounding below 0 is cut."""
    values, vectors = torch.linalg.eigh(gram.double())
    root: Tensor = (vectors * values.clamp_min(0).sqrt()).T
    return root.float().contiguous()


def collect_statistics(
    model: nn.Module,
    linears: Mapping[str, PrunableLinear],
    windows: Tensor,
    *,
    fisher_windows: int,
    projection_rows: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """
    Run the dense model over calibration windows and gather statistics.

    The first ``fisher_windows`` windows are run forward and backward, the rest
    forward only. Weights stay as they are and get no gradients.

    Args:
        model: A causal language model, in evaluation mode.
        linears: The linears to watch, by name.
        windows: (windows, tokens), int64.
        fisher_windows: 1 <= fisher_windows <= windows.
        projection_rows: Rows of the random projection of the activations;
            0 gathers the full Gram matrix.
        seed: Of the random projection.
        advance: Called with 1 after each window.

    Raises:
        InvalidInput: ``fisher_windows`` out of range.
        ModelError: A linear was never called.
        NumericalError: An activation or a gradient is NaN or infinite.
    """
    if not 1 <= fisher_windows <= len(windows):
        raise InvalidInput(
            f"fisher_windows={fisher_windows} is not in 1..{len(windows)}, the number of "
            "calibration windows."
        )
    collector = _Collector(linears, projection_rows, seed)
    tokens = windows.numel()
    with collector.attached(), _frozen(model):
        for number, window in enumerate(windows):
            batch = window[None].to(next(model.parameters()).device)  # (1, tokens)
            if number < fisher_windows:
                logits = model(input_ids=batch, use_cache=False).logits
                loss = cross_entropy(logits[0, :-1].float(), batch[0, 1:], reduction="sum")
                loss.backward()
            else:
                with torch.no_grad():
                    model(input_ids=batch, use_cache=False)
            collector.end_of_window()
            advance(1)
    return collector.finish(
        sequences=len(windows), tokens=tokens, gradient_tokens=fisher_windows * windows.shape[1]
    )


class _Collector:
    """The hooks on the linears, and what they have gathered."""

    def __init__(
        self, linears: Mapping[str, PrunableLinear], projection_rows: int, seed: int
    ) -> None:
        self.linears = linears
        self.projection_rows = projection_rows
        self.seed = seed
        self.moments: list[_SecondMoment] = []
        self.input_of: dict[str, int] = {}
        self.fisher: dict[str, Tensor] = {}
        self._readers: list[str] = []  # the first linear that reads each input
        self._recent: list[tuple[Tensor, int]] = []  # inputs of this window, while groups form

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        for name, linear in self.linears.items():
            handles.append(
                linear.module.register_forward_hook(
                    lambda _module, args, output, name=name: self._see(name, args[0], output)
                )
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, x: Tensor, output: Tensor) -> None:
        if name not in self.input_of:
            self._group(name, x)
        index = self.input_of[name]
        if self._readers[index] == name:
            flat = x.detach().reshape(-1, x.shape[-1])  # (tokens, in_features)
            self.moments[index].add(flat)
        if output.requires_grad:
            output.register_hook(lambda grad, name=name: self._see_gradient(name, grad))

    def _group(self, name: str, x: Tensor) -> None:
        """Linears that are handed the very same tensor share one input."""
        for seen, index in self._recent:
            if seen is x:
                self.input_of[name] = index
                return
        index = len(self.moments)
        self.input_of[name] = index
        self.moments.append(
            _SecondMoment(
                x.shape[-1], x.device, self.projection_rows, (self.seed * 100_003 + index) % 2**63
            )
        )
        self._readers.append(name)
        # Keeping the tensor alive is what makes "the very same" certain; neighbours suffice.
        self._recent = [*self._recent[-3:], (x, index)]

    def _see_gradient(self, name: str, grad: Tensor) -> None:
        squares = grad.detach().float().square().reshape(-1, grad.shape[-1]).sum(dim=0)
        self.fisher[name] = self.fisher.get(name, 0) + squares

    def end_of_window(self) -> None:
        self._recent = []

    def finish(self, *, sequences: int, tokens: int, gradient_tokens: int) -> Statistics:
        missing = [name for name in self.linears if name not in self.fisher]
        if missing:
            raise ModelError(
                f"{len(missing)} linears were not used in the forward and backward pass, so "
                f"nothing is known of their inputs: {', '.join(missing[:5])}. Pruning them blindly "
                "would be wrong; this model's architecture is not supported."
            )
        inputs = []
        for index, moment in enumerate(self.moments):
            _require_finite(moment.squares, self._readers[index], "activations")
            _require_finite(moment.moment, self._readers[index], "activations")
            inputs.append(moment.finish(sequences, tokens))
        fisher = {name: (self.fisher[name] / gradient_tokens).cpu() for name in self.linears}
        for name, values in fisher.items():
            _require_finite(values, name, "gradients")
        return Statistics(inputs=inputs, input_of=self.input_of, fisher=fisher)


def _require_finite(values: Tensor, layer: str, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            f"{layer}: the {what} of the calibration text are NaN or infinite. Check the model's "
            "weights, or calibrate in float32 (--dtype float32).",
            layer=layer,
        )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
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
