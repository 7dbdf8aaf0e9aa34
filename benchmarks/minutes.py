"""
What more minutes buy: perplexity by the minutes that a method is given, on texts of two domains.

Each cell is what a user runs, in a process and with a cache of its own: `pho search` with nothing
but minutes, `pho prune` with a published method and the same minutes, or one of these and `pho
recover` in what it leaves. Nothing is chosen on the report texts. Results are kept in a file, so
that an interrupted run goes on with the next cell. The machine should do nothing else.

    python benchmarks/minutes.py --out minutes.jsonl
    python benchmarks/minutes.py --model smollm2 --pattern 0.5 --minutes 2,5,10,20
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from domains import DOMAINS
from kept_results import KeptResults
from machine import conditions
from subject import MODELS, report_windows

from pho_service.cli.terminal import print_table, say
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.loading import load_model
from pho_service.spec.document import number

CONTEXT_LENGTH = 512
LEAST = 0.1  # minutes of a recovery, where pruning took longer than it was given
WINDOWS = {"docs": 14, "others": 8}  # of each report text, as in docs/measurements/quality.md
# With a recovery, this share of the minutes is for pruning at most; a search leaves a quarter.
METHODS = {"best": 1.0, "best, recovered": 0.75, "alps": 1.0, "sparsegpt, recovered": 0.5}


@click.command()
@click.option("--model", "models", multiple=True, help="smollm2, gemma3 or what `pho` takes.")
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "2:4"), show_default=True)
@click.option(
    "--method", "methods", multiple=True, type=click.Choice([*METHODS]), default=[*METHODS],
    show_default=True,
)  # fmt: skip
@click.option("--minutes", default="2,5,10,20,40,80", show_default=True)
@click.option(
    "--other", default="plots", show_default=True,
    help="Report text beside Python's documentation: plots, or a .txt, .jsonl or .parquet file.",
)  # fmt: skip
@click.option("--out", default="minutes.jsonl", show_default=True, type=click.Path(path_type=Path))
@click.option("--measure/--no-measure", default=True, help="Or print what is there.")
def main(
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    methods: tuple[str, ...],
    minutes: str,
    other: str,
    out: Path,
    measure: bool,
) -> None:
    """Print perplexities by minutes."""
    kept, models = KeptResults(out), models or tuple(MODELS)
    say(conditions())
    given = [float(word) for word in minutes.split(",")]
    cells = [
        {"model": m, "pattern": p, "method": method, "minutes": each, "other": other}
        for m in models for p in patterns for each in given for method in methods
    ]  # fmt: skip
    for cell in cells if measure else ():
        if kept.find(cell) is None:
            say(", ".join(str(value) for value in cell.values()))
            with tempfile.TemporaryDirectory() as folder:
                kept.keep(cell, Trial(cell=cell, folder=Path(folder)).measured())
    rows = []
    for cell in cells:
        if found := kept.find(cell):
            perplexities = [number(found["perplexity"][text]) for text in WINDOWS]
            model = Path(cell["model"]).name
            place = f"{model} {cell['pattern']} {cell['method']} {cell['minutes']:g}"
            rows.append([place, f"{found['seconds'] / 60:.1f}", found["options"], *perplexities])
    columns = ("model, pattern, method, minutes", "taken", "calibrated on", *WINDOWS)
    print_table("Perplexity by minutes", columns, rows)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """
    One cell.

    Attributes:
        cell: What it is found again by.
        folder: For texts, the cache and models.
    """

    cell: Mapping[str, Any]
    folder: Path

    def measured(self) -> dict[str, Any]:
        """The seconds that the cell's commands took, and the perplexities of their model."""
        name, minutes = self.cell["model"], self.cell["minutes"]
        source = str(MODELS[name]()) if name in MODELS else name
        texts = DOMAINS["docs"](self.folder / "docs")
        pruned, text = self.folder / "pruned", ("--text", str(texts["calibration"]))
        config, out = str(self.folder / "config.json"), ("--out", str(pruned))
        asked = ("--pattern", self.cell["pattern"], *text)
        method, share = self.cell["method"].partition(",")[0], METHODS[self.cell["method"]]
        given = ("--minutes", f"{share * minutes:g}")
        if method == "best":
            confirmed = ("--confirm-text", str(texts["confirmation"]))
            seconds = self._pho("search", source, *asked, *confirmed, *given, "--out", config)
            written = self._pho("prune", source, "--config", config, *text, *out)
            seconds += written if share < 1 else 0.0  # a recovery needs the model
        else:
            seconds = self._pho("prune", source, "--method", method, *asked, *given, *out)
        if share < 1:
            left = f"{max(minutes - seconds / 60, LEAST):.2f}"
            words = (str(pruned), "--teacher", source, *text, "--minutes", left)
            window = ("--context-length", str(CONTEXT_LENGTH))
            pruned = self.folder / "recovered"
            seconds += self._pho("recover", *words, *window, "--out", str(pruned))
        recipe = json.loads((pruned / "pruning.json").read_text())
        settings = recipe["calibration"]["settings"]
        return {
            "seconds": round(seconds, 1),
            "options": f"{settings['samples']} x {settings['context_length']}",
            "perplexity": self._perplexities(pruned),
        }

    def _pho(self, *words: str) -> float:
        """Run a command of `pho`, with nothing kept from another cell; the seconds that it took."""
        started = time.perf_counter()
        code = "from pho_service.cli import main; main()"
        places = {"PHO_CACHE_DIR": str(self.folder / "cache"), "PHO_DATA_DIR": str(self.folder)}
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env={**os.environ, **places}, cwd=self.folder,
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode:
            raise click.ClickException(f"pho {' '.join(words)} ended with code {done.returncode}.")
        return time.perf_counter() - started

    def _perplexities(self, pruned: Path) -> dict[str, float]:
        """Of a folder, on each report text."""
        model = load_model(str(pruned), dtype="float32")
        windows = report_windows(
            model, self.folder, self.cell["other"], **WINDOWS, context_length=CONTEXT_LENGTH
        )
        measured = (measure_perplexity(model, each).perplexity for each in windows.values())
        return dict(zip(WINDOWS, measured, strict=True))


if __name__ == "__main__":
    main()
