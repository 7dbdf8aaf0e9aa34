"""`pho compare`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    ModelOptions,
    at_least,
    device_options,
    file_source,
    json_option,
    open_bundle,
    open_model,
    read_calibration_text,
    report_text,
    text_source,
)
from pho_service.cli.terminal import print_json, print_table, progress, verb
from pho_service.spec.linears import Linears
from pho_service.spec.pattern import Pattern

if TYPE_CHECKING:
    from pho_service.models.loading import LanguageModel
    from pho_service.pipeline.compare import ComparisonRow
    from pho_service.pipeline.rating import ReportText


@click.command(
    cls=DocumentCommand,
    fields=("pattern", "scope", "steps/linears", "calibration", "revision", "dtype", "stream"),
    required=("pattern",),
)
@click.argument("model")
@click.option(
    "--report-text",
    "report_path",
    required=True,
    type=click.Path(),
    help="Text that the perplexities are measured on; nothing may have been chosen on it.",
)
@click.option("--report-windows", type=int, help="Only the first N windows of that text.")
@click.option(
    "--config",
    "config_paths",
    multiple=True,
    type=click.Path(),
    help="A configuration to compare; may be given several times.",
)
@device_options
@json_option
@verb
def compare(
    model: str,
    given: Given,
    report_path: str,
    report_windows: int | None,
    config_paths: tuple[str, ...],
    device: str,
    device_map: str | None,
    as_json: bool,
) -> None:
    """
    Print a table of perplexities: dense, the published methods, configurations.

    All rows share the statistics, the text and the pattern. Magnitude competes
    within layers, Wanda within rows, RIA is shown both ways, CRePE with equal
    coefficients takes --scope, a configuration its own. OWL gives each block a
    sparsity of its own; SparseGPT updates the weights that stay. All prune the
    linears that the configurations prune, or that are named by options.

    \b
    Example:
      pho compare HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text book.txt \\
          --report-text other.txt --config config.json
    """
    from pho_service.pipeline.compare import compare_job
    from pho_service.spec.configuration import read_configuration

    at_least(1, report_windows=report_windows)
    parsed = Pattern.parse(given("pattern"), given("scope"))
    linears = Linears.from_dict(given.document().get("steps", {}).get("linears", {})) or None
    configurations = [(path, read_configuration(Path(path))) for path in config_paths]
    calibration = given.calibration()
    settings, source = calibration.settings(), text_source(calibration)
    loaded = open_model(model, ModelOptions.of(given, device, device_map))
    text = read_calibration_text(loaded, source, settings)
    report = report_text(
        loaded,
        file_source(report_path),
        context_length=settings.context_length,
        bos=settings.bos,
        max_windows=report_windows,
    )
    bundle = open_bundle(loaded, text, settings)
    rows = compare_job(
        loaded,
        bundle,
        report,
        parsed,
        configurations,
        linears=linears,
        calibration=text.calibration,
        device=str(loaded.device),
        progress=progress,
    )
    if as_json:
        print_json(comparison_document(rows, report, loaded, str(parsed)))
        return
    show_comparison(rows, report, loaded, str(parsed))


def comparison_document(
    rows: "Sequence[ComparisonRow]", report: "ReportText", model: "LanguageModel", pattern: str
) -> dict[str, Any]:
    """A comparison with all that its numbers depend on."""
    from pho_service.host.versions import versions

    return {
        "pattern": pattern,
        "rows": [asdict(row) for row in rows],
        "report": {
            **report.to_dict(),
            "context_length": report.windows.shape[1],
            "tokens": report.windows.shape[0] * (report.windows.shape[1] - 1),
        },
        "model": model.to_dict(),
        "device": str(model.device),
        "versions": versions("torch", "transformers"),
    }


def show_comparison(
    rows: "Sequence[ComparisonRow]", report: "ReportText", model: "LanguageModel", pattern: str
) -> None:
    """The table, with its conditions under it."""
    windows, context_length = report.windows.shape
    print_table(
        f"{Path(model.name).name} at {pattern}",
        ("method", "scope", "perplexity", "sparsity", "proxy", "seconds", "peak memory"),
        [
            (
                row.method,
                row.scope,
                f"{row.perplexity:.3f}",
                f"{row.sparsity:.4%}",
                None if row.proxy is None else f"{row.proxy:.4g}",
                f"{row.seconds:.1f}",
                None if row.memory_bytes is None else f"{row.memory_bytes / 2**30:.2f} GiB",
            )
            for row in rows
        ],
        caption=f"{windows} windows of {context_length} tokens of {report.record.source} "
        f"(sha256 {report.record.sha256[:12]}), {model.to_dict()['dtype']} on {model.device}",
    )
