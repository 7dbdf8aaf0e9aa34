"""
What each method is worth: perplexity by model, pattern and method, on a text nothing was chosen on.

Calibrates on one part of Python's documentation, confirms searches on another
and reports on a third. Results are kept in a file, one line a method, so that
an interrupted run goes on where it was.

    python benchmarks/quality.py --out quality.jsonl
    python benchmarks/quality.py --model smollm2 --pattern 0.5 --method wanda --method best
"""

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from kept_results import KeptResults
from subject import MODELS, Subject, load_subject

from pho_service.cli.terminal import print_table, progress, say
from pho_service.host.versions import versions
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pruning.memory import peak_memory
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.spec.baselines import comparison_baselines
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern
from pho_service.spec.presets import Preset
from pho_service.tuning.request import SearchRequest

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
BASELINES = ("magnitude", "wanda", "ria-row", "ria-layer", "owl-wanda", "sparsegpt")
PRESETS = ("crepe", "crepe-plus", "best")
METHODS = (*BASELINES, *PRESETS)
CONTEXT_LENGTH = 512


@click.command()
@click.option(
    "--model", "models", multiple=True, help="smollm2, gemma3 or what `pho` takes.  [default: both]"
)
@click.option("--pattern", "patterns", multiple=True, help="[default: all five]")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS))
@click.option("--out", default="quality.jsonl", show_default=True, help="Where results are kept.")
@click.option("--samples", default=16, show_default=True, help="Windows of calibration text.")
@click.option("--trials", default=200, show_default=True, help="Of each search.")
@click.option("--finalists", default=3, show_default=True, help="Confirmed by perplexity.")
@click.option(
    "--confirm-steps/--no-confirm-steps",
    default=False,
    show_default=True,
    help="Confirm searches whose steps need a text, too; else their best by the proxy is shown.",
)
@click.option("--confirm-windows", default=4, show_default=True)
@click.option("--report-windows", default=14, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    methods: tuple[str, ...],
    out: str,
    **options: Any,
) -> None:
    """Print the tables of docs/quality.md."""
    kept = KeptResults(Path(out))
    for name in models or MODELS:
        missing = [
            (pattern, method)
            for pattern in patterns or PATTERNS
            for method in methods or METHODS
            if kept.find(_key(name, pattern, method, options)) is None
        ]
        if missing:
            _fill(kept, name, missing, options)
    for name in models or MODELS:
        _show(kept, name, list(patterns or PATTERNS), list(methods or METHODS), options)


def _fill(
    kept: KeptResults, name: str, missing: list[tuple[str, str]], options: dict[str, Any]
) -> None:
    """Measure the cells that are missing, each written as soon as it is known."""
    with tempfile.TemporaryDirectory() as folder:
        subject = load_subject(
            name,
            Path(folder),
            samples=options["samples"],
            confirm_windows=options["confirm_windows"],
            report_windows=options["report_windows"],
            context_length=CONTEXT_LENGTH,
            dtype=options["dtype"],
            seed=options["seed"],
        )
        if kept.find(_key(name, "dense", "dense", options)) is None:
            perplexity = rate_perplexity(subject.model.model, subject.report.windows).perplexity
            dense = {"perplexity": perplexity, "sparsity": 0}
            kept.keep(_key(name, "dense", "dense", options), dense)
        for pattern, method in missing:
            say(f"{name} {pattern} {method}")
            started = time.perf_counter()
            with peak_memory(subject.model.device) as peak:
                cell = _measure(subject, Pattern.parse(pattern), method, options)
            cell["seconds"] = round(time.perf_counter() - started, 1)
            cell["memory_bytes"] = peak()
            kept.keep(_key(name, pattern, method, options), cell)


def _measure(
    subject: Subject, pattern: Pattern, method: str, options: dict[str, Any]
) -> dict[str, Any]:
    """One cell: the perplexity on the report text, and what was pruned with."""
    if method in PRESETS:
        candidate, found = _searched(subject, pattern, method, options)
    else:
        (candidate,) = (c for c in comparison_baselines(pattern) if c.method == method)
        found = {}
    rating, sparsity = rate_pruned(
        subject.model,
        subject.bundle.statistics(),
        candidate,
        subject.report.windows,
        calibration=subject.calibration,
    )
    return {"perplexity": rating.perplexity, "sparsity": sparsity, **found}


def _searched(
    subject: Subject, pattern: Pattern, method: str, options: dict[str, Any]
) -> tuple[Candidate, dict[str, Any]]:
    """What a preset's search finds, confirmed on the confirmation text."""
    preset = Preset.of(method, pattern)
    request = SearchRequest(
        pattern=pattern,
        steps=preset.steps,
        bounds=preset.bounds,
        trials=options["trials"],
        seed=options["seed"],
        finalists=options["finalists"],
    )
    # Confirming alone takes the whole pipeline as often as there are finalists.
    confirm = options["confirm_steps"] or not preset.steps.needs_text
    result = search_job(
        request,
        subject.bundle,
        model=subject.model,
        confirm_text=subject.confirmation if confirm else None,
        calibration=subject.calibration,
        progress=progress,
    )
    found = result.configuration
    return found.candidate(), {
        "found": found.method,
        "coefficients": found.coefficients.to_dict(),
        "steps": found.steps.to_dict(),
        "confirmed": found.confirmation.perplexity if found.confirmation else None,
    }


def _key(name: str, pattern: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a cell is found again by: its place and its conditions."""
    return {"model": name, "pattern": pattern, "method": method, "options": options}


def _show(
    kept: KeptResults, name: str, patterns: list[str], methods: list[str], options: dict[str, Any]
) -> None:
    dense = kept.find(_key(name, "dense", "dense", options))
    assert dense is not None
    cells = {
        (pattern, method): kept.find(_key(name, pattern, method, options)) or {}
        for pattern in patterns
        for method in methods
    }

    def row(title: str, text: Callable[[dict[str, Any]], str]) -> list[tuple[str, ...]]:
        return [
            (f"{method}{title}", *(text(cells[pattern, method]) for pattern in patterns))
            for method in methods
        ]

    used = ", ".join(f"{package} {version}" for package, version in versions("torch").items())
    caption = (
        f"dense {dense['perplexity']:.2f}; {options['report_windows']} windows of "
        f"{CONTEXT_LENGTH} tokens of the report part; calibrated on {options['samples']} windows; "
        f"{options['trials']} trials, {options['finalists']} finalists"
        f"{'' if options['confirm_steps'] else ' of crepe alone'}, {options['dtype']}, seed "
        f"{options['seed']}; {used}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    print_table(
        f"{Path(name).name}: perplexity",
        ("method", *patterns),
        row("", lambda cell: f"{cell['perplexity']:.2f}"),
        caption=caption,
    )
    print_table(
        f"{Path(name).name}: seconds, peak memory",
        ("method", *patterns),
        row(
            "",
            lambda cell: f"{cell['seconds']:.0f} s, {(cell['memory_bytes'] or 0) / 2**30:.1f} GiB",
        ),
        caption="Search, confirmation, pruning and measuring; without loading and calibrating.",
    )


if __name__ == "__main__":
    main()
