"""`pho bench`."""

from dataclasses import asdict

import click

from pho_service.cli.options import at_least, check_models, json_option
from pho_service.cli.terminal import print_json, print_table, progress, verb


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--batch", default=1, show_default=True, help="Prompts at once.")
@click.option("--prompt", default=512, show_default=True, help="Tokens of each prompt.")
@click.option(
    "--new-tokens", default=32, show_default=True, help="Tokens to write after it, one by one."
)
@click.option("--rounds", default=5, show_default=True, help="How often all is measured.")
@click.option("--seed", default=0, show_default=True, help="Seed of the prompts' tokens.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="auto, float32, bfloat16 or float16. auto: the stored one on a GPU, float32 on a CPU.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@json_option
@verb
def bench(
    models: tuple[str, ...],
    batch: int,
    prompt: int,
    new_tokens: int,
    rounds: int,
    seed: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """
    Measure how fast MODELS load, read a prompt and write, on this machine.

    Each is a folder, packed or not, a hub id or a .gguf file; the others are
    compared with the first. All are in memory at once, and every round runs
    each of them. On a GPU, a folder with 2:4 linears is measured a second time,
    with torch's kernels for them.

    \b
    Example:
      pho bench dense pruned24 pruned24.pho --batch 8
    """
    from transformers.utils.logging import disable_progress_bar

    from pho_service.pipeline.bench import COLUMNS, NOTE, BenchSettings, row, title
    from pho_service.pipeline.bench import bench as measure

    at_least(1, batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    check_models(models)
    disable_progress_bar()  # ours is shown
    settings = BenchSettings(
        batch=batch, prompt=prompt, new_tokens=new_tokens, rounds=rounds, seed=seed
    )
    found = measure(models, settings, device=device, dtype=dtype, progress=progress)
    if as_json:
        print_json(
            {
                "conditions": found.conditions,
                "settings": asdict(settings),
                "sides": [asdict(side) for side in found.sides],
            }
        )
        return
    print_table(
        title(settings),
        COLUMNS,
        [row(found, side) for side in found.sides],
        caption="\n".join([*found.conditions, NOTE]),
    )
