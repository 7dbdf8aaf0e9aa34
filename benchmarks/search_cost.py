"""
What a search costs: hill climbing on perplexity against PHO, in one run, and what both find.

All search the same space for the same pattern on the same model. The climb
rates by perplexity on the windows that PHO confirms on; what is found is
measured on a third text, on which nothing was chosen. PHO stands in two rows:
as it is, and as the paper has it, where the proxy's best is taken and nothing
is confirmed. Loading the model counts for none. An interrupted run begins anew.

    python benchmarks/search_cost.py --json search-cost.json
    python benchmarks/search_cost.py --scope layer
    python benchmarks/search_cost.py --quick
    python benchmarks/search_cost.py --method hill-climb --method tpe --method pho
"""

import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import optuna
import torch
from machine import conditions
from subject import Subject, load_subject
from torch import Tensor

from pho_service.cli.terminal import print_table, progress, say
from pho_service.host.machine import versions
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import opened_study, search_job
from pho_service.progress import Advance, Run
from pho_service.pruning.hardware import peak_memory, pick_device
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.spec.baselines import reference_methods
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import parse_bounds
from pho_service.tuning.plan import SearchRequest
from pho_service.tuning.samplers import FIRST_STEP, LAST_STEP
from storage.studies import open_storage

PROXY = "pho-proxy"
PHO = (PROXY, "pho")  # the others rate by perplexity
METHODS = ("hill-climb", "cmaes", "tpe", *PHO)

FULL = {
    "evaluations": 100, "trials": 200, "finalists": 5, "samples": 32, "context_length": 512,
    "confirm_windows": 16, "report_windows": 14,
}  # fmt: skip
QUICK = {**FULL, "evaluations": 24, "samples": 16, "confirm_windows": 4, "report_windows": 8}


@dataclass(kw_only=True)
class Cost:
    """
    What a piece of work took.

    Attributes:
        cpu_s: Of all threads of this process.
        memory_bytes: Of this process at its peak, the model included; None where the system
            does not tell.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int | None = None

    def add_(self, other: "Cost") -> None:
        """Add what comes after it: times add up, and the higher peak counts."""
        self.wall_s += other.wall_s
        self.cpu_s += other.cpu_s
        peaks = [peak for peak in (self.memory_bytes, other.memory_bytes) if peak is not None]
        self.memory_bytes = max(peaks, default=None)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """
    A search: what it took, and what it found.

    Attributes:
        trials: The most evaluations that it could have had.
        evaluations: Those that it has, baselines included.
        baselines_s: Seconds of rating the baselines.
        search, confirmation: The two parts of it.
        whole: Both, and all between them; no memory.
        confirmed: What the confirmation took, in perplexities of its text; 0 without one.
        chosen: Perplexity of what was found on the confirmation text.
        report: The same on the report text.
        found: Method and coefficients.
    """

    method: str
    trials: int
    evaluations: int
    baselines_s: float
    search: Cost
    confirmation: Cost
    whole: Cost
    confirmed: float
    chosen: float
    report: float
    found: dict[str, Any]

    @property
    def evaluation_s(self) -> float:
        """Seconds an evaluation."""
        return self.search.wall_s / self.evaluations


@contextmanager
def metered(cost: Cost, *, memory: bool = True) -> Iterator[None]:
    """Write down in ``cost`` what the block takes. Only one at a time can watch the memory."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    if memory:
        with peak_memory(pick_device("auto")) as peak:
            yield
            cost.memory_bytes = peak()
    else:
        yield
    cost.wall_s, cost.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


@click.command()
@click.option(
    "--model", default="smollm2", show_default=True, help="Or gemma3, a folder, a hub id."
)
@click.option("--pattern", default="0.5", show_default=True)
@click.option("--scope", help="[default: global, as in `make demo`; row for N:M]")
@click.option("--space", "bounds", multiple=True, help="Bounds, as in `pho search`.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(METHODS),
    help="PHO, or a sampler that searches by perplexity.  [default: hill-climb, both of PHO]",
)
@click.option("--quick", is_flag=True, help="Less of everything: some minutes on 2 cores.")
@click.option("--evaluations", type=int, help="By perplexity, at most, beside the baselines.")
@click.option("--trials", type=int, help="Of PHO, baselines included.")
@click.option("--finalists", type=int, help="Of PHO, confirmed beside the baselines.")
@click.option("--samples", type=int, help="Windows of calibration text.")
@click.option("--context-length", type=int, help="Tokens of every window.")
@click.option("--confirm-windows", type=int)
@click.option("--report-windows", type=int)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", type=int, help="Of torch.  [default: one for each core]")
@click.option("--seed", default=0, show_default=True, help="Of the calibration and the samplers.")
@click.option("--json", "json_file", help="A file that keeps all numbers.")
def main(
    model: str,
    pattern: str,
    scope: str | None,
    bounds: tuple[str, ...],
    methods: tuple[str, ...],
    quick: bool,
    dtype: str,
    threads: int | None,
    seed: int,
    json_file: str | None,
    **given: int | None,
) -> None:
    """Print what each search costs and finds, and how many times cheaper PHO is."""
    sizes = {**(QUICK if quick else FULL), **{k: v for k, v in given.items() if v is not None}}
    asked = SearchRequest(
        pattern=Pattern.parse(pattern, scope or (None if ":" in pattern else "global")),
        bounds=parse_bounds(bounds),
        seed=seed,
    )
    # torch itself takes fewer on a busy machine, which nobody would see.
    torch.set_num_threads(threads or os.cpu_count() or 1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        calibration = Cost()
        subject = load_subject(
            model,
            Path(folder),
            samples=sizes["samples"],
            confirm_windows=sizes["confirm_windows"],
            report_windows=sizes["report_windows"],
            context_length=sizes["context_length"],
            dtype=dtype,
            seed=seed,
            calibrating=metered(calibration),
        )
        runs = []
        for number, method in enumerate(methods or ("hill-climb", *PHO)):
            # Each has a database of its own, or one would take the other's ratings.
            url = f"sqlite:///{Path(folder) / f'{number}.db'}"
            runs.append(search(method, asked, subject, sizes, url))
    document = {
        "conditions": {
            "model": model,
            "pattern": pattern,
            "scope": asked.pattern.scope.value,
            "space": asked.plan(subject.bundle.kernel_sizes).space.to_dict(),
            "dtype": dtype,
            "device": str(subject.model.device),
            "seed": seed,
            **sizes,
            "calibration_text": _text(subject.bundle.provenance["text"]),
            "confirmation_text": _text(subject.confirmation.to_dict()),
            "report_text": _text(subject.report.to_dict()),
            "climb": f"steps of {FIRST_STEP} to {LAST_STEP} of each range",
            "versions": versions("torch", "transformers", "optuna", "cmaes"),
            "threads": torch.get_num_threads(),
            "machine": conditions(),
        },
        "report_perplexity": references(asked.pattern, subject),
        "calibration": asdict(calibration),
        "runs": [{**asdict(run), "evaluation_s": run.evaluation_s} for run in runs],
        "ratios": ratios(calibration, runs),
    }
    show(document, calibration, runs)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def search(
    method: str, asked: SearchRequest, subject: Subject, sizes: Mapping[str, int], url: str
) -> Searched:
    """Search, as `pho search` does, and measure on the report text what was found."""
    say(method)
    request = replace(asked, trials=sizes["trials"], finalists=sizes["finalists"])
    if method not in PHO:
        request = replace(request, sampler=method, objective=Objective(name="perplexity"))
        baselines = len(request.plan(subject.bundle.kernel_sizes).baselines())
        request = replace(request, trials=sizes["evaluations"] + baselines)
    parts = {"search": Cost(), "confirmation": Cost()}

    @contextmanager
    def watched(title: str, steps: int) -> Iterator[Advance]:
        part, here = parts["search" if title.startswith("Searching") else "confirmation"], Cost()
        with metered(here), progress(title, steps) as advance:
            yield advance
        part.add_(here)

    whole = Cost()
    work = replace(subject.work, report=None)  # which is measured below, beside the cost
    work = replace(work, confirm=None) if method == PROXY else work
    with (
        metered(whole, memory=False),
        opened_study(url, request, work) as study,
    ):
        result = search_job(
            request,
            work,
            study=study,
            run=Run(device=str(subject.model.device), progress=watched),
        )
    with open_storage(url) as storage:
        trials = optuna.load_study(study_name=result.study_name, storage=storage).trials
    found = result.configuration
    confirmed = found.confirmation

    def measured(windows: Tensor) -> float:
        rating, _ = rate_pruned(
            subject.model,
            subject.bundle.statistics(),
            found.candidate(),
            windows,
            calibration=subject.calibration,
        )
        return rating.perplexity

    chosen = confirmed.perplexity if confirmed else measured(subject.confirmation.windows)
    return Searched(
        method=method,
        trials=request.trials,
        evaluations=len(trials),
        baselines_s=sum(
            t.user_attrs["seconds"] for t in trials if t.user_attrs["method"] != "crepe"
        ),
        **parts,
        whole=whole,
        confirmed=(confirmed and confirmed.evaluations) or 0.0,
        chosen=chosen,
        report=measured(subject.report.windows),
        found={"method": found.method, **found.coefficients.to_dict()},
    )


def references(pattern: Pattern, subject: Subject) -> dict[str, float]:
    """Perplexity on the report text of the dense model, and of RIA as a search begins with it."""
    dense = rate_perplexity(subject.model.model, subject.report.windows).perplexity
    ria = reference_methods(pattern)["ria"]
    pruned, _ = rate_pruned(subject.model, subject.bundle.statistics(), ria, subject.report.windows)
    return {"dense": dense, ria.method: pruned.perplexity}


def ratios(calibration: Cost, runs: Sequence[Searched]) -> dict[str, dict[str, float]]:
    """How many times what PHO costs a search by perplexity costs, and its perplexity beside."""
    pairs = [(run, pho) for pho in runs if pho.method in PHO for run in runs]
    return {
        f"{run.method} : {pho.method}": {
            "evaluation": run.evaluation_s / pho.evaluation_s,
            "end_to_end": (calibration.wall_s + run.whole.wall_s)
            / (calibration.wall_s + pho.whole.wall_s),
            "end_to_end_cpu": (calibration.cpu_s + run.whole.cpu_s)
            / (calibration.cpu_s + pho.whole.cpu_s),
            "without_calibration": run.whole.wall_s / (calibration.wall_s + pho.whole.wall_s),
            "without_calibration_cpu": run.whole.cpu_s / (calibration.cpu_s + pho.whole.cpu_s),
            "perplexity": run.report / pho.report,
        }
        for run, pho in pairs
        if run.method not in PHO
    }


def show(document: Mapping[str, Any], calibration: Cost, runs: Sequence[Searched]) -> None:
    """Print the conditions, and a table each of costs, of what was found, and of ratios."""
    for name, value in document["conditions"].items():
        click.echo(f"{name}: {value if isinstance(value, (str, int)) else json.dumps(value)}")
    print_table(
        "What a search takes",
        ("method", "evaluations", "s each", "search, s", "confirmation, s", "calibration, s",
         "all, s", "CPU, s", "peak, GiB"),
        [
            (
                run.method,
                f"{run.evaluations} of {run.trials}",
                f"{run.evaluation_s:.4g}",
                f"{run.search.wall_s:.1f}",
                f"{run.confirmation.wall_s:.1f} ({run.confirmed:.1f})",
                f"{calibration.wall_s:.1f}",
                f"{calibration.wall_s + run.whole.wall_s:.1f}",
                f"{calibration.cpu_s + run.whole.cpu_s:.1f}",
                _gib(calibration, run.search, run.confirmation),
            )
            for run in runs
        ],
        caption="Evaluations with the baselines, of the most that were allowed: fewer, where a "
        "climb ended by itself. Confirmation: (in evaluations). The peak holds the model and is "
        "that of calibration, search and confirmation.",
    )  # fmt: skip
    print_table(
        "What it finds",
        ("method", "perplexity, chosen on", "perplexity, report", "found"),
        [
            *(
                (run.method, f"{run.chosen:.3f}", f"{run.report:.3f}", _found(run.found))
                for run in runs
            ),
            *((name, "", f"{p:.3f}", "") for name, p in document["report_perplexity"].items()),
        ],
        caption="Report: a text on which nothing was calibrated, searched or confirmed.",
    )
    if document["ratios"]:
        columns = next(iter(document["ratios"].values()))
        print_table(
            "How many times what PHO takes",
            ("method", *(name.replace("_", " ") for name in columns)),
            [
                (method, *(f"{value:.4g}" for value in ratio.values()))
                for method, ratio in document["ratios"].items()
            ],
            caption="PHO with its calibration in every column; without ...: of the other search "
            "alone, which has none in the paper.",
        )


def _text(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without the folder, which is another one each time."""
    return {**record, "source": Path(record["source"]).name}


def _gib(*costs: Cost) -> str | None:
    known = [cost.memory_bytes for cost in costs if cost.memory_bytes is not None]
    return f"{max(known) / 2**30:.2f}" if known else None


def _found(found: Mapping[str, Any]) -> str:
    if found["method"] != "crepe":
        return str(found["method"])
    return (
        f"{found['row']:.3f} {found['column']:.3f} {found['neighbourhood']:.3f} "
        f"k{found['kernel_size']} a{found['activation_exponent']:.3f} "
        f"g{found['gradient_exponent']:.3f}"
    )


if __name__ == "__main__":
    main()
