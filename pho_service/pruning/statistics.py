"""
Statistics of a dense model's activations and gradients, for each linear, in one pass.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from pho_service.errors import ModelError, NumericalError, field_name
from pho_service.pruning.hardware import to_device
from pho_service.pruning.perplexity import frozen, recomputed, run_backward

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """
    The activation norm and the second moment of one input, shared by all linears that read it.

    Attributes:
        activation_norm: (in_features,), float32. Square root of the mean over
            sequences of the squares summed over tokens.
        root: (rows, in_features), float32: ``root.T @ root`` is the second
            moment E[x x^T] (in expectation, for a random projection).
    """

    activation_norm: Tensor
    root: Tensor


class SecondMoment:
    """
    Streams one input's activation norm and second moment, sample by sample.

    The second moment is kept as a Gram matrix, or as a random projection of
    the tokens that costs no more than reading them: each token, times a random
    sign, is added to one row of ``moment``, drawn at random. The expectation over the signs
    of ``moment.T @ moment`` is the sum of x x^T, since those of different
    tokens are independent.

    Args:
        width: in_features.
        device: Device of the input.
        projection_rows: Rows of the projection; 0 keeps the Gram matrix.
        seed: Seed of the rows and signs. They are drawn on the CPU, token by token, so they are the
            same on every device and in every batch.

    Source:
        Charikar, Chen & Farach-Colton 2002 (count sketch). The variance of the energy
        of any direction is that of a projection where each row sums all tokens, each with a
        sign: 2 / rows * sum over pairs of tokens i != j of (d x_i)^2 (d x_j)^2.
    """

    def __init__(
        self, width: int, device: torch.device, *, projection_rows: int, seed: int
    ) -> None:
        self.squares = torch.zeros(width, device=device)
        self.rows = projection_rows
        self.moment = torch.zeros(projection_rows or width, width, device=device)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor) -> None:
        """x: (tokens, in_features), one sequence or several, any floating dtype."""
        with torch.autocast(x.device.type, enabled=False):  # sums are float32, whatever is around
            exact = x.float().contiguous()
            self.squares += exact.square().sum(dim=0)
            if self.rows:
                self.moment += self._projected(exact)
            else:
                add_gram_(self.moment, exact, from_16_bits=x.dtype.itemsize == 2)

    def _projected(self, x: Tensor) -> Tensor:
        """(rows, in_features): the sum of the tokens of each row, with their signs."""
        drawn = torch.randint(2 * self.rows, (len(x),), generator=self._generator)
        row, sign = drawn // 2, drawn % 2 * 2.0 - 1
        token = row.argsort(stable=True)  # (tokens,), row by row
        first = row.bincount(minlength=self.rows).cumsum(dim=0).roll(1)
        first[0] = 0  # (rows,): where each row's tokens begin
        sign = sign[token]
        if x.device.type != "cpu":  # all in one copy, which nobody waits for
            numbers = torch.cat([token.int(), first.int(), sign.view(torch.int32)])
            on_device = to_device(numbers, x.device)
            token, first, sign = on_device.split([len(token), len(first), len(sign)])
            sign = sign.view(torch.float32)
        # One pass over x, and the same order of additions every time, on a GPU too.
        projected: Tensor = embedding_bag(token, x, first, mode="sum", per_sample_weights=sign)
        return projected

    @classmethod
    def of_sums(cls, squares: Tensor, moment: Tensor, rows: int) -> Self:
        """Sums that were streamed elsewhere; the tensors are taken as they are."""
        moments = cls(0, squares.device, projection_rows=0, seed=0)
        moments.rows, moments.squares, moments.moment = rows, squares, moment
        return moments

    @classmethod
    def mean(cls, moments: list[Self]) -> Self:
        """The sums that would have given the mean of several inputs' second moments."""
        (_, width), device, rows = (
            moments[0].moment.shape,
            moments[0].moment.device,
            moments[0].rows,
        )
        mean = cls(width, device, projection_rows=rows, seed=0)
        for moment in moments:
            mean.squares += moment.squares / len(moments)
            # Inputs have random signs of their own: the squares of the sum of their projections
            # are, in expectation, the sum of their squares.
            mean.moment += moment.moment / len(moments) ** (0.5 if rows else 1.0)
        return mean

    def finish(self, sequences: int, tokens: int) -> InputStatistics:
        """The statistics, on the CPU, of sums over so many sequences and tokens."""
        norm = (self.squares / sequences).sqrt()
        if self.rows:
            root = self.moment / tokens**0.5
        else:
            root = square_root(mirrored_(self.moment).div_(tokens))
        return InputStatistics(activation_norm=norm.cpu(), root=root.cpu())


PANEL = 256  # columns of a Gram matrix that are added at a time
GPU_PANEL = 2048  # the same on a GPU, where each is a launch


def add_gram_(gram: Tensor, x: Tensor, *, from_16_bits: bool = False) -> None:
    """
    Add ``x.T @ x`` to the upper triangle of a Gram matrix; :func:`mirrored_` fills in the lower.

    Args:
        gram: (width, width), float32. Below the diagonal it has no meaning.
        x: (tokens, width), float32.
        from_16_bits: ``x`` was cast from bfloat16 or float16. A GPU's tensor cores multiply it
            then: TF32 holds it exactly, and sums are float32 as elsewhere.
    """
    step = PANEL if x.device.type == "cpu" else GPU_PANEL
    with tensor_cores() if from_16_bits else nullcontext():
        for start in range(0, len(gram), step):
            panel = slice(start, start + step)
            gram[panel, start:].addmm_(x[:, panel].T, x[:, start:])


@contextmanager
def tensor_cores() -> Iterator[None]:
    """
    Inside, a GPU multiplies float32 matrices as TF32: factors of 10 bits, sums in float32.

    bfloat16 has 7 such bits and float16 has 10, so what was cast from them loses none.
    """
    matmul: Any = torch.backends.cuda.matmul
    has_precision = hasattr(matmul, "fp32_precision")  # from torch 2.9 on
    name, value = ("fp32_precision", "tf32") if has_precision else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def mirrored_(gram: Tensor) -> Tensor:
    """Make a matrix symmetric by its upper triangle."""
    for start in range(0, len(gram), PANEL):
        panel = slice(start, start + PANEL)
        corner = gram[panel, panel]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[start + PANEL :, panel] = gram[panel, start + PANEL :].T
    return gram


def square_root(gram: Tensor) -> Tensor:
    """
    (n, n) float32 L with ``L.T @ L == gram``, for any second moment, singular ones too.

    Sums in float32 leave a singular matrix with eigenvalues a little below zero. A millionth of
    its own is added to every diagonal element until there is a Cholesky factor, or ten millionths,
    and so on: far less work than eigenvectors.
    """
    scale = gram.diagonal().clamp_min(0).double().sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    correlation = gram.double() * inverse[:, None] * inverse
    for exponent in range(-6, 1):
        correlation.diagonal().fill_(1 + 10.0**exponent)
        lower, failed = torch.linalg.cholesky_ex(correlation)
        if not int(failed):
            break
    root: Tensor = (lower.T * scale).float().contiguous()
    return root


# The signs of the tokens of several shards must be drawn apart: with the same ones, products of
# tokens at the same places would not vanish in expectation.
APART = 2_654_435_761  # between two shards' seeds; torch's generator on the CPU reads 32 bits


@dataclass(frozen=True, kw_only=True)
class Sums:
    """
    What some windows add to the statistics, not divided by anything yet.

    Attributes:
        readers: The first linear that reads each input, in the order of their first calls.
        input_of: Index into ``readers`` for each linear that was called.
        squares: (in_features,), float32, for each input: squares summed over tokens.
        moments: (rows, in_features), float32, for each input: its projection.
        fisher: (out_features,), float32, for each linear that a gradient reached: its squares.
        gradient_tokens: How many tokens those are of.
    """

    readers: list[str]
    input_of: dict[str, int]
    squares: list[Tensor]
    moments: list[Tensor]
    fisher: dict[str, Tensor]
    gradient_tokens: dict[str, int]


class InputGroups:
    """
    Which linears are handed the very same tensor, in the order of their first calls.

    Attributes:
        input_of: Index of each linear's input, of the linears called so far.
    """

    def __init__(self) -> None:
        self.input_of: dict[str, int] = {}
        self.readers: list[str] = []  # the first linear that reads each input
        self._recent: list[tuple[Tensor, int]] = []  # inputs of this window, while groups form

    def see(self, name: str, x: Tensor) -> int | None:
        """The index of ``x`` if linear ``name`` is the one that it counts for, otherwise None."""
        if name not in self.input_of:
            self._group(name, x)
        index = self.input_of[name]
        return index if self.readers[index] == name else None

    def _group(self, name: str, x: Tensor) -> None:
        for recent, index in self._recent:
            if recent is x:
                self.input_of[name] = index
                return
        index = self.add(name)
        # Keeping the tensor alive is what makes "the very same" certain; neighbours suffice.
        self._recent = [*self._recent[-3:], (x, index)]

    def add(self, name: str) -> int:
        """Note that linear ``name`` reads an input of its own; its index."""
        self.input_of[name] = len(self.readers)
        self.readers.append(name)
        return self.input_of[name]

    def end_of_window(self) -> None:
        """Let go of the window's tensors."""
        self._recent = []


@dataclass(frozen=True, kw_only=True)
class PrunableLinear:
    """
    One linear of a model.

    Attributes:
        module: The module whose hooks see the input and the output.
        transposed: True where the module stores (in, out), as GPT-2's Conv1D.
        siblings: The same for the same matrix of all experts of a mixture; empty elsewhere.
    """

    name: str
    module: nn.Module
    transposed: bool = False
    siblings: str = ""

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): a view, so writing to it changes the model."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight: that of all experts, if they are fused."""
        parameter = getattr(self.module, "held_by", self.module.weight)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def part_of(self, gradient: Tensor) -> Tensor:
        """The part of the parameter's gradient that is this weight's."""
        weight, parameter = self.weight, self.parameter
        place = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        return gradient.contiguous().as_strided(weight.shape, weight.stride(), place)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """
    Attributes:
        inputs: One entry a distinct input.
        input_of: Index into ``inputs`` for each linear.
        fisher: (out_features,), float32, for each linear: mean over the tokens
            that reached it. Those of an expert are few, and its inputs count the others as zeros.
    """

    inputs: list[InputStatistics]
    input_of: dict[str, int]
    fisher: dict[str, Tensor]

    def activation_norm(self, name: str) -> Tensor:
        """(in_features,), float32: the activation norm at the input of linear ``name``."""
        return self.inputs[self.input_of[name]].activation_norm


def gather(
    model: nn.Module,
    linears: Mapping[str, PrunableLinear],
    windows: Tensor,
    *,
    fisher_windows: int,
    projection_rows: int,
    seed: int,
    batch_windows: int = 1,
    forward_windows: int | None = None,
    recompute: Iterable[nn.Module] = (),
    advance: Callable[[float], None] = lambda _: None,
) -> "Collector":
    """
    Run the dense model over calibration windows, and add up what its linears see.

    The first ``fisher_windows`` windows are run forward and backward, the rest
    forward only and without the head. Weights stay as they are and get no gradients.

    Args:
        model: A causal language model, in evaluation mode.
        linears: The linears to watch, by name.
        windows: (windows, tokens), int64.
        fisher_windows: 0 <= fisher_windows <= windows.
        projection_rows: Rows of the random projection of the activations;
            0 gathers the full Gram matrix.
        seed: Seed of the random projection.
        batch_windows: How many are run at once. It changes rounding only.
        forward_windows: The same of those that are run forward only, which take less memory;
            None is ``batch_windows``.
        recompute: Blocks that run a second time in a backward pass, so that only
            their inputs are kept for it. It changes nothing else.
        advance: Called with the number of windows after each batch.
    """
    collector = Collector(linears, projection_rows, seed)
    device = next(model.parameters()).device
    with (
        collector.reading_inputs(),
        collector.reading_gradients(),
        recomputed(recompute, collector.paused),
        frozen(model),
    ):
        backward, forward = windows[:fisher_windows], windows[fisher_windows:]
        for batch in backward.split(batch_windows) if len(backward) else ():  # (windows, tokens)
            run_backward(model, to_device(batch, device))
            collector.end_of_window()
            advance(len(batch))
        for batch in forward.split(forward_windows or batch_windows) if len(forward) else ():
            with torch.no_grad():  # without the head, for what hooks see
                model.base_model(  # type: ignore[operator]
                    input_ids=to_device(batch, device), use_cache=False
                )
            collector.end_of_window()
            advance(len(batch))
    return collector


@contextmanager
def watched(
    linears: Mapping[str, PrunableLinear], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input, output)`` whenever one of the linears is called."""
    handles = [
        linear.module.register_forward_hook(
            lambda _module, args, output, name=name: see(name, args[0], output)
        )
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Collector:
    """
    What the linears' calls say, gathered in one pass or block by block.

    Inputs and gradients are watched apart, since a pass block by block runs
    each block once to see its inputs and once more to see its gradients.
    """

    def __init__(
        self, linears: Mapping[str, PrunableLinear], projection_rows: int, seed: int
    ) -> None:
        self.linears = linears
        self.projection_rows = projection_rows
        self.seed = seed
        self.groups = InputGroups()
        self.fisher: dict[str, Tensor] = {}
        self._gradient_tokens: dict[str, int] = {}
        self._moments: dict[int, SecondMoment] = {}  # of inputs that are not finished
        self._inputs: list[InputStatistics] = []
        self._is_paused = False
        # Of seeds: an input has the same one in whatever order linears are called.
        self._places = {name: place for place, name in enumerate(linears)}

    def reading_inputs(self) -> AbstractContextManager[None]:
        """Inside, the inputs of the linears are added."""
        return watched(self.linears, self._see_input)

    def reading_gradients(self) -> AbstractContextManager[None]:
        """Inside, backward passes through the linears are added."""
        return watched(self.linears, self._see_output)

    def end_of_window(self) -> None:
        """Inputs of different windows are different inputs, wherever they lie in memory."""
        self.groups.end_of_window()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, calls of the linears do not count: they were counted before."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _see_input(self, name: str, x: Tensor, _output: Tensor) -> None:
        if self._is_paused:
            return
        index = self.groups.see(name, x)
        if index is None:
            return
        if index not in self._moments:
            self._moments[index] = SecondMoment(
                x.shape[-1],
                x.device,
                projection_rows=self.projection_rows,
                seed=(self.seed * 100_003 + self._places[name]) % 2**63,
            )
        self._moments[index].add(x.detach().reshape(-1, x.shape[-1]))  # (tokens, in_features)

    def _see_output(self, name: str, _x: Tensor, output: Tensor) -> None:
        if output.requires_grad and not self._is_paused:
            output.register_hook(lambda grad: self._see_gradient(name, grad))

    def _see_gradient(self, name: str, grad: Tensor) -> None:
        squares = grad.detach().float().square().reshape(-1, grad.shape[-1])  # (tokens, out)
        self.fisher[name] = self.fisher.get(name, 0) + squares.sum(dim=0)
        self._gradient_tokens[name] = self._gradient_tokens.get(name, 0) + len(squares)

    def sums(self) -> Sums:
        """The sums of inputs that are not finished; nothing is added afterwards."""
        moments = [self._moments[index] for index in range(len(self.groups.readers))]
        return Sums(
            readers=self.groups.readers,
            input_of=self.groups.input_of,
            squares=[m.squares for m in moments],
            moments=[m.moment for m in moments],
            fisher=self.fisher,
            gradient_tokens=self._gradient_tokens,
        )

    def add(self, sums: Sums) -> None:
        """
        Add what other windows gave, in place of running them here.

        The first that are added are taken as they are, and changed in place by the next.
        """
        for index, reader in enumerate(sums.readers):
            group = self.groups.input_of.get(reader)
            if group is None:
                group = self.groups.add(reader)
            device = self.linears[reader].weight.device
            squares, moment = sums.squares[index].to(device), sums.moments[index].to(device)
            if group in self._moments:
                self._moments[group].squares += squares
                self._moments[group].moment += moment
            else:
                self._moments[group] = SecondMoment.of_sums(squares, moment, self.projection_rows)
        for name, index in sums.input_of.items():
            if name not in self.groups.input_of:
                self.groups.input_of[name] = self.groups.input_of[sums.readers[index]]
        for name, values in sums.fisher.items():
            values = values.to(self.linears[name].weight.device)
            self.fisher[name] = self.fisher[name] + values if name in self.fisher else values
            tokens = self._gradient_tokens.get(name, 0)
            self._gradient_tokens[name] = tokens + sums.gradient_tokens[name]

    def finish_inputs(self, *, sequences: int, tokens: int) -> None:
        """
        Close the inputs seen so far: no more is added to them, and their sums are freed.

        An expert that no token was routed to counts as a mean one of its mixture.

        Raises:
            NumericalError: An activation is NaN or infinite.
        """
        self._fill_in_inputs()
        for index in range(len(self._inputs), len(self.groups.readers)):
            moment = self._moments.pop(index)
            for sums in (moment.squares, moment.moment):
                require_finite(sums, self.groups.readers[index], "activations")
            self._inputs.append(moment.finish(sequences, tokens))

    def _fill_in_inputs(self) -> None:
        """Give experts without tokens the mean input of their siblings, one for all of them."""
        group_of: dict[tuple[int, ...], int] = {}
        for name, linear in self.linears.items():
            if name in self.groups.input_of:
                continue
            sibling_groups = {self.groups.input_of.get(n, -1) for n in self._siblings(linear)}
            groups = tuple(sorted(sibling_groups & self._moments.keys()))
            if not groups:
                continue
            if groups not in group_of:
                index = group_of[groups] = self.groups.add(name)
                self._moments[index] = SecondMoment.mean([self._moments[i] for i in groups])
            self.groups.input_of[name] = group_of[groups]

    def _siblings(self, linear: PrunableLinear) -> list[str]:
        """The names of the linears that do the same in other experts."""
        if not linear.siblings:
            return []
        return [
            name
            for name, sibling in self.linears.items()
            if sibling.siblings == linear.siblings and name != linear.name
        ]

    def _fill_in_fisher(self) -> None:
        """Give experts without gradients the mean of their siblings."""
        filled = {}
        for name, linear in self.linears.items():
            if name in self.fisher or name not in self.groups.input_of:
                continue
            siblings = [n for n in self._siblings(linear) if n in self.fisher]
            if siblings:
                filled[name] = torch.stack(
                    [self.fisher[n] / self._gradient_tokens[n] for n in siblings]
                ).mean(dim=0)
        if filled:
            logger.warning(
                "experts got no tokens in the backward pass and count as mean ones",
                extra={"linears": len(filled), "first": next(iter(filled))},
            )
        for name, values in filled.items():
            self.fisher[name], self._gradient_tokens[name] = values, 1

    def statistics(self, windows: Tensor) -> Statistics:
        """Give what all of these windows have added, as :meth:`finish` does."""
        self.finish_inputs(sequences=len(windows), tokens=windows.numel())
        return self.finish()

    def finish(self) -> Statistics:
        """
        Give what was gathered, once all inputs are finished.

        Raises:
            ModelError: A linear was never called, or got no gradient.
            NumericalError: A gradient is NaN or infinite.
        """
        self._fill_in_fisher()
        missing = [name for name in self.linears if name not in self.fisher]
        if missing:
            raise ModelError(
                f"{len(missing)} linears were not used in the forward and backward pass, so "
                f"nothing is known of their inputs: {', '.join(missing[:5])}. Pruning them blindly "
                "would be wrong; this model's architecture is not supported."
            )
        fisher = {
            name: (self.fisher[name] / self._gradient_tokens[name]).cpu() for name in self.linears
        }
        for name, values in fisher.items():
            require_finite(values, name, "gradients")
        return Statistics(inputs=self._inputs, input_of=self.groups.input_of, fisher=fisher)


def require_finite(values: Tensor, layer: str, what: str) -> None:
    """Raise NumericalError if sums over the calibration text have a NaN or an infinity."""
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            f"{layer}: the {what} of the calibration text are NaN or infinite. Check the model's "
            f"weights, or calibrate in float32 ({field_name('dtype', 'float32')}).",
            layer=layer,
        )
