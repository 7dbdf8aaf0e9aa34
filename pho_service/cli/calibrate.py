"""`pho calibrate`."""

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_models,
    device_options,
    json_option,
    out_file,
)
from pho_service.cli.terminal import print_json, progress, verb


@click.command(
    cls=DocumentCommand,
    fields=("calibration", "revision", "dtype", "stream"),
    names={"calibration/seed": "--seed"},
)
@click.argument("model")
@click.option("--out", required=True, type=click.Path(), help="The bundle: a .safetensors file.")
@device_options
@json_option
@verb
def calibrate(model: str, given: Given, out: str, inputs: Terminal, as_json: bool) -> None:
    """
    Run MODEL once over a text and write its proxy bundle.

    The bundle has all that a search needs: sampled rows of every linear and
    statistics of its activations and gradients. A search from it needs neither
    the model nor the text. Without --text or --dataset, C4 is used.

    \b
    Example:
      pho calibrate HuggingFaceTB/SmolLM2-135M --text book.txt --out smollm2.safetensors
    """
    from pho_service.errors import InvalidInput
    from pho_service.models.bundle_file import write_bundle
    from pho_service.models.calibration import calibrate as make_bundle

    path = out_file(out)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"--out {out} must end in .safetensors: a bundle is such a file.")
    check_models([model], given("revision"))
    calibration = given.calibration()
    settings, source = calibration.settings(), calibration_source(calibration)
    loaded = inputs.model(model)
    text = inputs.windows(loaded, source, settings)
    bundle = make_bundle(loaded, text, settings, progress)
    write_bundle(bundle, path)
    size = path.expanduser().stat().st_size
    if as_json:
        print_json({"bundle": str(path), "bytes": size, **bundle.provenance})
        return
    click.echo(
        f"{path}: {size / 2**20:.1f} MB, {len(bundle.layers)} linears, "
        f"{len(text.calibration)} windows of {settings.context_length} tokens"
    )
