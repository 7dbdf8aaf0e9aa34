"""
Updates of the weights that a linear keeps, to make up for those that were removed.

All of it works on one Gram matrix H = E[x x^T] of the linear's input: rows of
weights W and W' give outputs that differ by (W - W') H (W - W')^T in the mean.

A ``weight`` is (out_features, in_features), of any floating dtype, dense and finite; a ``mask``
has its shape, bool, True = kept; ``gram`` is H, (in_features, in_features), float32, symmetric.
New weights are float32, 0 where they are removed. A ``ValueError`` says which shapes do not fit,
or which number is out of its range. ``layer`` is the name of a linear, for messages.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pho_service.errors import NumericalError, field_name
from pho_service.pruning.selection import keep_highest, nm_mask

_DEAD = 1e-15  # diagonal of an input that is always 0, as a share of the mean diagonal
_STEP = 16  # columns that catch up together inside of a block; for speed only


def inverse_factor(gram: Tensor, *, damping: float = 0.01, layer: str) -> Tensor:
    """
    Factor the inverse of the damped Gram matrix: U with U^T U = (H + damping * mean(diag H) I)^-1.

    Row j of U says how the inputs after j make up for input j once all inputs
    before j are fixed; that is all that pruning column by column needs. An
    input that is always 0 stands alone with a diagonal of almost 0, so its
    weights are the first to go. A matrix of zeros counts as the identity.

    Args:
        damping: Share of the mean diagonal that is added to the diagonal, >= 0.
            0.01 is the literature's; fewer tokens than inputs want more.

    Returns:
        (in_features, in_features), float32, upper triangular, positive diagonal.

    Raises:
        NumericalError: NaN or infinity in ``gram``, or it is not positive
            definite after damping, in float32 and in float64.

    Source:
        Frantar & Alistarh 2023, arXiv:2301.00774, section 3. They factor,
        invert and factor again; one factorisation from the last input to the
        first, inverted, is the same matrix. They set the diagonal of an input
        that is always 0 to 1 and zero its weights.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram of shape {tuple(gram.shape)} is not square")
    for dtype in (torch.float32, torch.float64):
        factor = _factor(damped(gram.to(dtype), damping, layer=layer))
        if factor is not None:
            return factor
    raise NumericalError(
        f"{layer}: the second moments of its inputs are not positive definite with damping "
        f"{damping:g} of their mean, in float32 and in float64, so no weights can be updated by "
        "them. Calibrate on more text, or raise the damping (0.1).",
        layer=layer,
    )


def damped(gram: Tensor, damping: float, *, layer: str) -> Tensor:
    """A copy with a share of its mean diagonal added; a dead input gets almost nothing."""
    matrix = gram.clone()
    matrix.diagonal().copy_(damped_diagonal(gram, damping, layer=layer))
    return matrix


def damped_diagonal(gram: Tensor, damping: float, *, layer: str) -> Tensor:
    """(in_features,): the diagonal of :func:`damped`."""
    if not damping >= 0:
        raise ValueError(f"damping={damping} is not at least 0")
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError(
            f"{layer}: the second moments of its inputs are NaN or infinite. Check the model's "
            f"weights, or calibrate in float32 ({field_name('dtype', 'float32')}).",
            layer=layer,
        )
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    alone = torch.where(mean > 0, _DEAD * mean, 1)
    return torch.where(diagonal == 0, alone, diagonal + damping * mean)


def _factor(matrix: Tensor) -> Tensor | None:
    """The upper factor of the inverse, float32; None if ``matrix`` is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if bool(failed):
        return None
    root = lower.flip(0, 1)  # upper, root @ root.T == matrix
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    factor = torch.linalg.solve_triangular(root, eye, upper=True).float()
    return factor if bool(torch.isfinite(factor).all()) else None


def obs_update(weight: Tensor, mask: Tensor, factor: Tensor, *, block: int = 128) -> Tensor:
    """
    Give the weights that stay, changed so that the outputs change least.

    From the first input to the last, what a removed weight did is handed to
    the weights after it. Weights before it stay as they are: the result is
    not the least error that the mask allows (:func:`least_squares_update`).
    Two more matrices of the weights' size are held meanwhile.

    Args:
        factor: (in_features, in_features), float32, of :func:`inverse_factor`.
        block: Columns that catch up together, >= 1; for speed only.

    Source:
        Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1 with a given mask,
        as RIA's ``--reconstruction``. A column fetches the errors before it
        where they push them to all columns behind: the same sums.
    """
    if mask.shape != weight.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and weight {tuple(weight.shape)} differ")

    def given(_current: Tensor, start: int, stop: int) -> Tensor:
        return mask[:, start:stop]

    return _sweep(weight, factor, given, block=block, piece=block)[0]


def sparsegpt(
    weight: Tensor,
    factor: Tensor,
    *,
    removed: int = 0,
    keep: int = 0,
    group: int = 0,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """
    Choose which weights go while the others make up for those gone before.

    A weight's score is W^2 / U_jj^2, its error if only the inputs after it can
    make up for it. Ratio: the scores of a block of columns compete over all
    rows, and each block loses its share by width. N:M: each run is decided
    with all columns before it done.

    Args:
        factor: (in_features, in_features), float32, of :func:`inverse_factor`.
        removed: Weights of the linear that are removed; only without ``group``.
        keep: N of N:M, 1 <= keep < group; 0 for a ratio.
        group: M of N:M, divides in_features; 0 for a ratio.
        block: Columns of a block, >= 1. N:M takes the next lower multiple of M.

    Returns:
        The new weights and the mask: ``removed`` weights are False, or group - keep of each run.

    Source:
        Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1. Their threshold
        rounds in each block; here the counts of the blocks add up to
        ``removed``, and among equal scores the lower index stays.
    """
    out_features, in_features = weight.shape
    _check_counts(weight, removed=removed, keep=keep, group=group)
    scale = factor.diagonal().square()  # (in_features,)

    def chosen(current: Tensor, start: int, stop: int) -> Tensor:
        values = current.square() / scale[start:stop]  # (out_features, stop - start)
        if group:
            return nm_mask(values, keep=keep, group=group)
        share = removed * stop // in_features - removed * start // in_features
        return keep_highest(values.reshape(1, -1), share).view(out_features, stop - start)

    return _sweep(weight, factor, chosen, block=block, piece=group or block)


def _check_counts(weight: Tensor, *, removed: int, keep: int, group: int) -> None:
    in_features = weight.shape[1]
    if not 0 <= removed <= weight.numel():
        raise ValueError(f"removed={removed} is not in 0..{weight.numel()}")
    if (keep or group) and not 1 <= keep < group:
        raise ValueError(f"keep={keep}, group={group}: 1 <= keep < group must hold")
    if group and removed:
        raise ValueError(f"removed={removed} has no meaning with N:M ({keep}:{group})")
    if group and in_features % group:
        raise ValueError(f"in_features={in_features} is not a multiple of M={group}")


def _sweep(
    weight: Tensor,
    factor: Tensor,
    choose: Callable[[Tensor, int, int], Tensor],
    *,
    block: int,
    piece: int,
) -> tuple[Tensor, Tensor]:
    """Remove weights from the first column to the last, each error made up for by later columns."""
    # ``choose`` gets the current weights of columns start to stop, a view (out_features, stop -
    # start), and gives which of them stay. It is asked once for each ``piece`` columns of a block,
    # when all before are done. A block is a multiple of a piece.
    in_features = weight.shape[1]
    if factor.shape != (in_features, in_features):
        raise ValueError(f"factor {tuple(factor.shape)} is not of in_features={in_features}")
    if block < 1:
        raise ValueError(f"block={block} is below 1")
    block = max(piece, block - block % piece)
    # Transposed: a column of weights is contiguous, and everything below works on columns.
    current = weight.detach().float().T.contiguous().clone()  # (in_features, out_features)
    errors = torch.empty_like(current)
    mask = torch.empty_like(current, dtype=torch.bool)
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        _catch_up(current, errors, factor, 0, start, stop)
        for first in range(start, stop, piece):
            last = min(first + piece, stop)
            _catch_up(current, errors, factor, start, first, last)
            mask[first:last] = choose(current[first:last].T, first, last).T
            _remove(current, errors, factor, mask, first, last)
    current.masked_fill_(~mask, 0)
    return current.T.contiguous(), mask.T.contiguous()


def _catch_up(
    current: Tensor, errors: Tensor, factor: Tensor, since: int, start: int, stop: int
) -> None:
    if since < start:
        current[start:stop].addmm_(factor[since:start, start:stop].T, errors[since:start], alpha=-1)


def _remove(
    current: Tensor, errors: Tensor, factor: Tensor, mask: Tensor, first: int, last: int
) -> None:
    """Find the errors of columns first to last, whose masks are known."""
    gone = (~mask[first:last]).float() / factor.diagonal()[first:last, None]
    for start in range(first, last, _STEP):
        stop = min(start + _STEP, last)
        _catch_up(current, errors, factor, first, start, stop)
        if current.is_cuda:
            inside = factor[start:stop, start:stop].triu(1)
            share = gone[start - first : stop - first]
            errors[start:stop] = _errors(current[start:stop], inside, share)
            current[start:stop].addmm_(inside.T, errors[start:stop], alpha=-1)
            continue
        for j in range(start, stop):
            _catch_up(current, errors, factor, start, j, j + 1)
            torch.mul(current[j], gone[j - first], out=errors[j])


def _errors(current: Tensor, factor: Tensor, gone: Tensor) -> Tensor:
    """The errors of some columns at once, for a GPU: launches cost it more than multiply-adds."""
    # That of column j is gone_j (current_j - sum over i < j of U_ij error_i): one triangular system
    # for each output. A CPU, which has no launches, takes column by column.
    systems = gone.T[:, :, None] * factor.T  # (out_features, columns, columns), and the identity
    right = (gone * current).T[:, :, None]
    solved: Tensor = torch.linalg.solve_triangular(systems, right, upper=False, unitriangular=True)
    return solved[:, :, 0].T


def least_squares_update(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    *,
    start: Tensor,
    damping: float = 0.01,
    steps: int = 20,
) -> Tensor:
    """
    Improve the weights that stay towards the least error that their mask allows.

    Each row minimises (W - W') (H + damping * mean(diag H) I) (W - W')^T over
    its kept weights, by conjugate gradients preconditioned with the diagonal,
    all rows at once. A step costs one product of ``weight``'s and ``gram``'s shapes.

    Args:
        start: Weights, a good guess, such as :func:`obs_update` gives. A row
            whose error does not fall stays as it is here.
        damping: Share of the mean diagonal that is added to the diagonal, >= 0.
        steps: Number of steps of conjugate gradients, >= 0.

    Source:
        Meng et al. 2024, arXiv:2406.07831 (ALPS), algorithm 2. They start from
        their ADMM's weights, and do not compare with the start.
    """
    if not weight.shape == mask.shape == start.shape:
        shapes = [tuple(tensor.shape) for tensor in (weight, mask, start)]
        raise ValueError(f"weight, mask and start of shapes {shapes} differ")
    if not damping >= 0 or steps < 0:
        raise ValueError(f"damping={damping} and steps={steps} must be at least 0")
    diagonal = gram.diagonal()
    ridge = damping * float(diagonal.mean())
    inverse = mask / (diagonal + ridge)  # (out_features, in_features): preconditioner, and support
    inverse.masked_fill_((diagonal + ridge) <= 0, 0)

    def times(rows: Tensor) -> Tensor:
        return torch.addmm(rows, rows, gram, beta=ridge)  # rows @ (gram + ridge I)

    weight, first = weight.detach().float(), start.detach().float() * mask
    residual = times(weight - first)
    error = _dot(weight - first, residual)
    result, direction = first.clone(), torch.zeros_like(first)
    slope = torch.zeros_like(error)
    for _ in range(steps):
        step = residual * inverse
        slope, previous = _dot(residual, step), slope
        direction = direction.mul_(_ratio(slope, previous)).add_(step)
        product = times(direction)
        length = _ratio(slope, _dot(direction, product))
        result.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
    better = _dot(weight - result, times(weight - result)) < error
    return torch.where(better, result, first)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row, (rows, 1)."""
    return (left * right).sum(dim=1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where ``below`` is not positive: a row that is done stays as it is."""
    return torch.where(below > 0, above / below, 0)
