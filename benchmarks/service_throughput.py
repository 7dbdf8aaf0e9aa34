"""
Many cheap jobs and few to many workers: does anybody starve, and what bounds the throughput?

32 jobs of 40 trials on a random model of 18,432 weights, queued before the
workers begin. Takes about four minutes on 2 cores:

    python benchmarks/service_throughput.py
"""

import os
import tempfile
import time
from pathlib import Path

import psutil
from local_service import conditions, service, wait_for_workers, write_tiny_model

from pho_service.client import Client

JOBS, TRIALS = 32, 40


def main() -> None:
    """Run with 1, 2, 4 and 8 workers."""
    print(f"{conditions()}; {JOBS} jobs of {TRIALS} trials")
    print(
        "| workers | seconds | jobs/min | trials/s | cores busy | stages each | longest wait, s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for workers in (1, 2, 4, 8):
        measure(workers)


def measure(workers: int) -> None:
    """Print one row of the table."""
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        spec = {**write_tiny_model(folder), "trials": TRIALS}
        with service(folder, workers=workers) as url, Client(url) as client:
            wait_for_workers(url, workers)
            psutil.cpu_percent()
            began = time.perf_counter()
            ids = [client.submit({**spec, "seed": seed}).id for seed in range(JOBS)]
            while not all(client.job(i).state == "succeeded" for i in ids):
                time.sleep(0.1)
            seconds = time.perf_counter() - began
            busy = psutil.cpu_percent() / 100 * (os.cpu_count() or 1)
            jobs = [client.job(i) for i in ids]
            waits = [(j.started_at - j.created_at).total_seconds() for j in jobs if j.started_at]
            log = (folder / "log").read_text()
            begun = [log.count(f"[{w.name.rpartition(':')[2]}]") for w in client.workers()]
            print(
                f"| {workers} | {seconds:.1f} | {60 * JOBS / seconds:.0f} | "
                f"{TRIALS * JOBS / seconds:.0f} | {busy:.1f} | {min(begun)} to {max(begun)} | "
                f"{max(waits):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
