"""
Bytes, speed and quality in llama.cpp: dense and pruned models, each in types of 16 to 4 bits.

SmolLM2-135M comes from a file of four bits, so that the dense model would be exact in that type,
and whatever pruning touches would not. So does Gemma 3 270M. So the dense model of all rows is one
that has left this grid: the scales of its norms are in its linears, and the outputs of some linears
are scaled, which the next ones undo. It computes the same. Nothing is chosen on the report text.

    python benchmarks/equal_bytes.py --keep equal-bytes
    python benchmarks/equal_bytes.py --keep equal-bytes --method wanda:0.5 --type q8_0
    python benchmarks/equal_bytes.py --keep equal-bytes-gemma --model gemma3

What is in the folder already is taken from it. The machine should do nothing else.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from domains import DOMAINS
from machine import conditions
from subject import MODELS
from transformers.utils.logging import disable_progress_bar

import pho_service as pho
from pho_service.cli.terminal import print_table, say
from pho_service.models.loading import load_model
from pho_service.models.saving import RECIPE
from pho_service.spec.export import GGUF_TYPES

CONTEXT = 512


@click.command()
@click.option("--model", default="smollm2", type=click.Choice([*MODELS]), show_default=True)
@click.option("--keep", required=True, type=click.Path(path_type=Path), help="Folder of models.")
@click.option(
    "--method", "methods", multiple=True, default=("wanda:0.5", "best:0.5"), show_default=True,
    help="A method or preset, and its pattern.",
)  # fmt: skip
@click.option("--folder", "folders", multiple=True, help="Another model to measure beside them.")
@click.option(
    "--type", "types", multiple=True, type=click.Choice(GGUF_TYPES), show_default=True,
    default=("bf16", "q8_0", "q5_0", "q4_0"),
)  # fmt: skip
@click.option("--samples", default=16, show_default=True, help="Calibration windows.")
@click.option("--trials", default=100, show_default=True)
@click.option("--windows", default=16, show_default=True, help="Of the report text.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--prompt", default=256, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="All numbers, as JSON.")
def main(
    model: str,
    keep: Path,
    methods: tuple[str, ...],
    folders: tuple[str, ...],
    types: tuple[str, ...],
    samples: int,
    trials: int,
    windows: int,
    rounds: int,
    prompt: int,
    new_tokens: int,
    out: Path | None,
) -> None:
    """Prune, export, and measure all of it in interleaved rounds."""
    disable_progress_bar()
    say(conditions())
    keep.mkdir(parents=True, exist_ok=True)
    texts = DOMAINS["docs"](keep / "texts")
    dense = keep / "dense"
    if not dense.is_dir():
        _leave_the_grid(MODELS[model](), dense)
    models = [dense]
    for method in methods:
        name, _, pattern = method.partition(":")
        folder = keep / f"{name}-{pattern.replace(':', '-')}"
        if not (folder / RECIPE).is_file():
            _prune(dense, folder, name, pattern, texts, samples, trials)
        models.append(folder)
    measured = pho.bench(
        [*models, *folders], runtime="llama.cpp", types=list(types), report=str(texts["report"]),
        report_windows=windows, context_length=CONTEXT, rounds=rounds, prompt=prompt,
        new_tokens=new_tokens,
    )  # fmt: skip
    if out is not None:
        sides = [asdict(side) for side in measured.sides]
        out.write_text(json.dumps({"conditions": measured.conditions, "sides": sides}, indent=2))
    table = measured.table
    print_table(table.title, table.columns, table.cells, caption="\n".join(table.notes))


def _leave_the_grid(source: Path, folder: Path) -> None:
    """Write the same function in other numbers: what linears read is scaled, and scaled back."""
    loaded = load_model(str(source))
    network: Any = loaded.model
    config, random = network.config, torch.Generator().manual_seed(0)
    group = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in network.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            # Gemma normalises what an MLP reads with another norm, and its scales are 1 + weight.
            before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
            ones = 1 if before_mlp is layer.post_attention_layernorm else 0
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (before_mlp, (mlp.gate_proj, mlp.up_proj)),
            ):
                scale = 2 ** (torch.rand(norm.weight.numel(), generator=random) - 0.5)
                for reader in readers:
                    reader.weight.div_(scale)
                norm.weight.copy_((norm.weight + 1 - ones) * scale - (1 - ones))
            for writer, reader, times in (
                (attention.v_proj, attention.o_proj, group),
                (mlp.up_proj, mlp.down_proj, 1),
            ):
                scale = 2 ** (torch.rand(writer.out_features, generator=random) - 0.5)
                writer.weight.mul_(scale[:, None])
                heads = scale.view(config.num_key_value_heads if times > 1 else 1, -1)
                reader.weight.div_(heads.repeat_interleave(times, dim=0).flatten())
    network.to(torch.bfloat16).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _prune(
    dense: Path,
    folder: Path,
    method: str,
    pattern: str,
    texts: dict[str, Path],
    samples: int,
    trials: int,
) -> None:
    loaded = pho.load_model(str(dense))
    model, tokenizer, calibration = loaded.model, loaded.tokenizer, str(texts["calibration"])
    bundle = pho.calibrate(model, tokenizer, calibration, samples=samples, context_length=CONTEXT)
    if method == "structured":
        choice = pho.search(
            bundle, f"structured:{pattern}", model=model, tokenizer=tokenizer, texts=calibration,
            confirm=str(texts["confirmation"]),
        )  # fmt: skip
        print(choice)
    elif method in ("score", "crepe", "crepe-plus", "best"):
        choice = pho.search(
            bundle, pattern, model=model, tokenizer=tokenizer, preset=method, trials=trials,
            texts=calibration, confirm=str(texts["confirmation"]),
        )  # fmt: skip
        print(choice)
    else:
        choice = pho.baseline(method, pattern)
    pruned = pho.prune(model, choice, bundle, texts=calibration)
    pho.save(model, tokenizer, pruned, folder)


if __name__ == "__main__":
    main()
