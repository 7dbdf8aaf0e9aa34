"""
Bytes, speed and quality in llama.cpp: dense and pruned models, each in types of 16 to 4 bits.

SmolLM2-135M comes from a file of four bits, so that the dense model would be exact in that type,
and whatever pruning touches would not. So the dense model of all rows is one that has left this
grid: trained for some steps on a text of its own. Nothing is chosen on the report text.

    python benchmarks/equal_bytes.py --keep equal-bytes
    python benchmarks/equal_bytes.py --method wanda:0.5 --type q8_0

What is in the folder already is taken from it. The machine should do nothing else.
"""

import json
from dataclasses import asdict
from pathlib import Path

import click
import torch
from domains import DOMAINS
from machine import conditions
from transformers.utils.logging import disable_progress_bar

import pho_service as pho
from pho_service.cli.terminal import print_table, progress, say
from pho_service.models.builtin import smollm2
from pho_service.models.loading import load_model
from pho_service.models.saving import RECIPE
from pho_service.spec.export import GGUF_TYPES

CONTEXT = 512
TRAINED_ON = 256  # tokens of a window of the training that leaves the grid


@click.command()
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
@click.option("--steps", default=150, show_default=True, help="Of training, to leave the grid.")
@click.option("--windows", default=16, show_default=True, help="Of the report text.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--prompt", default=256, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="All numbers, as JSON.")
def main(
    keep: Path,
    methods: tuple[str, ...],
    folders: tuple[str, ...],
    types: tuple[str, ...],
    samples: int,
    trials: int,
    steps: int,
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
        _leave_the_grid(dense, str(texts["calibration"]), steps)
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


def _leave_the_grid(folder: Path, text: str, steps: int) -> None:
    """Train the model a little, and save it in bfloat16."""
    loaded = load_model(str(smollm2()))
    model: torch.nn.Module = loaded.model
    tokens = loaded.tokenize(Path(text).read_text(encoding="utf-8"))
    rows = tokens[: len(tokens) // TRAINED_ON * TRAINED_ON].view(-1, TRAINED_ON)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95))
    model.requires_grad_(True).train()
    with progress("Training", steps) as advance:
        for step in range(steps):
            window = rows[order[step % len(rows)]][None]
            model(input_ids=window, labels=window).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            advance(1)
    loaded.model.eval().to(torch.bfloat16).save_pretrained(folder)
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
