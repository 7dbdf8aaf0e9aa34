"""
How long each step of the pipeline takes, a million weights, and how that grows with the width.

Random square linears with correlated inputs, on one thread.

    python benchmarks/step_times.py
"""

import platform
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor

from pho_service.cli.terminal import print_table
from pho_service.host.versions import versions
from pho_service.pruning.admm import PUBLISHED_DAMPING, PUBLISHED_PENALTY, Masked, admm, admm_refine
from pho_service.pruning.allocation import allocate
from pho_service.pruning.alps import Spectrum, alps
from pho_service.pruning.dsnot import dsnot_refine
from pho_service.pruning.error_permutation import PermutedLinear, permute_for_error
from pho_service.pruning.layer_view import LayerView
from pho_service.pruning.normalised import DAMPING, Normalised
from pho_service.pruning.permutation import permute_channels
from pho_service.pruning.selection import keep_highest, nm_mask
from pho_service.pruning.support import Support
from pho_service.pruning.swaps import swap_refine
from pho_service.pruning.weight_update import (
    inverse_factor,
    least_squares_update,
    obs_update,
    sparsegpt,
)
from pho_service.spec.allocation import Allocation
from pho_service.spec.pattern import Pattern


@click.command()
@click.option("--width", "widths", multiple=True, type=int, default=(512, 1024, 2048))
@click.option("--seed", default=0, show_default=True)
def main(widths: tuple[int, ...], seed: int) -> None:
    """Print the table of docs/pipeline.md."""
    torch.set_num_threads(1)
    columns = [_times(width, seed) for width in widths]
    print_table(
        "CPU seconds a million weights",
        ("step", *map(str, widths)),
        [(step, *(f"{column[step]:.3f}" for column in columns)) for step in columns[0]],
        caption=f"random linears of equal height and width, seed {seed}, 1 thread of "
        f"{platform.processor() or platform.machine()}, torch {versions('torch')['torch']}; "
        "permutations of 2:4, all else at 50 %; the inverse is shared by linears that read one "
        "input",
    )


def _times(width: int, seed: int) -> dict[str, float]:
    """Of each step on one linear, divided by its millions of weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator)
    inputs = torch.randn(4 * width, width, generator=generator)
    inputs += inputs[:, :1] * torch.rand(width, generator=generator)  # correlated
    gram = inputs.T @ inputs / len(inputs)
    norm = gram.diagonal().sqrt()
    fisher = torch.rand(width, generator=generator)
    score = weight.abs() * norm
    mask = keep_highest(score, width // 2)
    groups = nm_mask(score, keep=2, group=4)
    factor = inverse_factor(gram, layer="random")
    view = LayerView(
        name="model.layers.0.random", out_features=width, rows=weight, activation_norm=norm,
        fisher=fisher, root=torch.linalg.cholesky(gram.double() + torch.eye(width)).T.float(),
    )  # fmt: skip
    mean = inputs.mean(dim=0)
    support = Support.of(mask)
    masked = Masked(weight=weight, keep=mask, support=support)
    linear = PermutedLinear(weight=weight, score=score, fisher=fisher)
    steps: dict[str, Callable[[], object]] = {
        **{
            f"allocation {method}": lambda method=method: allocate(
                lambda: [view], Pattern.parse("0.5"), Allocation(method=method)
            )
            for method in ("owl", "fisher", "curves")
        },
        "permutation score": lambda: permute_channels(score, keep=2, group=4),
        "permutation error": lambda: permute_for_error([linear], gram, keep=2, group=4),
        "re-pruning dsnot": lambda: dsnot_refine(
            weight, mask, mean=mean, variance=inputs.var(dim=0), activation_norm=norm
        ),
        "re-pruning swaps": lambda: swap_refine(weight, mask, gram),
        "re-pruning swaps, 2:4": lambda: swap_refine(weight, groups, gram, group=4),
        "re-pruning admm": lambda: admm_refine(
            [masked], Normalised.of(gram, damping=DAMPING, layer="random"), layer="random"
        ),
        "inverse": lambda: inverse_factor(gram, layer="random"),
        "update obs": lambda: obs_update(weight, mask, factor),
        "least squares on top": lambda: least_squares_update(
            weight, mask, gram, start=weight * mask, steps=10
        ),
        "update sparsegpt": lambda: sparsegpt(weight, factor, removed=width * width // 2),
        "update sparsegpt, 2:4": lambda: sparsegpt(weight, factor, keep=2, group=4),
        "update admm": lambda: _admm(weight, gram, support),
        "update alps": lambda: alps(weight, Spectrum.of(gram, layer="random"), support),
    }
    return {name: _seconds(step) / (width * width / 1e6) for name, step in steps.items()}


def _admm(weight: Tensor, gram: Tensor, support: Support) -> None:
    moments = Normalised.of(gram, damping=0, layer="random")
    inverse = moments.inverse(PUBLISHED_DAMPING + PUBLISHED_PENALTY, layer="random")
    admm(weight, moments, inverse, support)


def _seconds(step: Callable[[], object]) -> float:
    """CPU seconds of the faster of two runs: others on the machine do not count."""
    best = float("inf")
    for _ in range(2):
        started = time.process_time()
        step()
        best = min(best, time.process_time() - started)
    return best


if __name__ == "__main__":
    main()
