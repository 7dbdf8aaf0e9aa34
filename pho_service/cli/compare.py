"""
`pho evaluate`, `pho generate`, `pho compare` and `pho bench`: models measured beside each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.minutes import calibrated_in_minutes
from pho_service.cli.options import (
    Terminal,
    at_least,
    calibration_source,
    check_models,
    device_options,
    file_source,
    json_verb,
    text_source,
)
from pho_service.cli.terminal import (
    loading,
    print_json,
    print_table,
    progress,
    say,
    show_table,
    working,
)
from pho_service.errors import InvalidInput
from pho_service.host.data_sets import USUAL_TEXTS
from pho_service.spec.configuration import NEW_TOKENS
from pho_service.spec.document import PRUNED, TEXT, FieldShown, check_choice, part_of, with_error
from pho_service.spec.objective import SearchOptions, options_of
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.perplexity import beside_in_words
from pho_service.spec.recovery import Recovery
from pho_service.spec.tasks import TaskScore, task_names
from pho_service.spec.verbs import (
    BenchSettings,
    CompareAsk,
    Count,
    EvaluateAsk,
    LlamaAsk,
    Reported,
    Where,
)

if TYPE_CHECKING:
    from pho_service.models.data_sets import TextSource
    from pho_service.models.loading import LanguageModel
    from pho_service.models.tasks import LoadedTasks
    from pho_service.models.texts import MixedText
    from pho_service.pipeline.compare import Comparison
    from pho_service.pipeline.work import Work
    from pho_service.planning.plan import ComparedWork
    from pho_service.spec.fields import CalibrationSpec, TextSpec
    from pho_service.spec.job import JobSpec


_TEXT = ("calibration/text", "calibration/dataset")

TASK_FIELDS = ("tasks", "tasks_dir", "tasks_limit")


@dataclass(frozen=True, kw_only=True)
class _EvaluateAsk(EvaluateAsk):
    """
    What a model is measured on and beside, besides the text and the tasks.

    Attributes:
        split: Split of the data set.
        beside: Another model that the perplexity stands beside.
    """

    split: Annotated[
        str | None,
        FieldShown(section=TEXT, default="test, or the only one that there is"),
    ] = None
    beside: Annotated[str | None, FieldShown(picks="models")] = None


@click.command(
    cls=DocumentCommand,
    fields=(
        *(
            f"calibration/{field}"
            for field in ("text", "dataset", "dataset_config", "data_file", "field")
        ),
        "calibration/context_length", "calibration/bos", "revision", "dtype", "stream",
        *TASK_FIELDS,
    ),
    ask=_EvaluateAsk,
)  # fmt: skip
@click.argument("model")
@device_options
@json_verb
def evaluate(model: str, given: Given, ask: _EvaluateAsk, inputs: Terminal, as_json: bool) -> None:
    """
    Print the perplexity of MODEL on a text, or what it scores in zero-shot tasks.

    MODEL is a hub id, a local folder or a .gguf file. With --tasks, a perplexity
    is measured only if a text is given, too. --beside tells how far MODEL is from
    another model on this text, which is far surer than each one's error (±).

    \b
    Example:
      pho evaluate pruned --text report.txt --context-length 512
      pho evaluate pruned --beside dense --text report.txt
      pho evaluate pruned --dataset wikitext2
      pho evaluate pruned --tasks boolq,arc_easy --limit 200
    """
    beside = ask.beside
    loaded_tasks, limit = load_asked_tasks(given), given("tasks_limit")
    how = given.calibration()
    check_models([model], given("revision"))
    check_models([] if beside is None else [beside])
    measured = loaded_tasks is None or any(field in given.said for field in _TEXT)
    if beside is not None and not measured:
        raise InvalidInput("--beside compares perplexities, and no text is given. Add --text.")
    source = text_source(_measured_on(given, ask.split), measured=True) if measured else None
    loaded = inputs.model(model)
    document: dict[str, Any] = {"model": loaded.to_dict(), "device": str(loaded.device)}
    if source is not None:
        from pho_service.pipeline import rating

        text = inputs.report(loaded, source, how, ask.max_windows)
        bos = bool(loaded.window_prefix(how.bos))
        perplexity = rating.perplexity_on(text, loaded, progress)
        notes = rating.favoured_folder(model, loaded, source, text)
        document = {**rating.evaluated(text, perplexity), "bos": bos, **document, "notes": notes}
    scores: Sequence[TaskScore] = ()
    if loaded_tasks is not None:
        from pho_service.pipeline.tasks import measure_tasks, tasks_document

        scores = measure_tasks(loaded, loaded_tasks, bos=how.bos, limit=limit, progress=progress)
        document |= tasks_document(loaded, scores, bos=how.bos, limit=limit)
    if source is not None and beside is not None:
        del loaded  # which the other one may need the memory of
        other = replace(inputs, revision=None).model(beside)
        its = inputs.report(other, source, how, ask.max_windows)
        document["beside"] = rating.beside(perplexity, text, other, its, progress)
        document["notes"] += rating.favoured_folder(beside, other, source, text)
    if as_json:
        print_json(document)
        return
    if "perplexity" in document:
        _show_perplexity(document)
    if scores:
        _show_scores(document, scores)


@dataclass(frozen=True, kw_only=True)
class _GenerateAsk(Where):
    """
    What a model goes on with, and how far.

    Attributes:
        beside: Another model that goes on with the same prompts.
        prompts: Text to go on with.
        text: Text file that three prompts are taken from instead.
        tokens: Most that are written.
    """

    beside: Annotated[str | None, FieldShown(picks="models")] = None
    prompts: Annotated[Sequence[str], FieldShown(option="--prompt")] = ()
    text: str | None = None
    tokens: Count = NEW_TOKENS


@click.command(cls=DocumentCommand, ask=_GenerateAsk)
@click.argument("model")
@json_verb
def generate(model: str, ask: _GenerateAsk, as_json: bool) -> None:
    """
    Print what MODEL writes after a prompt, by greedy decoding.

    MODEL is a folder, packed or not, a hub id or a .gguf file; --beside shows
    another one next to it, such as the dense model next to the pruned one.

    \b
    Example:
      pho generate pruned --beside dense --prompt "The sea is" --tokens 20
      pho generate pruned --beside dense --text report.txt
    """
    text = ask.text
    if bool(ask.prompts) == (text is not None):
        raise InvalidInput("Give either --prompt, once or more, or --text.")
    names = [model] if ask.beside is None else [ask.beside, model]
    if len({*names}) < len(names):
        raise InvalidInput(f"--beside {ask.beside} is the model itself. Give another one.")
    check_models(names, None, text)
    from pho_service.models.loading import load_model
    from pho_service.models.texts import read_windows
    from pho_service.pipeline.writing import PROMPT_TOKENS, beginnings, texts_of, write
    from pho_service.shown.parts import Table

    starts, continuations = [*ask.prompts], []
    for name in names:
        with loading(name):
            loaded = load_model(name, device=ask.device, dtype=ask.dtype)
        if text is not None and not starts:
            windows, _ = read_windows(
                loaded, file_source(text), context_length=PROMPT_TOKENS, bos="never"
            )
            starts = texts_of(loaded, beginnings(windows))
        with working(f"Writing with {name}"):
            continuations.append(write(loaded, starts, ask.tokens))
    rows = [*zip(starts, *continuations, strict=True)]
    if as_json:
        print_json([dict(zip(("prompt", *names), row, strict=True)) for row in rows])
        return
    title = f"At most {ask.tokens} tokens, each the likeliest"
    show_table(Table(("prompt", *names), rows, title=title, numbers=False, texts=True))


def _measured_on(given: Given, split: str | None) -> "TextSpec":
    """The text that the options name; that of papers from C4 if they name none, which is said."""
    from pho_service.spec.fields import TextSpec

    given.calibration()  # refuses what breaks a rule, by the options' names
    text_fields = {
        path.removeprefix("calibration/"): value
        for path, value in given.said.items()
        if path.removeprefix("calibration/") in TextSpec.model_fields
    }
    if not any(field in given.said for field in _TEXT):
        say("No --text given: using c4, the validation part as papers take it.")
        text_fields["dataset"] = "c4"
    if split is not None:
        if text_fields.get("dataset") in USUAL_TEXTS or "dataset" not in text_fields:
            raise InvalidInput(
                f"--split {split} is of a data set that is named by its own name. Leave it out, or "
                "give --dataset."
            )
        text_fields["split"] = split
    return TextSpec(**text_fields)


def load_asked_tasks(given: Given) -> "LoadedTasks | None":
    """The tasks of --tasks, found before a model is opened; None if none are asked for."""
    tasks, *others = TASK_FIELDS
    if given(tasks) is None:
        for field in others:
            if given(field) is not None:
                raise InvalidInput(
                    f"{given.names[field]} {given(field)} is of tasks, but none is named. Add "
                    "--tasks."
                )
        return None
    at_least(1, limit=given("tasks_limit"))
    names, folder = task_names(given(tasks)), given("tasks_dir")
    import lm_eval  # noqa: F401 - without it a sentence says so, and nothing else is shown

    with working("Reading tasks"):
        from pho_service.models.tasks import load_tasks

        return load_tasks(names, None if folder is None else Path(folder))


def _show_perplexity(document: dict[str, Any]) -> None:
    click.echo(
        f"perplexity {with_error(document['perplexity'], document['error'])}\n"
        f"tokens     {document['tokens']} in {document['windows']} windows of "
        f"{document['context_length']}, {'with' if document['bos'] else 'without'} BOS\n"
        f"text       {document['text']}\n"
        f"sha256     {document['text_sha256']}"
    )
    if beside := document.get("beside"):
        click.echo(f"beside     {beside_in_words(document['perplexity'], beside)}")
    for note in document["notes"]:
        say(note)


def _show_scores(document: dict[str, Any], scores: "Sequence[TaskScore]") -> None:
    from pho_service.shown.tables import scores_table

    used = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    where = f"{document['model']['dtype']} on {document['device']}"
    bos = "with" if document["bos"] else "without"
    table = scores_table(scores)
    name = Path(document["model"]["name"]).name
    show_table(
        replace(
            table,
            title=f"{name}: zero-shot tasks",
            notes=(*table.notes, f"{bos.capitalize()} BOS; {where}; {used}."),
        )
    )


# The seed is the calibration's.
_OF_SEARCHES = (
    *(name for name in options_of(SearchOptions()) if name != "seed"),
    "confirm/text", "confirm/windows", "confirm/finalists",
)  # fmt: skip
_OF_RECOVERIES = tuple(f"recovery/{field.name}" for field in fields(Recovery))


@dataclass(frozen=True, kw_only=True)
class _CompareAsk(Reported, CompareAsk):
    """
    The rows of a comparison, and the text that they are measured on.

    Attributes:
        config: A configuration to compare.
    """

    config: Annotated[Sequence[str], FieldShown(section=PRUNED)] = ()


@click.command(
    cls=DocumentCommand,
    fields=(
        "pattern", "scope", "steps/linears", "calibration", "revision", "dtype", "stream",
        "minutes", *_OF_SEARCHES, *TASK_FIELDS, *_OF_RECOVERIES,
    ),
    required=("pattern",),
    ask=_CompareAsk,
)  # fmt: skip
@click.argument("model")
@device_options
@json_verb
def compare(model: str, given: Given, ask: _CompareAsk, inputs: Terminal, as_json: bool) -> None:
    """
    Print a table of perplexities: dense, the published methods, configurations.

    All rows share the calibration windows, the text and the pattern. A name that
    ends in -sequential takes activation norms from the pruned blocks before; at
    N:M, one that ends in -permuted reorders channels. With --recover-tokens or
    --recover-minutes, what is found is recovered, too: a row more for each, with
    time of its own.

    \b
    Example:
      pho compare HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text book.txt \\
          --report-text other.txt --config config.json
      pho compare HuggingFaceTB/SmolLM2-135M --pattern 2:4 --text book.txt \\
          --confirm-text second.txt --report-text other.txt --seeds 0,1,2 \\
          --method wanda-permuted --method sparsegpt-permuted --preset best
    """
    from pho_service.models.texts import RecoveryText
    from pho_service.pipeline.compare import (
        ComparisonRequest,
        check_family,
        common_linears,
        compare_over_seeds,
    )
    from pho_service.pipeline.curve import check_patterns
    from pho_service.pipeline.tasks import also_tasks
    from pho_service.planning.plan import SHORT_WINDOW, ComparedWork
    from pho_service.spec.configuration import read_configuration

    measured = ask.report
    if measured is None:
        raise InvalidInput(
            "there is no text to measure on. Give --report-text or --report-dataset, such as "
            "wikitext2."
        )
    configurations = [(path, read_configuration(Path(path))) for path in ask.config]
    pattern = Pattern.parse(given("pattern"), given("scope"))
    given_linears = given.part("steps/linears", Linears) or None
    linears = common_linears(configurations, pattern, given_linears)
    searches = _searches(model, given, ask.presets, linears)
    recovers = "recovery" in given.document()
    request = ComparisonRequest(
        pattern=pattern,
        configurations=configurations,
        methods=ask.methods,
        searches={name: spec.request(0) for name, spec in searches.items()},
        linears=linears,
        ablation=ask.ablation,
        recovery=given.part("recovery", Recovery) if recovers else None,
    )
    found = [configuration for _, configuration in configurations]
    calibration, drawn = given.calibration(found), _seeds(ask.seeds, given)
    loaded_tasks = load_asked_tasks(given)
    check_models([model], given("revision"), given("confirm/text"))
    report_source = text_source(measured, measured=True)
    source = calibration_source(calibration)
    loaded = inputs.model(model)
    if not configurations:
        steps = [candidate.steps for _, candidate in request.rows([], has_text=True)[0]]
        short = replace(
            calibration.settings(), context_length=min(SHORT_WINDOW, loaded.longest or SHORT_WINDOW)
        )
        work = ComparedWork(
            rows=[*steps, *(search.steps for search in request.searches.values())],
            searches=[*searches.values()],
            windows=len(inputs.report(loaded, report_source, short, measured.windows).windows),
            calibrations=len(drawn),
        )
        calibration = _in_minutes(loaded, given, source, work)
    settings = calibration.settings()
    check_patterns(loaded, [pattern], linears)
    for path, configuration in configurations:
        check_family(configuration, loaded, path, other_family=ask.other_family)
    text = inputs.report(loaded, report_source, settings, measured.windows)
    search = next(iter(searches.values()), None)  # all are confirmed on the same text
    compared = compare_over_seeds(
        loaded,
        text,
        request,
        {seed: _calibration(loaded, source, calibration, seed, search, inputs) for seed in drawn},
        text=RecoveryText(source=source, context_length=settings.context_length, bos=settings.bos),
        also=also_tasks(loaded_tasks, bos=settings.bos, limit=given("tasks_limit")),
        run=inputs.run(loaded),
    )
    if as_json:
        print_json(compared.to_dict())
        return
    show_comparison(compared)


def _in_minutes(
    model: "LanguageModel",
    given: Given,
    source: "TextSource | MixedText",
    work: "ComparedWork",
) -> "CalibrationSpec":
    """How much all rows are calibrated on, where the minutes choose it."""
    document = {**given.document(), "model": given.models[0], "confirm": None}
    document.pop("recovery", None)
    spec = given.job({name: document[name] for name in document if name not in _OF_SEARCHES})
    return calibrated_in_minutes(spec, model, source, work, f"{len(work.rows)} rows")


def _searches(
    model: str, given: Given, presets: Sequence[str], linears: Linears
) -> "dict[str, JobSpec]":
    """The document of each preset's search, as `pho submit` would send it."""
    from pho_service.spec.space import PRESETS

    for name in presets:
        check_choice("--preset", name, PRESETS)
    options = [given.names[path] for path in _OF_SEARCHES if path in given.said]
    if options and not presets:
        raise InvalidInput(
            f"{', '.join(options)}: for --preset alone, which searches. Leave it out, or give a "
            "--preset."
        )
    document = given.document({"steps": {"linears": linears.to_dict()}} if linears else {})
    document.pop("recovery", None)  # which a job has of what it prunes
    return {
        name: given.job({**document, "model": model, "preset": name})
        for name in dict.fromkeys(presets)
    }


def _seeds(seeds: Sequence[int], given: Given) -> Sequence[int]:
    """The seeds of the calibrations."""
    if seeds and "calibration/seed" in given.said:
        raise InvalidInput(
            f"--seeds and {given.names['calibration/seed']} both say how the calibration is drawn. "
            "Give one of them."
        )
    return seeds or [given("calibration/seed")]


def _calibration(
    model: "LanguageModel",
    source: "TextSource | MixedText",
    spec: "CalibrationSpec",
    seed: int,
    search: "JobSpec | None",
    inputs: Terminal,
) -> "Callable[[], Work]":
    """What calibrates on the windows of a seed, when its turn comes."""
    settings = replace(spec.settings(), seed=seed)
    confirm = None if search is None else search.confirm
    return lambda: inputs.calibrated(model, source, settings, confirm)


def show_comparison(compared: "Comparison") -> None:
    """How good it is in a line, and the table; what else was measured has one of its own."""
    click.echo(f"Perplexity: {compared.summary}")
    table, extra = compared.table, compared.extra
    show_table(table.columns_but(extra), spare=("peak memory", "seconds", "proxy", "scope"))
    if extra:
        tasks = table.columns_but([c for c in table.columns if c not in ("method", *extra)])
        note = "Share of right answers, ± standard error over the questions."
        show_table(replace(tasks, title=f"{compared.title}: tasks", notes=(note,)))


@dataclass(frozen=True, kw_only=True)
class _BenchAsk(Reported, LlamaAsk, Where, BenchSettings):
    """What is measured, and where."""


@click.command(cls=DocumentCommand, ask=_BenchAsk)
@click.argument("models", nargs=-1, required=True)
@json_verb
def bench(models: tuple[str, ...], ask: _BenchAsk, as_json: bool) -> None:
    """
    Measure how fast MODELS load, read a prompt and write, on this machine.

    Each is a folder, packed or not, a hub id or a .gguf file; the others are
    compared with the first, and all are in memory at once. --runtime llama.cpp
    measures them there, and with --report-text also how good each file is.

    \b
    Example:
      pho bench dense pruned24 pruned24.pho --batch 8
      pho bench dense pruned --runtime llama.cpp --type q8_0 --type q4_0 \\
          --report-text report.txt
    """
    from transformers.utils.logging import disable_progress_bar

    settings = part_of(ask, BenchSettings)
    disable_progress_bar()  # ours is shown
    if ask.runtime == "torch":
        from pho_service.pipeline.bench import bench as measure

        if ask.report is not None:
            raise InvalidInput(
                "--report-text is for --runtime llama.cpp. For models in torch, "
                "`pho evaluate MODEL --text FILE` gives the perplexity."
            )
        check_models(models)
        benchmark = measure(models, settings, device=ask.device, dtype=ask.dtype, progress=progress)
    else:
        from pho_service.pipeline.llama_bench import ReportedOn, bench_llama

        on = None
        if ask.report is not None:
            on = ReportedOn(text_source(ask.report, measured=True), ask.report.windows)
        benchmark = bench_llama(models, settings, ask, on, where=ask, progress=progress)
    if as_json:
        print_json(
            {
                "conditions": benchmark.conditions,
                "settings": asdict(benchmark.settings),
                "sides": [asdict(side) for side in benchmark.sides],
            }
        )
        return
    table = benchmark.table
    print_table(table.title, table.columns, table.cells, caption="\n".join(table.notes))
