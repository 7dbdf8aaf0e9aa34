"""
What `pho plan` says beside what the same job takes on this CPU, stage by stage.

    OMP_NUM_THREADS=1 python benchmarks/planned.py --preset best --samples 8 --windows 4

Seconds are those of this process on its core, on both sides: other work on the machine changes
them little. A stage whose ratio lies between 0.67 and 1.5 is planned within a factor of 1.5.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import click
import torch
from domains import DOMAINS
from machine import conditions, software
from subject import MODELS, first_windows, load_benchmark_model

from pho_service.models.calibration import cached_bundle, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.saving import save_pruned
from pho_service.pipeline import search
from pho_service.pipeline.prune import prune_in_place
from pho_service.pipeline.work import Work
from pho_service.planning import costs
from pho_service.planning.plan import plan_job
from pho_service.planning.shapes import read_shapes
from pho_service.spec.job import JobSpec

T = TypeVar("T")
STEPS = {"search": "search", "choose": "confirm by perplexity", "measure": "confirm by perplexity",
         "finish": "confirm by perplexity"}  # fmt: skip


class Clock:
    """Seconds of this process, added up by the stage of the plan that they belong to."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}

    def timed(self, stage: str, do: Callable[..., T], *given: Any, **named: Any) -> T:
        """What is returned, its seconds put down."""
        began = time.process_time()
        try:
            return do(*given, **named)
        finally:
            self.took[stage] = self.took.get(stage, 0.0) + time.process_time() - began


def took(spec: JobSpec, texts: dict[str, Path], folder: Path) -> dict[str, float]:
    """Run the job in this process."""
    clock = Clock()
    model = load_benchmark_model(spec.model, "float32")
    clock.took["read the model"] = time.process_time()  # with all that was imported for it
    clock.timed("hash the weights", lambda: model.weights_sha256)
    source = TextSource(path=str(texts["calibration"]))
    settings = spec.calibration.settings()

    def calibrated() -> Any:
        text = calibration_text(model, source, settings)
        return text, cached_bundle(model, text, settings, folder / "cache")

    text, bundle = clock.timed("calibrate", calibrated)
    assert spec.confirm is not None
    context = settings.context_length
    confirm = first_windows(model, texts["confirmation"], spec.confirm.windows, context)
    work = Work.of(bundle, model, confirm, text.calibration)
    with ExitStack() as patched:
        for name, stage in STEPS.items():
            step = getattr(search._SearchPieces, name)

            def timed(*given: Any, step: Any = step, stage: str = stage) -> Any:
                return clock.timed(stage, step, *given)

            patched.enter_context(patch.object(search._SearchPieces, name, timed))
        request = spec.request(0)
        url = f"sqlite:///{folder / 'study.db'}"  # as `pho search` has it
        study = patched.enter_context(search.opened_study(url, request, work))
        found = search.search_job(request, work, study=study)
    pruned = clock.timed("prune", prune_in_place, work, found.configuration)
    clock.timed("save", save_pruned, model, folder / "pruned", pruned.masks.items(), pruned.recipe)
    return clock.took


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, gemma3 or a folder.")
@click.option("--pattern", default="0.5", show_default=True)
@click.option("--preset", default="best", show_default=True)
@click.option("--samples", default=8, show_default=True, help="Windows of calibration text.")
@click.option("--windows", default=4, show_default=True, help="Windows to confirm on.")
@click.option("--context-length", default=512, show_default=True)
@click.option("--trials", default=200, show_default=True)
@click.option("--finalists", default=5, show_default=True)
def main(
    model: str, pattern: str, preset: str, samples: int, windows: int, context_length: int,
    trials: int, finalists: int,
) -> None:  # fmt: skip
    """Print a table."""
    torch.set_num_threads(1)
    with patch.object(time, "perf_counter", time.process_time):
        machine = replace(costs.this_cpu.__wrapped__(), cores=1)
    print(f"{conditions()}; {software('torch', 'transformers')}")
    print(
        f"{machine.products / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s; {samples} "
        f"windows to calibrate on, {windows} to confirm on, of {context_length} tokens; {trials} "
        f"trials, {finalists} finalists",
        flush=True,
    )
    path = str(MODELS[model]()) if model in MODELS else model
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        texts = DOMAINS["docs"](Path(name) / "docs")
        spec = JobSpec.model_validate(
            {
                "model": path, "pattern": pattern, "preset": preset, "trials": trials,
                "calibration": {
                    "text": str(texts["calibration"]), "samples": samples,
                    "context_length": context_length,
                },
                "confirm": {
                    "text": str(texts["confirmation"]), "windows": windows,
                    "finalists": finalists,
                },
            }
        )  # fmt: skip
        plan = plan_job(spec, read_shapes(path), machine)
        measured = took(spec, texts, Path(name))
    print(f"\n{preset} at {pattern}\n\n| stage | planned, s | took, s | took / planned |")
    print("| --- | --- | --- | --- |")
    rows = [(s.title.partition(",")[0], (s.seconds[0] * s.seconds[1]) ** 0.5) for s in plan.stages]
    took_s = [measured[title] for title, _ in rows]
    total = ("all of it", sum(planned for _, planned in rows))
    for (title, planned), seconds in zip([*rows, total], [*took_s, sum(took_s)], strict=True):
        print(f"| {title} | {planned:.2f} | {seconds:.2f} | {seconds / planned:.2f} |")


if __name__ == "__main__":
    main()
