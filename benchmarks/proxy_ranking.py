"""
How well does the proxy rank where it is used: sparsities, N:M, allocations, scopes, models, seeds?

Random candidates of each cell are pruned and measured, one line a candidate in a file, so that a
run that was stopped goes on. Then every proxy rates them, and the rank correlations are printed.

    python benchmarks/proxy_ranking.py --model smollm2 --cell 0.7 --cell 2:4 --seeds 0,1
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from kept_results import KeptResults
from subject import MODELS, Subject, load_subject

from pho_service.cli.terminal import print_table, progress, say
from pho_service.pipeline.confirmation import rate_by_all_proxies
from pho_service.pipeline.rating import rate_pruned
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Candidate
from pho_service.tuning.validation import qualities, random_candidates

CELLS = ("0.6", "0.6 layer fisher", "0.7", "0.7 layer fisher", "2:4", "4:8", "0.5 global")
SPREAD = (0.05, 0.4)  # of the presets that have an allocation


@dataclass(frozen=True, kw_only=True)
class Cell:
    """
    Attributes:
        text: As it is asked for: ``pattern``, then a scope, then an allocation's method.
        pattern: What is pruned.
        bounds: Fields of the search space.
    """

    text: str
    pattern: Pattern
    bounds: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Read ``0.7 layer fisher``: only the pattern must be there."""
        pattern, scope, method = (*text.split(), None, None)[:3]
        bounds = {} if method is None else {"allocations": (method,), "allocation_spread": SPREAD}
        return cls(text=text, pattern=Pattern.parse(str(pattern), scope), bounds=bounds)

    def candidates(self, kernel_sizes: tuple[int, ...], count: int, seed: int) -> list[Candidate]:
        """The random candidates of a seed."""
        space = SearchSpace(**{"kernel_sizes": kernel_sizes, **self.bounds})
        return random_candidates(space.fitted(self.pattern), self.pattern, count=count, seed=seed)


@click.command()
@click.option("--model", default="smollm2", show_default=True, help=f"{', '.join(MODELS)}, or any.")
@click.option("--cell", "cells", multiple=True, default=CELLS, show_default=True)
@click.option("--seeds", default="0,1", show_default=True)
@click.option("--candidates", default=24, show_default=True)
@click.option("--samples", default=32, show_default=True, help="Windows of calibration.")
@click.option("--windows", default=4, show_default=True, help="That perplexity is measured on.")
@click.option("--context-length", default=512, show_default=True)
@click.option(
    "--folder", default="proxy-ranking", show_default=True, help="Texts, bundle, results."
)
@click.option("--seconds", type=float, help="No candidate is begun after so many.")
def main(
    model: str,
    cells: tuple[str, ...],
    seeds: str,
    candidates: int,
    samples: int,
    windows: int,
    context_length: int,
    folder: str,
    seconds: float | None,
) -> None:
    """Measure what is missing and print the table of docs/measurements/proxy.md."""
    began = time.monotonic()
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    subject = load_subject(
        model, place, samples=samples, confirm_windows=windows, report_windows=1,
        context_length=context_length, dtype="float32", seed=0,
    )  # fmt: skip
    asked = {"model": model, "samples": samples, "windows": windows, "context": context_length}
    results, rows = KeptResults(place / "results.jsonl"), []
    for cell in map(Cell.parse, cells):
        for seed in map(int, seeds.split(",")):
            drawn = cell.candidates(subject.bundle.kernel_sizes, candidates, seed)
            perplexity: list[float] = []
            for number, candidate in enumerate(drawn):
                key = {**asked, "cell": cell.text, "seed": seed, "number": number}
                found = results.find(key)
                if found is None and seconds and time.monotonic() - began > seconds:
                    break
                if found is None:
                    found = {"perplexity": _measured(subject, candidate)}
                    results.keep(key, found)
                perplexity.append(found["perplexity"])
            say(f"{cell.text}, seed {seed}: {len(perplexity)} of {len(drawn)}")
            if len(perplexity) == len(drawn) >= 8:
                rows.append(_row(subject, cell, seed, drawn, perplexity))
    print_table(
        f"{Path(subject.model.name).name}: Spearman with perplexity (in the better half)",
        ("cell, seed", "perplexity", "blend (95 %)", "geometric", "fisher", "relative", "absolute",
         "gini", "regret: blend, geometric"),
        rows,
        caption=f"{candidates} random candidates a cell, {samples} windows of calibration, "
        f"perplexity on {windows} windows of {context_length} tokens",
    )  # fmt: skip


def _measured(subject: Subject, candidate: Candidate) -> float:
    result, _ = rate_pruned(
        subject.model, subject.bundle.statistics(), candidate, subject.confirmation.windows
    )
    return result.perplexity


def _row(
    subject: Subject, cell: Cell, seed: int, drawn: list[Candidate], perplexity: list[float]
) -> tuple[str, ...]:
    with progress("Rating by the proxies", len(drawn)) as advance:
        proxies = rate_by_all_proxies(subject.bundle, drawn, device="cpu", advance=advance)
    found = {
        name.rpartition("/")[2]: quality
        for name, quality in qualities(proxies, perplexity, seed=seed).items()
    }
    blend = found["blend"]
    low, high = blend.spearman_interval
    each = {n: f"{q.spearman:.2f} ({q.spearman_better_half:.2f})" for n, q in found.items()}
    return (
        f"{cell.text}, {seed}",
        f"{min(perplexity):.1f} .. {max(perplexity):.4g}",
        f"{each['blend']} [{low:.2f}, {high:.2f}]",
        each["geometric"], each["fisher"], each["relative"], each["absolute"], each["gini"],
        f"{blend.regret:.1%}, {found['geometric'].regret:.1%}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
