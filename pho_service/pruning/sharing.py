"""
The linears of a pruned model that should lose more or less, by the slope of its predictions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pho_service.pruning.perplexity import DenseReference, frozen, recomputed, window_backward
from pho_service.pruning.statistics import PrunableLinear

_LOOKED_AT = 1 << 20  # scores of a linear, spread over all of it
_BORDER = 0.1  # share of what is removed, or kept if that is less, on either side of the threshold
_STEEPEST = 2.5  # standard deviations; a slope beyond is chance, or of a linear that moves anyway


@dataclass(frozen=True, kw_only=True)
class Border:
    """
    The weights of a linear that are the next to go, and those that would be the first to come back.

    Attributes:
        linear: What they are of.
        rows, columns: (weights,), int32.
        dense: (weights,), float32: what they are in the dense model.
    """

    linear: PrunableLinear
    rows: Tensor
    columns: Tensor
    dense: Tensor

    @classmethod
    def of(
        cls, linear: PrunableLinear, score: Tensor, sparsity: float, *, by_row: bool
    ) -> "Border":
        """
        The border of a linear that is dense.

        Args:
            linear: Its weight is (out_features, in_features).
            score: The same shape, float32.
            sparsity: Share that it loses.
            by_row: The weights of each output row compete, not those of the linear.
        """
        lines = score if by_row else score.reshape(1, -1)
        places = border_places(lines, sparsity)
        rows, columns = places // score.shape[1], places % score.shape[1]
        dense = linear.weight[rows, columns].float()
        return cls(linear=linear, rows=rows.int(), columns=columns.int(), dense=dense)

    def slope(self, gradient: Tensor) -> float:
        """The mean of -g w, of the parameter's gradient."""
        border_gradient = self.linear.part_of(gradient)[self.rows, self.columns].float()
        return -float(border_gradient @ self.dense) / max(1, len(self.dense))


def border_places(score: Tensor, sparsity: float) -> Tensor:
    """
    Find the weights whose scores are next to the threshold that a sparsity sets.

    Args:
        score: (lines, n), float32: what competes, line by line.
        sparsity: Share that each line loses.

    Returns:
        (weights,), int64, in the flat scores. A million of them are looked at, evenly spread.
    """
    lines, n = score.shape
    rows = torch.arange(0, lines, max(1, lines * n // _LOOKED_AT), device=score.device)
    columns = torch.arange(0, n, max(1, len(rows) * n // _LOOKED_AT), device=score.device)
    sample = score[rows][:, columns]
    width = _BORDER * min(sparsity, 1 - sparsity)
    count = len(columns)
    low, high = (
        sample.kthvalue(min(max(round(share * count), 1), count), dim=1, keepdim=True).values
        for share in (sparsity - width, sparsity + width)
    )
    row, column = ((sample >= low) & (sample <= high)).nonzero(as_tuple=True)
    return rows[row] * n + columns[column]


def slopes(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    borders: Mapping[str, Border],
    reference: DenseReference,
) -> Iterator[dict[str, float]]:
    """
    Measure how steeply the divergence from the dense model rises when linears lose more weights.

    Removing a weight w that is there changes the divergence by -g w to first order, g being its
    gradient. A weight that is gone has one too, and comes back as it was in the dense model. One
    pass backward gives both for all linears.

    Args:
        model: Pruned.
        blocks: Run again on the way back.
        borders: The weights of each linear that are next to its threshold.
        reference: What the dense model predicts.

    Yields:
        After each window, for each linear the mean of -g w over its border, in nats a weight.
    """
    sums: dict[str, float] = {}
    by_parameter: dict[int, list[str]] = {}
    parameters = {id(b.linear.parameter): b.linear.parameter for b in borders.values()}
    for name, border in borders.items():
        by_parameter.setdefault(id(border.linear.parameter), []).append(name)

    def read(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # that is why it is called
        for name in by_parameter[id(parameter)]:
            sums[name] = sums.get(name, 0.0) + borders[name].slope(parameter.grad)
        parameter.grad = None  # of all linears at once they would be as large as the model

    with frozen(model), recomputed(blocks, nullcontext), ExitStack() as stack:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            stack.callback(parameter.register_post_accumulate_grad_hook(read).remove)
        for window in range(len(reference.windows)):
            sums.clear()
            window_backward(model, reference, window)
            yield {name: sums.get(name, 0.0) for name in borders}


def fairer(
    slopes: Mapping[str, float], sizes: Mapping[str, int], *, rate: float
) -> dict[str, float]:
    """
    What to add to the log-odds of the share that each linear keeps.

    Where a model loses least, removing one weight more costs the same in every linear. So those
    where it costs more than on average keep more, and the others less.

    Args:
        slopes: As :func:`slopes` gives them.
        sizes: Weights of each linear.
        rate: Log-odds for a slope of one standard deviation above the mean.
    """
    weights = torch.tensor([sizes[name] for name in slopes], dtype=torch.float64)
    values = torch.tensor([*slopes.values()], dtype=torch.float64)
    off = values - (values * weights).sum() / weights.sum()
    deviation = ((off.square() * weights).sum() / weights.sum()).sqrt()
    if not deviation > 0:
        return dict.fromkeys(slopes, 0.0)
    steps = rate * (off / deviation).clamp(-_STEEPEST, _STEEPEST)
    return dict(zip(slopes, steps.tolist(), strict=True))
