"""`pho evaluate`."""

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    ModelOptions,
    at_least,
    device_options,
    json_option,
    open_model,
    report_text,
    text_source,
)
from pho_service.cli.terminal import print_json, progress, verb


@click.command(
    cls=DocumentCommand,
    fields=(
        *(f"calibration/{field}" for field in ("text", "dataset", "data_file", "split", "field")),
        "calibration/context_length", "calibration/bos", "revision", "dtype", "stream",
    ),
)  # fmt: skip
@click.argument("model")
@click.option("--max-windows", type=int, help="Rate only the first N windows.")
@device_options
@json_option
@verb
def evaluate(
    model: str,
    given: Given,
    max_windows: int | None,
    device: str,
    device_map: str | None,
    as_json: bool,
) -> None:
    """
    Print the perplexity of MODEL on a text.

    MODEL is a hub id, a local folder or a .gguf file. The text is joined,
    tokenised once and cut into windows that do not overlap; the tail is
    dropped. tokens counts the predicted ones, all but the first of a window.

    \b
    Example:
      pho evaluate pruned --text report.txt --context-length 512
    """
    from pho_service.models.blockwise import measure_perplexity

    at_least(1, max_windows=max_windows)
    how = given.calibration()
    source = text_source(how)
    loaded = open_model(model, ModelOptions.of(given, device, device_map))
    text = report_text(
        loaded,
        source,
        context_length=how.context_length,
        bos=how.bos,
        max_windows=max_windows,
    )
    with progress("Measuring perplexity", len(text.windows)) as advance:
        result = measure_perplexity(loaded, text.windows, advance=advance)
    document = {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "windows": result.windows,
        "context_length": how.context_length,
        "bos": bool(loaded.window_prefix(how.bos)),
        "text": text.record.source,
        "text_sha256": text.record.sha256,
        "model": loaded.to_dict(),
        "device": str(loaded.device),
    }
    if as_json:
        print_json(document)
        return
    click.echo(
        f"perplexity {result.perplexity:.4f}\n"
        f"tokens     {result.tokens} in {result.windows} windows of {how.context_length}, "
        f"{'with' if document['bos'] else 'without'} BOS\n"
        f"text       {text.record.source}\n"
        f"sha256     {text.record.sha256}"
    )
