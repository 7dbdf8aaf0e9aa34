"""
Options that several verbs share, and what they stand for.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pho_service.cli.terminal import progress, say, working
from pho_service.errors import InvalidInput
from pho_service.spec.presets import PRESETS
from pho_service.spec.steps import (
    ALLOCATION_UNITS,
    ALLOCATIONS,
    PERMUTATIONS,
    REPRUNINGS,
    UPDATES,
    Allocation,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pho_service.models.calibration import CalibrationText
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import TextSource
    from pho_service.pipeline.rating import ReportText
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.calibration import CalibrationSettings

F = TypeVar("F", bound=Callable[..., Any])


def all_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")

model_options = all_options(
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="auto: put the model on all GPUs together, for models larger than one.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto: float32 on the CPU, as stored on a GPU.",
    ),
    click.option(
        "--stream",
        is_flag=True,
        help="Leave the weights in their files, one block at a time on the device: for models "
        "larger than the memory.",
    ),
)

bos_option = click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Start every window with BOS; auto does as the tokenizer does.",
)

text_options = all_options(
    click.option("--text", type=click.Path(), help="A .txt, .jsonl or .parquet file."),
    click.option("--dataset", help="A data set by hub id or local folder, instead of --text."),
    click.option("--data-file", help="One file of the data set."),
    click.option("--split", default="train", show_default=True, help="Split of the data set."),
    click.option(
        "--field", default="text", show_default=True, help="Field or column that holds the text."
    ),
)

calibration_options = all_options(
    text_options,
    click.option(
        "--samples", type=int, default=128, show_default=True, help="Windows of calibration text."
    ),
    click.option(
        "--context-length", type=int, default=2048, show_default=True, help="Tokens of a window."
    ),
    click.option(
        "--fisher-samples", type=int, help="Windows run backward too.  [default: samples / 4]"
    ),
    click.option(
        "--rows-per-layer",
        type=int,
        default=16,
        show_default=True,
        help="Output rows of each linear in the bundle; 0 keeps all.",
    ),
    click.option(
        "--projection-rows",
        type=int,
        default=128,
        show_default=True,
        help="Rows of the projected activations; 0 keeps the full Gram matrix.",
    ),
    click.option(
        "--kernel-sizes",
        default="3,5,9,15",
        show_default=True,
        help="Odd window sizes that candidates may use.",
    ),
    click.option(
        "--mixed-precision",
        is_flag=True,
        help="Calibrate a float32 model with matrix products in bfloat16: faster where the "
        "processor has instructions for it.",
    ),
    click.option(
        "--calibration-memory",
        help="What may be in use at the peak of the calibration, the model included: 8GiB.  "
        "[default: a GPU's free memory; no limit on the CPU]",
    ),
    bos_option,
)

calibration_seed_option = click.option(
    "--calibration-seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the text and row samples.",
)

pattern_options = all_options(
    click.option(
        "--pattern", required=True, help="Share of weights to remove (0.5), or N kept of M (2:4)."
    ),
    click.option(
        "--scope",
        type=click.Choice(["row", "layer", "global"]),
        help="Where weights compete.  [default: layer; row for N:M]",
    ),
)

steps_options = all_options(
    click.option(
        "--preset",
        type=click.Choice(PRESETS),
        default="score",
        show_default=True,
        help="score: the score alone. crepe: as published, no gradient exponent. crepe-plus: the "
        "best that leaves kept weights untouched. best: kept weights are updated too.",
    ),
    click.option(
        "--allocation",
        type=click.Choice(ALLOCATIONS),
        help="How the sparsity is spread over the linears.  [default: the preset's]",
    ),
    click.option(
        "--allocation-unit",
        type=click.Choice(ALLOCATION_UNITS),
        help="What shares one sparsity.  [default: linear]",
    ),
    click.option(
        "--allocation-spread",
        type=float,
        help="Every sparsity lies within the pattern's plus and minus this.  [default: 0.2]",
    ),
    click.option(
        "--permutation",
        type=click.Choice(PERMUTATIONS),
        help="Of input channels, for N:M.  [default: the preset's]",
    ),
    click.option(
        "--repruning",
        type=click.Choice(REPRUNINGS),
        help="Of a finished mask.  [default: the preset's]",
    ),
    click.option(
        "--update",
        type=click.Choice(UPDATES),
        help="Of the weights that stay.  [default: the preset's]",
    ),
)

space_option = click.option(
    "--space",
    "bounds",
    multiple=True,
    help="Bounds of the search, name=low:high or name=value; may be given several times. Names: "
    "neighbourhood_share, row_share, activation_exponent, gradient_exponent, kernel_sizes=3,5, "
    "allocations=uniform,fisher, allocation_spread.",
)


def text_source(options: dict[str, Any]) -> "TextSource":
    """
    The text that ``--text`` or ``--dataset`` names; C4 if neither does.

    Takes its options out of ``options``.
    """
    from pho_service.models.texts import C4, TextSource

    text, dataset = options.pop("text"), options.pop("dataset")
    data_file, split, field = (options.pop(k) for k in ("data_file", "split", "field"))
    if text is not None and dataset is not None:
        raise InvalidInput("--text and --dataset are both given. Give one of them.")
    if data_file is not None and dataset is None:
        raise InvalidInput("--data-file is a file of a --dataset, but none is given.")
    if text is not None:
        return TextSource(path=text, field=field)
    if dataset is not None:
        return TextSource(dataset=dataset, data_file=data_file, split=split, field=field)
    say(f"No --text given: using {C4}.")
    return C4


def given_steps(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of Steps that were given, taken out of ``options``."""
    allocation = {
        field: options.pop(option)
        for field, option in (
            ("method", "allocation"), ("unit", "allocation_unit"), ("spread", "allocation_spread"),
        )
    }  # fmt: skip
    allocation = {field: value for field, value in allocation.items() if value is not None}
    steps = {name: options.pop(name) for name in ("permutation", "repruning", "update")}
    steps = {name: value for name, value in steps.items() if value is not None}
    if allocation:
        steps["allocation"] = Allocation(**allocation)
    return steps


def file_source(path: str) -> "TextSource":
    """A text file with its text in the usual place."""
    from pho_service.models.texts import TextSource

    return TextSource(path=path)


def calibration_settings(options: dict[str, Any]) -> "CalibrationSettings":
    """The settings among ``options``, taken out of them."""
    from pho_service.spec.calibration import CalibrationSettings

    sizes = options.pop("kernel_sizes")
    try:
        kernel_sizes = tuple(int(k) for k in sizes.split(","))
    except ValueError:
        raise InvalidInput(
            f"--kernel-sizes {sizes!r} are not numbers with commas between: 3,5,9."
        ) from None
    memory = options.pop("calibration_memory")
    names = ("samples", "context_length", "fisher_samples", "rows_per_layer", "projection_rows")
    return CalibrationSettings(
        kernel_sizes=kernel_sizes,
        bos=options.pop("bos"),
        seed=options.pop("calibration_seed"),
        mixed_precision=options.pop("mixed_precision"),
        memory_bytes=None if memory is None else parse_bytes(memory),
        **{name: options.pop(name) for name in names},
    )


def parse_bytes(text: str, option: str = "--calibration-memory") -> int:
    """The bytes that ``8GiB``, ``800 MB`` or ``8e9`` say."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip().lower())
    try:
        number, prefix, binary = found.groups("")  # type: ignore[union-attr]
        unit = (1024 if binary else 1000) ** (" kmgt".index(prefix) if prefix else 0)
        return int(float(number) * unit)
    except (AttributeError, ValueError, OverflowError):
        raise InvalidInput(
            f"{option} {text!r} is not a size. Give a number with a unit: 8GiB, 800MB."
        ) from None


def is_bundle(name: str) -> bool:
    """Whether a MODEL is a bundle of `pho calibrate`."""
    return Path(name).suffix == ".safetensors"


def open_model(name: str, options: dict[str, Any]) -> "LanguageModel":
    """Load a model as ``--revision``, ``--device`` and ``--dtype`` in ``options`` say."""
    with working(f"Loading {name}"):
        from transformers.utils.logging import disable_progress_bar

        from pho_service.models.loading import load_model

        disable_progress_bar()  # ours is shown
        return load_model(
            name,
            revision=options.pop("revision"),
            device=options.pop("device"),
            dtype=options.pop("dtype"),
            stream=options.pop("stream", False),
            device_map=options.pop("device_map", None),
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
