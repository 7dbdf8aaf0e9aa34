"""
Scores and selections on the CPU: partial sorts of integers by numpy, and compiled loops.

torch's ``kthvalue`` moves values and their indices about, with a branch for
each comparison that no processor can predict. numpy partitions integers with
vector instructions, and the bits of floats sort as the floats do. The scores
are made in one reading of the weights for all candidates, where torch makes a
pass for each term. :mod:`pho_service.pruning.selection` and ``scores`` have the
plain torch versions, which are the reference of these and serve all other devices.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from pho_service.pruning.hardware import in_threads

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float64]

_FEW = 1 << 16  # values: so few are not worth a second thread
_TOGETHER = 1 << 18  # values that are ordered at once: 1 MiB, for the second cache
_LOWEST = -(1 << 31)  # integer; the bits of -0.0, too
_HIGHEST = (1 << 31) - 1


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call; the machine code is kept where numba finds a place for it."""
    try:
        kernel: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return njit(nogil=True, error_model="numpy")(function)
    files = kernel._cache
    files.load_overload = _if_possible(files.load_overload)
    files.save_overload = _if_possible(files.save_overload)
    return kernel


def _if_possible(access: Callable[..., Any]) -> Callable[..., Any]:
    """Do without numba's files if they are broken, or cannot be written: the disk may be full."""

    def call(*args: Any) -> Any:
        with suppress(OSError, EOFError, UnpicklingError):
            return access(*args)
        return None

    return call


@_compiled
def _ordered(bits: Any) -> Any:
    """The bits of a float as an integer that sorts as the float does; -0.0 is 0.0."""
    if bits == _LOWEST:
        return np.int32(0)
    return bits ^ ((bits >> 31) & np.int32(_HIGHEST))


@_compiled
def _combine_terms(
    magnitude: Floats,
    row_terms: Floats,
    column_terms: Floats,
    neighbourhoods: Floats,
    window_means: Floats,
    windows: Numbers,
    activations: Floats,
    fishers: Floats,
    scores: Floats,
    first: int,
    end: int,
) -> None:
    """Score the rows ``first`` to ``end`` of all, each for all candidates while it is at hand."""
    _, linears, rows, n = magnitude.shape
    for line in range(first, end):
        i, of_input = divmod(line, linears * rows)
        linear, r = divmod(of_input, rows)
        weights = magnitude[i, linear, r]
        for c in range(len(windows)):
            score = scores[i, c, linear, r]
            row, fisher = row_terms[c, i, linear, r], fishers[c, i, linear, r]
            column, activation = column_terms[c, i, linear], activations[c, i, linear]
            near = neighbourhoods[c]
            if near:
                mean = window_means[windows[c], i, linear, r]
                for j in range(n):
                    relative = (row + column[j] + near / mean[j]) * weights[j]
                    score[j] = relative * activation[j] * fisher
            else:
                for j in range(n):
                    score[j] = (row + column[j]) * weights[j] * activation[j] * fisher


@_compiled
def _order(lines: Bits, ordered: Bits) -> None:
    """All bits as :func:`_ordered` ones."""
    for j in range(len(lines)):
        for i in range(lines.shape[1]):
            ordered[j, i] = _ordered(lines[j, i])


@_compiled
def _mark(lines: Bits, removed: Numbers, thresholds: Bits, marks: Marks) -> None:
    """Mark what is above a line's threshold, and the first that equal it."""
    n = lines.shape[1]
    for j in range(len(lines)):
        line, mask, threshold = lines[j], marks[j], thresholds[j]
        above = 0
        for i in range(n):
            mask[i] = _ordered(line[i]) > threshold
            above += mask[i]
        spare, i = n - removed[j] - above, 0  # how many that equal the threshold stay
        while spare > 0:
            if not mask[i] and _ordered(line[i]) == threshold:
                mask[i] = True
                spare -= 1
            i += 1


@_compiled
def _keep_in_groups(lines: Floats, keep: Numbers, group: int, marks: Marks) -> None:
    """Mark the ``keep[i]`` highest of each run of line i; among equals the first stay."""
    n = lines.shape[1]
    inside = np.empty((group, n), np.int8)  # is the value at a distance of the same run?
    for distance in range(group):
        for i in range(n):
            inside[distance, i] = i % group < group - distance
    better = np.empty(n, np.int8)  # values of the same run, by which each one is beaten
    for j in range(len(lines)):
        line, mask = lines[j], marks[j]
        better[:] = 0
        # All pairs at one distance at once, which a processor does many at a time.
        for distance in range(1, group):
            alike = inside[distance]
            for i in range(n - distance):
                better[i] += alike[i] & (line[i + distance] > line[i])
            for i in range(n - distance):
                better[i + distance] += alike[i] & (line[i + distance] <= line[i])
        for i in range(n):
            mask[i] = better[i] < keep[j]


@_compiled
def _add_digits(
    lines: Bits, weights: Weights, shift: int, width: int, prefix: int, counts: Weights
) -> None:
    """Add up the weights of values by a digit of their bits, where ``prefix`` is above it."""
    lowest = (1 << width) - 1
    for j in range(len(lines)):
        line, weight = lines[j], weights[j]
        for i in range(len(line)):
            digits = line[i] >> shift
            if digits >> width == prefix:
                counts[digits & lowest] += weight


@_compiled
def _count_below(lines: Floats, threshold: float, below: Numbers, tied: Numbers) -> None:
    """Count the values of each line below a threshold, and those that equal it."""
    for j in range(len(lines)):
        line, less, equal = lines[j], 0, 0
        for i in range(len(line)):
            less += line[i] < threshold
            equal += line[i] == threshold
        below[j], tied[j] = less, equal


def combine_terms(
    magnitude: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    neighbourhoods: Sequence[float],
    window_means: Tensor,
    windows: Sequence[int],
    activations: Tensor,
    fishers: Tensor,
    out: Tensor,
) -> None:
    """:func:`scores.plain_combine_terms` on the CPU, in one reading of the weights."""
    terms = [_array(t) for t in (magnitude, row_terms, column_terms)]
    means, weightings = _array(window_means), [_array(t) for t in (activations, fishers)]
    near, which = np.array(neighbourhoods, np.float32), np.array(windows, np.int64)
    scores = out.numpy()

    def work(part: slice) -> None:
        _combine_terms(*terms, near, means, which, *weightings, scores, part.start, part.stop)

    _over(magnitude.numel() // magnitude.shape[-1], scores.size, work)


def keep_highest(score: Tensor, removed: Tensor) -> Tensor:
    """:func:`selection.keep_highest`: (lines, n), float32, and (lines,), int64, on the CPU."""
    lines, numbers = _array(score).view(np.int32), _array(removed)
    marks = np.empty(lines.shape, np.bool_)
    _over(len(lines), lines.size, lambda part: _keep(lines[part], numbers[part], marks[part]))
    return torch.from_numpy(marks)


def _keep(lines: Bits, removed: Numbers, marks: Marks) -> None:
    """Mark all but the ``removed[i]`` lowest of line i, a few lines at a time."""
    n = lines.shape[1]
    few = max(1, _TOGETHER // max(1, n))
    for start in range(0, len(lines), few):
        part = slice(start, start + few)
        ordered, numbers = np.empty_like(lines[part]), removed[part]
        _order(lines[part], ordered)
        thresholds = np.full(len(ordered), _LOWEST, np.int32)
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for first, end in pairwise([0, *ends]):  # lines that lose equally many
            if k := int(numbers[first]):
                ordered[first:end].partition(k - 1, axis=1)
                thresholds[first:end] = ordered[first:end, k - 1]
        _mark(lines[part], numbers, thresholds, marks[part])


def nm_mask(score: Tensor, keep: Tensor, group: int) -> Tensor:
    """:func:`selection.nm_mask`: (lines, n), float32, and (lines,), int64, on the CPU."""
    lines, numbers = _array(score), _array(keep)
    marks = np.empty(lines.shape, np.bool_)
    _over(
        len(lines),
        lines.size,
        lambda part: _keep_in_groups(lines[part], numbers[part], group, marks[part]),
    )
    return torch.from_numpy(marks)


def add_digits(
    score: Tensor, weights: Tensor, shift: int, width: int, prefix: int, counts: Tensor
) -> None:
    """:func:`selection.add_digits` on the CPU; ``score`` is (lines, n)."""
    lines = _array(score).view(np.int32)
    _add_digits(lines, _array(weights), shift, width, prefix, counts.numpy())


def count_below(score: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """:func:`selection.count_below`: (lines, n), float32, on the CPU."""
    lines = _array(score)
    below, tied = (np.empty(len(lines), np.int64) for _ in range(2))
    at = np.float32(threshold)
    _over(
        len(lines), lines.size, lambda part: _count_below(lines[part], at, below[part], tied[part])
    )
    return torch.from_numpy(below), torch.from_numpy(tied)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.detach().contiguous().numpy()


def _over(lines: int, values: int, work: Callable[[slice], None]) -> None:
    """Do that many lines, with that many values, in as many parts as torch has threads."""
    parts = max(1, min(torch.get_num_threads(), lines)) if values >= _FEW else 1
    ends = [lines * i // parts for i in range(parts + 1)]
    in_threads(work, [slice(a, b) for a, b in pairwise(ends)])
