"""
The table that papers on pruning print: calibrated on C4, measured on WikiText-2.

128 windows of 2048 tokens of C4's first English file, the raw test part of WikiText-2 joined by
two newlines, windows of 2048 tokens cut out of it without a BOS of their own, and zero-shot tasks
if they are asked for. Published rows stand below those of the same method. Results are kept in a
file, one line a cell: an interrupted run goes on where it was.

    python benchmarks/paper.py meta-llama/Llama-2-7b-hf --out paper.jsonl
    python benchmarks/paper.py meta-llama/Llama-2-7b-hf --tasks boolq,rte,hellaswag
    python benchmarks/paper.py ./model --text calibration.jsonl --report-text report.txt --quick
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from kept_results import KeptResults
from published import PATTERNS, SOURCE, published_rows
from searched import searched
from subject import Subject, load_benchmark_model

from pho_service.cli.terminal import print_table, progress, say
from pho_service.errors import PhoError
from pho_service.host.settings import Settings
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.calibration import cached_bundle, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel
from pho_service.models.tasks import LoadedTasks, load_tasks
from pho_service.models.texts import ReportText, read_windows
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.tasks import as_extra, measure_tasks
from pho_service.pruning.hardware import peak_memory
from pho_service.pruning.masks import model_sparsity
from pho_service.spec.baselines import named_baselines
from pho_service.spec.calibration import C4_DATASET, C4_FILE, CalibrationSettings
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import PRESETS
from pho_service.spec.tasks import task_names

# Wanda and DSnoT take norms from the pruned blocks before, as their authors' code does.
METHODS = (
    "wanda-sequential", "dsnot", "sparsegpt", "admm", "alps", "crepe", "crepe-plus", "best",
)  # fmt: skip
# What --quick makes smaller: to see that all runs, not what it is worth.
QUICK = {
    "samples": 4, "context_length": 128, "trials": 16, "finalists": 1, "confirm_windows": 1,
    "report_windows": 4, "limit": 8,
}  # fmt: skip


@click.command()
@click.argument("model", default="meta-llama/Llama-2-7b-hf")
@click.option("--pattern", "patterns", multiple=True, help=f"[default: {', '.join(PATTERNS)}]")
@click.option("--method", "methods", multiple=True, help=f"[default: {', '.join(METHODS)}]")
@click.option("--text", help="Text to calibrate on.  [default: C4's first English file]")
@click.option("--report-text", help="Text to measure on.  [default: WikiText-2, raw, test]")
@click.option("--tasks", help="Zero-shot tasks, with commas between; needs the extra eval.")
@click.option("--tasks-dir", type=click.Path(path_type=Path), help="As of `pho evaluate`.")
@click.option("--limit", type=int, help="Only the first N examples of each task.")
@click.option("--samples", default=128, show_default=True, help="Windows of calibration text.")
@click.option("--context-length", default=2048, show_default=True, help="Tokens of all windows.")
@click.option("--report-windows", type=int, help="Only the first N windows of that text.")
@click.option("--bos", default="never", show_default=True, help="auto for models such as Gemma.")
@click.option("--trials", default=200, show_default=True, help="Of each search.")
@click.option("--finalists", default=3, show_default=True, help="Confirmed by perplexity.")
@click.option(
    "--confirm-steps/--no-confirm-steps", default=False, show_default=True,
    help="Confirm searches whose steps need a text, too; else their best by the proxy is shown.",
)  # fmt: skip
@click.option("--confirm-windows", default=8, show_default=True, help="Of the calibration text.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="paper.jsonl", show_default=True, help="Where results are kept.")
@click.option("--quick", is_flag=True, help="Small numbers of all: to see that it runs.")
@click.pass_context
def main(
    context: click.Context,
    model: str,
    patterns: tuple[str, ...],
    methods: tuple[str, ...],
    out: str,
    quick: bool,
    tasks_dir: Path | None,
    **options: Any,
) -> None:
    """Print the table of MODEL, a hub id or a folder."""
    if quick:
        given = click.core.ParameterSource.COMMANDLINE
        options |= {n: v for n, v in QUICK.items() if context.get_parameter_source(n) != given}
    patterns, methods = patterns or PATTERNS, methods or METHODS
    kept, conditions = KeptResults(Path(out)), {"model": model, **options}
    for pattern, method in _cells(patterns, methods):
        if method not in (*PRESETS, *named_baselines(Pattern.parse(pattern))):
            raise click.BadParameter(f"{method!r} is neither a preset nor a method at {pattern}.")
    missing = [c for c in _cells(patterns, methods) if not kept.find(_key(conditions, *c))]
    if missing or not kept.find(_key(conditions, "dense", "dense")):
        try:
            _fill(kept, conditions, missing, tasks_dir)
        except PhoError as error:
            raise click.ClickException(str(error)) from error
    _show(kept, conditions, patterns, methods)


def _cells(patterns: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((pattern, method) for pattern in patterns for method in methods)


def _key(conditions: dict[str, Any], pattern: str, method: str) -> dict[str, Any]:
    """What a cell is found again by: its place, and all conditions."""
    return {"pattern": pattern, "method": method, "conditions": conditions}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """
    A model and what it is measured on.

    Attributes:
        conditions: The options.
        subject: The dense model, calibrated, with its texts.
        tasks: None if none are asked for.
    """

    conditions: dict[str, Any]
    subject: Subject
    tasks: LoadedTasks | None

    @classmethod
    def of(cls, conditions: dict[str, Any], tasks_dir: Path | None) -> "Bench":
        """Read tasks, model and texts, and calibrate."""
        tasks = conditions["tasks"] and load_tasks(task_names(conditions["tasks"]), tasks_dir)
        model = load_benchmark_model(conditions["model"], conditions["dtype"])
        settings = CalibrationSettings(
            samples=conditions["samples"],
            context_length=conditions["context_length"],
            fisher_samples=max(1, conditions["samples"] // 4),
            bos=conditions["bos"],
            seed=conditions["seed"],
        )
        named = conditions["text"]
        c4 = TextSource(dataset=C4_DATASET, data_file=C4_FILE)
        source = TextSource(path=named) if named else c4
        text = calibration_text(model, source, settings)
        report = conditions["report_text"]
        windows, record = read_windows(
            model,
            TextSource(path=report) if report else TextSource(dataset="wikitext2"),
            context_length=conditions["context_length"],
            bos=conditions["bos"],
            max_windows=conditions["report_windows"],
        )
        held_out = text.held_out[: conditions["confirm_windows"]]
        if not len(held_out):
            raise click.ClickException("the calibration text has no windows left to confirm on.")
        subject = Subject(
            model=model,
            bundle=cached_bundle(
                model, text, settings, Settings().cache_dir.expanduser(), progress
            ),
            source=source,
            calibration=text.calibration,
            confirmation=ReportText(windows=held_out, record=text.record),
            report=ReportText(windows=windows, record=record),
        )
        return cls(conditions=conditions, subject=subject, tasks=tasks or None)

    def measured(self) -> dict[str, Any]:
        """Of the model as it is."""
        model = self.subject.model
        perplexity = measure_perplexity(model, self.subject.report.windows).perplexity
        if self.tasks is None:
            return {"perplexity": perplexity}
        scores = measure_tasks(model, self.tasks, limit=self.conditions["limit"])
        return {"perplexity": perplexity, "tasks": as_extra(scores)}

    def cell(self, pattern: str, method: str) -> dict[str, Any]:
        """Of the model pruned with a method, and what it took to find and to prune it."""
        subject, parsed = self.subject, Pattern.parse(pattern)
        names = ("seed", "trials", "finalists", "confirm_steps")
        started = time.perf_counter()
        with peak_memory(*subject.model.devices) as peak:
            found: dict[str, Any] = {}
            if method in PRESETS:
                asked = {name: self.conditions[name] for name in names}
                candidate, found = searched(subject, method, parsed, **asked)
            else:
                candidate = named_baselines(parsed)[method]
            with pruned_model(
                subject.model, subject.bundle.statistics(), candidate, subject.calibration
            ) as shares:
                took = {
                    "seconds": round(time.perf_counter() - started, 1),
                    "memory_bytes": peak(),
                    "sparsity": model_sparsity(subject.model.linears, shares),
                }
                return {**found, **took, **self.measured()}


def _fill(
    kept: KeptResults,
    conditions: dict[str, Any],
    missing: Sequence[tuple[str, str]],
    tasks_dir: Path | None,
) -> None:
    """Measure the cells that are missing, each written as soon as it is known."""
    started = time.perf_counter()
    bench = Bench.of(conditions, tasks_dir)
    ready = round(time.perf_counter() - started, 1)
    if not kept.find(_key(conditions, "dense", "dense")):
        dense = {**bench.measured(), "calibration_seconds": ready, **_where(bench.subject.model)}
        kept.keep(_key(conditions, "dense", "dense"), dense)
    for pattern, method in missing:
        say(f"{pattern}, {method}")
        try:
            cell = bench.cell(pattern, method)
        except PhoError as error:  # a cell that cannot be had is no reason to leave the others
            say(f"left out: {error}")
            continue
        kept.keep(_key(conditions, pattern, method), cell)


def _where(model: LanguageModel) -> dict[str, Any]:
    described = model.to_dict()
    names = ("weights_sha256", "dtype", "parameters")
    return {"device": str(model.device), **{name: described[name] for name in names}}


def _show(
    kept: KeptResults,
    conditions: dict[str, Any],
    patterns: tuple[str, ...],
    methods: tuple[str, ...],
) -> None:
    dense = kept.find(_key(conditions, "dense", "dense"))
    assert dense is not None  # it was measured first
    found = {c: kept.find(_key(conditions, *c)) or {} for c in _cells(patterns, methods)}
    report = conditions["report_text"] or "WikiText-2, raw, test"
    name = Path(conditions["model"]).name
    rows: list[tuple[str, ...]] = [("dense", *[f"{dense['perplexity']:.2f}"] * len(patterns))]
    for method in methods:
        cells = [found[pattern, method].get("perplexity") for pattern in patterns]
        rows.append((method, *("" if cell is None else f"{cell:.2f}" for cell in cells)))
        rows += published_rows(method.removesuffix("-sequential"), patterns)
    print_table(
        f"{name}: perplexity",
        ("method", *patterns),
        rows,
        caption=f"{report}, windows of {conditions['context_length']}; calibrated on "
        f"{conditions['samples']} of {conditions['text'] or 'C4'}; {dense['dtype']} on "
        f"{dense['device']}, seed {conditions['seed']}. Published: {SOURCE}.",
    )
    print_table(
        f"{name}: seconds, peak memory",
        ("method", *patterns),
        [(method, *(_took(found[pattern, method]) for pattern in patterns)) for method in methods],
        caption="Search, confirmation and pruning; reading and calibrating, once for all, took "
        f"{dense['calibration_seconds']:.0f} s.",
    )
    if "tasks" not in dense:
        return
    asked = [task for task in dense["tasks"] if not task.endswith("stderr")]
    for pattern in patterns:
        print_table(
            f"{name} at {pattern}: zero-shot tasks",
            ("method", *asked),
            [
                (method, *(_share(cell.get("tasks", {}), task) for task in asked))
                for method, cell in (
                    ("dense", dense), *((method, found[pattern, method]) for method in methods),
                )
            ],
            caption="Percent, ± standard error over the questions.",
        )  # fmt: skip


def _took(cell: dict[str, Any]) -> str:
    if not cell:
        return ""
    return f"{cell['seconds']:.0f} s, {(cell['memory_bytes'] or 0) / 2**30:.1f} GiB"


def _share(scores: dict[str, float], task: str) -> str:
    if task not in scores:
        return ""
    error = scores.get(f"{task} stderr")
    return f"{scores[task] * 100:.1f}" + ("" if error is None else f" ± {error * 100:.1f}")


if __name__ == "__main__":
    main()
