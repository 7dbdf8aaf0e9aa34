"""`pho evaluate`."""

from typing import Any

import click

from pho_service.cli.options import (
    at_least,
    bos_option,
    json_option,
    model_options,
    open_model,
    report_text,
    text_options,
    text_source,
)
from pho_service.cli.terminal import print_json, progress, verb


@click.command()
@click.argument("model")
@text_options
@click.option(
    "--context-length", type=int, default=2048, show_default=True, help="Tokens of a window."
)
@click.option("--max-windows", type=int, help="Rate only the first N windows.")
@bos_option
@model_options
@json_option
@verb
def evaluate(
    model: str,
    context_length: int,
    max_windows: int | None,
    bos: str,
    as_json: bool,
    **options: Any,
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

    at_least(8, context_length=context_length)
    at_least(1, max_windows=max_windows)
    source = text_source(options)
    loaded = open_model(model, options)
    text = report_text(
        loaded, source, context_length=context_length, bos=bos, max_windows=max_windows
    )
    with progress("Measuring perplexity", len(text.windows)) as advance:
        result = measure_perplexity(loaded, text.windows, advance=advance)
    document = {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "windows": result.windows,
        "context_length": context_length,
        "bos": bool(loaded.window_prefix(bos)),
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
        f"tokens     {result.tokens} in {result.windows} windows of {context_length}, "
        f"{'with' if document['bos'] else 'without'} BOS\n"
        f"text       {text.record.source}\n"
        f"sha256     {text.record.sha256}"
    )
