"""
Selections on the CPU, compiled: the k-th lowest of many lines by counting bits.

torch's ``kthvalue`` moves values and their indices about, with a branch for
each comparison that no processor can predict; counting the leading bits of
floats needs neither. :mod:`pho_service.pruning.selection` has the plain torch
versions, which are the reference of these and serve all other devices.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

Bits = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float64]

_FEW = 1 << 16  # values: so few are not worth a second thread
_SORTED = 24  # values: so few are sorted instead of counted
_NEGATIVE_ZERO = -(1 << 31)  # its bits, which are also the lowest integer
_HIGHEST = (1 << 31) - 1
_MOST_BINS = 4096  # 16 KiB of counts, which leave room for the values in the first cache


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call; the machine code is kept where numba finds a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return njit(nogil=True)(function)


@_compiled
def _ordered(bits: Any) -> Any:
    """The bits of a float as an integer that sorts as the float does; -0.0 is 0.0."""
    if bits == _NEGATIVE_ZERO:
        return np.int32(0)
    return bits ^ ((bits >> 31) & np.int32(_HIGHEST))


@_compiled
def _kth_lowest(line: Bits, k: int, values: Bits, counts: Bits) -> Any:
    """The k-th lowest of a line, 1 <= k <= n, as ordered bits. The rest is scratch."""
    n = len(line)
    low, high = np.int32(_HIGHEST), np.int32(_NEGATIVE_ZERO)
    for i in range(n):
        value = _ordered(line[i])
        values[i] = value
        low, high = min(low, value), max(high, value)
    while low < high:
        if n <= _SORTED:
            values[:n].sort()
            return values[k - 1]
        # Count by as many leading bits of the distance from the lowest as there are bins, ...
        bins = 64
        while bins < _MOST_BINS and 8 * bins < n:
            bins *= 2
        shift, span = 0, np.int64(high) - np.int64(low)
        while span >> shift >= bins:
            shift += 1
        counts[:bins] = 0
        for i in range(n):
            counts[(np.int64(values[i]) - low) >> shift] += 1
        digit = 0
        while counts[digit] < k:
            k -= counts[digit]
            digit += 1
        # ... and go on with those that share the digit.
        bottom = low + (np.int64(digit) << shift)
        low, high = np.int32(_HIGHEST), np.int32(_NEGATIVE_ZERO)
        found = 0
        for i in range(n):
            value = values[i]
            if (value - bottom) >> shift == 0:
                values[found] = value
                found += 1
                low, high = min(low, value), max(high, value)
        n = found
    return low


@_compiled
def _keep_highest(lines: Bits, removed: Numbers, marks: Marks) -> None:
    """Mark all but the ``removed[i]`` lowest of line i; among equals the first stay."""
    n = lines.shape[1]
    values, counts = np.empty(n, np.int32), np.empty(_MOST_BINS, np.int32)
    for j in range(len(lines)):
        line, kept, k = lines[j], marks[j], removed[j]
        if k == 0 or k == n:
            kept[:] = k == 0
            continue
        threshold = _kth_lowest(line, k, values, counts)
        above = 0
        for i in range(n):
            kept[i] = _ordered(line[i]) > threshold
            above += kept[i]
        spare, i = n - k - above, 0  # how many that equal the threshold stay
        while spare > 0:
            if _ordered(line[i]) == threshold:
                kept[i] = True
                spare -= 1
            i += 1


@_compiled
def _keep_in_groups(
    lines: npt.NDArray[np.float32], keep: Numbers, group: int, marks: Marks
) -> None:
    """Mark the ``keep[i]`` highest of each run of line i; among equals the first stay."""
    for j in range(len(lines)):
        line, kept = lines[j], marks[j]
        for start in range(0, len(line), group):
            for a in range(start, start + group):
                better = 0
                for b in range(start, a):
                    better += line[b] >= line[a]
                for b in range(a + 1, start + group):
                    better += line[b] > line[a]
                kept[a] = better < keep[j]


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
def _count_below(
    lines: npt.NDArray[np.float32], threshold: float, below: Numbers, tied: Numbers
) -> None:
    """How many values of each line are below a threshold, and how many equal it."""
    for j in range(len(lines)):
        line, less, equal = lines[j], 0, 0
        for i in range(len(line)):
            less += line[i] < threshold
            equal += line[i] == threshold
        below[j], tied[j] = less, equal


def keep_highest(score: Tensor, removed: Tensor) -> Tensor:
    """:func:`selection.keep_highest`: (lines, n), float32, and (lines,), int64, on the CPU."""
    lines, numbers = _array(score).view(np.int32), _array(removed)
    marks = np.empty(lines.shape, np.bool_)
    _over(lines, lambda part: _keep_highest(lines[part], numbers[part], marks[part]))
    return torch.from_numpy(marks)


def nm_mask(score: Tensor, keep: Tensor, group: int) -> Tensor:
    """:func:`selection.nm_mask`: (lines, n), float32, and (lines,), int64, on the CPU."""
    lines, numbers = _array(score), _array(keep)
    marks = np.empty(lines.shape, np.bool_)
    _over(lines, lambda part: _keep_in_groups(lines[part], numbers[part], group, marks[part]))
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
    _over(lines, lambda part: _count_below(lines[part], at, below[part], tied[part]))
    return torch.from_numpy(below), torch.from_numpy(tied)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.detach().contiguous().numpy()


def _over(lines: npt.NDArray[Any], work: Callable[[slice], None]) -> None:
    """Do the lines in as many parts as torch has threads."""
    threads = min(torch.get_num_threads(), len(lines))
    if threads < 2 or lines.size < _FEW:
        work(slice(None))
        return
    ends = [len(lines) * i // threads for i in range(threads + 1)]
    for done in [_threads(threads).submit(work, slice(a, b)) for a, b in pairwise(ends)]:
        done.result()


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="pho-kernels")
