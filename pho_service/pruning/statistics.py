"""
What a dense model's activations and gradients say about its linears, in one pass.

Per input of linears: the activation norm and a second moment, either the Gram
matrix H = E[x x^T] or a random projection S of the tokens with E[S^T S] = H. Per
output row: the Fisher weight g = E[(dL/dy)^2]. All sums over tokens are
float32, streamed sample by sample; nothing grows with the number of samples.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pho_service.errors import InvalidInput, ModelError, NumericalError
from pho_service.pruning.copies import to_device
from pho_service.pruning.input_groups import InputGroups
from pho_service.pruning.passes import frozen, recomputed, run_backward, run_decoder
from pho_service.pruning.second_moments import InputStatistics, SecondMoment
from pho_service.pruning.sums import Sums

logger = logging.getLogger(__name__)


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


def collect_statistics(
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
    advance: Callable[[int], None] = lambda _: None,
) -> Statistics:
    """
    Run the dense model over calibration windows and gather statistics.

    The first ``fisher_windows`` windows are run forward and backward, the rest
    forward only and without the head. Weights stay as they are and get no gradients.

    Args:
        model: A causal language model, in evaluation mode.
        linears: The linears to watch, by name.
        windows: (windows, tokens), int64.
        fisher_windows: 1 <= fisher_windows <= windows.
        projection_rows: Rows of the random projection of the activations;
            0 gathers the full Gram matrix.
        seed: Seed of the random projection.
        batch_windows: How many are run at once. It changes rounding only.
        forward_windows: The same of those that are run forward only, which take less memory;
            None is ``batch_windows``.
        recompute: Blocks that run a second time in a backward pass, so that only
            their inputs are kept for it. It changes nothing else.
        advance: Called with the number of windows after each batch.

    Raises:
        InvalidInput: ``fisher_windows`` out of range.
        ModelError: A linear was never called.
        NumericalError: An activation or a gradient is NaN or infinite.
    """
    check_fisher_windows(fisher_windows, len(windows))
    collector = gather(
        model,
        linears,
        windows,
        fisher_windows=fisher_windows,
        projection_rows=projection_rows,
        seed=seed,
        batch_windows=batch_windows,
        forward_windows=forward_windows,
        recompute=recompute,
        advance=advance,
    )
    collector.finish_inputs(sequences=len(windows), tokens=windows.numel())
    return collector.finish()


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
    advance: Callable[[int], None] = lambda _: None,
) -> "Collector":
    """
    Do what :func:`collect_statistics` does, but for the end: the sums are not divided yet.

    Args:
        model, linears, windows, projection_rows, seed, batch_windows: As there.
        forward_windows, recompute, advance: As there.
        fisher_windows: 0 <= fisher_windows <= windows.
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
            run_decoder(model, to_device(batch, device))
            collector.end_of_window()
            advance(len(batch))
    return collector


def check_fisher_windows(fisher_windows: int, windows: int) -> None:
    """Raise InvalidInput unless 1 <= fisher_windows <= windows."""
    if not 1 <= fisher_windows <= windows:
        raise InvalidInput(
            f"fisher_windows={fisher_windows} is not in 1..{windows}, the number of "
            "calibration windows."
        )


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
        """What was gathered, of inputs that are not finished; nothing is added afterwards."""
        moments = [self._moments[index] for index in range(len(self.groups.readers))]
        return Sums(
            readers=self.groups.readers,
            input_of=self.groups.input_of,
            squares=[each.squares for each in moments],
            moments=[each.moment for each in moments],
            fisher=self.fisher,
            gradient_tokens=self._gradient_tokens,
        )

    def add(self, sums: Sums) -> None:
        """
        Add what other windows gave, in place of running them here.

        The first that are added are taken as they are, and changed in place by the next.
        """
        for index, reader in enumerate(sums.readers):
            mine = self.groups.input_of.get(reader)
            if mine is None:
                mine = self.groups.add(reader)
            device = self.linears[reader].weight.device
            squares, moment = sums.squares[index].to(device), sums.moments[index].to(device)
            if mine in self._moments:
                self._moments[mine].squares += squares
                self._moments[mine].moment += moment
            else:
                self._moments[mine] = SecondMoment.of_sums(squares, moment, self.projection_rows)
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
        known: dict[tuple[int, ...], int] = {}
        for name, linear in self.linears.items():
            if name in self.groups.input_of:
                continue
            found = {self.groups.input_of.get(n, -1) for n in self._siblings(linear)}
            seen = tuple(sorted(found & self._moments.keys()))
            if not seen:
                continue
            if seen not in known:
                known[seen] = self.groups.add(name)
                self._moments[known[seen]] = SecondMoment.mean([self._moments[i] for i in seen])
            self.groups.input_of[name] = known[seen]

    def _siblings(self, linear: PrunableLinear) -> list[str]:
        """The names of the linears that do the same in other experts."""
        if not linear.siblings:
            return []
        return [
            name
            for name, other in self.linears.items()
            if other.siblings == linear.siblings and name != linear.name
        ]

    def _fill_in_fisher(self) -> None:
        """Give experts without gradients the mean of their siblings."""
        filled = {}
        for name, linear in self.linears.items():
            if name in self.fisher or name not in self.groups.input_of:
                continue
            others = [n for n in self._siblings(linear) if n in self.fisher]
            if others:
                filled[name] = torch.stack(
                    [self.fisher[n] / self._gradient_tokens[n] for n in others]
                ).mean(dim=0)
        if filled:
            logger.warning(
                "experts got no tokens in the backward pass and count as mean ones",
                extra={"linears": len(filled), "first": next(iter(filled))},
            )
        for name, values in filled.items():
            self.fisher[name], self._gradient_tokens[name] = values, 1

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
            "weights, or calibrate in float32 (--dtype float32).",
            layer=layer,
        )
