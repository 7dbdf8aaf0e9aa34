"""
Block reconstruction: train the kept weights of a pruned block towards what the dense block gave.

The block reads what the pruned blocks before it give, and is to give what the dense model has at
that place, so it also makes up for what the blocks before it lost.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, field_name
from pho_service.progress import Advance
from pho_service.pruning.hardware import quick_products
from pho_service.pruning.scores import TINY
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.steps import Reconstruction

HELD_OUT = 8  # every so many windows one is held out, and at least one
_RETRIES = 2  # passes of a block that may make it worse
_SLOWER = 1 / 3  # times the rate, after each of them
_NAMED = 4  # blocks that a sentence names


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A linear of a block, and which of its weights may change in place."""

    linear: PrunableLinear
    keep: Tensor  # (out_features, in_features), bool. What is False stays as it is, to the bit


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """
    Result of the training of one block.

    Attributes:
        before: Mean over the tokens of the held-out windows of its output's squared error over the
            dense output's energy. None if it is NaN or infinite.
        after: The same with the weights that the block was left with.
        passes: Passes that were made, with those that were taken back.
        kept: Whether the trained weights were taken; otherwise the block has its earlier ones.
    """

    before: float | None
    after: float | None
    passes: int
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def check_windows(count: int) -> None:
    """
    Raises:
        InvalidInput: There are too few windows to train on some and hold out others.
    """
    if count < 2:
        raise InvalidInput(
            f"a reconstruction trains on some calibration windows and holds out at least one, but "
            f"there is only {count}. Give 2 {field_name('calibration/samples')} or more, or "
            f"{field_name('steps/reconstruction/method', 'none')}."
        )


def reconstruct(
    weights: Sequence[Trainable],
    run: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    settings: Reconstruction,
    *,
    advance: Advance = lambda _: None,
) -> Reconstructed:
    """
    Train the kept weights of a block, and leave those with the least held-out error.

    The error is the mean over tokens of the output's squared error over the dense output's energy,
    as the next block's norm sees it: without that division the few tokens with massive activations
    would be all that counts. Adam takes one window a step, in an order drawn from the seed. Its
    rate is a share of the root mean square of each parameter's kept weights, as models differ in
    that by a factor of ten, and falls linearly to 0 over all passes. After each pass the held-out
    windows are measured. A pass that made them worse does not count: it is taken back, and the
    training goes on at a third of the rate; how much a block bears cannot be told beforehand. The
    third such pass ends it.

    Args:
        weights: What is trained; all else that the block has stays as it is.
        run: The block's output for the window of a number, with gradients for the weights.
        targets: What it should be, for each window: (..., tokens, hidden), as the output.
        settings: Passes, rate and seed.
        advance: Called with 0 after each window.

    Returns:
        The result. The held-out error is never higher than before: where nothing is better,
        or an error is no number, the weights are those from before.

    Raises:
        InvalidInput: Fewer than two windows.

    Source:
        BRECQ, Li et al. 2021, arXiv:2102.05426, trains the rounding of one block after the other
        on their outputs. Here it is the weights that a mask keeps, and the inputs are those that
        the pruned blocks before give.
    """
    check_windows(len(targets))
    training, held_out = split(len(targets))
    with _Fit(weights, run, targets).ready() as fit:
        best = before = fit.error_of(held_out)
        weights_then, rate = fit.copies(), settings.learning_rate
        better = worse = 0
        measurable = math.isfinite(before)
        generator = torch.Generator().manual_seed(settings.seed)
        while measurable and better < settings.passes and worse <= _RETRIES:
            for place, index in enumerate(torch.randperm(len(training), generator=generator)):
                progress = (better + place / len(training)) / settings.passes
                fit.step(training[int(index)], rate * (1 - progress))
                advance(0)
            error = fit.error_of(held_out)
            if error < best:  # never of a NaN
                best, weights_then, better = error, fit.copies(), better + 1
            else:
                fit.restore(weights_then)
                rate, worse = rate * _SLOWER, worse + 1
    return Reconstructed(
        before=before if measurable else None,
        after=best if measurable else None,
        passes=better + worse,
        kept=better > 0,
    )


def split(count: int) -> tuple[list[int], list[int]]:
    """The numbers of the windows to train on and of those to hold out, spread over all."""
    step = min(HELD_OUT, count)
    held_out = range(step - 1, count, step)
    return [window for window in range(count) if window not in held_out], [*held_out]


def summary(blocks: Mapping[str, Reconstructed]) -> str:
    """Say in a sentence what the training of a model's blocks came to; at least one block."""
    better = [block for block in blocks.values() if block.kept and block.before and block.after]
    unchanged = [name for name, block in blocks.items() if block.passes and not block.kept]
    trained = sum(block.kept for block in blocks.values())
    sentence = f"{trained} of {len(blocks)} blocks reconstructed"
    if better:
        ratio = sum(math.log(e.after / e.before) for e in better if e.after and e.before)
        sentence += f", held-out error {math.expm1(ratio / len(better)):+.1%} on average"
    if unchanged:
        more = f" and {len(unchanged) - _NAMED} more" if len(unchanged) > _NAMED else ""
        sentence += f"; no better, so left as they were: {', '.join(unchanged[:_NAMED])}{more}"
    if untrained := sum(not block.passes for block in blocks.values()):
        sentence += f"; {untrained} not trained"
    return sentence


class _Fit:
    """Weights on their way: exact ones in float32, which Adam changes, and the model's own."""

    # The steps of a model in 16 bits are smaller than its weights can show.

    def __init__(
        self,
        weights: Sequence[Trainable],
        run: Callable[[int], Tensor],
        targets: Sequence[Tensor],
    ) -> None:
        self.weights = weights
        self.run = run
        self.targets = targets
        self.parameters = [*dict.fromkeys(weight.linear.parameter for weight in weights)]
        self.exact = [
            weight.linear.weight.detach().to(torch.float32, memory_format=torch.contiguous_format)
            for weight in weights
        ]
        # Adam moves every weight by about its rate, however large weights are: models differ.
        self.sizes = [  # root mean squares
            float(exact[weight.keep].norm()) / max(1, int(weight.keep.sum())) ** 0.5
            for exact, weight in zip(self.exact, weights, strict=True)
        ]
        groups = [{"params": [exact]} for exact in self.exact]
        self.adam = torch.optim.Adam(groups, fused=True)  # and no copies of all at once

    @contextmanager
    def ready(self) -> Iterator["_Fit"]:
        """Inside, the weights have gradients."""
        flags = [parameter.requires_grad for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield self
        finally:
            for parameter, flag in zip(self.parameters, flags, strict=True):
                parameter.requires_grad_(flag)

    def _error(self, window: int) -> Tensor:
        """Mean over the tokens of the output's squared error over the target's energy."""
        output = self.run(window).float()
        target = self.targets[window].to(output.device).float()
        energy = target.square().sum(dim=-1).clamp_min(TINY)  # (..., tokens)
        return ((output - target).square().sum(dim=-1) / energy).mean()

    def error_of(self, windows: Sequence[int]) -> float:
        """The mean over windows, with the weights of now."""
        with torch.no_grad():
            return float(torch.stack([self._error(window) for window in windows]).mean())

    def step(self, window: int, rate: float) -> None:
        """One step of Adam towards the target of a window."""
        with quick_products(self.parameters[0].device):
            error = self._error(window)
        gradients = torch.autograd.grad(error, self.parameters, allow_unused=True)
        by_parameter = dict(zip(map(id, self.parameters), gradients, strict=True))
        for exact, weight in zip(self.exact, self.weights, strict=True):
            gradient = by_parameter[id(weight.linear.parameter)]
            # Experts that no token of the window reached have none, or zeros, and stay.
            if gradient is not None:
                gradient = weight.linear.part_of(gradient).float() * weight.keep
            exact.grad = gradient if gradient is not None and bool(gradient.any()) else None
        for group, size in zip(self.adam.param_groups, self.sizes, strict=True):
            group["lr"] = rate * size
        self.adam.step()
        self.adam.zero_grad()
        self._write()

    def copies(self) -> list[Tensor]:
        """Return copies of the exact weights as they are now."""
        return [exact.detach().clone() for exact in self.exact]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Take weights from before, and forget the way from there."""
        for exact, then in zip(self.exact, copies, strict=True):
            exact.copy_(then)
        self.adam.state.clear()
        self._write()

    def _write(self) -> None:
        """Into the model; what is not in 16 bits is the model's own tensor."""
        for weight, exact in zip(self.weights, self.exact, strict=True):
            weight.linear.weight.detach().copy_(exact)
