"""
What `make bench-gpu` found, as tables on a terminal and as Markdown for docs/measurements/speed.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from pho_service.cli.terminal import print_table

COLUMNS = (
    "part", "seconds", "whole model", "tokens/s", "allocated, GiB", "reserved, GiB", "main, GiB",
    "plan, GiB",
)  # fmt: skip


def print_shape(name: str, found: Mapping[str, Any]) -> None:
    """The tables of one shape."""
    print_table(f"{name}, like {found['like']}", COLUMNS, _rows(found), caption=_caption(found))
    print_table(
        "Checks", ("what", "found"), [(what, _shown(v)) for what, v in found["checks"].items()]
    )


def write_tables(document: Mapping[str, Any]) -> str:
    """All shapes of a file, in Markdown."""
    if not document:
        raise click.ClickException("the file has no shapes: run the benchmark first.")
    parts = []
    for name, found in document.items():
        parts += [f"### {name}, like {found['like']}", "", f"{_caption(found)}.", ""]
        parts += [*_markdown(COLUMNS, _rows(found)), ""]
        checks = [(what, _shown(value)) for what, value in found["checks"].items()]
        parts += [*_markdown(("check", "found"), checks), ""]
    return "\n".join(parts)


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One for each part; the seconds of the whole model where only some blocks were measured."""
    rows = []
    planned = _planned(found)
    for part in found["parts"]:
        tokens, times = part["tokens"], float(part["times"])
        rows.append(
            (
                part["title"],
                f"{part['seconds']:.2f}",
                f"{part['seconds'] * times:.0f}" if times > 1 else "",
                f"{tokens / part['seconds']:.0f}" if tokens else "",
                *(_gib(part[kind]) for kind in ("allocated", "reserved", "main")),
                _gib(planned.get(part["title"])),
            )
        )
    total = sum(part["seconds"] for part in found["parts"])
    return [*rows, ("total", f"{total:.2f}", "", "", "", "", "", "")]


def _planned(found: Mapping[str, Any]) -> dict[str, int]:
    """The peaks of `pho plan` by the part: of the card, or of main memory where there is none."""
    planned: dict[str, int] = {}
    for preset, titles in (
        ("score", {"calibrate": "calibrate", "confirm by perplexity": "confirm",
                   "read the model": "load", "search": f"{found['trials']} trials"}),
        ("best at 2:4", {"prune": "prune and save, best at 2:4"}),
        ("recovered", {"recover": found["parts"][-1]["title"]}),
    ):  # fmt: skip
        for stage in found["planned"].get(preset, {"stages": []})["stages"]:
            title = titles.get(stage["title"].partition(",")[0])
            if title is not None:
                planned[title] = stage["peak"]["device"] or stage["peak"]["host"]
    return planned


def _caption(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    times = found["blocks_times"]
    few = f"; the whole model has {times:.0f} times the blocks" if times > 1 else ""
    return (
        f"Random weights, {settings['samples']} windows of {settings['context_length']} random "
        f"tokens, a quarter of them backward, {found['trials']} trials, confirmed on "
        f"{found['confirmed_on']} windows, seed {settings['seed']}{few}; steps are of one block; "
        f"ran on {found['card']}, {found['machine']}, {found['software']}"
    )


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " of ".join(map(str, value))
    return f"{value:.3g}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
