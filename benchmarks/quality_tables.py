"""
The cells of `make bench-quality` as tables, on a terminal and for docs/measurements/quality.md.
"""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click
import torch
from domains import BOTH, TITLES
from kept_results import KeptResults
from quality_conditions import CONTEXT_LENGTH, Conditions

from pho_service.cli.terminal import print_table
from pho_service.host.machine import versions
from pho_service.spec.baselines import PERMUTED, SEQUENTIAL

MODEL_TITLES = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma 3 270M"}
METHOD_TITLES = {
    "magnitude": "magnitude", "wanda": "Wanda", "ria-row": "RIA (row)", "ria-layer": "RIA (layer)",
    "dsnot": "Wanda + DSnoT", "owl-wanda": "OWL + Wanda", "owl-sparsegpt": "OWL + SparseGPT",
    "sparsegpt": "SparseGPT", "admm": "ADMM", "alps": "ALPS",
}  # fmt: skip
RECOVERED = "-recovered"
NOTHING = "\N{EN DASH}"  # a cell that was not measured, or that does not exist

Cells = dict[tuple[str, str], dict[int, dict[str, Any]]]  # of a pattern and a method, by seed
Rows = list[tuple[str, ...]]
Tables = list[tuple[str, Rows, str]]  # title, rows, caption


def print_tables(*what: Any) -> None:
    """The tables of one model on a terminal; takes what :func:`tables` takes."""
    for title, (header, *rows), caption in tables(*what):
        print_table(title, ("method", *header[1:]), rows, caption=caption)


def write_tables(*what: Any) -> None:
    """The same in Markdown."""
    for title, (header, *rows), caption in tables(*what):
        lines = [(title, *map(_percent, header[1:])), ("---",) * len(header), *rows]
        click.echo("\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}\n")


def tables(
    kept: KeptResults,
    conditions: Conditions,
    name: str,
    patterns: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> Tables:
    """
    A table for each report text, and one with seconds and peak memory.

    Args:
        kept: What was measured.
        conditions: Under which.
        name: Of the model.
        patterns, methods, seeds: Columns, rows without those that nothing was measured of, and
            what is averaged over.
    """
    cells: Cells = {}
    for pattern in patterns:
        for method in methods:
            places = {seed: conditions.cell(name, seed, pattern, method) for seed in seeds}
            found = {seed: kept.find(place) for seed, place in places.items()}
            cells[pattern, method] = {seed: cell for seed, cell in found.items() if cell}
    methods = [method for method in methods if any(cells[p, method] for p in patterns)]
    methods = _with_recovered(cells, methods, patterns)
    dense = (kept.find(conditions.dense(name)) or {}).get("perplexity", {})
    model = MODEL_TITLES.get(name, Path(name).name)
    header = ("method", *patterns)
    shown: Tables = []
    for text in ("docs", conditions.other):
        title = f"{model}, {TITLES.get(text, Path(text).name)}"
        rows = _by_method(cells, methods, patterns, lambda cell, t=text: cell["perplexity"][t])
        first = [("dense", *[f"{dense[text]:.2f}"] * len(patterns))] if text in dense else []
        ratios = _ratios(cells, methods, patterns, text)
        shown.append((title, [header, *first, *rows, *ratios], _caption(conditions, text)))
    return [*shown, _costs(kept, conditions, name, cells, header, methods, seeds)]


def _with_recovered(cells: Cells, methods: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Add rows of what was recovered to those of the methods that it was pruned by."""
    shown = []
    for method in methods:
        for pattern in patterns:
            found = cells[pattern, method].items()
            cells[pattern, method + RECOVERED] = {
                seed: {**cell, **cell["recovered"]} for seed, cell in found if "recovered" in cell
            }
        shown.append(method)
        if any(cells[pattern, method + RECOVERED] for pattern in patterns):
            shown.append(method + RECOVERED)
    return shown


def _by_method(
    cells: Cells,
    methods: Sequence[str],
    patterns: Sequence[str],
    value: Callable[[dict[str, Any]], float],
) -> Rows:
    return [
        (_title(m), *(_spread([value(c) for c in cells[p, m].values()]) for p in patterns))
        for m in methods
    ]


def _ratios(cells: Cells, methods: Sequence[str], patterns: Sequence[str], text: str) -> Rows:
    """How much lower or higher one method's perplexity is than another's, seed by seed."""

    def percents(pattern: str, method: str, other: str) -> list[float]:
        own, theirs = cells[pattern, method], cells[pattern, other]
        return [
            100 * (own[seed]["perplexity"][text] / theirs[seed]["perplexity"][text] - 1)
            for seed in own
            if seed in theirs
        ]

    return [
        (
            f"{_title(method)} : {_title(other)}",
            *(_spread(percents(p, method, other), "+.1f", " %") for p in patterns),
        )
        for method in methods
        for other in _set_against(method)
        if other in methods
    ]


def _set_against(method: str) -> tuple[str, ...]:
    if method == "crepe":
        return ("wanda", "wanda-sequential")
    if not method.startswith("best"):
        return ()
    return tuple(name + end for name in ("sparsegpt", "admm", "alps") for end in ("", PERMUTED))


def _costs(
    kept: KeptResults,
    conditions: Conditions,
    name: str,
    cells: Cells,
    header: tuple[str, ...],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> tuple[str, Rows, str]:
    rows = [(_title(m), *(_cost([*cells[p, m].values()]) for p in header[1:])) for m in methods]
    found = [kept.find(conditions.calibration(name, seed)) for seed in seeds]
    calibration = [each for each in found if each]
    once = f" once, {_cost(calibration)}" if calibration else ""
    model = MODEL_TITLES.get(name, Path(name).name)
    return (
        f"{model}, seconds and peak memory",
        [header, *rows],
        "Means of the seeds: search, confirmation and pruning, without loading, measuring, and "
        f"calibrating{once}; what is recovered takes its row's time more. {_machine()}.",
    )


def _cost(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return NOTHING
    memory = fmean(cell["memory_bytes"] or 0 for cell in cells) / 2**30
    return f"{fmean(cell['seconds'] for cell in cells):.0f} s, {memory:.1f} GiB"


def _spread(values: list[float], form: str = ".2f", unit: str = "") -> str:
    """``27.71 ± 0.12``: mean and standard deviation of a sample; one value has no deviation."""
    if not values:
        return NOTHING
    mean = format(fmean(values), form)
    if len(values) == 1:
        return f"{mean}{unit}"
    return f"{mean} ± {format(stdev(values), form.lstrip('+'))}{unit}"


def _title(method: str) -> str:
    for ending in (PERMUTED, SEQUENTIAL, RECOVERED):
        if method.endswith(ending):
            return f"{_title(method.removesuffix(ending))}, {ending.removeprefix('-')}"
    return METHOD_TITLES.get(method, f"`{method}`")


def _percent(pattern: str) -> str:
    return pattern if ":" in pattern else f"{100 * float(pattern):g} %"


def _caption(conditions: Conditions, text: str) -> str:
    c = conditions
    windows = c.report_windows if text == "docs" else c.other_windows
    domain = "the same" if c.source in (text, BOTH) else "another"
    confirmed = "" if c.confirm_steps else " where no step needs a text"
    return (
        "Perplexity: mean ± standard deviation over calibrations, or of one calibration. "
        f"{windows} windows of {CONTEXT_LENGTH} tokens; calibrated on {c.samples} of "
        f"{TITLES[c.source]}, which is {domain} domain; searches of {c.trials} trials, "
        f"{c.finalists} finalists confirmed on {c.confirm_windows} windows{confirmed}; {c.dtype}. "
        f"{_machine()}."
    )


def _machine() -> str:
    used = ", ".join(f"{package} {version}" for package, version in versions("torch").items())
    return f"{used}, {platform.machine()}, {torch.get_num_threads()} threads"
