"""
What the weighting of the proxy is worth: what a search finds by each, measured on another text.

`crepe-plus` is searched on a bundle, by the proxy alone, and its winner is pruned with the masks
alone, so that nothing but the proxy makes a difference.

    python benchmarks/weightings.py --model gemma3 --pattern 0.5 --pattern 0.7
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import optuna
from searched import request_of
from subject import Subject, load_subject

from pho_service.cli.terminal import print_table
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.spec.objective import WEIGHTINGS, Objective, Weighting
from pho_service.spec.pattern import Pattern


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "0.7"), show_default=True)
@click.option(
    "--weighting", "weightings", multiple=True, default=("blend", "geometric"), show_default=True,
    type=click.Choice(WEIGHTINGS),
)  # fmt: skip
@click.option("--trials", default=200, show_default=True)
@click.option("--samples", default=32, show_default=True, help="Windows of calibration text.")
@click.option("--context-length", default=512, show_default=True)
@click.option("--report-windows", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    patterns: tuple[str, ...],
    weightings: tuple[Weighting, ...],
    trials: int,
    samples: int,
    context_length: int,
    report_windows: int,
    seed: int,
) -> None:
    """Print a perplexity for each pattern and weighting."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        subject = load_subject(
            model, Path(folder), samples=samples, confirm_windows=1,
            report_windows=report_windows, context_length=context_length, dtype="float32",
            seed=seed,
        )  # fmt: skip
    rows = []
    for pattern in map(Pattern.parse, patterns):
        found = [_perplexity(subject, pattern, weighting, trials, seed) for weighting in weightings]
        rows.append((str(pattern), *(f"{perplexity:.2f}" for perplexity in found)))
    print_table(
        f"{Path(subject.model.name).name}: perplexity of what crepe-plus finds by each weighting",
        ("pattern", *weightings),
        rows,
        caption=f"{trials} trials, seed {seed}, {samples} windows of calibration, masks alone, "
        f"{report_windows} windows of {context_length} tokens that nothing was chosen on",
    )


def _perplexity(
    subject: Subject, pattern: Pattern, weighting: Weighting, trials: int, seed: int
) -> float:
    request = request_of(
        "crepe-plus",
        pattern,
        objective=Objective(weighting=weighting),
        trials=trials,
        seed=seed,
    )
    winner = search_job(request, subject.bundle).configuration.candidate()
    mask = replace(winner, steps=winner.steps.rated)
    result, _ = rate_pruned(
        subject.model, subject.bundle.statistics(), mask, subject.report.windows
    )
    return result.perplexity


if __name__ == "__main__":
    main()
