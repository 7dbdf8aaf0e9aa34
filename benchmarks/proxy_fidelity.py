"""
How much of the proxy can be sampled away before it ranks differently?

Rates random candidates by the full proxy (all rows, full Gram matrix) and by
cheaper ones, and prints rank correlation, bundle size and time a candidate.

    python benchmarks/proxy_fidelity.py MODEL --text calibration.jsonl
"""

import platform
import tempfile
import time
from pathlib import Path

import click
import torch
from scipy.stats import spearmanr

from pho_service.cli.terminal import print_table, progress, say
from pho_service.host.versions import versions
from pho_service.models.builtin import smollm2, write_texts
from pho_service.models.bundle_file import write_bundle
from pho_service.models.calibration import calibration_text, measure
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource
from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.perplexity import rate_perplexity
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.candidate import Candidate
from pho_service.spec.objective import WEIGHTINGS
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace
from pho_service.tuning.validation import random_candidates

KERNEL_SIZES = (3, 5, 9, 15)


@click.command()
@click.argument("model", required=False)
@click.option("--text", help="Calibration text.  [default: that of the demo]")
@click.option("--pattern", default="0.5", show_default=True)
@click.option("--scope", default="layer", show_default=True)
@click.option("--candidates", default=32, show_default=True)
@click.option("--samples", default=32, show_default=True)
@click.option("--context-length", default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str | None,
    text: str | None,
    pattern: str,
    scope: str,
    candidates: int,
    samples: int,
    context_length: int,
    seed: int,
) -> None:
    """Print the table of docs/proxy.md."""
    with tempfile.TemporaryDirectory() as folder:
        path = text or str(write_texts(Path(folder))["calibration"])
        loaded = load_model(model or str(smollm2()))
        settings = CalibrationSettings(samples=samples, context_length=context_length, seed=seed)
        windows = calibration_text(loaded, TextSource(path=path), settings)
        measured = {}
        for projection_rows in (0, 64, 128, 256):
            measured[projection_rows] = measure(
                loaded,
                windows,
                CalibrationSettings(
                    samples=samples,
                    context_length=context_length,
                    seed=seed,
                    projection_rows=projection_rows,
                ),
                progress,
            )
        drawn = random_candidates(
            SearchSpace(kernel_sizes=KERNEL_SIZES),
            Pattern.parse(pattern, scope),
            count=candidates,
            seed=seed,
        )

        def bundle(rows: int, projection_rows: int) -> ProxyBundle:
            return sample_bundle(
                loaded.linears,
                measured[projection_rows],
                rows_per_layer=rows,
                kernel_sizes=KERNEL_SIZES,
                seed=seed,
            )

        full, full_seconds = _rate(bundle(0, 0), drawn)
        table = [("all, Gram", *_row(full, full, full_seconds, None))]
        for rows in (16, 32, 64):
            for projection_rows in (0, 64, 128, 256):
                sampled = bundle(rows, projection_rows)
                file = Path(folder) / "bundle.safetensors"
                write_bundle(sampled, file)
                values, seconds = _rate(sampled, drawn)
                kind = f"projection {projection_rows}" if projection_rows else "Gram"
                table.append((f"{rows}, {kind}", *_row(values, full, seconds, file)))
                say(f"{rows} rows, {kind}: done")
        started = time.perf_counter()
        tokens = 8192 // context_length
        rate_perplexity(loaded.model, windows.calibration[:tokens])
        perplexity_seconds = time.perf_counter() - started
    print_table(
        f"{Path(loaded.name).name} at {pattern}, scope {scope}: Spearman with the full proxy",
        ("rows a layer, second moment", *WEIGHTINGS, "MB", "s a candidate"),
        table,
    )
    click.echo(
        f"{candidates} random candidates, calibrated on {len(windows.calibration)} windows of "
        f"{context_length} tokens, seed {seed}. One perplexity of {tokens * context_length} "
        f"tokens, without pruning: {perplexity_seconds:.2f} s. {platform.processor() or 'CPU'}, "
        f"{torch.get_num_threads()} threads, {versions('torch', 'transformers')}"
    )


def _rate(bundle: ProxyBundle, drawn: list[Candidate]) -> tuple[dict[str, list[float]], float]:
    evaluator = ProxyEvaluator(bundle)
    evaluator.evaluate(drawn[:1])
    started = time.perf_counter()
    ratings = []
    for candidate in drawn:
        ratings += evaluator.evaluate([candidate])
    seconds = (time.perf_counter() - started) / len(drawn)
    return {w: [getattr(r, w) for r in ratings] for w in WEIGHTINGS}, seconds


def _row(
    values: dict[str, list[float]], full: dict[str, list[float]], seconds: float, file: Path | None
) -> list[str]:
    correlations = [f"{spearmanr(values[w], full[w]).statistic:.3f}" for w in WEIGHTINGS]
    size = f"{file.stat().st_size / 2**20:.0f}" if file else ""
    return [*correlations, size, f"{seconds:.3f}"]


if __name__ == "__main__":
    main()
