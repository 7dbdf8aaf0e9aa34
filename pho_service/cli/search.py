"""`pho search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.options import (
    at_least,
    calibration_options,
    calibration_seed_option,
    calibration_settings,
    confirm_text,
    given_steps,
    json_option,
    model_options,
    open_bundle,
    open_model,
    out_file,
    pattern_options,
    read_calibration_text,
    space_option,
    steps_options,
    text_source,
)
from pho_service.cli.terminal import print_json, progress, say, verb
from pho_service.spec import OBJECTIVES, SAMPLERS, WEIGHTINGS, Objective, Pattern

if TYPE_CHECKING:
    from pho_service.search.request import SearchRequest
    from pho_service.search.result import SearchResult


@click.command()
@click.argument("model")
@pattern_options
@click.option(
    "--trials",
    type=int,
    default=200,
    show_default=True,
    help="Baselines included; a hill climb may end before.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
@click.option(
    "--sampler",
    type=click.Choice(list(SAMPLERS)),
    default="cmaes",
    show_default=True,
    help="Where candidates come from; hill-climb, with --objective perplexity, is what a search "
    "without a proxy would do.",
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="activation-reconstruction",
    show_default=True,
)
@click.option(
    "--weighting",
    type=click.Choice(WEIGHTINGS),
    default="blend",
    show_default=True,
    help="How activation reconstruction adds up the errors of rows and layers.",
)
@steps_options
@space_option
@click.option(
    "--study",
    default="sqlite:///study.db",
    show_default=True,
    help="Database of the Optuna study; an interrupted search goes on from it.",
)
@click.option("--out", default="config.json", show_default=True, help="The configuration.")
@click.option(
    "--confirm-text",
    "confirm_path",
    type=click.Path(),
    help="Text for the final perplexities.  [default: windows of --text that calibration left]",
)
@click.option(
    "--confirm-windows", type=int, default=16, show_default=True, help="Windows of that text."
)
@click.option(
    "--finalists",
    type=int,
    default=5,
    show_default=True,
    help="Found candidates that are compared with the dense model, beside the baselines; the three "
    "nearest and the nearest baseline get a perplexity. If a step needs a text: that many get one.",
)
@calibration_options
@calibration_seed_option
@model_options
@json_option
@verb
def search(
    model: str,
    pattern: str,
    scope: str | None,
    trials: int,
    seed: int,
    sampler: str,
    objective: str,
    weighting: str,
    preset: str,
    bounds: tuple[str, ...],
    study: str,
    out: str,
    confirm_path: str | None,
    confirm_windows: int,
    finalists: int,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Find the best coefficients for MODEL, and confirm them by perplexity.

    MODEL is a hub id, a local folder, a .gguf file, or a bundle of `pho
    calibrate` (.safetensors). From a bundle neither the model nor a text is
    needed, and no perplexity can be measured. Interrupted and started again
    with the same options, a search goes on where it was.

    \b
    Example:
      pho search HuggingFaceTB/SmolLM2-135M --pattern 0.5 --scope global \\
          --text book.txt --trials 200 --study sqlite:///study.db
    """
    from pho_service.search.presets import Preset
    from pho_service.search.request import SearchRequest
    from pho_service.search.space import parse_bounds

    path = out_file(out)
    at_least(1, confirm_windows=confirm_windows)
    parsed = Pattern.parse(pattern, scope)
    asked = Preset.of(preset, parsed).changed(given_steps(options), parse_bounds(bounds))
    request = SearchRequest(
        pattern=parsed,
        objective=Objective(name=objective, weighting=weighting),
        bounds=asked.bounds,
        steps=asked.steps,
        sampler=sampler,
        trials=trials,
        seed=seed,
        study_url=study,
        finalists=finalists,
    )
    settings = calibration_settings(options)
    if Path(model).suffix == ".safetensors":
        result = _from_bundle(request, model, confirm_path, options)
    else:
        request.plan(settings.kernel_sizes)  # refuses what is wrong before any long work
        source = text_source(options)
        result = _from_model(
            request, model, source, settings, confirm_path, confirm_windows, options
        )
    _finish(result, path, study, as_json)


def _from_bundle(
    request: "SearchRequest", bundle: str, confirm_path: str | None, options: dict[str, Any]
) -> "SearchResult":
    from pho_service.errors import InvalidInput
    from pho_service.jobs.search import search_job
    from pho_service.models.bundle_file import read_bundle
    from pho_service.models.devices import pick_device

    if any(v is not None for v in (confirm_path, options["text"], options["dataset"])):
        raise InvalidInput(
            f"{bundle} is a bundle: it needs no text, and no perplexity can be measured without "
            "the model. Leave the text out, or give the model instead of the bundle."
        )
    device = str(pick_device(options["device"]))
    return search_job(request, read_bundle(Path(bundle)), device=device, progress=progress)


def _from_model(
    request: "SearchRequest",
    name: str,
    source: Any,
    settings: Any,
    confirm_path: str | None,
    confirm_windows: int,
    options: dict[str, Any],
) -> "SearchResult":
    from pho_service.jobs.search import search_job

    model = open_model(name, options)
    text = read_calibration_text(model, source, settings)
    confirming = confirm_text(model, text, confirm_path, settings, confirm_windows)
    bundle = open_bundle(model, text, settings)
    return search_job(
        request,
        bundle,
        model=model,
        confirm_text=confirming,
        calibration=text.calibration,
        device=str(model.device),
        progress=progress,
    )


def _finish(result: "SearchResult", path: Path, study: str, as_json: bool) -> None:
    from pho_service.configuration import write_configuration

    write_configuration(result.configuration, path)
    for warning in result.warnings:
        say(f"Note: {warning}")
    if as_json:
        print_json(
            {
                "configuration": result.configuration.model_dump(mode="json"),
                "out": str(path),
                "study": {"url": study, "name": result.study_name},
                "warnings": result.warnings,
            }
        )
        return
    click.echo(describe(result, path, study))


def describe(result: "SearchResult", path: Path, study: str) -> str:
    """What was found, in a few lines."""
    found = result.configuration
    c = found.coefficients
    lines = [
        f"method       {found.method}, pattern {found.pattern}, scope {found.scope}",
        f"coefficients row {c.row:.4f}, column {c.column:.4f}, neighbourhood "
        f"{c.neighbourhood:.4f}, kernel {c.kernel_size}",
        f"exponents    activation {c.activation_exponent:.4f}, gradient {c.gradient_exponent:.4f}",
        f"steps        {found.steps.steps()}",
        f"objective    {found.objective['name']} {found.objective['value']:.6g}",
    ]
    if found.confirmation:
        lines.append(
            f"perplexity   {found.confirmation.perplexity:.4f} on "
            f"{found.confirmation.tokens} tokens of {found.confirmation.text['source']}"
        )
        tokens = found.confirmation.divergence_tokens
        if tokens is not None:
            rated = sum(c.perplexity is not None for c in found.candidates)
            lines.append(
                f"confirmed    the best of {rated} perplexities; those {rated} were nearest to the "
                f"dense model on {tokens} tokens, among the finalists and the baselines"
            )
    lines += [
        f"written      {path}",
        f"study        {result.study_name!r}; browse it with: optuna-dashboard {study}",
    ]
    return "\n".join(lines)
