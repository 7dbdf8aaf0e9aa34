"""
`pho demo` and `pho example`: the main job with everything built in.
"""

import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from pho_service.cli.document import DOCUMENT, DocumentCommand, Given
from pho_service.cli.options import Terminal, file_source, json_verb, text_source
from pho_service.cli.terminal import print_json, progress, say, show_table
from pho_service.host.files import new_file, new_folder
from pho_service.progress import Run, about, one_bar
from pho_service.spec.document import FieldShown, number
from pho_service.spec.pattern import ScopeName

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import ReportText
    from pho_service.pipeline.compare import Comparison, ComparisonRow
    from pho_service.pipeline.work import Work
    from pho_service.spec.configuration import Configuration
    from pho_service.spec.job import JobSpec
    from pho_service.tuning.result import SearchResult


# Few windows: the demo shows what there is, and does not measure for good.
CONTEXT_LENGTH = 512
CALIBRATION_WINDOWS, FISHER_WINDOWS, CONFIRMATION_WINDOWS, REPORT_WINDOWS = 6, 4, 3, 6
SHOWN = ("score", "crepe-plus", "best")
BASELINES = ("wanda", "ria-row", "sparsegpt")
CALIBRATE, SEARCH = "calibrate, once for all", "search with {}"
COMPARE, PRUNE = "compare with Wanda, RIA and SparseGPT", "prune with what best found"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Model, texts and study that all searches of the demo share."""

    work: "Work"
    report: "ReportText"
    study: str
    run: Run

    def searched(self, spec: "JobSpec") -> "SearchResult":
        """Search; confirm where that takes seconds, not where each finalist takes minutes."""
        from pho_service.pipeline.search import opened_study, search_job
        from storage.studies import keep_record

        request, work = spec.request(0), replace(self.work, cache_dir=None)
        with opened_study(self.study, request, work) as record:
            keep_record(record, DOCUMENT, spec.model_dump(mode="json"))
            if request.steps.needs_text:
                work = replace(work, dense=None, confirm=None)
            return search_job(request, work, study=record, run=self.run)

    def pruned(
        self, configuration: "Configuration", judged_by: "Configuration", folder: Path
    ) -> "tuple[Configuration, ComparisonRow]":
        """Prune with what was found for good, measure it, and write the model."""
        from pho_service.models.saving import save_pruned
        from pho_service.pipeline.compare import ComparisonRow
        from pho_service.pipeline.prune import prune_in_place
        from pho_service.pipeline.rating import perplexity_on
        from pho_service.pipeline.writing import side_by_side, written_by
        from pho_service.pruning.hardware import peak_memory
        from pho_service.spec.configuration import Confirmation

        model, confirm, started = self.work.model, self.work.text, time.perf_counter()

        texts, windows = (self.report, confirm), confirm.windows
        dense = [perplexity_on(text, model, progress) for text in texts]
        said = {"dense": written_by(model, windows)}
        with peak_memory(*model.devices) as peak:
            pruned = prune_in_place(self.work, configuration, progress=progress)
            after = [perplexity_on(text, model, progress) for text in texts]
        said["pruned"] = written_by(model, windows)
        reported, confirmed = (now.against(was) for now, was in zip(after, dense, strict=True))
        others = judged_by.perplexities
        perplexity = confirmed.perplexity
        errors = {} if confirmed.error is None else {"dense": confirmed.error}
        errors |= {k: e for k, e in (others.errors if others else {}).items() if "/" in k}
        good = others and others.model_copy(update={"pruned": perplexity, "errors": errors})
        confirmation = Confirmation(perplexity=perplexity, **confirm.measured_on())
        configuration = configuration.model_copy(
            update={
                "confirmation": confirmation,
                "perplexities": good,
                "continuations": side_by_side(model, windows, **said),
            }
        )
        recipe = {**pruned.recipe, "configuration": configuration.model_dump(mode="json")}
        save_pruned(model, folder, pruned.masks.items(), recipe)
        return configuration, ComparisonRow(
            method="best", scope=configuration.scope, perplexity=reported.perplexity,
            sparsity=pruned.sparsity, error=reported.rise_error,
            proxy=configuration.objective["value"], seconds=time.perf_counter() - started,
            memory_bytes=peak(),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _DemoAsk:
    """
    What the demo is shown at, and where its results go.

    Attributes:
        out: Folder for all results.
        pattern: 0.5, 2:4 and so on.
        scope: Scope in which weights compete.
    """

    out: str = "demo"
    pattern: str = "0.5"
    scope: Annotated[
        ScopeName | None, FieldShown(default="layer; global for score; row for N:M")
    ] = None


@click.command(cls=DocumentCommand, fields=("trials", "seed"), ask=_DemoAsk)
@json_verb
def demo(given: Given, ask: _DemoAsk, as_json: bool) -> None:
    """
    Run the main job on SmolLM2-135M, with built-in texts and settings.

    The presets score, crepe-plus and best are searched on one bundle, and
    compared with Wanda, RIA and SparseGPT; what best finds is pruned and written.

    \b
    Example:
      pho demo --out demo
      pho demo --out demo24 --pattern 2:4
    """
    from pho_service.host.files import check_free
    from pho_service.models.builtin import PARTS, smollm2, write_texts
    from pho_service.pipeline.compare import ComparisonRequest, compare_over_seeds
    from pho_service.pipeline.search import check_study_url
    from pho_service.shown.tables import continuations_table
    from pho_service.spec.configuration import write_configuration

    folder, pattern, scope = Path(ask.out).expanduser(), ask.pattern, ask.scope
    if folder.exists():
        check_free(folder / "pruned")
    gguf = smollm2()
    texts = {part: str(folder / "texts" / f"{part}.jsonl") for part in PARTS}
    shared = {
        "calibration": {
            "text": texts["calibration"], "samples": CALIBRATION_WINDOWS,
            "context_length": CONTEXT_LENGTH, "fisher_samples": FISHER_WINDOWS,
        },
        "confirm": {"text": texts["confirmation"], "windows": CONFIRMATION_WINDOWS, "finalists": 2},
    }  # fmt: skip
    specs = {
        name: given.job({**_asked(given, name, str(gguf), pattern, scope), **shared})
        for name in SHOWN
    }
    write_texts(folder / "texts", apart=True)  # nothing is measured on what was chosen on
    study = f"sqlite:///{folder / 'study.db'}"
    check_study_url(study)
    settings, parsed = specs["score"].calibration.settings(), specs["score"].pruning()
    inputs = Terminal(cache_dir=folder / "cache")
    source = text_source(specs["score"].calibration)
    model = inputs.model(str(gguf))
    planned = _planned(specs, model)
    say(f"{len(planned)} steps, {about(sum(planned.values()))} at this machine's present speed.")
    with one_bar(planned, say) as steps:
        steps.begin(CALIBRATE)
        opened = inputs.calibrated(model, source, settings, specs["score"].confirm)
        report = inputs.report(model, file_source(texts["report"]), settings, REPORT_WINDOWS)
        place = _Place(work=opened, report=report, study=study, run=inputs.run(model))
        results = {}
        for name, spec in specs.items():
            steps.begin(SEARCH.format(name))
            results[name] = place.searched(spec)
        configurations = {name: result.configuration for name, result in results.items()}
        first = [(name, configurations[name]) for name in SHOWN[:-1]]
        steps.begin(COMPARE)
        request = ComparisonRequest(pattern=parsed, configurations=first, methods=BASELINES)
        compared = compare_over_seeds(
            model, report, request, {settings.seed: lambda: opened}, run=place.run
        )
        steps.begin(PRUNE)
        configurations["best"], row = place.pruned(
            configurations["best"], configurations["score"], folder / "pruned"
        )
    compared = replace(
        compared,
        # The lowest of the others is not that of all.
        rows=[*(replace(preset_row, behind=None) for preset_row in compared.rows), row],
        seeds={seed: [*rows, row] for seed, rows in compared.seeds.items()},
    )
    config = folder / "config.json"
    write_configuration(configurations["best"], config)
    for name, configuration in first:
        write_configuration(configuration, folder / f"{name}.json")
    for warning in results["score"].warnings:
        say(f"Note: {warning}")
    if as_json:
        print_json(compared.to_dict())
        return
    show_table(compared.table, spare=("peak memory", "seconds", "proxy", "scope"))
    show_table(continuations_table(configurations["best"].continuations))
    files, pruned = ", ".join(f"{name}.json" for name in ("config", *SHOWN[:-1])), folder / "pruned"
    click.echo(
        f"\n{_verdict(compared)}\n\n"
        f"Written to {folder}: the model in pruned, what it was pruned with and what the other "
        f"presets found in {files}, all trials in study.db. Next, in Python and in a shell:\n"
        f"  model = transformers.AutoModelForCausalLM.from_pretrained({str(pruned)!r})\n"
        f"  pho prune --check {shlex.quote(str(pruned))}\n"
        f"  pho generate {shlex.quote(str(pruned))} --prompt 'The list is'\n"
        f"  optuna-dashboard {study}"
    )


def _planned(specs: "Mapping[str, JobSpec]", model: "LanguageModel") -> dict[str, float]:
    """The seconds of each step, by the rates that the model runs at on this machine."""
    from pho_service.pipeline.minutes import machine_of
    from pho_service.planning.plan import plan_job
    from pho_service.planning.shapes import read_shapes

    shapes = read_shapes(specs["score"].model)
    machine = machine_of(model, shapes, specs["score"])
    costs = {name: plan_job(spec, shapes, machine).costs for name, spec in specs.items()}
    score, masks, best = costs.values()
    searches = {SEARCH.format(name): each.search() for name, each in costs.items()}
    searches[SEARCH.format("score")] += score.confirmation()  # the others run a text for each mask
    measured = 4 * score.measured() + 2 * masks.measured()  # dense, Wanda and RIA; SparseGPT
    return {
        CALIBRATE: score.hashing() + score.calibration(),
        **searches,
        COMPARE: measured * REPORT_WINDOWS / CONFIRMATION_WINDOWS,
        PRUNE: best.pruned() + best.saving() + 6 * best.perplexity() + best.written(),
    }


def _verdict(compared: "Comparison") -> str:
    """What came of it, in a sentence."""
    rows = {row.method: row for row in compared.rows}
    share = f"{rows['best'].sparsity:.0%}"
    best, wanda = (compared.over_dense(rows[name]) for name in ("best", "wanda"))
    return (
        f"{'Half' if share == '50%' else share} of the weights are removed. Perplexity: "
        f"{number(rows['dense'].perplexity)} dense, {number(best.perplexity)} with best ({best}), "
        f"{number(wanda.perplexity)} with Wanda by the norms of the dense model ({wanda})."
    )


def _asked(
    given: Given, preset: str, model: str, pattern: str, scope: str | None
) -> Mapping[str, Any]:
    """The document of a preset's search, without its texts."""
    widest = "global" if preset == "score" else "layer"
    scope = scope or (None if ":" in pattern else widest)
    return given.document({"model": model, "pattern": pattern, "preset": preset, "scope": scope})


@click.command()
@click.option("--out", default="example", show_default=True, help="Folder for the files.")
@click.option(
    "--small",
    is_flag=True,
    help="Instead of SmolLM2, train a LLaMA of 29,736 weights on the first text, in less than "
    "twenty seconds: every verb takes seconds on it.",
)
@json_verb
def example(out: str, small: bool, as_json: bool) -> None:
    """
    Write SmolLM2-135M and three texts to a folder, to try things on.

    The texts are Python's documentation in three parts: to calibrate, confirm and
    report on.

    \b
    Example:
      pho example --out example
      pho search example/smollm2.gguf --pattern 0.5 --text example/calibration.jsonl \\
          --samples 32 --context-length 512
    """
    from pho_service.models.builtin import smollm2, write_texts

    folder = Path(out).expanduser()
    if small:
        texts = write_texts(folder, apart=True)
        model = folder / "small-llama"
        with new_folder(model, replacing="config.json") as partial_folder:
            _train(texts["calibration"], partial_folder)
    else:
        source = smollm2()
        model = folder / "smollm2.gguf"
        texts = write_texts(folder, apart=True)
        with new_file(model) as partial:
            shutil.copyfile(source, partial)
    paths = list(texts.values())
    written = [str(path) for path in (model, *paths)]
    if as_json:
        print_json(written)
        return
    click.echo("\n".join(written))


def _train(text: Path, folder: Path) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pho_service.models import builtin
    from pho_service.models.data_sets import TextSource

    disable_progress_bar()  # ours is shown
    torch.set_num_threads(1)  # more would wait for each other most of the time
    builtin.train_small_model(
        TextSource(path=str(text)),
        folder,
        steps=builtin.EXAMPLE_STEPS,
        context_length=builtin.EXAMPLE_CONTEXT,
        seed=0,
        shape=builtin.EXAMPLE,
        progress=progress,
    )
