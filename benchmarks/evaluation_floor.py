"""
How close is the rating of a candidate to what the machine allows?

The floor is the larger of two times: to read once what a candidate depends on
at the measured memory bandwidth, and to do the multiply-adds of its errors at
the measured matrix rate. Both are measured anew in every round, next to the
ratings, so that what else the machine does weighs on both sides.

    python benchmarks/evaluation_floor.py                     # SmolLM2-135M
    python benchmarks/evaluation_floor.py bundle.safetensors --device cuda
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from machine import conditions, software
from scipy.stats import spearmanr
from subject import load_subject
from torch import Tensor

from pho_service.cli.terminal import print_table, progress, verb
from pho_service.models.bundle_file import read_bundle
from pho_service.models.devices import pick_device
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import BATCH, ProxyEvaluator
from pho_service.pruning.selection import keep_highest, plain_keep_highest
from pho_service.pruning.stacks import Stack
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.tuning.validation import random_candidates

PATTERNS = (("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("2:4", None))
BANDWIDTH_BYTES = 1 << 28  # read at once, more than any cache holds
MATRIX_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class Work:
    """
    What one candidate takes at least.

    Attributes:
        bytes: Sampled weights, window means of one size, roots and the vectors beside them.
        multiply_adds: Of the sampled weights with the roots.
    """

    bytes: int
    multiply_adds: int

    @classmethod
    def of(cls, stacks: Sequence[Stack]) -> "Work":
        """The work of a candidate on these stacks."""
        read = [
            tensor.nbytes
            for stack in stacks
            for tensor in (
                stack.rows, stack.window_means[0], stack.roots,
                stack.row_mean, stack.column_mean, stack.activation_norm, stack.fisher,
            )
        ]  # fmt: skip
        products = [stack.rows.numel() * stack.roots.shape[1] for stack in stacks]
        return cls(bytes=sum(read), multiply_adds=sum(products))


class Machine:
    """Measures a device; what it measures with is kept from one round to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._read = torch.ones(BANDWIDTH_BYTES // 4, device=device)
        self._matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE, device=device)

    def seconds(self, work: Callable[[], object], *, times: int = 5) -> float:
        """Of the fastest of some runs."""
        best = float("inf")
        for _ in range(times):
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - started)
        return best

    def bandwidth(self) -> float:
        """Bytes read a second."""
        return self._read.nbytes / self.seconds(self._read.sum)

    def matrix_rate(self, dtype: torch.dtype = torch.float32) -> float:
        """Multiply-adds a second."""
        matrix = self._matrix.to(dtype)
        return MATRIX_SIZE**3 / self.seconds(lambda: matrix @ matrix)


@click.command()
@click.argument("bundle", required=False)
@click.option("--device", default="auto", show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Of measurements.")
@click.option("--candidates", default=40, show_default=True, help="That levers are ranked on.")
@click.option("--seed", default=0, show_default=True)
@verb
def main(bundle: str | None, device: str, rounds: int, candidates: int, seed: int) -> None:
    """Print the tables of docs/speed.md on the rating of a candidate."""
    on = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        rated = read_bundle(Path(bundle)) if bundle else _smollm2(Path(folder), seed)
    measure(rated, on, rounds=rounds, seed=seed)
    levers(rated, on, count=candidates, seed=seed)


def _smollm2(folder: Path, seed: int) -> ProxyBundle:
    """The bundle of the demo's settings."""
    return load_subject(
        "smollm2", folder, samples=32, confirm_windows=1, report_windows=1, context_length=512,
        dtype="float32", seed=seed,
    ).bundle  # fmt: skip


def measure(bundle: ProxyBundle, device: torch.device, *, rounds: int = 9, seed: int = 0) -> None:
    """
    Print the floor of a rating and how far ratings are from it.

    Args:
        bundle: To rate on.
        device: Where.
        rounds: Medians are over these.
        seed: Of the candidates.
    """
    machine, evaluator = Machine(device), ProxyEvaluator(bundle, device)
    work = Work.of(evaluator.stacks)
    patterns = [Pattern.parse(*pattern) for pattern in PATTERNS]
    candidates = {p: _candidates(bundle, p, rounds * BATCH, seed) for p in patterns}
    for pattern in patterns:
        evaluator.evaluate(candidates[pattern][:1])  # compiles, and warms up
    reading, multiplying = [], []
    rating: dict[Pattern, list[float]] = {p: [] for p in patterns}
    with progress("Measuring", rounds) as advance:
        for i in range(rounds):
            reading.append(work.bytes / machine.bandwidth())
            multiplying.append(work.multiply_adds / machine.matrix_rate())
            for pattern in patterns:
                few = candidates[pattern][i * BATCH : (i + 1) * BATCH]
                seconds = machine.seconds(lambda few=few: evaluator.evaluate(few))
                rating[pattern].append(seconds / len(few))
            advance(1)
    floors = [max(pair) for pair in zip(reading, multiplying, strict=True)]

    def row(pattern: Pattern) -> tuple[str, str, str]:
        ratios = [r / f for r, f in zip(rating[pattern], floors, strict=True)]
        title = f"{pattern}, scope {pattern.scope.value}"
        return title, _ms(rating[pattern]), f"{statistics.median(ratios):.2f}"

    gigabytes = work.bytes / statistics.median(reading) / 1e9
    billions = work.multiply_adds / statistics.median(multiplying) / 1e9
    print_table(
        "Milliseconds a candidate",
        ("", "ms", "times the floor"),
        [
            ("reading", _ms(reading), ""),
            ("multiply-adds", _ms(multiplying), ""),
            ("floor: the larger", _ms(floors), "1"),
            *(row(pattern) for pattern in patterns),
        ],
        caption=f"{work.bytes / 1e6:.1f} MB read at {gigabytes:.1f} GB/s, "
        f"{work.multiply_adds / 1e6:.0f} million multiply-adds at {billions:.0f} billion a second "
        f"(float32, square matrices of {MATRIX_SIZE}); medians of {rounds} rounds of "
        f"{BATCH} random candidates of seed {seed} at a time; {_where(device)}",
    )


def levers(bundle: ProxyBundle, device: torch.device, *, count: int, seed: int) -> None:
    """Print what single changes are worth, in time and in the order of candidates."""
    machine, evaluator = Machine(device), ProxyEvaluator(bundle, device)
    pattern = Pattern.parse("0.5", "layer")
    candidates = _candidates(bundle, pattern, count, seed)
    values = _blend(evaluator, candidates)
    rows = []
    few = candidates[:BATCH]
    for title, other, precision in (
        ("tf32 products", evaluator, "high"),
        ("bfloat16 products", ProxyEvaluator(bundle, device, dtype=torch.bfloat16), "highest"),
        ("half of the rows", ProxyEvaluator(_fewer_rows(bundle, 2), device), "highest"),
        ("a quarter of the rows", ProxyEvaluator(_fewer_rows(bundle, 4), device), "highest"),
    ):
        now = machine.seconds(lambda: evaluator.evaluate(few)) / len(few)
        with _float32_products(precision):
            then = machine.seconds(lambda other=other: other.evaluate(few)) / len(few)
            rho = spearmanr(values, _blend(other, candidates)).statistic
        rows.append((title, f"{now * 1e3:.2f}", f"{then * 1e3:.2f}", f"{rho:.4f}"))
    lines = [
        stack.importance([few[0].coefficients], out=torch.empty_like(stack.rows)[:, None])
        .flatten(0, 2)
        .flatten(1)
        for stack in evaluator.stacks
    ]  # (I * L, R * n) each
    removed = [torch.full((len(line),), line.shape[1] // 2, device=device) for line in lines]

    def select(how: Callable[..., object]) -> Callable[[], object]:
        return lambda: [how(line, number) for line, number in zip(lines, removed, strict=True)]

    def partition(line: Tensor, number: Tensor) -> Tensor:
        return line > line.kthvalue(int(number[0]), dim=-1, keepdim=True).values

    def one_by_one() -> None:
        for candidate in few:
            evaluator.evaluate([candidate])

    select(keep_highest)()  # compiles
    for title, ours, theirs, times in (
        ("one candidate at a time", lambda: evaluator.evaluate(few), one_by_one, len(few)),
        ("selection by kthvalue", select(keep_highest), select(partition), 1),
        ("selection by sorting", select(keep_highest), select(plain_keep_highest), 1),
    ):
        now, then = (machine.seconds(work) / times for work in (ours, theirs))
        rows.append((title, f"{now * 1e3:.2f}", f"{then * 1e3:.2f}", ""))
    print_table(
        "What else was tried",
        ("instead", "ms as it is", "ms then", "Spearman"),
        rows,
        caption=f"ms a candidate, of a whole rating or of the step that is named; Spearman of the "
        f"blend over {count} random candidates, {pattern} in scope layer, seed {seed}; "
        f"{_where(device)}",
    )


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """What torch may do in float32 products meanwhile: ``high`` is tf32 where there is one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _candidates(bundle: ProxyBundle, pattern: Pattern, count: int, seed: int) -> list[Candidate]:
    space = SearchSpace(kernel_sizes=bundle.kernel_sizes).fitted(pattern)
    return random_candidates(space, pattern, count=count, seed=seed)


def _blend(evaluator: ProxyEvaluator, candidates: Sequence[Candidate]) -> list[float]:
    return [rating.blend for rating in evaluator.evaluate(candidates)]


def _fewer_rows(bundle: ProxyBundle, step: int) -> ProxyBundle:
    """A bundle with every ``step``-th of its sampled rows."""
    layers = [
        replace(
            layer,
            row_index=layer.row_index[::step],
            rows=layer.rows[::step],
            row_mean=layer.row_mean[::step],
            window_means={k: means[::step] for k, means in layer.window_means.items()},
        )
        for layer in bundle.layers
    ]
    return replace(bundle, layers=layers)


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f}"


def _where(device: torch.device) -> str:
    """The conditions of all tables."""
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else conditions()
    return f"{on}; {torch.get_num_threads()} threads, {software('torch', 'numpy')}"


if __name__ == "__main__":
    main()
