"""
`pho recover`: train a pruned or smaller model towards the dense one, masks fixed.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    file_source,
    json_verb,
)
from pho_service.cli.terminal import loading, print_json, progress, say, show_table
from pho_service.errors import InvalidInput
from pho_service.progress import Run, never, one_bar
from pho_service.spec.document import MODEL, REPORT, FieldShown
from pho_service.spec.recovery import Recovered, Recovery

if TYPE_CHECKING:
    from pho_service.models.texts import RecoveryText
    from pho_service.pipeline.work import Work
    from pho_service.spec.job import JobSpec

_TEXT = (
    "text", "dataset", "dataset_config", "data_file", "split", "field", "more_texts", "shares",
    "context_length", "bos",
)  # fmt: skip
_NAMES = {
    f"recovery/{field.name}": f"--{field.name.replace('_', '-')}" for field in fields(Recovery)
}


@dataclass(frozen=True, kw_only=True)
class _RecoverAsk:
    """
    Where the dense model is, and where the recovered one goes.

    Attributes:
        teacher: The dense model that FOLDER was pruned from; or a larger one.
        out: A new folder.
        confirm_text: Text file to measure perplexities on: dense, pruned, recovered. Not trained
            on; by default one window of eight of the text itself.
    """

    teacher: Annotated[str, FieldShown(section=MODEL, picks="models")]
    out: Annotated[Path, FieldShown(kind="path")]
    confirm_text: Annotated[str | None, FieldShown(section=REPORT)] = None


@click.command(
    cls=DocumentCommand,
    fields=(
        *(f"calibration/{name}" for name in _TEXT), *_NAMES, "confirm/windows", "revision", "dtype",
    ),
    names=_NAMES,
    ask=_RecoverAsk,
)  # fmt: skip
@click.argument("folder", type=click.Path(path_type=Path))
@device_options
@json_verb
def recover(folder: Path, given: Given, ask: _RecoverAsk, inputs: Terminal, as_json: bool) -> None:
    """
    Train what FOLDER keeps towards what the dense model predicts, masks fixed.

    FOLDER is a pruned model: of `pho prune`, or of any tool that writes exact
    zeros. Or it is smaller than its teacher, with fewer blocks or narrower ones
    and the same vocabulary: then all its linears are trained. Take other text
    than the calibration's, and more of it; no labels are needed. --written adds
    windows that the dense model writes. --minutes is the time for all of it. An
    interrupted run goes on with the same command.

    \b
    Example:
      pho recover pruned --teacher HuggingFaceTB/SmolLM2-135M --text book.txt \\
          --context-length 512 --minutes 10 --out recovered
    """
    from pho_service.host.files import check_free
    from pho_service.models.texts import RecoveryText
    from pho_service.pipeline.recover import TRAINING, PrunedModel, recover_folder
    from pho_service.pruning.recovery import Processes

    settings, teacher, out = given.part("recovery", Recovery), ask.teacher, ask.out
    how = given.calibration()
    check_free(out)
    if not folder.expanduser().exists():
        raise InvalidInput(f"{folder} does not exist. Give that of a pruned or smaller model.")
    check_models([teacher], given("revision"), ask.confirm_text)
    source = calibration_source(how)
    processes = Processes()
    with loading(str(folder)):
        pruned = PrunedModel.read(
            folder, dtype=given("dtype"), device=inputs.device, device_map=inputs.device_map
        )
    if "calibration/context_length" not in given.said:
        how = how.fitted(pruned.model.longest)
    windows = given("confirm/windows")
    text = RecoveryText(source=source, context_length=how.context_length, bos=how.bos)
    if ask.confirm_text is None:
        text = text.setting_aside(pruned.model, windows, settings.seed)
    else:
        measured = inputs.report(pruned.model, file_source(ask.confirm_text), how, windows)
        text = replace(text, measured=measured)
    # One part of the time is for the dense model; two passes forward and one backward are four.
    parts, begins = {"": 1.0, TRAINING: 4.0}, {TRAINING: TRAINING, "": ""}
    with one_bar(parts, never, begins=begins, shown=not processes.number):
        recovered = recover_folder(
            pruned, lambda: nullcontext(inputs.model(teacher)), text, settings, out,
            run=Run(progress=progress),
        )  # fmt: skip
    if processes.number:
        return
    if as_json:
        print_json({"out": str(out), **recovered.to_dict()})
        return
    click.echo(f"{out}: {recovered}")
    show_recovered(recovered)
    if recovered.kept and not recovered.perplexities:
        say("The text is too short to measure on, too: give --confirm-text, or `pho evaluate` it.")


def show_recovered(recovered: Recovered) -> None:
    """The perplexities before and after, and what the models write, where there was a text."""
    from pho_service.shown.tables import continuations_table, recovered_table

    if recovered.perplexities:
        show_table(recovered_table(recovered))
    if recovered.continuations:
        before = recovered.models_before
        show_table(continuations_table(recovered.continuations, before=before))


def recovery_text(spec: "JobSpec", work: "Work") -> "RecoveryText":
    """What a job recovers on: other windows than what it was chosen on, new ones first."""
    from pho_service.models.texts import RecoveryText

    text = None if spec.recovery is None else spec.recovery.text
    return RecoveryText(
        source=calibration_source(spec.calibration) if text is None else file_source(text),
        context_length=spec.calibration.context_length,
        bos=spec.calibration.bos,
        unlike=work.calibration,
        seen=work.calibration if text is None else None,
        measured=work.confirm,
    )


def recover_pruned(
    folder: Path,
    teacher: str,
    text: "RecoveryText",
    settings: Recovery,
    out: Path,
    inputs: Terminal,
) -> Recovered:
    """Recover the folder that a search has just pruned."""
    from pho_service.pipeline.recover import PrunedModel, recover_folder

    with loading(str(folder)):
        pruned = PrunedModel.read(
            folder, dtype=inputs.dtype, device=inputs.device, device_map=inputs.device_map
        )
    return recover_folder(
        pruned, lambda: nullcontext(inputs.model(teacher)), text, settings, out,
        run=Run(progress=progress),
    )  # fmt: skip
