"""
A burst of jobs, and workers that a cluster starts by the work that there is, from none up.

KEDA's loop is simulated: every few seconds the query of docker/kubernetes/keda/ says how many
workers are needed, those that are missing are started as processes, and each ends by itself. The
service, its database and the workers are real; the model is a random one of 18,432 weights. Exits
with 1 if a job fails, a worker does not end with exit code 0, or some do not end. Takes about three
minutes:

    python benchmarks/autoscaling.py
    python benchmarks/autoscaling.py --jobs 4 --most 2   # tries it out
"""

import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml
from chaos import Service
from local_service import write_tiny_model
from machine import conditions, software
from sqlalchemy import func, select, text

from pho_service.client import Client
from storage.database import Database
from storage.jobs import JobStore
from storage.records import JobState
from storage.tables import stages

KEDA = Path(__file__).parents[1] / "docker" / "kubernetes" / "keda" / "worker" / "scaledjob.yaml"
LOOK_S = 0.2
PATIENCE_S = 300.0  # beyond the time of idle workers, until all have ended


@click.command()
@click.option("--jobs", "count", default=50, show_default=True)
@click.option("--most", default=8, show_default=True, help="KEDA's maxReplicaCount.")
@click.option("--poll-s", default=5.0, show_default=True, help="KEDA's pollingInterval.")
@click.option("--idle-s", default=20.0, show_default=True, help="--exit-when-idle of the workers.")
@click.option("--trials", default=40, show_default=True, help="Of each job.")
def main(count: int, most: int, poll_s: float, idle_s: float, trials: int) -> None:
    """Submit the burst, and print how the workers came and went."""
    print(f"{conditions()}; {software('procrastinate', 'torch')}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pho-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # the database may run as another user
        spec: dict[str, Any] = {**write_tiny_model(folder), "trials": trials}
        with Service(folder=folder, workers=0, outside=0) as service:
            database = Database(service.database_url, pool=2)
            cluster = Cluster(service, database, most=most, idle_s=idle_s)
            cluster.look()
            if cluster.needed:
                raise SystemExit("workers are needed before there is work")
            began = time.monotonic()
            with Client(service.url) as client:
                for seed in range(count):  # jobs of one calibration would wait for the first
                    calibration = {**spec["calibration"], "seed": seed}
                    client.submit({**spec, "seed": seed, "calibration": calibration})
            submitted_s = time.monotonic() - began
            done_s = cluster.run(count, began, poll_s)
            with database.transaction() as connection:
                worked_s = connection.execute(select(func.sum(stages.c.worked_s))).scalar_one()
            states = JobStore(database).counts()[0]
            database.close()
    print(f"{count} jobs in {submitted_s:.0f} s; the last result after {done_s:.0f} s; ", end="")
    print(f"no worker after {cluster.gone_s:.0f} s")
    print(f"workers started: {cluster.started}, at once: {cluster.peak}")
    idle = cluster.reporting_s - worked_s
    print(f"seconds of workers: {cluster.alive_s:.0f}, of which {worked_s:.0f} on stages, ", end="")
    print(f"{cluster.alive_s - cluster.reporting_s:.0f} to start and end, {idle:.0f} idle")
    wrong = [f"exit code {code}" for code in cluster.codes if code]
    wrong += [f"{n} jobs are {s}" for s, n in states.items() if s is not JobState.SUCCEEDED]
    wrong += [f"{len(cluster.workers)} workers did not end"] if cluster.workers else []
    for each in wrong:
        print(f"VIOLATED: {each}")
    raise SystemExit(1 if wrong else 0)


@dataclass
class Cluster:
    """
    KEDA, and the nodes that it starts workers on.

    Attributes:
        needed: Workers that the query asks for.
        gone_s: When the last worker had ended.
        alive_s: Seconds that all workers lived, together.
        reporting_s: Of those, seconds in which they could take a stage.
    """

    service: Service
    database: Database
    most: int
    idle_s: float
    needed: int = 0
    started: int = 0
    peak: int = 0
    gone_s: float = 0.0
    alive_s: float = 0.0
    reporting_s: float = 0.0
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Ask how many workers are needed, as KEDA does."""
        (job,) = (d for d in yaml.safe_load_all(KEDA.read_text()) if d["kind"] == "ScaledJob")
        (trigger,) = job["spec"]["triggers"]
        with self.database.transaction() as connection:
            found = connection.execute(text(trigger["metadata"]["query"])).scalar_one()
        self.needed = min(self.most, found)

    def scale(self) -> None:
        """Start the workers that are missing: KEDA's default strategy for a ScaledJob."""
        self.look()
        for _ in range(self.needed - len(self.workers)):
            options = ("--device", "cpu", "--exit-when-idle", f"{self.idle_s:g}")
            self.workers.append(self.service.start_worker(self.started, *options))
            self.started += 1
        self.peak = max(self.peak, len(self.workers))

    def run(self, jobs: int, began: float, poll_s: float) -> float:
        """Go on until all workers have ended; when the last of the jobs was done."""
        store = JobStore(self.database)
        polled, looked, done_at = 0.0, time.monotonic(), 0.0
        while not done_at or self.workers:
            now = time.monotonic()
            if now - polled >= poll_s:
                polled = now
                self.scale()
            self.alive_s += len(self.workers) * (now - looked)
            self.reporting_s += len(store.workers(alive_s=30)) * (now - looked)
            looked = now
            self.codes += [w.returncode for w in self.workers if w.poll() is not None]
            self.workers = [w for w in self.workers if w.returncode is None]
            ended = sum(n for s, n in store.counts()[0].items() if s.is_over)
            if ended == jobs and not done_at:
                done_at = now
            if done_at and now - done_at > self.idle_s + PATIENCE_S:
                break
            time.sleep(LOOK_S)
        for worker in self.workers:
            worker.kill()
        self.gone_s = time.monotonic() - began
        return done_at - began


if __name__ == "__main__":
    main()
