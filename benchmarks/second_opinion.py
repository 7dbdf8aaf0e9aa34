"""
What it is worth that two weightings of the proxy propose finalists in turn.

`crepe-plus` is searched, its finalists are pruned with the masks alone, and the best of them on the
confirmation text is measured on the report text: once with finalists that the objective alone
proposes, and once with as many that a second weighting proposes too. Baselines take no part.

    python benchmarks/second_opinion.py --model gemma3 --pattern 0.7
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import optuna
from searched import request_of
from subject import Subject, passing_subject

from pho_service.cli.terminal import print_table, progress
from pho_service.pipeline.proxy_rating import rate_by_proxy
from pho_service.pipeline.rating import ReportText, rate_pruned
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.pattern import Pattern
from pho_service.tuning.finalists import finalists, united
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.search import run_search


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "0.7"), show_default=True)
@click.option("--trials", default=200, show_default=True)
@click.option("--finalists", "count", default=5, show_default=True)
@click.option("--samples", default=16, show_default=True, help="Windows of calibration text.")
@click.option("--context-length", default=512, show_default=True)
@click.option("--confirm-windows", default=8, show_default=True)
@click.option("--report-windows", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    patterns: tuple[str, ...],
    trials: int,
    count: int,
    samples: int,
    context_length: int,
    confirm_windows: int,
    report_windows: int,
    seed: int,
) -> None:
    """Print the perplexity of the best finalist, by who proposes."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    subject = passing_subject(
        model, samples=samples, confirm_windows=confirm_windows, report_windows=report_windows,
        context_length=context_length, seed=seed,
    )  # fmt: skip
    rows = [
        (pattern, *_best(subject, _searched(subject, Pattern.parse(pattern), trials, seed), count))
        for pattern in patterns
    ]
    print_table(
        f"{Path(subject.model.name).name}: perplexity of the best of {count} finalists",
        ("pattern", "by the blend", "by two weightings"),
        rows,
        caption=f"crepe-plus, {trials} trials, seed {seed}, {samples} windows of calibration, "
        f"masks alone; chosen on {confirm_windows} windows of {context_length} tokens, measured on "
        f"{report_windows} others",
    )


def _searched(subject: Subject, pattern: Pattern, trials: int, seed: int) -> list[RatedCandidate]:
    """What a search found, without baselines, best first."""
    request = request_of("crepe-plus", pattern, trials=trials, seed=seed)
    plan = request.plan(subject.bundle.kernel_sizes)
    evaluate = rate_by_proxy(ProxyEvaluator(subject.bundle), request.objective)
    with progress("Searching", trials) as advance:
        rated = run_search(optuna.create_study(), plan, evaluate, advance)
    return [each for each in rated if each.candidate.method == "crepe"]


def _best(subject: Subject, rated: Sequence[RatedCandidate], count: int) -> list[str]:
    """Of the best by the confirmation text: as one weighting proposes, and as two do."""

    def perplexity(each: RatedCandidate, text: ReportText) -> float:
        mask = replace(each.candidate, steps=each.candidate.steps.rated)
        statistics = subject.bundle.statistics()
        return rate_pruned(subject.model, statistics, mask, text.windows)[0].perplexity

    alone = finalists([replace(each, second_opinion=None) for each in rated], count)
    groups = (alone, finalists(rated, count))
    confirmed = {
        each.number: perplexity(each, subject.confirmation) for each in united(rated, *groups)
    }
    best = [min(group, key=lambda each: confirmed[each.number]) for group in groups]
    return [f"{perplexity(each, subject.report):.2f}" for each in best]


if __name__ == "__main__":
    main()
