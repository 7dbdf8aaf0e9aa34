"""`pho transfer`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    is_bundle,
    json_verb,
    out_file,
    plot_file,
    plot_transfer,
    text_source,
)
from pho_service.cli.terminal import print_json, say, show_table
from pho_service.errors import InvalidInput
from pho_service.pipeline.work import Work
from pho_service.spec.document import PRUNED, SEARCH, FieldShown
from pho_service.spec.objective import SearchOptions, options_of
from pho_service.spec.pattern import ScopeName
from pho_service.spec.verbs import Reported, Studied

if TYPE_CHECKING:
    from pho_service.spec.configuration import Configuration
    from pho_service.spec.results import Transfer


@dataclass(frozen=True, kw_only=True)
class _TransferAsk(Reported, Studied):
    """
    What a configuration must be, what it is measured on, and where that is kept.

    Attributes:
        pattern: Refuse a configuration of another pattern.
        scope: Refuse a configuration of another scope.
        search: Find the own best of each model, too.
        out: All that was measured.
        plot: Draw it on this HTML page.
    """

    pattern: Annotated[str | None, FieldShown(section=PRUNED)] = None
    scope: Annotated[ScopeName | None, FieldShown(section=PRUNED, default="any")] = None
    search: Annotated[bool, FieldShown(section=SEARCH)] = False
    out: str = "transfer.json"
    plot: Annotated[str | None, FieldShown(kind="path")] = None


@click.command(
    cls=DocumentCommand,
    fields=(
        "calibration", "confirm/text", "confirm/windows", "confirm/finalists",
        *options_of(SearchOptions()), "revision", "dtype", "stream",
    ),
    ask=_TransferAsk,
)  # fmt: skip
@click.argument("configuration")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@device_options
@json_verb
def transfer(
    configuration: str,
    models: tuple[str, ...],
    given: Given,
    ask: _TransferAsk,
    inputs: Terminal,
    as_json: bool,
) -> None:
    """
    Measure what CONFIGURATION is worth on other models.

    For each MODEL: the perplexity of the dense model, of Wanda, of RIA, of the
    configuration, and with --search of the model's own best. A MODEL may also be a
    bundle of `pho calibrate`: then the proxy alone says whether the configuration
    holds. Each model is written to --out when it is done; the same command
    continues.

    \b
    Example:
      pho transfer config.json HuggingFaceTB/SmolLM2-360M google/gemma-3-270m \\
          --text book.txt --report-text other.txt --search
    """
    from pho_service.models.bundle_file import read_bundle
    from pho_service.pipeline.search import check_study_url
    from pho_service.pipeline.transfer import (
        check_configuration,
        own_search,
        transfer_job,
        transfer_key,
    )
    from pho_service.spec.configuration import read_configuration
    from pho_service.spec.fields import ConfirmSpec

    path = out_file(ask.out)
    picture = None if ask.plot is None else plot_file(ask.plot)
    measured_on = ask.report
    own_confirm = given.part("confirm", ConfirmSpec)
    config = read_configuration(Path(configuration))
    check_configuration(configuration, config, ask.pattern, ask.scope)
    calibration = given.calibration([config])
    settings = calibration.settings()
    kernel_size = config.candidate().coefficients.kernel_size
    if kernel_size not in settings.kernel_sizes:
        sizes = (*settings.kernel_sizes, kernel_size)
        settings = replace(settings, kernel_sizes=sizes)
    request = None
    if ask.search:
        options = SearchOptions(**{name: given(name) for name in options_of(SearchOptions())})
        request = own_search(config, options, finalists=own_confirm.finalists)
        check_study_url(ask.study)
    whole = [name for name in models if not is_bundle(name)]
    if whole and measured_on is None:
        raise InvalidInput(
            f"{whole[0]} is a model, and its perplexities need a text that nothing was chosen on. "
            "Give --report-text or --report-dataset, or a bundle instead of the model: then only "
            "proxies are compared."
        )
    check_models(models, given("revision"), own_confirm.text)
    if whole and measured_on is not None:
        report_source = text_source(measured_on, measured=True)
        source = calibration_source(calibration)
    confirm = None if request is None else own_confirm
    document = _TransferFile.open(path, configuration, config)
    shown = []

    def measured(name: str) -> dict[str, Any]:
        """Measure one model, and release it before the next is loaded: two may not fit."""
        if is_bundle(name):
            work = Work(bundles={name: read_bundle(Path(name))})
        else:
            assert measured_on is not None  # it is a model
            work = inputs.calibrated(name, source, settings, confirm)
            text = inputs.report(work.model, report_source, settings, measured_on.windows)
            work = replace(work, report=text)
        run = inputs.run(work.dense)
        return document.once(
            transfer_key(work, config, request),
            lambda: transfer_job(name, work, config, search=request, study_url=ask.study, run=run),
        )

    for name in models:
        say(name)
        shown.append(measured(name))
    for record in shown:
        for warning in record["warnings"]:
            say(f"Note: {warning}")
    if picture is not None:
        plot_transfer(shown, picture, f"{configuration} at {config.pattern}, {config.scope}")
    if as_json:
        print_json({**document.values, "targets": shown})
        return
    show_transfer(shown, configuration, config)
    click.echo(f"written  {path}" + (f" and {picture}" if picture else ""))


class _TransferFile:
    """The file of a configuration's transfers; written again with each target."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def open(cls, path: Path, name: str, configuration: "Configuration") -> "_TransferFile":
        """What the file holds already, or an empty one."""
        from pho_service.errors import OutputError
        from pho_service.library import TRANSFER_VERSION
        from pho_service.spec.configuration import TRANSFER_FORMAT

        kind = {"format": TRANSFER_FORMAT, "version": TRANSFER_VERSION}
        written = configuration.model_dump(mode="json")
        if not path.exists():
            return cls(
                path,
                {**kind, "source": name, "configuration": written, "targets": []},
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            is_transfer = {key: values[key] for key in kind} == kind
            is_transfer = is_transfer and all("key" in record for record in values["targets"])
            same = is_transfer and values["configuration"] == written
        except (OSError, ValueError, LookupError, TypeError):
            is_transfer = same = False
        if not same:
            holds = (
                "holds transfers of another configuration" if is_transfer else "is something else"
            )
            raise OutputError(f"{path} is there already and {holds}. Give another --out.")
        return cls(path, values)

    def once(self, key: str, measure: Callable[[], "Transfer"]) -> dict[str, Any]:
        """A target's numbers: those that the file has of the same inputs, or new ones, kept."""
        from pho_service.host.files import write_json

        targets: list[dict[str, Any]] = self.values["targets"]
        record = next((target for target in targets if target["key"] == key), None)
        if record is None:
            record = measure().to_dict()
            targets.append(record)
            write_json(self.path, self.values)
        return record


def show_transfer(
    records: Sequence[dict[str, Any]], name: str, configuration: "Configuration"
) -> None:
    """A table of perplexities, where they were measured, and one of proxies."""
    from pho_service.shown.tables import MEASURES, transfer_table

    for what in MEASURES:
        table = transfer_table(records, what)
        if table is not None:
            where = f"at {configuration.pattern}, scope {configuration.scope}"
            show_table(replace(table, title=f"{name} {where}: {what}"))
