"""
Many cheap jobs and few to many workers: does anybody starve, and what bounds the throughput?

32 jobs of 40 trials on a random model of 18,432 weights, queued before the
workers begin. Takes about four minutes on 2 cores:

    python benchmarks/service_throughput.py
    python benchmarks/service_throughput.py --workers 1 --jobs 2 --trials 8   # tries it out
    python benchmarks/service_throughput.py --workers 1 --jobs 2 --trials 10000   # memory
"""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
import psutil
from local_service import service, wait_for_workers, write_tiny_model
from machine import conditions

from pho_service.client import Client


@click.command()
@click.option("--workers", "crews", multiple=True, type=int, default=(1, 2, 4, 8))
@click.option("--jobs", default=32, show_default=True)
@click.option("--trials", default=40, show_default=True, help="Of each job.")
def main(crews: tuple[int, ...], jobs: int, trials: int) -> None:
    """Print the table: a row for each number of workers."""
    print(f"{conditions()}; {jobs} jobs of {trials} trials")
    print(
        "| workers | seconds | jobs/min | trials/s | cores busy | stages each | longest wait, s | "
        "MiB of the API, of the largest worker, after quarters of the time |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for workers in crews:
        measure(workers, count=jobs, trials=trials)


def measure(workers: int, *, count: int, trials: int) -> None:
    """Print one row of the table."""
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        spec = {**write_tiny_model(folder), "trials": trials}
        with service(folder, workers=workers) as url, Client(url) as client:
            wait_for_workers(url, workers)
            psutil.cpu_percent()
            began, sizes = time.perf_counter(), [memory()]
            ids = [client.submit({**spec, "seed": seed}).id for seed in range(count)]
            while not all((job := client.job(i)).state == "succeeded" for i in ids):
                assert job.state != "failed", job.error
                time.sleep(0.1)
                sizes.append(memory())
            seconds = time.perf_counter() - began
            busy = psutil.cpu_percent() / 100 * (os.cpu_count() or 1)
            jobs = [client.job(i) for i in ids]
            waits = [(j.started_at - j.created_at).total_seconds() for j in jobs if j.started_at]
            log = (folder / "log").read_text()
            begun = [log.count(f"[{w.name.rpartition(':')[2]}]") for w in client.workers()]
            print(
                f"| {workers} | {seconds:.1f} | {60 * count / seconds:.0f} | "
                f"{trials * count / seconds:.0f} | {busy:.1f} | {min(begun)} to {max(begun)} | "
                f"{max(waits):.1f} | "
                f"{'; '.join(sizes[len(sizes) * i // 4 - 1] for i in range(1, 5))} |",
                flush=True,
            )


def memory() -> str:
    """What the API and the largest worker have resident."""
    most = {"serve": 0, "workers": 0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            for kind in most.keys() & process.cmdline():
                most[kind] = max(most[kind], process.memory_info().rss)
    return f"{most['serve'] >> 20}, {most['workers'] >> 20}"


if __name__ == "__main__":
    main()
