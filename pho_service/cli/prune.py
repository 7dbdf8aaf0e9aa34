"""`pho prune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from pho_service.cli.terminal import print_json, print_table, progress, say, verb
from pho_service.errors import InvalidInput, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from pho_service.models.loading import LanguageModel
    from pho_service.pruning.bundle import ProxyBundle


@click.command()
@click.argument("model", required=False)
@click.option("--config", "config_path", type=click.Path(), help="A configuration.")
@click.option("--out", type=click.Path(), help="A new or empty folder.")
@click.option(
    "--bundle",
    "bundle_path",
    type=click.Path(),
    help="Take the statistics from here instead of calibrating on a text.",
)
@click.option(
    "--check",
    "check_path",
    type=click.Path(),
    help="Check a pruned folder instead; with MODEL, the dense original, also what stayed.",
)
@calibration_options
@calibration_seed_option
@model_options
@json_option
@verb
def prune(
    model: str | None,
    config_path: str | None,
    out: str | None,
    bundle_path: str | None,
    check_path: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Prune MODEL with a configuration and save it as a Hugging Face folder.

    The folder has safetensors with exact zeros, the tokenizer, pruning/masks.safetensors
    with one bit a weight, and pruning.json: the recipe, with the sparsity and
    the hashes of each layer. Zeros alone make nothing smaller or faster: that
    needs a runtime that skips them. --check compares a folder with its recipe.

    \b
    Example:
      pho prune HuggingFaceTB/SmolLM2-135M --config config.json \\
          --text book.txt --out pruned
      pho prune HuggingFaceTB/SmolLM2-135M --check pruned
    """
    if check_path:
        if config_path or out or bundle_path:
            raise InvalidInput("--check takes a folder and prunes nothing: leave --config, --out "
                               "and --bundle out.")  # fmt: skip
        _check(Path(check_path), model, as_json, options)
        return
    if not (model and config_path and out):
        raise InvalidInput(
            "MODEL, --config and --out are needed to prune; --check FOLDER to check a folder."
        )
    _prune(model, Path(config_path), Path(out), bundle_path, as_json, options)


def _prune(
    name: str,
    config: Path,
    folder: Path,
    bundle_path: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from pho_service.configuration import read_configuration
    from pho_service.files import check_free
    from pho_service.jobs.prune import prune_job

    check_free(folder)
    configuration = read_configuration(config)
    needs_text = configuration.candidate().steps.needs_text or options["stream"]
    loaded, bundle, calibration = _inputs(name, bundle_path, needs_text, options)
    key = configuration.calibration.get("key")
    if key and key != bundle.provenance.get("key"):
        say(
            "Note: these statistics are not those of the search (other text, settings, model or "
            "versions), so the perplexity may differ from the one in the configuration."
        )
    result = prune_job(
        loaded, bundle, configuration, folder, calibration=calibration, progress=progress
    )
    if as_json:
        print_json({"out": str(folder), "sparsity": result.sparsity, "layers": result.layers})
        return
    click.echo(f"{folder}: {result.sparsity:.4%} of {len(result.layers)} linears removed")


def _inputs(
    name: str, bundle_path: str | None, needs_text: bool, options: dict[str, Any]
) -> "tuple[LanguageModel, ProxyBundle, Tensor | None]":
    """The model, its statistics, and the calibration windows if there is a text."""
    from pho_service.models.bundle_file import read_bundle

    settings = calibration_settings(options)
    named = options["text"] is not None or options["dataset"] is not None
    if bundle_path is None:
        source = text_source(options)
        loaded = open_model(name, options)
        text = read_calibration_text(loaded, source, settings)
        return loaded, open_bundle(loaded, text, settings), text.calibration
    if named and not needs_text:
        raise InvalidInput("--bundle and a text are both given. Give one of them.")
    if needs_text and not named:
        raise InvalidInput(
            "a bundle is not enough to permute by error, re-prune, update weights or stream. "
            "Give the calibration text too: --text with the --samples and --context-length of "
            "the search."
        )
    bundle = read_bundle(Path(bundle_path))
    if not named:
        return open_model(name, options), bundle, None
    source = text_source(options)
    loaded = open_model(name, options)
    return loaded, bundle, read_calibration_text(loaded, source, settings).calibration


def _check(folder: Path, original: str | None, as_json: bool, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    from pho_service.jobs.check import check_folder, read_recipe

    loaded = None
    if original is not None:
        if options["dtype"] == "auto":  # the hash of the original's weights depends on it
            options["dtype"] = read_recipe(folder).model.dtype
        loaded = open_model(original, options)
    checks = check_folder(folder, original=loaded, progress=progress)
    if as_json:
        print_json({"folder": str(folder), "checks": [asdict(check) for check in checks]})
    else:
        print_table(
            str(folder),
            ("check", "result", "detail"),
            [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in checks],
        )
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise ModelError(
            f"{folder} is not what its recipe says: {', '.join(failed)}. Prune the model again."
        )
