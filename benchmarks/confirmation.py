"""
Does a race of finalists end with the winner of a full confirmation, and what does it take?

Searches, and measures the finalists and the baselines on all windows of a text once. Then races
are replayed over these losses, each with the windows in the order of another seed. What is run is
the search and the measuring; nothing is run for the replays.

    python benchmarks/confirmation.py --losses losses.json
    python benchmarks/confirmation.py --scope global --seed 1
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import optuna
from machine import conditions
from subject import Subject, load_subject

from pho_service.cli.terminal import print_table, progress
from pho_service.host.versions import versions
from pho_service.pipeline.proxy_rating import rate_by_proxy
from pho_service.pipeline.rating import Glances, compared_count
from pho_service.pipeline.rating import Subject as Measured
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.tuning.finalists import finalists
from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.race import Losses, race_looks, race_order, still_racing
from pho_service.tuning.request import SearchRequest
from pho_service.tuning.search import run_search
from storage.studies import open_storage, open_study


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3, or a folder.")
@click.option("--pattern", default="0.5", show_default=True)
@click.option("--scope", help="As for `pho search`.")
@click.option("--trials", default=200, show_default=True)
@click.option("--finalists", "found", default=5, show_default=True)
@click.option("--samples", default=32, show_default=True)
@click.option("--context-length", default=512, show_default=True)
@click.option("--windows", default=16, show_default=True, help="Of the confirmation text.")
@click.option("--seeds", default=20, show_default=True, help="Races that are replayed.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--losses", "losses_file", help="A JSON file for the losses; read if it is there.")
def main(losses_file: str | None, seeds: int, **options: Any) -> None:
    """Print the table of docs/speed.md."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = None if losses_file is None else Path(losses_file)
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(Path(folder), **options)
        if kept is not None:
            kept.write_text(json.dumps(found), encoding="utf-8")
    show(found, seeds)


def measured(
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
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """The losses of all finalists of a search, on every window."""
    subject = load_subject(
        model,
        folder,
        samples=samples,
        confirm_windows=windows,
        report_windows=1,
        context_length=context_length,
        dtype=dtype,
        seed=0,
    )
    asked = Pattern.parse(pattern, scope)
    chosen = finalists(_searched(folder, subject, asked, trials, seed), found)
    glances = Glances(
        Measured(model=subject.model, bundle=subject.bundle, text=subject.confirmation)
    )
    losses: dict[str, Any] = {}
    with progress("Measuring", len(chosen)) as advance:
        for each in chosen:
            glance = glances(each.candidate, range(len(subject.confirmation.windows)))
            losses[f"{each.candidate.method}, trial {each.number}"] = glance.losses
            advance(1)
    return {
        "title": f"{Path(subject.model.name).name} at {pattern}, scope {asked.scope.value}, "
        f"search of {trials} trials with seed {seed}",
        "first": compared_count(subject.confirmation.windows),
        "predicted": subject.confirmation.windows.shape[1] - 1,
        "losses": losses,
        "conditions": f"{conditions()}, {dtype}, {versions('torch', 'transformers')}",
    }


def _searched(
    folder: Path, subject: Subject, asked: Pattern, trials: int, seed: int
) -> list[RatedCandidate]:
    plan = SearchRequest(pattern=asked, trials=trials, seed=seed).plan(subject.bundle.kernel_sizes)
    with open_storage(f"sqlite:///{folder / 'study.db'}") as storage:
        study = open_study(storage, "confirmation", direction="minimize")
        return run_search(study, plan, rate_by_proxy(ProxyEvaluator(subject.bundle), Objective()))


def replay(losses: Mapping[int, Losses], first: int, seed: int) -> tuple[list[int], float]:
    """Who is left of a race before the end of the text, and evaluations spent."""
    windows = len(next(iter(losses.values())))
    order, left = race_order(windows, seed), [*losses]
    seen = dict.fromkeys(losses, windows)
    for count in race_looks(windows, first)[:-1]:
        if len(left) == 1:
            break
        racing = {number: losses[number] for number in left}
        left = still_racing(racing, order[:count], windows=windows)
        seen.update(dict.fromkeys(racing.keys() - set(left), count))
    return left, (first + sum(seen.values())) / windows


def show(found: Mapping[str, Any], seeds: int) -> None:
    """Print the perplexities, and what the races gave."""
    names = [*found["losses"]]
    losses = {
        number: {int(window): blocks for window, blocks in found["losses"][name].items()}
        for number, name in enumerate(names)
    }
    windows = len(losses[0])
    means = {
        number: sum(map(sum, own.values())) / windows / found["predicted"]
        for number, own in losses.items()
    }
    best = min(means, key=means.__getitem__)
    races = [replay(losses, found["first"], seed) for seed in range(seeds)]
    winners = [min(left, key=means.__getitem__) for left, _ in races]
    spent = [evaluations for _, evaluations in races]
    print_table(
        f"{found['title']}: {len(names)} finalists on {windows} windows",
        ("races", "same winner", "evaluations, mean", "most", "regret, %"),
        [
            (
                str(seeds),
                str(winners.count(best)),
                f"{sum(spent) / seeds:.2f}",
                f"{max(spent):.2f}",
                f"{max(100 * math.expm1(means[winner] - means[best]) for winner in winners):.2f}",
            )
        ],
        caption="Evaluations: windows run, the dense model's and the rest of the winner's "
        "among them, by the windows of the text. Regret: how much higher the worst winner's "
        "perplexity is than the best.",
    )
    for number in sorted(means, key=means.__getitem__):
        click.echo(f"{math.exp(means[number]):9.3f}  {names[number]}")
    click.echo(found["conditions"])


if __name__ == "__main__":
    main()
