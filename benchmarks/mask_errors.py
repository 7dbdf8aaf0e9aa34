"""
How much error masks and updates leave in one block, at equal sparsity, against ALPS.

A block in the middle of a dense model, on the inputs that it is calibrated on, and on those of
another text. Every linear loses the same share, so only masks and updates differ: neither
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
from pho_service.spec.presets import SHRINKAGE
from pho_service.spec.steps import Steps

LEAST = "least-squares"
OTHERS = 8  # windows of the other text
METHODS = {
    "alps": Steps(update="alps"),
    "admm": Steps(update="admm"),
    "sparsegpt": Steps(update="sparsegpt"),
    "swaps, least squares": Steps(repruning="swaps", update=LEAST),
    "admm, least squares": Steps(repruning="admm", update=LEAST),
}
SHRUNK = "the same, shrunk"
ROW_WEIGHTS = "the same with row weights"
PERMUTED = "the same, permuted"
Errors = dict[str, float]  # by linear


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """
    A block's linears with the second moments of what they read, and the model's statistics.

    Attributes:
        moments: Of the calibration.
        others: Of another text.
    """

    linears: Mapping[str, PrunableLinear]
    statistics: Statistics
    moments: list[InputMoments]
    others: list[InputMoments]
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
    names = (*METHODS, SHRUNK, ROW_WEIGHTS, PERMUTED)
    print_table(
        f"{Path(model).name}: error of the outputs of a block against ALPS's on the calibration's "
        "inputs, the same on another text's, and CPU seconds",
        ("method", *columns),
        [(name, *(column.get(name, "-") for column in columns.values())) for name in names],
        caption=f"geometric mean over {len(inputs.linears)} linears of one block, all at the "
        f"pattern's sparsity, on the inputs of the dense model in {samples} calibration windows "
        f"of {context_length} tokens, and in {OTHERS} of the confirmation's part; shrinkage "
        f"{SHRINKAGE:g}; ALPS in the same scope; seed {seed}, 1 thread; "
        f"{conditions()}; {software('torch')}",
    )


def _column(inputs: Inputs, pattern: Pattern) -> dict[str, str]:
    """A cell for each method."""
    refined = METHODS["admm, least squares"]
    steps = {**METHODS, SHRUNK: replace(refined, shrinkage=SHRINKAGE)}
    if pattern.scope is Scope.LAYER and not pattern.group:
        steps[ROW_WEIGHTS] = refined
    if pattern.group:
        steps[PERMUTED] = replace(refined, permutation="score")
    cells: dict[str, str] = {}
    first: tuple[Errors, ...] = ()
    for name, each in steps.items():
        say(f"{pattern} {pattern.scope}: {name} ...")
        seconds, errors = _errors(inputs, pattern, each, alike=name != ROW_WEIGHTS)
        first = first or errors
        ratios = [_ratio(one, alps) for one, alps in zip(errors, first, strict=True)]
        cells[name] = f"{ratios[0]:+.1%} {ratios[1]:+.1%} {seconds:.1f} s"
    return cells


def _ratio(errors: Errors, alps: Errors) -> float:
    """Geometric mean over the linears of one error over the other, minus 1."""
    return math.expm1(sum(math.log(errors[li] / alps[li]) for li in errors) / len(errors))


def _errors(
    inputs: Inputs, pattern: Pattern, steps: Steps, *, alike: bool
) -> tuple[float, tuple[Errors, Errors]]:
    """CPU seconds, and the errors on the calibration and the other text; rows count ``alike``."""
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

    def errors(moments: list[InputMoments]) -> Errors:
        return {
            name: float(
                output_error(
                    inputs.linears[name].weight, weight, moments[inputs.input_of[name]].gram
                ).sum(dtype=torch.float64)
            )
            for name, weight in changed.items()
        }

    return seconds, (errors(inputs.moments), errors(inputs.others))


def _inputs(
    model: str, block: int | None, *, samples: int, context_length: int, seed: int
) -> Inputs:
    with tempfile.TemporaryDirectory() as folder:
        subject = load_subject(
            model,
            Path(folder),
            samples=samples,
            confirm_windows=OTHERS,
            report_windows=1,
            context_length=context_length,
            dtype="float32",
            seed=seed,
        )
    index = subject.model.model.config.num_hidden_layers // 2 if block is None else block
    say(f"inputs of block {index} ...")
    found = []
    for windows in (subject.calibration, subject.confirmation.windows):
        blocks = walk(subject.model, windows)
        chosen = next(islice(blocks, index, None))
        moments, input_of = chosen.moments()
        blocks.close()
        found.append(moments)
    return Inputs(
        linears=chosen.linears,
        statistics=subject.bundle.statistics(),
        moments=found[0],
        others=found[1],
        input_of=input_of,
    )


if __name__ == "__main__":
    main()
