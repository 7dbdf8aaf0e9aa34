"""
Calibration and search on LLaMA-2-7B shapes, on one GPU: `make bench-gpu`.

Random weights in bfloat16, made on the card. Prints the card, seconds and peak
GPU memory of each part; then whether tf32 and bfloat16 rank candidates as
float32 does, and how far an evaluation is from what the card allows.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --size tiny --context-length 64   # tries the script out
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from machine import card, conditions, software
from random_llama import SHAPES, random_llama, random_text
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pho_service.cli.terminal import print_table, progress, say, verb
from pho_service.jobs.search import search_job
from pho_service.memory import peak_memory
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.calibration import calibrate
from pho_service.models.loading import pick_device
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.search.request import SearchRequest
from pho_service.search.space import SearchSpace
from pho_service.search.validation import random_candidates
from pho_service.spec import CalibrationSettings, Objective, Pattern

TARGET_S = 120  # of all parts, on one H100
PATTERN = Pattern.parse("0.5", "layer")
PRECISIONS = ("float32", "tf32", "bfloat16")

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
    _show_precisions(bundle, target, candidates, seed)
    _show_floor(bundle, target)


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


def _show_precisions(bundle: ProxyBundle, device: torch.device, count: int, seed: int) -> None:
    """Does a faster multiplication change the ranking?"""
    drawn = random_candidates(
        SearchSpace(kernel_sizes=bundle.kernel_sizes), PATTERN, count=count, seed=seed
    )
    objective = Objective()
    values: dict[str, list[float]] = {}
    rows = []
    for precision in PRECISIONS:
        with _multiplying_in(precision):
            evaluator = ProxyEvaluator(bundle, device)
            for candidate in drawn:
                evaluator.evaluate([candidate])  # what is kept for the next time is there now
            started = time.perf_counter()
            ratings = [evaluator.evaluate([candidate])[0] for candidate in drawn]
            seconds = (time.perf_counter() - started) / count
        values[precision] = [getattr(rating, objective.weighting) for rating in ratings]
        exact = values["float32"]
        rank = spearmanr(values[precision], exact).statistic
        off = max(abs(v / e - 1) for v, e in zip(values[precision], exact, strict=True))
        speed = "" if precision == "bfloat16" else f"{seconds * 1e3:.2f}"
        rows.append((precision, f"{rank:.4f}", f"{off:.1e}", speed))
    print_table(
        "Precision of the matrix products of an evaluation",
        ("precision", "Spearman with float32", "largest relative difference", "ms a candidate"),
        rows,
        caption=f"{count} random candidates at {PATTERN} in scope {PATTERN.scope}, seed {seed}, "
        f"one at a time, proxy {objective.weighting}, on {device}. tf32: torch's float32 matmul "
        "precision `high`, which changes nothing on most CPUs. bfloat16: operands and results of "
        "every product are rounded to it, which takes time of its own, so none is given.",
    )


@contextmanager
def _multiplying_in(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with _RoundedProducts() if precision == "bfloat16" else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _RoundedProducts(TorchDispatchMode):
    """Matrix products in bfloat16 whose results are float32 again, as the evaluator wants them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        given = dict(kwargs or {})
        if func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.bmm):
            return func(*args, **given)
        product = func.overloadpacket(*(operand.bfloat16() for operand in args)).float()
        return given["out"].copy_(product) if "out" in given else product


def _show_floor(bundle: ProxyBundle, device: torch.device) -> None:
    """What an evaluation takes at least on this device, and what it takes."""
    if find_spec("evaluation_floor") is None:
        say("benchmarks/evaluation_floor.py is not here: the floor is not measured.")
        return
    import evaluation_floor

    evaluation_floor.measure(bundle, device)


if __name__ == "__main__":
    main()
