"""
Options that several verbs share, what they stand for, and `--plot`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from pho_service.cli.document import report_option
from pho_service.cli.terminal import loading, progress, say, verb, working
from pho_service.errors import BundleError, InvalidInput, told_to
from pho_service.host.data_sets import USUAL_TEXTS
from pho_service.host.files import write_text
from pho_service.pipeline.inputs import Inputs
from pho_service.pipeline.work import Work
from pho_service.progress import Run

if TYPE_CHECKING:
    from torch import Tensor

    from pho_service.cli.document import Given
    from pho_service.models.calibration import CalibrationText
    from pho_service.models.data_sets import TextSource
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import MixedText, ReportText, Text
    from pho_service.pipeline.confirmation import Validation
    from pho_service.pipeline.inputs import Cut
    from pho_service.spec.calibration import CalibrationSettings
    from pho_service.spec.fields import CalibrationSpec, ConfirmSpec, SearchReportSpec, TextSpec
    from pho_service.spec.steps import Candidate
    from pho_service.tuning.plan import SearchRequest


F = TypeVar("F", bound=Callable[..., Any])


def all_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


json_verb = all_options(
    click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout."), verb
)


def device_options(function: F) -> F:
    """The options of where a model runs; with those of its fields they become ``inputs``."""

    @functools.wraps(function)
    def run(*args: Any, given: "Given", device: str, device_map: str | None, **kwargs: Any) -> Any:
        inputs = Terminal(
            revision=given("revision"),
            dtype=given("dtype"),
            stream=given("stream"),
            device=device,
            device_map=device_map,
        )
        return function(*args, given=given, inputs=inputs, **kwargs)

    options = all_options(
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
        click.option(
            "--device-map",
            type=click.Choice(["auto"]),
            help="auto: put the model on all GPUs together, for models larger than one.",
        ),
    )
    return cast("F", options(run))


def check_models(names: Sequence[str], revision: str | None = None, *texts: str | None) -> None:
    """See that models, bundles and text files can be there, before any long work."""
    from pho_service.models.loading import check_name

    if find_spec("torch") is None:  # said before anything is looked up
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    for name in names:
        if is_bundle(name):
            check_bundle(name)
        else:
            check_name(name, revision)
    for text in filter(None, texts):
        file_source(text)


def check_bundle(name: str) -> None:
    """Raise BundleError if there is no such file."""
    if not Path(name).expanduser().is_file():
        raise BundleError(
            f"the bundle {name} does not exist. Make a bundle with `pho calibrate`, and give its "
            "path."
        )


def text_source(spec: "TextSpec", *, measured: bool = False) -> "TextSource":
    """The text that is named, to calibrate or to measure on; its first row was read."""
    from pho_service.models.data_sets import TextSource
    from pho_service.models.texts import check_text

    source = TextSource(
        path=spec.text,
        dataset=spec.dataset,
        config=spec.dataset_config,
        data_file=spec.data_file,
        split=spec.split,
        field=spec.field,
    )
    if source.dataset is None:
        return check_text(source)
    if source.dataset in USUAL_TEXTS and Path(source.dataset).is_dir():
        say(f"Note: {source.dataset} is that of papers; the folder here is ./{source.dataset}.")
    with working(f"Looking into {source}"):
        return check_text(source, measured=measured)


def calibration_source(calibration: "CalibrationSpec") -> "TextSource | MixedText":
    """What ``--text`` and ``--dataset`` name; C4 if neither does, which is said."""
    from pho_service.models.texts import mixed_text
    from pho_service.spec.calibration import C4_DATASET, C4_FILE

    if (calibration.dataset, calibration.data_file) == (C4_DATASET, C4_FILE):
        say(f"No --text given: using {C4_DATASET} {C4_FILE} {calibration.split}.")
    return mixed_text([*map(text_source, calibration.parts.values())], calibration.shares)


def file_source(path: str) -> "TextSource":
    """A text file with its text in the usual place, seen to be readable."""
    from pho_service.spec.fields import TextSpec

    return text_source(TextSpec(text=path), measured=True)


def is_bundle(name: str) -> bool:
    """Tell whether a MODEL is a bundle of `pho calibrate`."""
    return Path(name).suffix == ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Terminal(Inputs):
    """Opens models as the options of a verb say, and says what it does."""

    revision: str | None = None
    dtype: str = "auto"
    stream: bool = False
    device: str = "auto"
    device_map: str | None = None
    cache_dir: Path | None = None  # of bundles; by default that of the settings

    def run(self, model: "LanguageModel | None" = None) -> Run:
        """What a verb runs with: where the model is, or else where the options say."""
        from pho_service.pruning.hardware import pick_device

        device = pick_device(self.device) if model is None else model.device
        return Run(device=str(device), progress=progress)

    def model(self, name: str) -> "LanguageModel":
        with loading(name):
            from pho_service.models.loading import load_model

            return load_model(
                name,
                revision=self.revision,
                device=self.device,
                dtype=self.dtype,
                stream=self.stream,
                device_map=self.device_map,
            )

    def windows(
        self, model: "LanguageModel", source: "Text | MixedText", settings: "CalibrationSettings"
    ) -> "CalibrationText":
        """Says so if the text had fewer windows than asked for."""
        with working(f"Reading {source}"):
            text = super().windows(model, source, settings)
        if len(text.calibration) < settings.samples:
            say(
                f"The text fills fewer windows of {settings.context_length} tokens than the "
                f"{settings.samples} asked for: {len(text.calibration)}. All of it is used."
            )
        return text

    def report(
        self,
        model: "LanguageModel",
        source: "Text",
        how: "Cut",
        most: int | None,
        unlike: "Tensor | None" = None,
    ) -> "ReportText":
        with working(f"Reading {source}"), told_to(report_option):
            return super().report(model, source, how, most, unlike)

    @property
    def cache(self) -> Path:
        """The folder of bundles and of trained blocks."""
        from pho_service.host.settings import Settings

        return self.cache_dir or Settings().cache_dir

    def calibrated(
        self,
        model: "LanguageModel | str",
        source: "TextSource | MixedText",
        settings: "CalibrationSettings",
        confirm: "ConfirmSpec | None" = None,
        *,
        report: "SearchReportSpec | None" = None,
        requests: "Sequence[Candidate | SearchRequest]" = (),
    ) -> Work:
        """Load a model unless it is, read its texts, and calibrate it or take what is cached."""
        # ``requests`` are compared with the model before its text is read.
        from pho_service.models.calibration import bundle_path, cached_bundle
        from pho_service.pipeline.curve import check_patterns

        loaded = self.model(model) if isinstance(model, str) else model
        for request in requests:
            check_patterns(loaded, [request.pattern], request.steps.linears)
        text = self.windows(loaded, source, settings)
        confirmed = None
        if confirm is not None:
            other = None if confirm.text is None else file_source(confirm.text)
            confirmed = self.confirmation(loaded, other, settings, confirm.windows, text)
        reported = None
        if report is not None:
            other = text_source(report, measured=True)
            reported = self.reported(
                loaded, other, settings, report.windows, text.calibration, confirmed
            )
        is_cached = bundle_path(self.cache, text.bundle_key).is_file()
        started = time.monotonic()
        bundle = cached_bundle(loaded, text, settings, self.cache, progress)
        return Work(
            bundles={loaded.name: bundle},
            dense=loaded,
            calibration=text.calibration,
            confirm=confirmed,
            report=reported,
            unused_windows=len(text.held_out),
            calibration_s=None if is_cached else round(time.monotonic() - started, 3),
            cache_dir=self.cache,
        )


def at_least(least: int, **values: int | None) -> None:
    """Raise InvalidInput if an option that was given is below ``least``."""
    for name, value in values.items():
        if value is not None and value < least:
            raise InvalidInput(f"--{name.replace('_', '-')} {value} is below {least}.")


def out_file(path: str) -> Path:
    """A file to write, checked before any long work."""
    from pho_service.host.files import check_file

    check_file(Path(path))
    return Path(path)


def plot_file(name: str) -> Path:
    """The file that a plot will be written to, checked before any long work."""
    if Path(name).suffix.lower() not in (".html", ".htm"):
        raise InvalidInput(
            f"--plot {name} is not a name of a page: plots are drawn in HTML, which a browser "
            f"shows and saves as a picture. Give {Path(name).with_suffix('.html')}."
        )
    return out_file(name)


def plot_validation(result: "Validation", path: Path, title: str) -> None:
    """Write a page with a chart for each proxy: its value against perplexity."""
    from pho_service.shown.charts import validation_charts
    from pho_service.shown.parts import Section, page

    drawn = validation_charts(result.proxies, result.perplexity, result.qualities)
    count = f"{len(result.candidates)} random candidates, rated by each proxy and by perplexity."
    section = Section(id="proxies", title="Proxies against perplexity", texts=[count], charts=drawn)
    write_text(path, page(title, [section]))


def plot_transfer(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a page with what a configuration was worth on each model, as a report shows it."""
    from pho_service.shown.page import transfer_section
    from pho_service.shown.parts import page

    if all("error" in record for record in records):
        raise InvalidInput("there is nothing to plot: no model could be measured.")
    write_text(path, page(title, [transfer_section(records)]))
