"""`pho compare`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.evaluate import TASK_FIELDS, load_asked_tasks
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    json_option,
    report_options,
    report_spec,
    text_source,
)
from pho_service.cli.terminal import print_json, show_table, verb
from pho_service.errors import InvalidInput
from pho_service.spec.document import check_choice
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern
from pho_service.spec.samplers import SearchOptions, options_of
from pho_service.spec.seed import SEEDS

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.models.texts import TextSource
    from pho_service.pipeline.inputs import Calibrated
    from pho_service.pipeline.repeated import Compared
    from pho_service.spec.fields import CalibrationSpec
    from pho_service.spec.job import JobSpec

# The seed is the calibration's.
_OF_SEARCHES = (
    *(name for name in options_of(SearchOptions()) if name != "seed"),
    "confirm/text", "confirm/windows", "confirm/candidates",
)  # fmt: skip


@click.command(
    cls=DocumentCommand,
    fields=(
        "pattern", "scope", "steps/linears", "calibration", "revision", "dtype", "stream",
        *_OF_SEARCHES, *TASK_FIELDS,
    ),
    required=("pattern",),
)  # fmt: skip
@click.argument("model")
@report_options
@click.option(
    "--config",
    "config_paths",
    multiple=True,
    type=click.Path(),
    help="A configuration to compare; may be given several times.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="A published method to show; may be given several times; all shows every one.  "
    "[default: those that take minutes]",
)
@click.option(
    "--preset",
    "presets",
    multiple=True,
    help="Search with this preset of `pho search`, and show what is found; may be given several "
    "times.",
)
@click.option(
    "--ablation",
    is_flag=True,
    help="Show configurations step by step: the score alone, then with each step more.",
)
@click.option(
    "--seeds",
    help="Repeat all with these seeds of calibration and search, and show means and standard "
    "deviations: 0,1,2.",
)
@click.option(
    "--other-family",
    is_flag=True,
    help="Compare configurations that were found on another family of models, too.",
)
@device_options
@json_option
@verb
def compare(
    model: str,
    given: Given,
    report: Mapping[str, Any],
    config_paths: tuple[str, ...],
    methods: tuple[str, ...],
    presets: tuple[str, ...],
    ablation: bool,
    seeds: str | None,
    other_family: bool,
    inputs: Terminal,
    as_json: bool,
) -> None:
    """
    Print a table of perplexities: dense, the published methods, configurations.

    All rows share the calibration windows, the text and the pattern. Magnitude competes
    within layers, Wanda within rows, RIA is shown both ways, CRePE with equal
    coefficients takes --scope, a configuration its own. OWL gives each block a
    sparsity of its own; SparseGPT updates the weights that stay. All prune the
    linears that the configurations prune, or that are named by options.

    A name that ends in -sequential takes a score's activation norms from the
    pruned blocks before, as Wanda and RIA are published. At N:M, one that ends in
    -permuted cuts the groups in the channel order that keeps the most score.

    \b
    Example:
      pho compare HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text book.txt \\
          --report-text other.txt --config config.json
      pho compare HuggingFaceTB/SmolLM2-135M --pattern 2:4 --text book.txt \\
          --confirm-text second.txt --report-text other.txt --seeds 0,1,2 \\
          --method wanda-permuted --method sparsegpt-permuted --preset best
    """
    from pho_service.pipeline.compare import check_family, common_linears
    from pho_service.pipeline.repeated import ComparisonRequest, compare_over_seeds
    from pho_service.pipeline.tasks import also_tasks
    from pho_service.spec.configuration import read_configuration

    measured = report_spec(report)
    if measured is None:
        raise InvalidInput(
            "there is no text to measure on. Give --report-text or --report-dataset, such as "
            "wikitext2."
        )
    named = [(path, read_configuration(Path(path))) for path in config_paths]
    pattern = Pattern.parse(given("pattern"), given("scope"))
    asked = Linears.from_dict(given.document().get("steps", {}).get("linears", {})) or None
    linears = common_linears(named, pattern, asked)
    searches = _searches(model, given, presets, linears)
    request = ComparisonRequest(
        pattern=pattern,
        configurations=named,
        methods=methods or None,
        searches={name: each.request(0) for name, each in searches.items()},
        linears=linears,
        ablation=ablation,
    )
    calibration, drawn = given.calibration(), _seeds(seeds, given)
    loaded_tasks = load_asked_tasks(given)
    settings = calibration.settings()
    check_models([model], given("revision"), given("confirm/text"))
    report_source = text_source(measured, measured=True)
    source = calibration_source(calibration)
    loaded = inputs.model(model)
    for path, configuration in named:
        check_family(configuration, loaded, path, other_family=other_family)
    text = inputs.report(loaded, report_source, settings, measured.windows)
    search = next(iter(searches.values()), None)  # all are confirmed on the same text
    compared = compare_over_seeds(
        loaded,
        text,
        request,
        {seed: _calibration(loaded, source, calibration, seed, search, inputs) for seed in drawn},
        also=also_tasks(loaded_tasks, bos=settings.bos, limit=given("tasks_limit")),
        run=inputs.run(loaded),
    )
    if as_json:
        print_json(compared.to_dict())
        return
    show_comparison(compared)


def _searches(
    model: str, given: Given, presets: Sequence[str], linears: Linears
) -> "dict[str, JobSpec]":
    """The document of each preset's search, as `pho submit` would send it."""
    from pho_service.spec.presets import PRESETS

    for name in presets:
        check_choice("--preset", name, PRESETS)
    options = [given.names[path] for path in _OF_SEARCHES if path in given.said]
    if options and not presets:
        raise InvalidInput(
            f"{', '.join(options)}: for --preset alone, which searches. Leave it out, or give a "
            "--preset."
        )
    return {
        name: given.job(
            given.document(
                {
                    "model": model,
                    "preset": name,
                    **({"steps": {"linears": linears.to_dict()}} if linears else {}),
                }
            )
        )
        for name in dict.fromkeys(presets)
    }


def _seeds(seeds: str | None, given: Given) -> list[int]:
    """The seeds of the calibrations, each once."""
    if seeds is None:
        return [given("calibration/seed")]
    if "calibration/seed" in given.said:
        raise InvalidInput(
            f"--seeds and {given.names['calibration/seed']} both say how the calibration is drawn. "
            "Give one of them."
        )
    words = [word.strip() for word in seeds.split(",")]
    if not all(word.isdecimal() and int(word) < SEEDS for word in words):
        raise InvalidInput(
            f"--seeds {seeds!r} are not whole numbers from 0 to {SEEDS - 1} with commas between: "
            "0,1,2."
        )
    found = [int(word) for word in words]
    if len({*found}) < len(found):
        raise InvalidInput(f"--seeds {seeds!r}: one is given twice, which counts it twice.")
    return found


def _calibration(
    model: "LanguageModel",
    source: "TextSource",
    spec: "CalibrationSpec",
    seed: int,
    search: "JobSpec | None",
    inputs: Terminal,
) -> "Callable[[], Calibrated]":
    """What calibrates on the windows of a seed, when its turn comes."""
    settings = replace(spec.settings(), seed=seed)
    confirm = None if search is None else search.confirm
    return lambda: inputs.calibrated(model, source, settings, confirm)


def show_comparison(compared: "Compared") -> None:
    """How good it is in a line, and the table; what else was measured has one of its own."""
    click.echo(f"Perplexity: {compared.summary}")
    table, extra = compared.table, compared.extra
    show_table(table.columns_but(extra), spare=("peak memory", "seconds", "proxy", "scope"))
    if extra:
        tasks = table.columns_but([c for c in table.columns if c not in ("method", *extra)])
        note = "Share of right answers, ± standard error over the questions."
        show_table(replace(tasks, title=f"{compared.title}: tasks", notes=(note,)))
