"""
Does a race on masks alone find the winner that pruning all finalists in full finds?

    python benchmarks/masks_race.py --model smollm2 --pattern 0.5 --pattern 2:4 --seeds 0,1
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
from machine import conditions, software
from subject import load_subject

from pho_service.cli.terminal import progress
from pho_service.pipeline.search import search_job, study_of
from pho_service.pipeline.work import Work
from pho_service.progress import Run
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import Preset
from pho_service.tuning.plan import SearchRequest


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--pattern", "patterns", multiple=True, default=["0.5", "2:4"], show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Of the searches, with commas.")
@click.option("--samples", default=8, show_default=True, help="Windows of calibration text.")
@click.option("--windows", default=8, show_default=True, help="Windows to confirm on.")
@click.option("--context-length", default=256, show_default=True)
@click.option("--trials", default=100, show_default=True)
@click.option("--finalists", default=5, show_default=True)
def main(
    model: str,
    patterns: tuple[str, ...],
    seeds: str,
    samples: int,
    windows: int,
    context_length: int,
    trials: int,
    finalists: int,
) -> None:
    """Print a row for each search."""
    print(f"{conditions()}; {software('torch', 'optuna')}", flush=True)
    print(
        f"{model}, preset best without its reconstruction; {samples} windows of calibration text, "
        f"{windows} to confirm on, of {context_length} tokens; {trials} trials"
    )
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        subject = load_subject(
            model, Path(name), samples=samples, confirm_windows=windows, report_windows=1,
            context_length=context_length, dtype="float32", seed=0,
        )  # fmt: skip
        print("| pattern | seed | best of two | s | best of all | s | apart | same |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for text in patterns:
            for seed in map(int, seeds.split(",")):
                pattern = Pattern.parse(text)
                preset = Preset.of("best", pattern)
                request = SearchRequest(
                    pattern=pattern, steps=preset.steps.before_reconstruction, trials=trials,
                    bounds=preset.bounds, seed=seed, finalists=finalists,
                )  # fmt: skip
                # Both studies have the same trials, which are searched before the clock runs.
                studies = [study_of(None, request, subject.work) for _ in "ab"]
                found, took = [], []
                for study, in_full in zip(studies, (2, finalists), strict=True):
                    search_job(request, Work.of(subject.bundle), study=study)
                    began = time.perf_counter()
                    result = search_job(
                        replace(request, in_full=in_full), subject.work, study=study,
                        run=Run(progress=progress),
                    )  # fmt: skip
                    took.append(time.perf_counter() - began)
                    found.append(result.configuration)
                two, everybody = (each.confirmation.perplexity for each in found)
                same = found[0].candidate() == found[1].candidate()
                print(
                    f"| {text} | {seed} | {two:.3f} | {took[0]:.0f} | {everybody:.3f} | "
                    f"{took[1]:.0f} | {two / everybody - 1:+.2%} | {'yes' if same else 'no'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
