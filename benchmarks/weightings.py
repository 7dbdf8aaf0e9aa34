"""
What the weighting of the proxy is worth: what a search finds by each, measured on another text.

A preset is searched on a bundle, by the proxy alone. Its winner is pruned with the masks alone, so
that nothing but the proxy makes a difference, or with all steps of the preset.

    python benchmarks/weightings.py --model gemma3 --pattern 0.5 --pattern 0.7
    python benchmarks/weightings.py --model gemma3 --preset best --steps
"""

from dataclasses import replace
from pathlib import Path

import click
import optuna
from searched import request_of
from subject import passing_subject

from pho_service.cli.terminal import print_table, progress
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.progress import Run
from pho_service.spec.objective import WEIGHTINGS, Objective, Weighting
from pho_service.spec.pattern import Pattern
from pho_service.spec.presets import PRESETS


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "0.7"), show_default=True)
@click.option(
    "--weighting", "weightings", multiple=True, default=("blend", "geometric"), show_default=True,
    type=click.Choice(WEIGHTINGS),
)  # fmt: skip
@click.option("--preset", default="crepe-plus", show_default=True, type=click.Choice([*PRESETS]))
@click.option("--steps/--masks-alone", default=False, help="[default: --masks-alone]")
@click.option("--trials", default=200, show_default=True)
@click.option("--samples", default=32, show_default=True, help="Windows of calibration text.")
@click.option("--context-length", default=512, show_default=True)
@click.option("--report-windows", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    patterns: tuple[str, ...],
    weightings: tuple[Weighting, ...],
    preset: str,
    steps: bool,
    trials: int,
    samples: int,
    context_length: int,
    report_windows: int,
    seed: int,
) -> None:
    """Print a perplexity for each pattern and weighting."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    subject = passing_subject(
        model, samples=samples, confirm_windows=1, report_windows=report_windows,
        context_length=context_length, seed=seed,
    )  # fmt: skip

    def perplexity(pattern: Pattern, weighting: Weighting) -> float:
        request = request_of(
            preset, pattern, objective=Objective(weighting=weighting), trials=trials, seed=seed
        )
        winner = search_job(
            request, subject.bundle, run=Run(progress=progress)
        ).configuration.candidate()
        result, _ = rate_pruned(
            subject.model,
            subject.bundle.statistics(),
            winner if steps else replace(winner, steps=winner.steps.rated),
            subject.report.windows,
            calibration=subject.calibration,
        )
        return result.perplexity

    print_table(
        f"{Path(subject.model.name).name}: perplexity of what {preset} finds by each weighting",
        ("pattern", *weightings),
        [
            (pattern, *(f"{perplexity(Pattern.parse(pattern), each):.2f}" for each in weightings))
            for pattern in patterns
        ],
        caption=f"{trials} trials, seed {seed}, {samples} windows of calibration, "
        f"{'all steps' if steps else 'masks alone'}, "
        f"{report_windows} windows of {context_length} tokens that nothing was chosen on",
    )


if __name__ == "__main__":
    main()
