"""`pho evaluate`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    Terminal,
    at_least,
    check_models,
    device_options,
    json_option,
    text_source,
)
from pho_service.cli.terminal import print_json, progress, say, show_table, verb, working
from pho_service.errors import InvalidInput
from pho_service.host.usual_texts import USUAL_TEXTS
from pho_service.spec.numbers import number
from pho_service.spec.tasks import task_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pho_service.models.loading import LanguageModel
    from pho_service.models.task_files import LoadedTasks
    from pho_service.pipeline.rating import ReportText
    from pho_service.spec.fields import CalibrationSpec, TextSpec
    from pho_service.spec.numbers import number
from pho_service.spec.tasks import TaskScore

_TEXT = ("calibration/text", "calibration/dataset")

TASK_FIELDS = ("tasks", "tasks_dir", "tasks_limit")


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
)  # fmt: skip
@click.argument("model")
@click.option(
    "--split", help="Split of the data set.  [default: test, or the only one that there is]"
)
@click.option("--max-windows", type=int, help="Rate only the first N windows.")
@device_options
@json_option
@verb
def evaluate(
    model: str,
    given: Given,
    split: str | None,
    max_windows: int | None,
    inputs: Terminal,
    as_json: bool,
) -> None:
    """
    Print the perplexity of MODEL on a text, or what it scores in zero-shot tasks.

    MODEL is a hub id, a local folder or a .gguf file. The text is joined,
    tokenised once and cut into windows that do not overlap; the tail is
    dropped. tokens counts the predicted ones, all but the first of a window.
    With --tasks, a perplexity is measured only if a text is given, too.

    \b
    Example:
      pho evaluate pruned --text report.txt --context-length 512
      pho evaluate pruned --dataset wikitext2
      pho evaluate pruned --tasks boolq,arc_easy --limit 200
    """
    at_least(1, max_windows=max_windows)
    loaded_tasks, limit = load_asked_tasks(given), given("tasks_limit")
    how = given.calibration()
    check_models([model], given("revision"))
    measured = loaded_tasks is None or any(field in given.said for field in _TEXT)
    source = text_source(_measured_on(given, split), measured=True) if measured else None
    loaded = inputs.model(model)
    document: dict[str, Any] = {"model": loaded.to_dict(), "device": str(loaded.device)}
    if source is not None:
        document = {
            **_perplexity(loaded, inputs.report(loaded, source, how, max_windows), how),
            **document,
        }
    scores: Sequence[TaskScore] = ()
    if loaded_tasks is not None:
        from pho_service.pipeline.tasks import measure_tasks, tasks_document

        scores = measure_tasks(loaded, loaded_tasks, bos=how.bos, limit=limit, progress=progress)
        document |= tasks_document(loaded, scores, bos=how.bos, limit=limit)
    if as_json:
        print_json(document)
        return
    if "perplexity" in document:
        _show_perplexity(document)
    if scores:
        _show_scores(document, scores)


def _measured_on(given: Given, split: str | None) -> "TextSpec":
    """The text that the options name; that of papers from C4 if they name none, which is said."""
    from pho_service.spec.fields import TextSpec

    given.calibration()  # refuses what breaks a rule, by the options' names
    named = {
        path.removeprefix("calibration/"): said
        for path, said in given.said.items()
        if path.removeprefix("calibration/") in TextSpec.model_fields
    }
    if not any(field in given.said for field in _TEXT):
        say("No --text given: using c4, the validation part as papers take it.")
        named["dataset"] = "c4"
    if split is not None:
        if named.get("dataset") in USUAL_TEXTS or "dataset" not in named:
            raise InvalidInput(
                f"--split {split} is of a data set that is named by its own name. Leave it out, or "
                "give --dataset."
            )
        named["split"] = split
    return TextSpec(**named)


def load_asked_tasks(given: Given) -> "LoadedTasks | None":
    """
    The tasks of --tasks, found before a model is opened; None if none are asked for.

    Raises:
        InvalidInput: Options of tasks are given, but no task; or a task is not there.
    """
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
        from pho_service.models.task_files import load_tasks

        return load_tasks(names, None if folder is None else Path(folder))


def _perplexity(
    loaded: "LanguageModel", text: "ReportText", how: "CalibrationSpec"
) -> dict[str, Any]:
    """The perplexity, with all that it depends on."""
    from pho_service.models.blockwise import measure_perplexity

    with progress("Measuring perplexity", len(text.windows)) as advance:
        result = measure_perplexity(loaded, text.windows, advance=advance)
    return {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "windows": result.windows,
        "context_length": how.context_length,
        "bos": bool(loaded.window_prefix(how.bos)),
        "text": text.record.source,
        "text_sha256": text.record.sha256,
    }


def _show_perplexity(document: dict[str, Any]) -> None:
    click.echo(
        f"perplexity {number(document['perplexity'])}\n"
        f"tokens     {document['tokens']} in {document['windows']} windows of "
        f"{document['context_length']}, {'with' if document['bos'] else 'without'} BOS\n"
        f"text       {document['text']}\n"
        f"sha256     {document['text_sha256']}"
    )


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
