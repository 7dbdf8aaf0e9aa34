"""
How much error masks and updates leave in one block, at equal sparsity, against ALPS.

A block in the middle of a dense model, on the inputs that it is calibrated on.
Every linear loses the same share, so only masks and updates differ: neither
allocation nor, unless it is said, row weights have a say.

    python benchmarks/mask_errors.py
    python benchmarks/mask_errors.py --model gemma3 --pattern 0.5 --scope layer
"""

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import click
import torch
from machine import conditions, software
from subject import load_subject
from torch import Tensor

from pho_service.cli.terminal import print_table, say
from pho_service.models.blockwise import walk
from pho_service.pipeline.pipeline import finished_block
from pho_service.pruning.masks import linear_masks
from pho_service.pruning.statistics import PrunableLinear, Statistics
from pho_service.pruning.steps import InputMoments
from pho_service.pruning.weight_update import output_error
from pho_service.spec.baselines import comparison_baselines
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.steps import Steps

LEAST = "least-squares"
METHODS = {
    "alps": Steps(update="alps"),
    "admm": Steps(update="admm"),
    "sparsegpt": Steps(update="sparsegpt"),
    "swaps, least squares": Steps(repruning="swaps", update=LEAST),
    "admm, least squares": Steps(repruning="admm", update=LEAST),
}
ROW_WEIGHTS = "the same with row weights"
PERMUTED = "the same, permuted"
Errors = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A block's linears with the second moments of what they read, and the model's statistics."""

    linears: Mapping[str, PrunableLinear]
    statistics: Statistics
    moments: list[InputMoments]
    input_of: Mapping[str, int]


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--block", type=int, help="[default: the middle one]")
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "0.6", "0.7", "2:4"))
@click.option("--scope", "scopes", multiple=True, type=click.Choice(["layer", "row"]),
              default=("layer", "row"))  # fmt: skip
@click.option("--samples", default=16, show_default=True, help="Calibration windows.")
@click.option("--context-length", default=512, show_default=True, help="Tokens of a window.")
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    block: int | None,
    patterns: tuple[str, ...],
    scopes: tuple[str, ...],
    samples: int,
    context_length: int,
    seed: int,
) -> None:
    """Print the table of docs/quality.md."""
    torch.set_num_threads(1)
    inputs = _inputs(model, block, samples=samples, context_length=context_length, seed=seed)
    columns = {
        f"{pattern}" if pattern.group else f"{pattern} {pattern.scope}": _column(inputs, pattern)
        for text in patterns
        for pattern in dict.fromkeys(Pattern.parse(text).within(Scope(s)) for s in scopes)
    }
    names = (*METHODS, ROW_WEIGHTS, PERMUTED)
    print_table(
        f"{Path(model).name}: error of the outputs of a block against ALPS's, and CPU seconds",
        ("method", *columns),
        [(name, *(column.get(name, "-") for column in columns.values())) for name in names],
        caption=f"geometric mean over {len(inputs.linears)} linears of one block, all at the "
        f"pattern's sparsity, on the inputs of the dense model in {samples} calibration windows "
        f"of {context_length} tokens; ALPS in the same scope; seed {seed}, 1 thread; "
        f"{conditions()}; {software('torch')}",
    )


def _column(inputs: Inputs, pattern: Pattern) -> dict[str, str]:
    """A cell for each method."""
    steps: dict[str, Steps] = dict(METHODS)
    if pattern.scope is Scope.LAYER and not pattern.group:
        steps[ROW_WEIGHTS] = steps["admm, least squares"]
    if pattern.group:
        steps[PERMUTED] = replace(steps["admm, least squares"], permutation="score")
    cells, first = {}, None
    for name, each in steps.items():
        say(f"{pattern} {pattern.scope}: {name} ...")
        seconds, errors = _errors(inputs, pattern, each, alike=name != ROW_WEIGHTS)
        first = first or errors
        ratio = sum(math.log(errors[linear] / first[linear]) for linear in errors) / len(errors)
        cells[name] = f"{math.exp(ratio) - 1:+.1%} {seconds:.1f} s"
    return cells


def _errors(inputs: Inputs, pattern: Pattern, steps: Steps, *, alike: bool) -> tuple[float, Errors]:
    """CPU seconds, and the error of each linear by name, all rows of which count ``alike``."""
    (wanda,) = (each for each in comparison_baselines(pattern) if each.method == "wanda")
    candidate = Candidate(method="x", coefficients=wanda.coefficients, pattern=pattern, steps=steps)
    statistics = inputs.statistics
    if alike:
        ones = {name: torch.ones_like(fisher) for name, fisher in statistics.fisher.items()}
        statistics = replace(statistics, fisher=ones)
    masks = list(linear_masks(inputs.linears, statistics, candidate))
    started = time.process_time()
    finished = finished_block(
        inputs.linears, statistics, candidate, masks, inputs.moments, inputs.input_of
    )
    changed: dict[str, Tensor] = {name: weight for name, _, weight in finished}
    seconds = time.process_time() - started
    return seconds, {
        name: float(
            output_error(
                inputs.linears[name].weight, weight, inputs.moments[inputs.input_of[name]].gram
            ).sum(dtype=torch.float64)
        )
        for name, weight in changed.items()
    }


def _inputs(
    model: str, block: int | None, *, samples: int, context_length: int, seed: int
) -> Inputs:
    with tempfile.TemporaryDirectory() as folder:
        subject = load_subject(
            model,
            Path(folder),
            samples=samples,
            confirm_windows=1,
            report_windows=1,
            context_length=context_length,
            dtype="float32",
            seed=seed,
        )
    index = subject.model.model.config.num_hidden_layers // 2 if block is None else block
    say(f"inputs of block {index} ...")
    blocks = walk(subject.model, subject.calibration)
    chosen = next(islice(blocks, index, None))
    moments, input_of = chosen.moments()
    blocks.close()
    return Inputs(
        linears=chosen.linears,
        statistics=subject.bundle.statistics(),
        moments=moments,
        input_of=input_of,
    )


if __name__ == "__main__":
    main()
