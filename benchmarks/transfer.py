"""
Does a configuration that was found on one model hold on another?

For each pattern: the own best of each model, taken to the other one; a search
over both at once; and how many trials a search saves that starts from what was
found on the other model. One more model, a small one that is trained for it, has no
part in these searches: their results are measured on it too. Searches choose on the
confirmation text; every perplexity in the tables is of the report text, which nothing
was chosen or trained on. An interrupted run begins anew.

    python benchmarks/transfer.py --json transfer.json
    python benchmarks/transfer.py --model smollm2 --model a-folder --pattern 0.5
"""

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import optuna
import torch
from machine import conditions
from subject import Subject, load_subject

from pho_service.cli.terminal import print_table, progress, say
from pho_service.host.machine import versions
from pho_service.models.builtin import Training, train_small_model, write_texts
from pho_service.models.data_sets import TextSource
from pho_service.pipeline.compare import compare_candidates
from pho_service.pipeline.objectives import rate_by_proxy
from pho_service.pipeline.search import search_job
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Pattern
from pho_service.spec.results import regret
from pho_service.tuning.plan import RatedCandidate, SearchRequest
from pho_service.tuning.search import run_search


@click.command()
@click.option(
    "--model", "models", multiple=True, default=("smollm2", "gemma3"), show_default=True,
    help="Or a folder, or a hub id; at least two.",
)  # fmt: skip
@click.option("--pattern", "patterns", multiple=True, default=("0.5", "2:4"), show_default=True)
@click.option("--scope", default="layer", show_default=True, help="Of ratios.")
@click.option("--trials", default=200, show_default=True, help="Of each search.")
@click.option("--seeds", default=10, show_default=True, help="Searches, cold and warm.")
@click.option("--samples", default=32, show_default=True, help="Windows of calibration text.")
@click.option("--context-length", default=512, show_default=True, help="Tokens of every window.")
@click.option("--confirm-windows", default=16, show_default=True)
@click.option("--report-windows", default=14, show_default=True)
@click.option(
    "--third-steps", type=click.IntRange(min=0), default=1200, show_default=True,
    help="Of training the third model, which only tests what was found; 0: none is trained.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of the calibration and the samplers.")
@click.option("--json", "json_file", help="A file that keeps all numbers.")
def main(
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    scope: str,
    trials: int,
    seeds: int,
    samples: int,
    context_length: int,
    confirm_windows: int,
    report_windows: int,
    third_steps: int,
    seed: int,
    json_file: str | None,
) -> None:
    """Print what each model's configuration is worth on the others."""
    if len(models) < 2:
        raise click.UsageError("a transfer takes at least two models: give --model twice")
    torch.set_num_threads(os.cpu_count() or 1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    document: dict[str, Any] = {
        "conditions": {
            "models": models, "scope": scope, "trials": trials, "seeds": seeds,
            "samples": samples, "context_length": context_length,
            "confirm_windows": confirm_windows, "report_windows": report_windows,
            "third_steps": third_steps, "seed": seed,
            "dtype": "float32", "versions": versions("torch", "transformers", "optuna", "cmaes"),
            "threads": torch.get_num_threads(), "machine": conditions(),
        },
        "transfer": [], "warm_start": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        load = partial(
            load_subject,
            folder=Path(folder),
            samples=samples,
            confirm_windows=confirm_windows,
            report_windows=report_windows,
            context_length=context_length,
            dtype="float32",
            seed=seed,
        )
        subjects = {Path(name).stem: load(name) for name in models}
        third: dict[str, Subject] = {}
        if third_steps:
            training = train_third(Path(folder), third_steps, context_length, seed)
            third[training.folder.name] = subject = load(str(training.folder))
            document["conditions"]["third_model"] = about_third(training, subject)
        for text in patterns:
            pattern = Pattern.parse(text, None if ":" in text else scope)
            request = SearchRequest(pattern=pattern, trials=trials, seed=seed)
            own = {name: find(name, subject, request) for name, subject in subjects.items()}
            joint = find_jointly(subjects, request)
            for name, subject in subjects.items():
                say(f"{pattern} on {name}")
                document["transfer"].append(measure(name, subject, pattern, own, joint))
                others = [c for origin, c in own.items() if origin != name]
                document["warm_start"].append(
                    {"model": name, "pattern": str(pattern), "scope": pattern.scope.value,
                     **saving(subject, request, others, seeds)}
                )  # fmt: skip
            for name, subject in third.items():
                say(f"{pattern} on {name}")
                known = {**own, name: find(name, subject, request)}
                document["transfer"].append(measure(name, subject, pattern, known, joint))
    show(document)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def train_third(folder: Path, steps: int, context_length: int, seed: int) -> Training:
    """A model that is trained on the calibration part of the texts alone."""
    text = TextSource(path=str(write_texts(folder / "texts")["calibration"]))
    return train_small_model(
        text,
        folder / "small-llama",
        steps=steps,
        context_length=context_length,
        seed=seed,
        progress=progress,
    )


def about_third(training: Training, subject: Subject) -> dict[str, Any]:
    """What to print of the third model: its training, and how good it is before pruning."""
    dense = rate_perplexity(subject.model.model, subject.report.windows)
    return {
        **asdict(training),
        "folder": training.folder.name,
        "report_perplexity": round(dense.perplexity, 3),
    }


def find(name: str, subject: Subject, request: SearchRequest) -> Configuration:
    """A model's own best, confirmed."""
    say(f"{request.pattern}: searching on {name}")
    return search_job(
        request,
        subject.work,
        run=Run(device=str(subject.model.device), progress=progress),
    ).configuration


def find_jointly(subjects: Mapping[str, Subject], request: SearchRequest) -> Configuration:
    """The best on the mean over all models, by the proxy alone."""
    bundles = {name: subject.bundle for name, subject in subjects.items()}
    asked = replace(request, objective=Objective(over="mean"))
    device = str(next(iter(subjects.values())).model.device)
    return search_job(
        asked, Work(bundles=bundles), run=Run(device=device, progress=progress)
    ).configuration


def measure(
    name: str,
    subject: Subject,
    pattern: Pattern,
    own: Mapping[str, Configuration],
    joint: Configuration,
) -> dict[str, Any]:
    """Perplexities on the report text, proxies, and regrets, of one model and pattern."""
    candidates = {
        **reference_methods(pattern),
        "own": own[name].candidate(),
        **{f"of {origin}": c.candidate() for origin, c in own.items() if origin != name},
        "joint": joint.candidate(),
    }
    rows = compare_candidates(
        subject.work,
        list(candidates.items()),
        run=Run(device=str(subject.model.device), progress=progress),
    )
    perplexities: dict[str, float | None] = {row.method: row.perplexity for row in rows}
    proxies = {row.method: row.proxy for row in rows}
    taken = [method for method in candidates if method not in ("wanda", "ria", "own")]
    return {
        "model": name,
        "pattern": str(pattern),
        "scope": pattern.scope.value,
        "perplexities": perplexities,
        "proxies": proxies,
        "regret": {m: regret({**perplexities, "transferred": perplexities[m]}) for m in taken},
        "proxy_regret": {m: regret({**proxies, "transferred": proxies[m]}) for m in taken},
    }


def saving(
    subject: Subject, request: SearchRequest, others: Sequence[Configuration], seeds: int
) -> dict[str, Any]:
    """Trials until a search has the best of a cold one, cold and warm, for each seed."""
    evaluate = rate_by_proxy(
        ProxyEvaluator(subject.bundle, str(subject.model.device)), request.objective
    )
    start = tuple(c.candidate() for c in others)
    counts = []
    with progress("Searching cold and warm", seeds) as advance:
        for seed in range(seeds):
            asked = replace(request, seed=seed)
            cold, warm = (
                run_search(
                    optuna.create_study(),
                    replace(asked, warm_start=points).plan(subject.bundle.kernel_sizes),
                    evaluate,
                )
                for points in ((), start)
            )
            counts.append(tuple(trials_until(each, cold[0].value) for each in (cold, warm)))
            advance(1)
    return {"cold": [cold for cold, _ in counts], "warm": [warm for _, warm in counts]}


def trials_until(rated: Sequence[RatedCandidate], goal: float) -> int | None:
    """Trials until a value is as low as ``goal``; None if none is."""
    return min((each.number + 1 for each in rated if each.value <= goal), default=None)


def show(document: Mapping[str, Any]) -> None:
    """Print the conditions, and a table each of perplexities, regrets and saved trials."""
    for name, value in document["conditions"].items():
        click.echo(f"{name}: {value if isinstance(value, (str, int)) else json.dumps(value)}")
    rows = []
    for cell in document["transfer"]:
        for method, value in cell["perplexities"].items():
            lost, by_proxy = (cell[k].get(method) for k in ("regret", "proxy_regret"))
            ria = cell["perplexities"]["ria"]
            rows.append(
                (
                    f"{cell['model']} {cell['pattern']} {cell['scope']}",
                    method,
                    f"{value:.3f}",
                    None if method in ("dense", "ria", "wanda") else f"{ria - value:.3f}",
                    None if lost is None else f"{lost:.0%}",
                    None if by_proxy is None else f"{by_proxy:.0%}",
                    "no better than RIA" if method not in ("dense", "ria", "wanda") and value >= ria
                    else None,
                )
            )  # fmt: skip
    print_table(
        "What a configuration is worth elsewhere",
        ("on", "method", "perplexity", "gain over RIA", "regret", "by the proxy", ""),
        rows,
        caption="Perplexity on the report text. Regret: the share of the own best's gain over RIA "
        "that is lost; below 0 it is better than the own best; empty where the own best gains "
        "nothing. joint: found on all models but small-llama at once, by the proxy alone.",
    )
    print_table(
        "Trials until a search is as good as a cold one in the end",
        ("on", "cold", "warm", "searches that never were"),
        [
            (
                f"{cell['model']} {cell['pattern']} {cell['scope']}",
                f"{statistics.median(cell['cold']):g}",
                _median(cell["warm"], document["conditions"]["trials"]),
                sum(count is None for count in cell["warm"]),
            )
            for cell in document["warm_start"]
        ],
        caption=f"Median of {document['conditions']['seeds']} seeds, baselines included. Warm: "
        "from the other models' own best. One that never was counts as all of its trials.",
    )


def _median(counts: Sequence[int | None], most: int) -> str:
    return f"{statistics.median(most if count is None else count for count in counts):g}"


if __name__ == "__main__":
    main()
