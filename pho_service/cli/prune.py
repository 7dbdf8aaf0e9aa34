"""`pho prune`."""

from pathlib import Path
from typing import Any

import click

from pho_service.cli.options import (
    calibration_options,
    calibration_seed_option,
    calibration_settings,
    json_option,
    model_options,
    open_bundle,
    open_model,
    read_calibration_text,
    text_source,
)
from pho_service.cli.terminal import print_json, progress, say, verb


@click.command()
@click.argument("model")
@click.option("--config", "config_path", required=True, type=click.Path(), help="A configuration.")
@click.option("--out", required=True, type=click.Path(), help="A new or empty folder.")
@click.option(
    "--bundle",
    "bundle_path",
    type=click.Path(),
    help="Take the statistics from here instead of calibrating on a text.",
)
@calibration_options
@calibration_seed_option
@model_options
@json_option
@verb
def prune(
    model: str, config_path: str, out: str, bundle_path: str | None, as_json: bool, **options: Any
) -> None:
    """
    Prune MODEL with a configuration and save it as a Hugging Face folder.

    The folder has safetensors with exact zeros, the tokenizer, and
    pruning.json: the recipe and the sparsity of each layer. Zeros alone make
    nothing smaller or faster: that needs a runtime that skips them.

    \b
    Example:
      pho prune HuggingFaceTB/SmolLM2-135M --config config.json \\
          --text book.txt --out pruned
    """
    from pho_service.configuration import read_configuration
    from pho_service.errors import InvalidInput
    from pho_service.files import check_free
    from pho_service.jobs.prune import prune_job
    from pho_service.models.bundle_file import read_bundle

    folder = Path(out)
    check_free(folder)
    configuration = read_configuration(Path(config_path))
    settings = calibration_settings(options)
    if bundle_path:
        if options["text"] is not None or options["dataset"] is not None:
            raise InvalidInput("--bundle and a text are both given. Give one of them.")
        bundle = read_bundle(Path(bundle_path))
        loaded = open_model(model, options)
    else:
        source = text_source(options)
        loaded = open_model(model, options)
        bundle = open_bundle(loaded, read_calibration_text(loaded, source, settings), settings)
    key = configuration.calibration.get("key")
    if key and key != bundle.provenance.get("key"):
        say(
            "Note: these statistics are not those of the search (other text, settings, model or "
            "versions), so the perplexity may differ from the one in the configuration."
        )
    result = prune_job(loaded, bundle, configuration, folder, progress)
    if as_json:
        print_json({"out": str(folder), "sparsity": result.sparsity, "layers": result.layers})
        return
    click.echo(f"{folder}: {result.sparsity:.4%} of {len(result.layers)} linears removed")
