"""
What the assignments of a channel permutation take at the widths of large models, and gain.

Random scores of which some channels are far larger than others, 2:4, on one
thread. Beside the assignments as they are made, over the best pairs of channels
and groups, those over all pairs are run as long as that is not too long. With a
model, its perplexity with either is measured too.

    python benchmarks/assignments.py
    python benchmarks/assignments.py --all-pairs 14336
    python benchmarks/assignments.py --model smollm2
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import click
import torch
from machine import conditions, machine, software
from subject import load_subject
from torch import Tensor

from pho_service.cli.terminal import print_table, say
from pho_service.pipeline.rating import rate_pruned
from pho_service.pruning import assignment
from pho_service.pruning.assignment import assign
from pho_service.pruning.permutation import moved_scores, permute_channels, retained_score
from pho_service.spec.baselines import comparison_baselines
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import PERMUTATIONS, Steps

KEEP, GROUP = 2, 4
SHARE = "of its gain"
COLUMNS = (
    "width", "gains, s", "all pairs, s", "best pairs, s", SHARE,
    "permutation, s", "with all pairs, s", SHARE,
)  # fmt: skip
Result = TypeVar("Result")


@click.command()
@click.option(
    "--width", "widths", multiple=True, type=int, default=(1024, 2048, 4096, 8192, 11008, 14336)
)
@click.option("--rows", default=1024, show_default=True, help="Output rows of each width.")
@click.option("--all-pairs", default=4096, show_default=True, help="Largest width for all pairs.")
@click.option("--permuted", default=4096, show_default=True, help="Largest for whole permutations.")
@click.option("--model", help="smollm2, gemma3 or what `pho` takes: its perplexity instead.")
@click.option(
    "--permutation",
    "permutations",
    multiple=True,
    type=click.Choice(PERMUTATIONS[1:]),
    default=("score",),
    show_default=True,
    help="Of the model.",
)
@click.option("--samples", default=16, show_default=True, help="Calibration windows of the model.")
@click.option("--report-windows", default=14, show_default=True, help="Measured on.")
@click.option("--context-length", default=512, show_default=True, help="Tokens of a window.")
@click.option("--seed", default=0, show_default=True)
def main(
    widths: tuple[int, ...],
    rows: int,
    all_pairs: int,
    permuted: int,
    model: str | None,
    permutations: tuple[str, ...],
    samples: int,
    report_windows: int,
    context_length: int,
    seed: int,
) -> None:
    """Print a table of docs/speed.md."""
    torch.set_num_threads(1)
    if model is not None:
        text = {"samples": samples, "report_windows": report_windows}
        _show_model(model, permutations, context_length=context_length, seed=seed, **text)
        return
    lines = []
    for width in widths:
        say(f"width {width} ...")
        lines.append(_line(width, rows, seed, all_pairs=all_pairs, permuted=permuted))
    slopes = [
        math.nan if name == SHARE else _slope(widths, [line[column] for line in lines])
        for column, name in enumerate(COLUMNS[1:])
    ]
    print_table(
        "CPU seconds of one assignment, and of whole permutations",
        COLUMNS,
        [
            *(
                (str(width), *(_cell(value, column) for column, value in enumerate(line)))
                for width, line in zip(widths, lines, strict=True)
            ),
            ("exponent", *(_cell(slope, column) for column, slope in enumerate(slopes))),
        ],
        caption=f"random scores of {rows} rows, {KEEP}:{GROUP}, seed {seed}, 1 thread; gains: of "
        "all channels on the move in all groups, made before an assignment and not part of it; of "
        "its gain: against all pairs; a permutation makes 8 assignments; exponent: of the seconds "
        f"in the width, by least squares of logarithms; {conditions()}; "
        f"{software('torch', 'scipy')}",
    )


def _line(
    width: int, rows: int, seed: int, *, all_pairs: int, permuted: int
) -> tuple[float, float, float, float, float, float, float]:
    """The columns after the width; NaN is what was not run."""
    score = _score(width, rows, seed)
    channels = score.T.contiguous() / score.max()
    groups = torch.arange(width).view(-1, GROUP)
    seconds, gain = _timed(lambda: moved_scores(channels, groups[:, 0], groups[:, 1:], KEEP))
    before = gain.diagonal().sum(dtype=torch.float64)
    best_seconds, best = _timed(lambda: _sum(gain, assign(gain)) - before)
    whole_seconds = share = math.nan
    if width <= all_pairs:
        with patch.object(assignment, "_WHOLE", width):
            whole_seconds, whole = _timed(lambda: _sum(gain, assign(gain)) - before)
        share = float(best / whole)
    return (seconds, whole_seconds, best_seconds, share, *_permutation(score, width <= permuted))


def _show_model(
    name: str,
    permutations: tuple[str, ...],
    *,
    samples: int,
    report_windows: int,
    context_length: int,
    seed: int,
) -> None:
    """Print a model's perplexity with Wanda's scores and permutations by both assignments."""
    with tempfile.TemporaryDirectory() as folder:
        subject = load_subject(
            name,
            Path(folder),
            samples=samples,
            confirm_windows=1,
            report_windows=report_windows,
            context_length=context_length,
            dtype="float32",
            seed=seed,
        )
    pattern = Pattern.parse(f"{KEEP}:{GROUP}")
    (wanda,) = (each for each in comparison_baselines(pattern) if each.method == "wanda")
    widest = max(linear.weight.shape[1] for linear in subject.model.linears.values())

    def perplexity(permutation: str, whole: int) -> float:
        say(f"permutation {permutation}, all pairs up to {whole} groups ...")
        with patch.object(assignment, "_WHOLE", whole):
            rating, _ = rate_pruned(
                subject.model,
                subject.bundle.statistics(),
                replace(wanda, steps=Steps(permutation=permutation)),
                subject.report.windows,
                calibration=subject.calibration,
            )
        return rating.perplexity

    lines = []
    for permutation in permutations:
        best, whole = (perplexity(permutation, most) for most in (assignment._WHOLE, widest))
        cells = f"{whole:.3f}", f"{best:.3f}", f"{best / whole - 1:+.2%}"
        lines.append((permutation, *cells))
    print_table(
        f"{Path(name).name}: perplexity of Wanda at {pattern}, permuted",
        ("permutation", "all pairs", "best pairs", "difference"),
        [("none", f"{perplexity('none', widest):.3f}", "", ""), *lines],
        caption=f"{report_windows} windows of {context_length} tokens of the report part, "
        f"calibrated on {samples}, float32, seed {seed}; inputs of up to {widest} channels; "
        f"{machine()}; {software('torch', 'scipy')}",
    )


def _permutation(score: Tensor, run: bool) -> tuple[float, float, float]:
    """Seconds of a permutation, of one with all pairs, and the share of the latter's gain."""
    if not run:
        return math.nan, math.nan, math.nan

    def gained() -> float:
        order = permute_channels(score, keep=KEEP, group=GROUP)
        natural = torch.arange(len(order))
        after, before = (
            retained_score(score, each, keep=KEEP, group=GROUP) for each in (order, natural)
        )
        return after - before

    seconds, best = _timed(gained)
    with patch.object(assignment, "_WHOLE", score.shape[1]):
        whole_seconds, whole = _timed(gained)
    return seconds, whole_seconds, best / whole


def _score(width: int, rows: int, seed: int) -> Tensor:
    """Channels of different sizes, one in 512 a hundred times as large, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(width, generator=generator) / 2).exp()
    sizes[torch.randperm(width, generator=generator)[: -(-width // 512)]] *= 100
    return torch.randn(rows, width, generator=generator).abs() * sizes


def _sum(gain: Tensor, chosen: Tensor) -> Tensor:
    return gain[chosen, torch.arange(len(gain))].sum(dtype=torch.float64)


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds, and what the work gives."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _slope(widths: tuple[int, ...], seconds: list[float]) -> float:
    """The exponent; NaN with fewer than two widths that took any time."""
    points = [
        (math.log(width), math.log(taken))
        for width, taken in zip(widths, seconds, strict=True)
        if taken > 0  # NaN is not
    ]
    if len(points) < 2:
        return math.nan
    x, y = torch.tensor(points, dtype=torch.float64).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def _cell(value: float, column: int) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.2%}" if COLUMNS[column + 1] == SHARE else f"{value:.3g}"


if __name__ == "__main__":
    main()
