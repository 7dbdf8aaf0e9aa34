"""
Sums over the tokens of one input: its activation norm and its second moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pho_service.pruning.copies import to_device


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
            there = to_device(numbers, x.device)
            token, first, sign = there.split([len(token), len(first), len(sign)])
            sign = sign.view(torch.float32)
        # One pass over x, and the same order of additions every time, on a GPU too.
        projected: Tensor = embedding_bag(token, x, first, mode="sum", per_sample_weights=sign)
        return projected

    @classmethod
    def of_sums(cls, squares: Tensor, moment: Tensor, rows: int) -> Self:
        """What has been streamed elsewhere; the tensors are taken as they are."""
        taken = cls(0, squares.device, projection_rows=0, seed=0)
        taken.rows, taken.squares, taken.moment = rows, squares, moment
        return taken

    @classmethod
    def mean(cls, moments: list[Self]) -> Self:
        """What the mean of several inputs' second moments would have been streamed as."""
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
    """The same matrix, made symmetric by its upper triangle."""
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
