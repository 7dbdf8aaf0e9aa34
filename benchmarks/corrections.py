"""
What corrections of an allocation are worth: perplexity before and after, step by step.

Searches as `crepe-plus` does, corrects the best, and measures both on a text that nothing was
chosen on: as the score prunes them, with swaps, and with the least squares of `best`.

    python benchmarks/corrections.py --model smollm2 --pattern 0.7 --corrections 40
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import optuna
from searched import request_of
from subject import Subject, passing_subject

from pho_service.cli.terminal import print_table, progress
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.progress import Run
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern

HEADER = ("pattern, seed", "divergence", "mask alone", "swaps", "swaps, least squares")


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "0.7"), show_default=True)
@click.option("--seed", "seeds", multiple=True, default=(0,), type=int, show_default=True)
@click.option("--corrections", default=24, show_default=True)
@click.option("--trials", default=60, show_default=True)
@click.option("--samples", default=16, show_default=True, help="Windows of calibration text.")
@click.option("--context-length", default=512, show_default=True)
@click.option("--report-windows", default=14, show_default=True)
def main(model: str, patterns: tuple[str, ...], seeds: tuple[int, ...], **options: Any) -> None:
    """Print a line before and a line after the corrections, for each pattern and seed."""
    rows: list[tuple[str, ...]] = []
    for seed in seeds:
        subject = passing_subject(
            model, samples=options["samples"], confirm_windows=1,
            report_windows=options["report_windows"], context_length=options["context_length"],
            seed=seed,
        )  # fmt: skip
        if not rows:
            dense = rate_perplexity(subject.model.model, subject.report.windows).perplexity
            rows.append(("dense", "0", *[f"{dense:.2f}"] * 3))
        for pattern in patterns:
            rows += _corrected(subject, Pattern.parse(pattern), seed, options)
    print_table(f"{Path(model).name}: corrections", HEADER, rows)


def _corrected(
    subject: Subject, pattern: Pattern, seed: int, options: dict[str, Any]
) -> list[tuple[str, ...]]:
    request = request_of(
        "crepe-plus",
        pattern,
        trials=options["trials"],
        corrections=options["corrections"],
        seed=seed,
    )
    study = optuna.create_study()
    found = search_job(
        request,
        subject.bundle,
        study=study,
        model=subject.model,
        calibration=subject.calibration,
        run=Run(progress=progress),
    ).configuration
    correction = found.search["correction"]
    before = Candidate.from_dict(study.trials[correction["corrects"]].user_attrs, pattern)
    lines = ((str(pattern), before), ("corrected", found.candidate()))
    return [
        (f"{name}, {seed}", f"{divergence:.4f}", *_perplexities(subject, candidate))
        for (name, candidate), divergence in zip(lines, correction["divergences"], strict=True)
    ]


def _perplexities(subject: Subject, candidate: Candidate) -> list[str]:
    steps = candidate.steps
    found = []
    for each in (steps.rated, steps, replace(steps, update="least-squares")):
        rating, _ = rate_pruned(
            subject.model,
            subject.bundle.statistics(),
            replace(candidate, steps=each),
            subject.report.windows,
            calibration=subject.calibration,
        )
        found.append(f"{rating.perplexity:.2f}")
    return found


if __name__ == "__main__":
    main()
