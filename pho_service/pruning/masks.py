"""
The masks of a whole model for one candidate, and a model with them applied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from pho_service.pruning.scores import layer_importance
from pho_service.pruning.selection import keep_highest, nm_mask, threshold_of
from pho_service.pruning.statistics import PrunableLinear, Statistics
from pho_service.spec import Candidate, Coefficients, Pattern, Scope


def plain_score(gradient_exponent: float) -> Coefficients:
    """
    The score that layers are compared by in scope ``global``: A * x * g^b.

    Relative importances have no common scale across layers: with them, a
    global threshold ruins some layers. So the plain score decides how many
    weights each layer loses, and a candidate's own score which ones. Within a
    layer RIA and CRePE stay exact; across layers every candidate is the plain
    form.
    """
    return Coefficients(
        row=1,
        column=0,
        neighbourhood=0,
        activation_exponent=1,
        gradient_exponent=gradient_exponent,
        normalisation="none",
    )


def line_mask(lines: Tensor, pattern: Pattern) -> Tensor:
    """
    Prune each line of scores by itself.

    Args:
        lines: (..., n), float32.
        pattern: Its scope is not looked at: a line is what competes.

    Returns:
        The shape of ``lines``, bool.
    """
    if pattern.group:
        return nm_mask(lines, keep=pattern.keep, group=pattern.group)
    n = lines.shape[-1]
    return keep_highest(lines.reshape(-1, n), pattern.removed(n)).view(lines.shape)


def model_masks(
    linears: Mapping[str, PrunableLinear], statistics: Statistics, candidate: Candidate
) -> Iterator[tuple[str, Tensor]]:
    """
    Give the mask of one linear after the other, (out_features, in_features), bool.

    One layer's scores are held at a time. In scope ``global`` the plain scores
    are computed twice before the first mask comes.

    Raises:
        InvalidInput: N:M does not divide an input width.
        NumericalError: A score is NaN or infinite; names the layer.
    """
    for name, linear in linears.items():
        candidate.pattern.check_width(linear.weight.shape[1], name)

    def score(name: str, coefficients: Coefficients) -> Tensor:
        return layer_importance(
            linears[name].weight,
            activation_norm=statistics.activation_norm(name),
            fisher=statistics.fisher[name],
            coefficients=coefficients,
            layer=name,
        )

    removed: dict[str, int] = {}
    if candidate.pattern.scope is Scope.GLOBAL:
        plain = plain_score(candidate.coefficients.gradient_exponent)
        removed = _shares(lambda name: score(name, plain), linears, candidate.pattern)
    for name in linears:
        values = score(name, candidate.coefficients)
        if removed:
            mask = keep_highest(values.reshape(1, -1), removed[name])
        elif candidate.pattern.scope is Scope.LAYER:
            mask = line_mask(values.reshape(1, -1), candidate.pattern)
        else:
            mask = line_mask(values, candidate.pattern)
        yield name, mask.view(values.shape)


def _shares(
    score: Callable[[str], Tensor], linears: Mapping[str, PrunableLinear], pattern: Pattern
) -> dict[str, int]:
    """How many weights each linear loses under one threshold; they add up exactly."""
    total = pattern.removed(sum(linear.weight.numel() for linear in linears.values()))
    threshold = threshold_of(lambda: ((score(name), 1.0) for name in linears), total)
    below, tied = [], []
    for name in linears:
        values = score(name)
        below.append(int((values < threshold).sum()))
        tied.append(int((values == threshold).sum()))
    removed = share_ties(below, tied, [1.0] * len(below), total)
    return dict(zip(linears, removed, strict=True))


def share_ties(
    below: Sequence[int], tied: Sequence[int], weights: Sequence[float], total: float
) -> list[int]:
    """
    Decide which of the scores that equal a threshold go: the earlier layers keep theirs.

    Args:
        below: Scores under the threshold, layer by layer; all of them go.
        tied: Scores that equal it.
        weights: How many weights of the model each score of a layer stands for.
        total: Weights of the model to remove.

    Returns:
        Scores to remove, layer by layer; they stand for ``total`` weights, or
        for less by under one score of a layer.
    """
    removed = list(below)
    left = total - sum(n * weight for n, weight in zip(below, weights, strict=True))
    for i in reversed(range(len(removed))):
        taken = min(tied[i], int(left / weights[i] + 1e-6))
        removed[i] += taken
        left -= taken * weights[i]
    return removed


@contextmanager
def pruned(
    linears: Mapping[str, PrunableLinear], masks: Iterator[tuple[str, Tensor]]
) -> Iterator[dict[str, float]]:
    """
    Zero the masked weights of a model, and put them back afterwards.

    Args:
        linears: Of the model, by name. Changed in place.
        masks: (name, mask) pairs, as :func:`model_masks` gives them. They
            must not depend on weights that were masked before.

    Yields:
        The achieved sparsity of each linear.
    """
    removed: dict[str, tuple[Tensor, Tensor]] = {}
    sparsity: dict[str, float] = {}
    try:
        for name, keep in masks:
            weight = linears[name].weight
            gone = ~keep
            removed[name] = (gone, weight[gone])
            weight.masked_fill_(gone, 0)
            sparsity[name] = float(gone.float().mean())
        yield sparsity
    finally:
        # Backwards, for a module that two names stand for.
        for name, (gone, values) in reversed(removed.items()):
            linears[name].weight[gone] = values


def model_sparsity(linears: Mapping[str, PrunableLinear], sparsity: Mapping[str, float]) -> float:
    """The share of all prunable weights that is gone."""
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}
    return sum(sparsity[name] * size for name, size in sizes.items()) / sum(sizes.values())
