"""`pho plan`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import click

from pho_service.api.answers import PlanAnswer
from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import json_verb
from pho_service.cli.remote import JobFile, job_document, open_client
from pho_service.cli.terminal import print_json, print_table
from pho_service.spec.document import JOB, MACHINE, FieldShown, format_bytes, format_count

if TYPE_CHECKING:
    from pho_service.planning.costs import Machine


@dataclass(frozen=True, kw_only=True)
class _PlanAsk(JobFile):
    """
    The machine that a search is planned for.

    Attributes:
        card: H100, H200, A100, A100-40GB, L40S, 4090 or cpu.
        device_memory: Memory of another card: 80GiB.
        main_memory: Main memory of the machine: 128GiB.
        url: Ask this service, which knows its models, instead of this machine.
    """

    card: Annotated[str | None, FieldShown(section=MACHINE, default="what is here")] = None
    device_memory: Annotated[int | None, FieldShown(section=MACHINE, kind="size")] = None
    main_memory: Annotated[int | None, FieldShown(section=MACHINE, kind="size")] = None
    url: Annotated[str | None, FieldShown(section=JOB)] = None


@click.command(cls=DocumentCommand, fields=("",), ask=_PlanAsk)
@click.argument("models", metavar="[MODEL]", nargs=-1)
@json_verb
def plan(models: tuple[str, ...], given: Given, ask: _PlanAsk, as_json: bool) -> None:
    """
    Say what a search on MODEL would take: memory, disk and time, before anything is read.

    MODEL is a hub id, a local folder or a .gguf file; the other options are those
    of `pho submit`. Times are ranges. Exit code 1: it does not fit.

    \b
    Example:
      pho plan meta-llama/Llama-2-7b-hf --pattern 2:4 --preset best --card H100
      pho plan org/model --pattern 0.5 --device-memory 24GiB
    """
    spec = job_document(models, ask.job, given, pattern=None if ask.job else "0.5")
    sizes = {"device_memory": ask.device_memory, "main_memory": ask.main_memory}
    memory = {name: size for name, size in sizes.items() if size}
    if ask.url is not None:
        with open_client(ask.url) as client:
            answer = client.plan(spec, card=ask.card, **memory)
    else:
        answer = _here(spec, ask.card, memory)
    if as_json:
        print_json(answer.model_dump(mode="json"))
    else:
        _show(answer, str(spec["model"]))
    if not answer.fits:
        raise SystemExit(1)


def _here(spec: dict[str, Any], card: str | None, memory: dict[str, int]) -> PlanAnswer:
    """The plan, made in this process."""
    from pho_service.planning.costs import named_machine
    from pho_service.planning.plan import plan_job
    from pho_service.planning.shapes import read_shapes
    from pho_service.spec.job import JobSpec

    job = JobSpec.model_validate(spec)
    machine = named_machine(card) if card else _this_machine()
    machine = machine.resized(memory.get("device_memory"), memory.get("main_memory"))
    shapes = read_shapes(job.model, revision=job.revision)
    return PlanAnswer.model_validate(plan_job(job, shapes, machine).to_dict())


def _this_machine() -> "Machine":
    """The first GPU that torch sees, or the CPU; that, too, if there is no torch."""
    from pho_service.planning.costs import named_machine

    try:
        from pho_service.pipeline.minutes import machine_at_hand
    except ModuleNotFoundError:
        return named_machine("cpu")
    return machine_at_hand()


def _show(answer: PlanAnswer, name: str) -> None:
    from pho_service.planning.plan import format_span

    model, machine = answer.model, answer.machine
    rows = [
        (stage.title, format_span(*stage.seconds), *_sizes(stage.peak, gpu=machine.gpu))
        for stage in answer.stages
    ]
    rows.append(("all of it", format_span(*answer.seconds), *_sizes(answer.peak, gpu=machine.gpu)))
    columns = ["stage", "time", *(["GPU"] if machine.gpu else []), "main memory", "disk"]
    how = "streamed from its files" if answer.stream else f"{answer.windows_at_once} at once"
    rates = "measured for a moment" if machine.measured else "from its data sheet, not measured"
    print_table(
        f"{name}: {format_count(model.parameters)} parameters ({model.family}), "
        f"{format_bytes(model.weights_bytes)} in {model.dtype}",
        columns,
        rows,
        caption=f"on {machine.name} with {format_bytes(machine.memory_bytes)}"
        f"{f' and {format_bytes(machine.main_bytes)} of main memory' if machine.gpu else ''}, "
        f"rates {rates}; windows of the calibration: {how}"
        f"{', blocks run twice' if answer.recompute and not answer.stream else ''}",
    )
    if answer.choice is not None:
        click.echo(answer.choice)
    saved, packed = map(format_bytes, (answer.pruned.saved_bytes, answer.pruned.packed_bytes))
    click.echo(f"The pruned model takes {saved} on a disk, and about {packed} once it is packed.")
    if answer.pruned.times_smaller is not None:
        click.echo(
            f"Where reading the weights takes the time, as in writing text, it is about "
            f"{answer.pruned.times_smaller:.2f} times as fast as the dense model."
        )
    if answer.fits:
        click.echo("It fits.")
        return
    click.echo("It does not fit: " + "; ".join(answer.obstacles) + ".")
    for way in answer.ways_out:
        click.echo(f"  - {way}")


def _sizes(peak: Any, *, gpu: bool) -> list[str]:
    return [format_bytes(s) for s in (*([peak.device] if gpu else []), peak.host, peak.disk)]
