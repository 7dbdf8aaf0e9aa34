"""`pho search`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.library import best_of_library, is_library, wanted_for
from pho_service.cli.options import (
    at_least,
    calibration_options,
    calibration_seed_option,
    calibration_settings,
    confirm_text,
    given_steps,
    is_bundle,
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
from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.spec.objective import (
    OBJECTIVES,
    OVER,
    WEIGHTINGS,
    Objective,
    ObjectiveName,
    Over,
    Weighting,
)
from pho_service.spec.pattern import Pattern
from pho_service.spec.samplers import SAMPLERS

if TYPE_CHECKING:
    from pho_service.search.request import SearchRequest
    from pho_service.search.result import SearchResult

WARM = 3  # configurations of a library that a search begins with


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@pattern_options
@click.option(
    "--over",
    type=click.Choice(OVER),
    help="How several models count, each relative to RIA on it.  [default: mean]",
)
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
@click.option(
    "--warm-start",
    "warm_paths",
    multiple=True,
    type=click.Path(),
    help="A configuration that was found elsewhere, in the same pattern and scope; or a library, "
    "that is, a folder of them or the URL of a service, for the three most promising. They are "
    "rated first, and the sampler begins around the best; may be given several times.",
)
@click.option(
    "--compare-cold",
    is_flag=True,
    help="Search without the warm start, too, and say how many trials it saved.",
)
@calibration_options
@calibration_seed_option
@model_options
@json_option
@verb
def search(
    models: tuple[str, ...],
    pattern: str,
    scope: str | None,
    over: Over | None,
    trials: int,
    seed: int,
    sampler: str,
    objective: ObjectiveName,
    weighting: Weighting,
    preset: str,
    bounds: tuple[str, ...],
    study: str,
    out: str,
    confirm_path: str | None,
    confirm_windows: int,
    finalists: int,
    warm_paths: tuple[str, ...],
    compare_cold: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Find the best coefficients for a model, and confirm them by perplexity.

    MODEL is a hub id, a local folder, a .gguf file, or a bundle of `pho
    calibrate` (.safetensors). From a bundle neither the model nor a text is
    needed, and no perplexity can be measured. Interrupted and started again
    with the same options, a search goes on where it was.

    With several models the search is for coefficients that are good on all of
    them, by the proxy relative to RIA's; `pho transfer` measures what the
    result is worth on each.

    \b
    Example:
      pho search HuggingFaceTB/SmolLM2-135M --pattern 0.5 --scope global \\
          --text book.txt --trials 200 --study sqlite:///study.db
    """
    from pho_service.library.files import read_library_file
    from pho_service.pipeline.search import check_study_url
    from pho_service.search.request import SearchRequest
    from pho_service.spec.presets import Preset
    from pho_service.spec.space import parse_bounds

    path = out_file(out)
    at_least(1, confirm_windows=confirm_windows)
    parsed = Pattern.parse(pattern, scope)
    asked = Preset.of(preset, parsed).changed(given_steps(options), parse_bounds(bounds))
    request = SearchRequest(
        pattern=parsed,
        objective=Objective(
            name=objective,
            weighting=weighting,
            over=over or "mean" if len(models) > 1 else None,
        ),
        bounds=asked.bounds,
        steps=asked.steps,
        sampler=sampler,
        trials=trials,
        seed=seed,
        finalists=finalists,
        warm_start=tuple(
            read_library_file(Path(path)).configuration.candidate()
            for path in warm_paths
            if not is_library(path)
        ),
        compare_cold=compare_cold,
    )
    check_study_url(study)
    if compare_cold and not warm_paths:
        raise InvalidInput("--compare-cold compares with a warm start: give --warm-start, too.")
    libraries = tuple(path for path in warm_paths if is_library(path))
    settings = calibration_settings(options)
    model = models[0]
    if over is not None and len(models) == 1:
        raise InvalidInput(f"--over {over} is for several models, but {model} is the only one.")
    if len(models) > 1:
        result = _from_several(request, libraries, models, settings, study, confirm_path, options)
    elif is_bundle(model):
        result = _from_bundle(request, libraries, model, study, confirm_path, options)
    else:
        request.plan(settings.kernel_sizes)  # refuses what is wrong before any long work
        source = text_source(options)
        result = _from_model(
            request,
            libraries,
            model,
            source,
            settings,
            study,
            confirm_path,
            confirm_windows,
            options,
        )
    _finish(result, path, study, as_json)


def _warmed(
    request: "SearchRequest", libraries: tuple[str, ...], model: Mapping[str, Any]
) -> "SearchRequest":
    """A request that also begins with what libraries have for a model of this description."""
    pattern = request.pattern
    scope = None if pattern.group else pattern.scope.value
    found = []
    for library in libraries:
        try:
            found += best_of_library(library, wanted_for(model, str(pattern), scope), WARM)
        except ConfigurationError as error:
            say(f"Note: nothing to start from: {error}")
    for each in found:
        say(f"Starting from {each.origin['id']}: {'; '.join(each.origin['reasons'])}.")
    points = tuple(each.configuration.candidate() for each in found)
    return replace(request, warm_start=(*request.warm_start, *points))


def _from_bundle(
    request: "SearchRequest",
    libraries: tuple[str, ...],
    name: str,
    study: str,
    confirm_path: str | None,
    options: dict[str, Any],
) -> "SearchResult":
    from pho_service.models.bundle_file import read_bundle
    from pho_service.models.devices import pick_device
    from pho_service.pipeline.search import opened_study, search_job

    if any(v is not None for v in (confirm_path, options["text"], options["dataset"])):
        raise InvalidInput(
            f"{name} is a bundle: it needs no text, and no perplexity can be measured without "
            "the model. Leave the text out, or give the model instead of the bundle."
        )
    device = str(pick_device(options["device"]))
    bundle = read_bundle(Path(name))
    request = _warmed(request, libraries, bundle.provenance.get("model", {}))
    with opened_study(study, request, bundle) as record:
        return search_job(request, bundle, study=record, device=device, progress=progress)


def _from_model(
    request: "SearchRequest",
    libraries: tuple[str, ...],
    name: str,
    source: Any,
    settings: Any,
    study: str,
    confirm_path: str | None,
    confirm_windows: int,
    options: dict[str, Any],
) -> "SearchResult":
    from pho_service.pipeline.search import opened_study, search_job

    model = open_model(name, options)
    text = read_calibration_text(model, source, settings)
    confirming = confirm_text(model, text, confirm_path, settings, confirm_windows)
    bundle = open_bundle(model, text, settings)
    request = _warmed(request, libraries, model.to_dict())
    with opened_study(study, request, bundle, confirming) as record:
        return search_job(
            request,
            bundle,
            study=record,
            model=model,
            confirm_text=confirming,
            calibration=text.calibration,
            device=str(model.device),
            progress=progress,
        )


def _from_several(
    request: "SearchRequest",
    libraries: tuple[str, ...],
    names: tuple[str, ...],
    settings: Any,
    study: str,
    confirm_path: str | None,
    options: dict[str, Any],
) -> "SearchResult":
    from pho_service.models.bundle_file import read_bundle
    from pho_service.models.devices import pick_device
    from pho_service.pipeline.search import opened_study, search_job

    if confirm_path is not None:
        raise InvalidInput(
            "--confirm-text is for one model. Leave it out, and measure the result on each model "
            "with `pho transfer`."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InvalidInput(f"{twice[0]} is given twice. Give each model once.")
    device = str(pick_device(options["device"]))
    whole = [name for name in names if not is_bundle(name)]
    if whole:
        request.plan(settings.kernel_sizes)  # refuses what is wrong before any long work
        source = text_source(options)
    bundles = {}
    for name in names:
        if is_bundle(name):
            bundles[name] = read_bundle(Path(name))
            continue
        model = open_model(name, dict(options))
        text = read_calibration_text(model, source, settings)
        bundles[name] = open_bundle(model, text, settings)
        del model  # two may not fit
    request = _warmed(request, libraries, {})
    with opened_study(study, request, bundles) as record:
        return search_job(request, bundles, study=record, device=device, progress=progress)


def _finish(result: "SearchResult", path: Path, study: str, as_json: bool) -> None:
    from pho_service.spec.configuration import write_configuration

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
        f"steps        {found.steps}",
        f"objective    {found.objective['name']} {found.objective['value']:.6g}",
    ]
    for name, value in found.objective.get("relative_to_ria", {}).items():
        lines.append(f"             {value:.4f} of RIA's on {name}")
    if found.confirmation:
        lines.append(
            f"perplexity   {found.confirmation.perplexity:.4f} on "
            f"{found.confirmation.tokens} tokens of {found.confirmation.text['source']}"
        )
        tokens = found.confirmation.divergence_tokens
        if tokens is not None:
            rated = sum(c.perplexity is not None for c in found.candidates)
            lines.append(
                f"confirmed    the best of {rated} perplexities; finalists and baselines got one "
                f"that are near to the dense model on {tokens} tokens"
            )
    lines += _started(result)
    lines += [
        f"written      {path}",
        f"study        {result.study_name!r}; browse it with: optuna-dashboard {study}",
    ]
    return "\n".join(lines)


def _started(result: "SearchResult") -> list[str]:
    """What a warm start was worth."""
    from pho_service.search.warm_start import Saving

    points = result.configuration.search.get("warm_start", [])
    known = [point for point in points if point["value"] is not None]
    if not known:
        return []
    objective = result.configuration.objective
    better = min if objective["direction"] == "minimize" else max
    best = better(known, key=lambda point: point["value"])
    lines = [
        f"warm start   {best['value']:.6g} at trial {best['trial']}, the best of {len(points)}; "
        f"the result is trial {result.trial}"
    ]
    saving = result.configuration.search.get("saving")
    return lines + ([] if saving is None else [f"             {Saving(**saving)}"])
