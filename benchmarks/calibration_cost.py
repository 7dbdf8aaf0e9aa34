"""
What a calibration costs beside the passes that it cannot do without, and how its precision ranks.

First table: a calibration as it is, and the bare passes of the model on the
same windows. Second: the sums over one input against the linear that reads it.

    python benchmarks/calibration_cost.py MODEL --text calibration.jsonl
"""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from pho_service.cli.terminal import print_table, say
from pho_service.host.versions import versions
from pho_service.models.architecture import decoder_blocks
from pho_service.models.builtin import smollm2, write_texts
from pho_service.models.calibration import CalibrationText, calibrate, calibration_text
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import TextSource
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.passes import frozen, run_backward, run_decoder
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.second_moments import SecondMoment, mirrored_, square_root
from pho_service.pruning.statistics import collect_statistics
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.tuning.validation import random_candidates

LINEARS = ("576x576", "1536x576", "4096x4096", "11008x4096")  # of SmolLM2-135M and LLaMA-2-7B
PROJECTION_ROWS = 128

T = TypeVar("T")


@click.command()
@click.argument("model", required=False)
@click.option("--text", help="Calibration text.  [default: that of the demo]")
@click.option("--samples", default=8, show_default=True)
@click.option("--context-length", default=512, show_default=True)
@click.option("--candidates", default=40, show_default=True, help="To compare ranks by.")
@click.option("--linear", "linears", multiple=True, default=LINEARS, help="Inputs x outputs.")
@click.option("--threads", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str | None,
    text: str | None,
    samples: int,
    context_length: int,
    candidates: int,
    linears: tuple[str, ...],
    threads: int,
    seed: int,
) -> None:
    """Print the tables of docs/speed.md on calibration."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = text or str(write_texts(Path(folder))["calibration"])
        started = time.process_time()
        loaded = load_model(model or str(smollm2()))
        loading = time.process_time() - started
        settings = CalibrationSettings(samples=samples, context_length=context_length, seed=seed)
        windows = calibration_text(loaded, TextSource(path=path), settings)
    rows = _passes(loaded, windows) + _calibrations(loaded, windows, settings, candidates)
    print_table(
        f"{Path(loaded.name).name}, {len(windows.calibration)} windows of {context_length} tokens, "
        f"{_backward(settings)} of them backward",
        ("work", "CPU seconds", "Spearman"),
        rows,
    )
    print_table(
        f"CPU milliseconds for {context_length} tokens",
        ("linear", "forward", f"projection {PROJECTION_ROWS}", "Gram", "root of Gram, once"),
        [_sums(shape, context_length, seed) for shape in linears],
    )
    click.echo(
        f"Loading took {loading:.1f} CPU seconds. Spearman of {candidates} random candidates' "
        f"blend with that of the first calibration. Seed {seed}, "
        f"{platform.processor() or platform.machine()}, {threads} threads, "
        f"{versions('torch', 'transformers')}"
    )


def _backward(settings: CalibrationSettings) -> int:
    return settings.fisher_samples or max(1, settings.samples // 4)


def _passes(model: LanguageModel, text: CalibrationText) -> list[tuple[str, ...]]:
    """The bare passes of a calibration."""
    count = max(1, len(text.calibration) // 4)

    def forward() -> None:
        for window in text.calibration[count:]:
            run_decoder(model.model, window[None].to(model.device))

    def backward() -> None:
        with frozen(model.model):
            for window in text.calibration[:count]:
                run_backward(model.model, window[None].to(model.device))

    rows = []
    for name, run in (
        (f"bare forward of {len(text.calibration) - count}, no head", forward),
        (f"bare forward and backward of {count}", backward),
    ):
        seconds, _ = _measured(run)
        say(f"{name}: {seconds:.1f} s")
        rows.append((name, f"{seconds:.1f}", ""))
    return rows


def _calibrations(
    model: LanguageModel, text: CalibrationText, settings: CalibrationSettings, candidates: int
) -> list[tuple[str, ...]]:
    """Whole calibrations, and whether they rank candidates like the first."""
    drawn = random_candidates(
        SearchSpace(kernel_sizes=settings.kernel_sizes), Pattern.parse("0.5", "layer"),
        count=candidates, seed=settings.seed,
    )  # fmt: skip
    first: list[float] = []
    rows = []
    works: dict[str, Callable[[], ProxyBundle]] = {
        "calibration": lambda: calibrate(model, text, settings),
        "with recomputing": lambda: _recomputing(model, text, settings),
        "with mixed precision": lambda: calibrate(
            model, text, replace(settings, mixed_precision=True)
        ),
        "with another seed": lambda: calibrate(
            model, text, replace(settings, seed=settings.seed + 1)
        ),
        "with the Gram matrix": lambda: calibrate(
            model, text, replace(settings, projection_rows=0)
        ),
    }
    for name, work in works.items():
        seconds, bundle = _measured(work)
        values = [rating.blend for rating in ProxyEvaluator(bundle).evaluate(drawn)]
        first = first or values
        rank = f"{spearmanr(values, first).statistic:.4f}"
        say(f"{name}: {seconds:.1f} s")
        rows.append((name, f"{seconds:.1f}", rank))
    return rows


def _recomputing(
    model: LanguageModel, text: CalibrationText, settings: CalibrationSettings
) -> ProxyBundle:
    """A calibration as it is run where the memory is short."""
    statistics = collect_statistics(
        model.model,
        model.linears,
        text.calibration,
        fisher_windows=_backward(settings),
        projection_rows=settings.projection_rows,
        seed=settings.seed,
        recompute=[block for _, block in decoder_blocks(model.model)],
    )
    return sample_bundle(
        model.linears,
        statistics,
        rows_per_layer=settings.rows_per_layer,
        kernel_sizes=settings.kernel_sizes,
        seed=settings.seed,
    )


def _measured(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds, and what the work gives."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _sums(shape: str, tokens: int, seed: int) -> tuple[str, ...]:
    """Of one input of a linear, for one window."""
    width, out_features = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    linear = nn.Linear(width, out_features, bias=False)
    projection, gram = (
        SecondMoment(width, x.device, projection_rows=rows, seed=seed)
        for rows in (PROJECTION_ROWS, 0)
    )
    times = [
        _milliseconds(lambda: _forward(linear, x)),
        _milliseconds(lambda: projection.add(x)),
        _milliseconds(lambda: gram.add(x)),
        _milliseconds(lambda: square_root(mirrored_(gram.moment)), runs=1),
    ]
    say(f"{shape}: done")
    return (shape, *(f"{t:.2f}" if t < 10 else f"{t:.0f}" for t in times))


@torch.no_grad()
def _forward(linear: nn.Module, x: Tensor) -> None:
    linear(x)


def _milliseconds(work: Callable[[], object], runs: int = 3) -> float:
    """CPU time of the fastest run: others on the machine do not count."""
    best = float("inf")
    for _ in range(runs):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return 1000 * best


if __name__ == "__main__":
    main()
