"""
Options that several verbs share, and what they stand for.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import click

from pho_service.cli.terminal import progress, say, working
from pho_service.errors import BundleError, InvalidInput
from pho_service.host.usual_texts import USUAL_TEXTS

if TYPE_CHECKING:
    from torch import Tensor

    from pho_service.cli.document import Given
    from pho_service.models.calibration import CalibrationText
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import TextSource
    from pho_service.pipeline.rating import ReportText
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.calibration import CalibrationSettings
    from pho_service.spec.fields import CalibrationSpec, TextSpec
    from pho_service.spec.transfer import ReportSpec

F = TypeVar("F", bound=Callable[..., Any])


def all_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")

device_options = all_options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="auto: put the model on all GPUs together, for models larger than one.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """
    How a model is loaded.

    Attributes:
        revision: Revision of a hub model: branch, tag or commit.
        dtype: ``auto``, or that of the weights.
        stream: Whether the weights are left in their files.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: ``auto`` for all GPUs together.
    """

    revision: str | None = None
    dtype: str = "auto"
    stream: bool = False
    device: str = "auto"
    device_map: str | None = None

    @classmethod
    def of(cls, given: "Given", device: str, device_map: str | None) -> Self:
        """From the options of a verb."""
        return cls(
            revision=given("revision"),
            dtype=given("dtype"),
            stream=given("stream"),
            device=device,
            device_map=device_map,
        )


def check_models(names: Sequence[str], revision: str | None = None) -> None:
    """
    See that models, or bundles of them, can be there, before torch is loaded and any long work.

    Raises:
        ModelError, BundleError, InvalidInput: One of them cannot.
        ModuleNotFoundError: There is no torch, which is to be said before anything is looked up.
    """
    from pho_service.models.names import check_name

    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    for name in names:
        if is_bundle(name):
            check_bundle(name)
        else:
            check_name(name, revision)


def check_bundle(name: str) -> None:
    """Raise BundleError if there is no such file."""
    if not Path(name).expanduser().is_file():
        raise BundleError(
            f"the bundle {name} does not exist. Make a bundle with `pho calibrate`, and give its "
            "path."
        )


def text_source(spec: "TextSpec", *, measured: bool = False) -> "TextSource":
    """
    The text that is named, of which the first row was read: before any long work.

    Args:
        spec: What names it.
        measured: Whether perplexities are measured on it; otherwise a model is calibrated.

    Raises:
        TextError, InvalidInput: It cannot be read.
    """
    from pho_service.models.texts import TextSource, check_text

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


def calibration_source(calibration: "CalibrationSpec") -> "TextSource":
    """The text that ``--text`` or ``--dataset`` names; C4 if neither does, which is said."""
    from pho_service.spec.calibration import C4_DATASET, C4_FILE

    if (calibration.dataset, calibration.data_file) == (C4_DATASET, C4_FILE):
        say(f"No --text given: using {C4_DATASET} {C4_FILE} {calibration.split}.")
    return text_source(calibration)


def file_source(path: str) -> "TextSource":
    """A text file with its text in the usual place, seen to be readable."""
    from pho_service.spec.fields import TextSpec

    return text_source(TextSpec(text=path), measured=True)


# Fields of a report's text, and what their options say; `ReportSpec` has the rules.
_REPORT = {
    "text": "Text file to measure on; nothing may have been chosen on it.",
    "dataset": "Data set to measure on instead: hub id or folder; or c4 or wikitext2.",
    "dataset_config": "Configuration of that data set.",
    "data_file": "One file of that data set.",
    "split": "Split of that data set.  [default: test, or the only one that there is]",
    "field": "Field or column that holds its text.  [default: text]",
    "windows": "Only the first N windows of what is measured on.",
}


def report_options(function: F) -> F:
    """The options of a text to measure on; what they say is the argument ``report``."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        said = {name: kwargs.pop(f"report_{name}") for name in _REPORT}
        return function(*args, report=said, **kwargs)

    for name in reversed(_REPORT):
        option = click.option(
            f"--report-{name.replace('_', '-')}",
            type=int if name == "windows" else str,
            help=_REPORT[name],
        )
        run = option(run)
    return cast("F", run)


def report_spec(said: Mapping[str, Any]) -> "ReportSpec | None":
    """
    The text to measure on that the options name; None if they name none.

    Raises:
        InvalidInput: They break a rule.
    """
    from pydantic import ValidationError

    from pho_service.spec.transfer import ReportSpec

    given = {name: value for name, value in said.items() if value is not None}
    if not given:
        return None
    at_least(1, report_windows=given.get("windows"))
    try:
        return ReportSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = "-".join(map(str, first["loc"])).replace("_", "-")
        option = f"--report-{place}" if place else "--report-text or --report-dataset"
        message = str(first["msg"]).removeprefix("Value error, ").removesuffix(".")
        raise InvalidInput(f"{option}: {message}.") from error


def is_bundle(name: str) -> bool:
    """Tell whether a MODEL is a bundle of `pho calibrate`."""
    return Path(name).suffix == ".safetensors"


def open_model(name: str, options: ModelOptions) -> "LanguageModel":
    """Load a model as the options say."""
    with working(f"Loading {name}"):
        from transformers.utils.logging import disable_progress_bar

        from pho_service.models.loading import load_model

        disable_progress_bar()  # ours is shown
        return load_model(
            name,
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            stream=options.stream,
            device_map=options.device_map,
        )


def read_calibration_text(
    model: "LanguageModel", source: "TextSource", settings: "CalibrationSettings"
) -> "CalibrationText":
    """The calibration windows; says so if the text had fewer than asked for."""
    from pho_service.models.calibration import calibration_text

    with working(f"Reading {source}"):
        text = calibration_text(model, source, settings)
    if len(text.calibration) < settings.samples:
        say(
            f"The text fills {len(text.calibration)} windows of {settings.context_length} tokens, "
            f"fewer than the {settings.samples} asked for: all of it is used."
        )
    return text


def open_bundle(
    model: "LanguageModel", text: "CalibrationText", settings: "CalibrationSettings"
) -> "ProxyBundle":
    """Calibrate, or take the bundle from the cache."""
    from pho_service.host.settings import Settings
    from pho_service.pipeline.bundles import cached_bundle

    return cached_bundle(model, text, settings, Settings().cache_dir, progress)


def report_text(
    model: "LanguageModel",
    source: "TextSource",
    *,
    context_length: int,
    bos: str,
    max_windows: int | None,
    unlike: "Tensor | None" = None,
) -> "ReportText":
    """A text, cut for perplexity; without what overlaps with the windows ``unlike``."""
    from pho_service.models.texts import read_windows
    from pho_service.pipeline.rating import ReportText

    with working(f"Reading {source}"):
        windows, record = read_windows(
            model,
            source,
            context_length=context_length,
            bos=bos,
            max_windows=max_windows,
            unlike=unlike,
        )
    return ReportText(windows=windows, record=record)


def confirm_text(
    model: "LanguageModel",
    text: "CalibrationText",
    path: str | None,
    settings: "CalibrationSettings",
    max_windows: int,
) -> "ReportText | None":
    """
    The windows to confirm on: of ``path``, or those that calibration left of its own text.

    None of them overlaps with the calibration's. None, with a sentence, if there are none.
    """
    from pho_service.pipeline.rating import ReportText

    if path is not None:
        return report_text(
            model,
            file_source(path),
            context_length=settings.context_length,
            bos=settings.bos,
            max_windows=max_windows,
            unlike=text.calibration,
        )
    if len(text.held_out) == 0:
        say("The text has no windows left beside the calibration. Give --confirm-text.")
        return None
    return ReportText(windows=text.held_out[:max_windows], record=text.record)


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
