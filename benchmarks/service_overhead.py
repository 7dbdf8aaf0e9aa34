"""
What a job of 200 trials costs through the service, and by `pho search` from the same bundle.

Prints its conditions. Takes about two minutes on 2 cores:

    python benchmarks/service_overhead.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from local_service import conditions, service, wait_for_workers

from pho_service.client import Client
from pho_service.versions import versions

TRIALS = 200
ROUNDS = 3
PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]


def main() -> None:
    """Run both sides in turns."""
    print(f"{conditions()}; {json.dumps(versions('torch', 'optuna'))}")
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    os.environ.update(threads)
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        subprocess.run([*PHO, "example", "--out", name], check=True, stdout=subprocess.DEVNULL)
        spec = {
            "model": "smollm2.gguf", "pattern": "0.5", "scope": "layer", "trials": TRIALS,
            "calibration": {"text": "calibration.jsonl", "samples": 32, "context_length": 512,
                            "fisher_samples": 8},
            "confirm": None,
        }  # fmt: skip
        with service(folder, workers=1) as url, Client(url) as client:
            wait_for_workers(url, 1)
            client.wait(client.submit({**spec, "seed": 100}).id)  # makes the bundle
            (bundle,) = (folder / "data" / "artifacts" / "bundles").glob("*.safetensors")
            print("| round | through the service, s | pho search, s | ratio |")
            print("| --- | --- | --- | --- |")
            for seed in range(ROUNDS):
                began = time.perf_counter()
                job = client.wait(client.submit({**spec, "seed": seed}).id, show_progress=False)
                served = time.perf_counter() - began
                assert job.state == "succeeded", job.error
                began = time.perf_counter()
                subprocess.run(
                    [*PHO, "search", str(bundle), "--pattern", "0.5", "--scope", "layer",
                     "--trials", str(TRIALS), "--seed", str(seed), "--out", str(folder / "c.json"),
                     "--study", f"sqlite:///{folder / f'{seed}.db'}"],
                    check=True, capture_output=True,
                )  # fmt: skip
                searched = time.perf_counter() - began
                ratio = served / searched
                print(f"| {seed} | {served:.1f} | {searched:.1f} | {ratio:.2f} |", flush=True)
                found = json.loads((folder / "c.json").read_text())
                assert found["coefficients"] == client.best(job.id).coefficients.model_dump()


if __name__ == "__main__":
    main()
