"""
Calibration and search on LLaMA-2-7B shapes, on one GPU: `make bench-gpu`.

Random weights in bfloat16, made on the card. Prints the card, seconds and peak
GPU memory of each part; then how far a rating is from what the card allows, and
whether tf32 and bfloat16 rank candidates as float32 does.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --size tiny --context-length 64   # tries the script out
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import click
import evaluation_floor
import torch
from machine import card, conditions, software
from random_llama import SHAPES, random_llama, random_text

from pho_service.cli.terminal import print_table, progress, verb
from pho_service.jobs.search import search_job
from pho_service.memory import peak_memory
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.calibration import calibrate
from pho_service.models.devices import pick_device
from pho_service.pruning.bundle import ProxyBundle
from pho_service.search.request import SearchRequest
from pho_service.spec import CalibrationSettings, Pattern

TARGET_S = 120  # of all parts, on one H100
PATTERN = Pattern.parse("0.5", "layer")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times parts, and watches the memory of the device in each."""

    device: torch.device
    rows: list[tuple[str, float, int | None]] = field(default_factory=list)

    def part(self, title: str, work: Callable[[], T]) -> T:
        """Do a part of the whole."""
        with peak_memory(self.device) as peak:
            started = time.perf_counter()
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.rows.append((title, time.perf_counter() - started, peak()))
        return result


@click.command()
@click.option("--device", help="[default: cuda, which has to be there]")
@click.option("--size", type=click.Choice(list(SHAPES)), default="7", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, help="Of the model.")
@click.option("--samples", default=128, show_default=True, help="Windows of random tokens.")
@click.option("--context-length", default=2048, show_default=True)
@click.option("--trials", default=200, show_default=True)
@click.option("--candidates", default=40, show_default=True, help="That the precisions rank.")
@click.option("--seed", default=0, show_default=True)
@verb
def main(
    device: str | None,
    size: str,
    dtype: str,
    samples: int,
    context_length: int,
    trials: int,
    candidates: int,
    seed: int,
) -> None:
    """Print the tables."""
    if device is None and not torch.cuda.is_available():
        raise click.UsageError(
            "this measures a CUDA device, and torch sees none. Run it on a machine with one and a "
            "CUDA build of torch; --device cpu --size tiny --context-length 64 tries it out."
        )
    target = pick_device(device or "cuda")
    ran_on = card() if target.type == "cuda" else "the CPU, no GPU"
    click.echo(f"{ran_on}; {conditions()}; {software('torch', 'transformers', 'optuna')}")
    settings = CalibrationSettings(
        samples=samples, context_length=context_length, bos="never", seed=seed
    )
    clock = Clock(device=target)
    with tempfile.TemporaryDirectory(prefix="pho-") as folder:
        bundle = _parts(clock, Path(folder), size, dtype, settings, trials)
    total = sum(seconds for _, seconds, _ in clock.rows)
    print_table(
        f"LLaMA of {SHAPES[size].parameters / 1e9:.2g} billion parameters on {target}",
        ("part", "seconds", "peak memory, GiB"),
        [
            *((title, f"{s:.1f}", f"{(peak or 0) / 2**30:.2f}") for title, s, peak in clock.rows),
            ("total", f"{total:.1f}", ""),
        ],
        caption=f"random weights ({SHAPES[size].like} but for the vocabulary) in {dtype}, "
        f"{samples} windows of {context_length} random tokens, a quarter of them backward; "
        f"{trials} trials at {PATTERN} in scope {PATTERN.scope}, study in SQLite, no confirmation; "
        f"seed {seed}. Making or loading the model is not counted. Target: 7 billion parameters, "
        f"128 x 2048 tokens and 200 trials in under {TARGET_S} s on one H100. Ran on {ran_on}",
    )
    evaluation_floor.measure(bundle, target, seed=seed)
    evaluation_floor.levers(bundle, target, count=candidates, seed=seed)


def _parts(
    clock: Clock, folder: Path, size: str, dtype: str, settings: CalibrationSettings, trials: int
) -> ProxyBundle:
    """All that `pho search` does with a loaded model and a text, without confirmation."""
    model = random_llama(size, dtype=dtype, device=str(clock.device), seed=settings.seed)
    text = random_text(settings)
    path = folder / "bundle.safetensors"
    request = SearchRequest(
        pattern=PATTERN,
        trials=trials,
        seed=settings.seed,
        study_url=f"sqlite:///{folder / 'study.db'}",
    )
    clock.part("hash of the weights", lambda: model.weights_sha256)
    made = clock.part("calibration", lambda: calibrate(model, text, settings, progress))
    clock.part("writing the bundle", lambda: write_bundle(made, path))
    bundle = clock.part("reading the bundle", lambda: read_bundle(path))
    clock.part(
        f"{trials} trials",
        lambda: search_job(
            request, bundle, model=model, device=str(clock.device), progress=progress
        ),
    )
    return bundle


if __name__ == "__main__":
    main()
