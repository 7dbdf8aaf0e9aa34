"""
What one calibration or one search costs, in a process that does nothing else.

`cost_curves.py` starts it, so that the peak memory is that of this piece of work:

    python benchmarks/cost_point.py TASK CONDITIONS BUNDLE

TASK is `calibrate`, which writes the file BUNDLE, or `search`, which reads it;
CONDITIONS is a JSON object with the fields of `Conditions`. Prints a JSON object.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import card, machine, software

from pho_service.progress import Run

PATTERN, SCOPE = "0.5", "layer"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """
    Of one point.

    Attributes:
        size: Of the model, a key of `random_llama.SHAPES`.
        windows: Calibrated on; a quarter of them is run backward.
        context_length: Tokens of a window.
        rows: Of each linear that the bundle keeps.
        trials: Of the search; the baselines are the first.
        device, dtype: Of the model; the proxy is float32.
        seed: Of weights, tokens, rows and search.
    """

    size: str = "0.1"
    windows: int = 4
    context_length: int = 512
    rows: int = 16
    trials: int = 200
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def calibrate_point(conditions: Conditions, bundle: Path) -> dict[str, Any]:
    """Make a random model, then calibrate it and write its bundle, as `pho calibrate` does."""
    import torch
    from random_llama import random_llama, random_text

    from pho_service.models.bundle_file import write_bundle
    from pho_service.models.calibration import calibrate
    from pho_service.spec.calibration import CalibrationSettings

    model = random_llama(
        conditions.size,
        dtype=conditions.dtype,
        device=conditions.device,
        seed=conditions.seed,
    )
    settings = CalibrationSettings(
        samples=conditions.windows,
        context_length=conditions.context_length,
        rows_per_layer=conditions.rows,
        bos="never",
        seed=conditions.seed,
    )
    text = random_text(settings)
    size = sum(p.numel() * p.element_size() for p in model.model.parameters())
    with _measured(torch.device(conditions.device)) as cost:
        write_bundle(calibrate(model, text, settings), bundle)
    return {**cost, "model_bytes": size, "bundle_bytes": bundle.stat().st_size}


def search_point(conditions: Conditions, bundle: Path) -> dict[str, Any]:
    """Read a bundle and search it, with the study in SQLite, as `pho search` does."""
    import torch

    from pho_service.models.bundle_file import read_bundle
    from pho_service.pipeline.search import opened_study, search_job
    from pho_service.spec.pattern import Pattern
    from pho_service.tuning.request import SearchRequest
    from storage.studies import open_storage

    with tempfile.TemporaryDirectory() as folder:
        with open_storage(f"sqlite:///{Path(folder) / 'empty.db'}"):
            pass  # loads what SQLite takes, so that it counts among the imports
        request = SearchRequest(
            pattern=Pattern.parse(PATTERN, SCOPE),
            trials=conditions.trials,
            seed=conditions.seed,
        )
        url = f"sqlite:///{Path(folder) / 'study.db'}"
        with _measured(torch.device(conditions.device)) as cost:
            read = read_bundle(bundle)
            with opened_study(url, request, read) as study:
                search_job(request, read, study=study, run=Run(device=conditions.device))
    return {**cost, "bundle_bytes": bundle.stat().st_size}


@contextmanager
def _measured(device: Any) -> Iterator[dict[str, Any]]:
    """Fill the dictionary that is given with what the block costs."""
    import psutil
    import torch

    from pho_service.pruning.memory import peak_memory

    on_gpu = device.type == "cuda"
    cost: dict[str, Any] = {
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "machine": card() if on_gpu else machine(),
        "software": software("torch", "transformers", "optuna"),
        "before_bytes": torch.cuda.memory_allocated(device)
        if on_gpu
        else psutil.Process().memory_info().rss,
    }
    started, started_cpu = time.perf_counter(), time.process_time()
    with peak_memory(device) as peak:
        yield cost
        cost["peak_bytes"] = peak()
    cost["seconds"] = time.perf_counter() - started
    cost["cpu_seconds"] = time.process_time() - started_cpu


TASKS = {"calibrate": calibrate_point, "search": search_point}


def main(task: str, conditions: str, bundle: str) -> None:
    """Print what one point costs."""
    print(json.dumps(TASKS[task](Conditions(**json.loads(conditions)), Path(bundle))))


if __name__ == "__main__":
    main(*sys.argv[1:])
