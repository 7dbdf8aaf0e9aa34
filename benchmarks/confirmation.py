"""
How many tokens does it take to tell finalists apart, by divergence and by perplexity?

Searches, measures the finalists and the baselines on the first windows of a
text, by their divergence from the dense model and by perplexity, and compares
their order with that by perplexity on the windows after those.

    python benchmarks/confirmation.py
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import optuna
import torch
from machine import conditions
from scipy.stats import spearmanr
from subject import load_subject

from pho_service.cli.terminal import print_table, progress
from pho_service.host.versions import versions
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.proxy_rating import rate_by_proxy
from pho_service.pruning.divergence import dense_reference, rate_divergence
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.tuning.finalists import finalists
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.search import run_search
from storage.studies import open_storage, open_study

KINDS = ("divergence", "perplexity")


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3, or a folder.")
@click.option("--pattern", default="0.5", show_default=True)
@click.option("--scope", help="As for `pho search`.")
@click.option("--trials", default=200, show_default=True)
@click.option("--finalists", "found", default=5, show_default=True)
@click.option("--samples", default=32, show_default=True)
@click.option("--context-length", default=512, show_default=True)
@click.option("--windows", default=4, show_default=True, help="Of which few are looked at.")
@click.option("--held-out", default=16, show_default=True, help="Windows that decide.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(**options: Any) -> None:
    """Print the table of docs/speed.md."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), **options)


def _run(
    folder: Path,
    *,
    model: str,
    pattern: str,
    scope: str | None,
    trials: int,
    found: int,
    samples: int,
    context_length: int,
    windows: int,
    held_out: int,
    dtype: str,
    seed: int,
) -> None:
    asked = Pattern.parse(pattern, scope)
    subject = load_subject(
        model,
        folder,
        samples=samples,
        confirm_windows=windows + held_out,
        report_windows=1,
        context_length=context_length,
        dtype=dtype,
        seed=seed,
    )
    loaded, measured_on = subject.model, subject.confirmation.windows
    first, rest = measured_on[:windows], measured_on[windows:]

    plan = SearchRequest(pattern=asked, trials=trials, seed=seed).plan(subject.bundle.kernel_sizes)
    with open_storage(f"sqlite:///{folder / 'study.db'}") as storage:
        study = open_study(storage, "confirmation", direction="minimize")
        rated = run_search(study, plan, rate_by_proxy(ProxyEvaluator(subject.bundle), Objective()))
    chosen = finalists(rated, found)

    references = [dense_reference(loaded.model, window[None]) for window in first]
    statistics = subject.bundle.statistics()
    truth: list[float] = []
    divergence: list[list[float]] = []  # of each candidate, on each of the first windows
    loss: list[list[float]] = []
    spent = dict.fromkeys(("prune and restore", "one window"), 0.0)
    with progress("Measuring", len(chosen)) as advance:
        for candidate in chosen:
            began = time.process_time()
            with pruned_model(loaded, statistics, candidate.candidate, None):
                entered = time.process_time()
                divergence.append([rate_divergence(loaded.model, r) for r in references])
                spent["one window"] += (time.process_time() - entered) / len(references)
                loss.append([_loss(loaded.model, window[None]) for window in first])
                truth.append(_loss(loaded.model, rest))
                left = time.process_time()
            spent["prune and restore"] += entered - began + time.process_time() - left
            advance(1)

    print_table(
        f"{Path(loaded.name).name} at {pattern}, scope {asked.scope.value}: "
        f"order of {len(chosen)} candidates against perplexity on {rest.numel()} other tokens",
        ("tokens", *(f"{kind}: {what}" for kind in KINDS for what in ("rho", "half", "regret"))),
        [
            (
                str(used * context_length),
                *_order(divergence, truth, used),
                *_order(loss, truth, used),
            )
            for used in range(1, windows + 1)
        ],
        caption="rho: Spearman's; half: the same among the better half; regret: excess, in per "
        "cent, of the best perplexity among the three best on the few tokens",
    )
    seconds = ", ".join(f"{what} {total / len(chosen):.2f}" for what, total in spent.items())
    click.echo(
        f"{found} finalists of {trials} trials and the baselines, seed {seed}. "
        f"CPU seconds a candidate: {seconds}. {conditions()}, {torch.get_num_threads()} threads, "
        f"{dtype}, {versions('torch', 'transformers')}"
    )


def _order(measured: list[list[float]], truth: list[float], used: int) -> list[str]:
    """How well the mean over the first windows orders the candidates."""
    few = [sum(values[:used]) for values in measured]
    numbers = range(len(few))
    best = sorted(numbers, key=few.__getitem__)[:3]
    half = sorted(numbers, key=truth.__getitem__)[: (len(few) + 1) // 2]
    regret = math.exp(min(truth[i] for i in best) - min(truth)) - 1
    return [
        f"{spearmanr(few, truth).statistic:.2f}",
        f"{spearmanr([few[i] for i in half], [truth[i] for i in half]).statistic:.2f}",
        f"{100 * regret:.1f}",
    ]


def _loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    return math.log(rate_perplexity(model, windows).perplexity)


if __name__ == "__main__":
    main()
