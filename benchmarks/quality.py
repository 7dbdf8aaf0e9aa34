"""
What each method is worth: perplexity by model, pattern and method, on texts nothing was chosen on.

Each seed calibrates on other windows of one text and searches with that seed. Two texts are
reported on: Python's documentation and one of another domain. Results are kept in a file, one line
a cell, so that an interrupted run goes on where it was, and several may fill one file.

    python benchmarks/quality.py --out quality.jsonl
    python benchmarks/quality.py --model smollm2 --pattern 0.5 --method wanda --method best
    python benchmarks/quality.py --seeds 0,1,2 --samples 64 --source plots --markdown
    python benchmarks/quality.py --model smollm2 --pattern structured:20% --method structured
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from domains import ALSO, BOTH, DOMAINS
from kept_results import KeptResults
from quality_conditions import CONTEXT_LENGTH, CUT, Conditions, Place
from quality_tables import print_tables, write_tables
from searched import searched
from subject import MODELS, Subject, load_benchmark_model, load_subject, report_windows
from torch import Tensor

from pho_service.cli.terminal import progress, say
from pho_service.errors import PhoError
from pho_service.host.settings import Settings
from pho_service.models.blockwise import measure_perplexity
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import RecoveryText, mixed_text
from pho_service.pipeline.cuts import cut_copy
from pho_service.pipeline.pipeline import pruned_model
from pho_service.pipeline.recover import PrunedModel, recover_model
from pho_service.pipeline.search import search_job
from pho_service.progress import Run
from pho_service.pruning.hardware import peak_memory
from pho_service.pruning.masks import model_sparsity
from pho_service.spec.baselines import comparison_baselines, named_baselines
from pho_service.spec.pattern import Pattern
from pho_service.spec.recovery import Recovery
from pho_service.spec.space import PRESETS
from pho_service.spec.steps import Candidate
from pho_service.tuning.plan import SearchRequest

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
# Nobody's method, and a search that adds little to crepe.
NOT_BY_DEFAULT = ("crepe-equal", "score")


def _baselines(pattern: str) -> dict[str, Candidate]:
    return named_baselines(Pattern.parse(pattern))


METHODS = tuple(dict.fromkeys([*(m for p in PATTERNS for m in _baselines(p)), *PRESETS, CUT]))
# As published, beside what our searches do too: norms from the pruned blocks, an order of channels.
BY_DEFAULT = (
    *(c.method for c in comparison_baselines(Pattern.parse(PATTERNS[0]))),
    "wanda-sequential", "wanda-permuted", "sparsegpt-permuted", "admm-permuted", "alps-permuted",
    *PRESETS,
)  # fmt: skip


def _seeds(_context: click.Context, _option: click.Parameter, words: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{words!r} is not a list of whole numbers like 0,1,2.") from error


def _also(_context: click.Context, _option: click.Parameter, value: str) -> str:
    name, _, share = value.partition(":")
    if value and (name not in ALSO or not share.isdecimal() or not int(share)):
        raise click.BadParameter(f"{value} is not one of {', '.join(ALSO)}, and :SHARE after it.")
    return value


@click.command()
@click.option(
    "--model", "models", multiple=True, help="smollm2, gemma3 or what `pho` takes.  [default: both]"
)
@click.option(
    "--pattern", "patterns", multiple=True, help="In the order of work.  [default: all five]"
)
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(METHODS),
    help="In the order of work.  [default: the published ones, and the presets]",
)  # fmt: skip
@click.option(
    "--seeds", default="0,1,2", show_default=True, callback=_seeds,
    help="One calibration and one search of each; the first is done for all cells first.",
)  # fmt: skip
@click.option("--out", default="quality.jsonl", show_default=True, help="Where results are kept.")
@click.option("--samples", default=16, show_default=True, help="Windows of calibration text.")
@click.option(
    "--source", default="docs", show_default=True, type=click.Choice([*DOMAINS, BOTH]),
    help="Domain of the calibration and confirmation text; both confirms on the documentation.",
)  # fmt: skip
@click.option(
    "--other", default="plots", show_default=True,
    help="Report text beside Python's documentation: plots, or a .txt, .jsonl or .parquet file.",
)  # fmt: skip
@click.option("--report-windows", default=14, show_default=True, help="Of the documentation.")
@click.option("--other-windows", default=8, show_default=True, help="Of the other text.")
@click.option("--trials", default=200, show_default=True, help="Of each search.")
@click.option("--finalists", default=3, show_default=True, help="Confirmed by perplexity.")
@click.option(
    "--confirm-steps/--no-confirm-steps",
    default=False,
    show_default=True,
    help="Confirm searches whose steps need a text, too; else their best by the proxy is shown.",
)
@click.option("--confirm-windows", default=4, show_default=True)
@click.option(
    "--recover-tokens", default=0, show_default=True,
    help="Recover what searches found, on so many tokens of the calibration text beyond the "
    "windows used; a row of its own.",
)  # fmt: skip
@click.option(
    "--recover-written", default=0, show_default=True,
    help="Of these tokens, how many the dense model writes itself.",
)  # fmt: skip
@click.option(
    "--recover-also", default="", metavar="NAME:SHARE", callback=_also,
    help="For each window of the calibration's text so many of another: docstrings:2 of those of "
    "Python's standard library, manual:7 of Python's manual.",
)  # fmt: skip
@click.option("--dtype", default="float32", show_default=True)
@click.option(
    "--cache", default=None, type=click.Path(path_type=Path),
    help="Folder for calibrations.  [default: PHO's cache]",
)  # fmt: skip
@click.option("--measure/--no-measure", default=True, help="Or print what is there.")
@click.option(
    "--markdown", is_flag=True, help="The tables as they stand in docs/measurements/quality.md."
)
def main(
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    out: str,
    cache: Path | None,
    measure: bool,
    markdown: bool,
    **options: Any,
) -> None:
    """Print the tables of docs/measurements/quality.md."""
    conditions = Conditions(**options)
    kept = KeptResults(Path(out))
    models = models or tuple(MODELS)
    patterns = patterns or PATTERNS
    methods = methods or tuple(
        each for each in METHODS if each in BY_DEFAULT and each not in NOT_BY_DEFAULT
    )
    if measure:
        for name in models:
            places = [(seed, p, m) for seed in seeds for p in patterns for m in methods]
            places = [place for place in places if _exists(*place[1:])]
            _fill(kept, conditions, name, places, cache or Settings().cache_dir.expanduser())
    show = write_tables if markdown else print_tables
    for name in models:
        show(kept, conditions, name, patterns, methods, seeds)


def _exists(pattern: str, method: str) -> bool:
    if Pattern.parse(pattern).structured:
        return method == CUT
    return method in PRESETS or method in _baselines(pattern)


def _fill(
    kept: KeptResults, conditions: Conditions, name: str, places: list[Place], cache: Path
) -> None:
    """Measure the cells of a model that are missing, each written as soon as it is known."""

    def missing(places: Iterable[Place]) -> Iterator[Place]:
        return (each for each in places if kept.find(conditions.cell(name, *each)) is None)

    if not any(missing(places)):
        return
    model = load_benchmark_model(name, conditions.dtype)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            kept=kept, conditions=conditions, name=name, model=model, folder=Path(folder),
            reports=report_windows(
                model, Path(folder), conditions.other, docs=conditions.report_windows,
                others=conditions.other_windows, context_length=CONTEXT_LENGTH,
            ),
        )  # fmt: skip
        if kept.find(conditions.dense(name)) is None:
            kept.keep(conditions.dense(name), {"perplexity": bench.perplexities(model)})
        for seed in dict.fromkeys(seed for seed, _, _ in places):
            here = [place for place in places if place[0] == seed]
            if any(missing(here)):
                subject = bench.calibrated(seed, cache)
                for place in missing(here):  # another process may have measured some meanwhile
                    bench.measure(subject, place)


Pruned = tuple[LanguageModel, float, dict[str, Any]]  # its sparsity, and what was found of it


@dataclass(frozen=True, kw_only=True)
class Bench:
    """
    A dense model, and what its cells are measured with.

    Attributes:
        kept: Where results are.
        conditions: Of the table.
        name: Of the model, in results.
        model: Given back dense after each cell.
        folder: For texts.
        reports: Windows to measure on, by the name of their text.
    """

    kept: KeptResults
    conditions: Conditions
    name: str
    model: LanguageModel
    folder: Path
    reports: dict[str, Tensor]

    def perplexities(self, model: LanguageModel) -> dict[str, float]:
        """Of a model, on each report text."""
        return {
            text: measure_perplexity(model, windows).perplexity
            for text, windows in self.reports.items()
        }

    def calibrated(self, seed: int, cache: Path) -> Subject:
        """The model with the calibration of a seed, which costs nothing if the cache has it."""
        return load_subject(
            self.model,
            self.folder,
            samples=self.conditions.samples,
            confirm_windows=self.conditions.confirm_windows,
            report_windows=1,  # reports have their own
            context_length=CONTEXT_LENGTH,
            dtype=self.conditions.dtype,
            seed=seed,
            source=self.conditions.source,
            cache=cache,
            calibrating=self._metered(seed),
        )

    @contextmanager
    def _metered(self, seed: int) -> Iterator[None]:
        started = time.perf_counter()
        with peak_memory(self.model.device) as peak:
            yield
            found = {"seconds": round(time.perf_counter() - started, 1), "memory_bytes": peak()}
        self.kept.keep(self.conditions.calibration(self.name, seed), found)

    def measure(self, subject: Subject, place: Place) -> None:
        """One cell: what the texts say of the pruned model, and what it took to find it."""
        seed, pattern, method = place
        say(f"{self.name}, seed {seed}, {pattern}, {method}")
        started = time.perf_counter()
        try:
            with peak_memory(self.model.device) as peak:
                pruned = self._cut if method == CUT else self._pruned
                with pruned(subject, place) as (model, sparsity, found):
                    cell = {
                        "seconds": round(time.perf_counter() - started, 1),
                        "memory_bytes": peak(),
                        "sparsity": sparsity,
                        "perplexity": self.perplexities(model),
                        **found,
                    }
                    say(f"{cell['perplexity']} at {sparsity:.3f}")
                    if self.conditions.recover_tokens and method in (*PRESETS, CUT):
                        cell["recovered"] = self._recovered(subject, seed, model)
        except PhoError as error:  # a cell that cannot be had is no reason to leave the others
            say(f"left out: {error}")
            return
        self.kept.keep(self.conditions.cell(self.name, *place), cell)

    @contextmanager
    def _pruned(self, subject: Subject, place: Place) -> Iterator[Pruned]:
        seed, pattern, method = place
        found: dict[str, Any] = {}
        if method in PRESETS:
            candidate, found = searched(
                subject, method, Pattern.parse(pattern), seed=seed, trials=self.conditions.trials,
                finalists=self.conditions.finalists, confirm_steps=self.conditions.confirm_steps,
            )  # fmt: skip
        else:
            candidate = _baselines(pattern)[method]
        statistics = subject.bundle.statistics()
        with pruned_model(self.model, statistics, candidate, subject.calibration) as shares:
            yield self.model, model_sparsity(self.model.linears, shares), found

    @contextmanager
    def _cut(self, subject: Subject, place: Place) -> Iterator[Pruned]:
        """A copy that is cut by the best split of the share."""
        work = replace(subject.work, cache_dir=self.folder / "cuts")
        request = SearchRequest(
            pattern=Pattern.parse(place[1]), finalists=self.conditions.finalists
        )
        cut = search_job(request, work, run=Run(progress=progress)).configuration.cut
        assert cut is not None
        small = cut_copy(work, cut.structure, progress=progress).model
        yield small, cut.removed, {"cut": cut.structure.to_dict()}

    def _recovered(self, subject: Subject, seed: int, model: LanguageModel) -> dict[str, Any]:
        """Recover a pruned or cut model, in place: what that brought, and what it took."""
        source, unlike = subject.source, subject.calibration
        if also := self.conditions.recover_also:
            name, _, share = also.partition(":")
            more = TextSource(path=str(ALSO[name](self.folder)))
            source = mixed_text([source, more], (1, int(share)))
            unlike = torch.cat([unlike, self.reports["docs"]])
        with peak_memory(self.model.device) as peak, tempfile.TemporaryDirectory() as place:
            recovered = recover_model(
                PrunedModel.of(model),
                lambda: nullcontext(load_benchmark_model(self.name, self.conditions.dtype)),
                RecoveryText(source=source, context_length=CONTEXT_LENGTH, unlike=unlike),
                Recovery(
                    tokens=self.conditions.recover_tokens,
                    written=self.conditions.recover_written,
                    seed=seed,
                ),
                Path(place),
                run=Run(progress=progress),
            )
            return {
                "seconds": recovered.seconds,
                "memory_bytes": peak(),
                "perplexity": self.perplexities(model),
                "divergence": [recovered.before, recovered.after],
                "tokens": recovered.tokens,
                "windows": recovered.windows,
                "written": recovered.written,
            }


if __name__ == "__main__":
    main()
