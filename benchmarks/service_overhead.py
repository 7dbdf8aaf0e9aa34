"""
What a job of 200 trials costs through the service, and by `pho search` from the same bundle.

Prints its conditions. Takes about two minutes on 2 cores:

    python benchmarks/service_overhead.py
    python benchmarks/service_overhead.py --tiny --trials 20 --rounds 1   # tries it out
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from local_service import service, wait_for_workers, write_tiny_model
from machine import conditions

from pho_service.client import Client
from pho_service.host.machine import versions

PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]
SMOLLM2 = {
    "model": "smollm2.gguf",
    "pattern": "0.5",
    "preset": "score",
    "calibration": {
        "text": "calibration.jsonl", "samples": 32, "context_length": 512, "fisher_samples": 8,
    },
    "confirm": None,
}  # fmt: skip


@click.command()
@click.option("--trials", default=200, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--tiny", is_flag=True, help="On a random model of 18,432 weights, not SmolLM2-135M.")
def main(trials: int, rounds: int, tiny: bool) -> None:
    """Run both sides in turns, and print the table."""
    print(f"{conditions()}; {json.dumps(versions('torch', 'optuna'))}")
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        if tiny:
            job = write_tiny_model(folder)
        else:
            subprocess.run([*PHO, "example", "--out", name], check=True, stdout=subprocess.DEVNULL)
            job = SMOLLM2
        spec = {**job, "scope": "layer", "trials": trials}
        with service(folder, workers=1) as url, Client(url) as client:
            wait_for_workers(url, 1)
            first = client.submit({**spec, "seed": 100})
            client.wait(first.id, progress=False)  # makes the bundle
            (bundle,) = (folder / "data" / "artifacts" / "bundles").glob("*.safetensors")
            print("| round | through the service, s | pho search, s | ratio |")
            print("| --- | --- | --- | --- |")
            for seed in range(rounds):
                began = time.perf_counter()
                done = client.wait(client.submit({**spec, "seed": seed}).id, progress=False)
                served = time.perf_counter() - began
                assert done.state == "succeeded", done.error
                began = time.perf_counter()
                subprocess.run(
                    [*PHO, "search", str(bundle), "--preset", "score", "--pattern", "0.5",
                     "--scope", "layer", "--trials", str(trials), "--seed", str(seed),
                     "--out", str(folder / "c.json"),
                     "--study", f"sqlite:///{folder / f'{seed}.db'}"],
                    check=True, capture_output=True,
                )  # fmt: skip
                searched = time.perf_counter() - began
                ratio = served / searched
                print(f"| {seed} | {served:.1f} | {searched:.1f} | {ratio:.2f} |", flush=True)
                found = json.loads((folder / "c.json").read_text())
                assert found["coefficients"] == client.best(done.id).coefficients.to_dict()


if __name__ == "__main__":
    main()
