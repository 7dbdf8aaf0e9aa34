"""
Many workers on one PostgreSQL: stages a second, latency of a claim, connections, CPU of the server.

Workers are simulated, a few hundred in a few processes. Each has the connections of a real one,
takes stages out of the queue and claims them as `pho worker` does, looks once a second whether its
job may go on, reports every two seconds, and sleeps where a real one works. The server is an
embedded PostgreSQL of its own. Takes about four minutes:

    python benchmarks/scale.py
    python benchmarks/scale.py --workers 4 --seconds 2 --stage-s 0.5   # tries it out

With --pgbouncer PROGRAM the workers reach the server through a PgBouncer of 1.24 or newer, which
has a connection of its own for each of theirs (pool_mode=session), or, with --pool-mode
transaction, for each of their transactions. Workers are then not told of new stages, as LISTEN
does not work through it, but look for them every two seconds.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
import procrastinate
import psutil
from machine import conditions, software
from sqlalchemy import text
from sqlalchemy.engine import make_url

from storage.database import Database
from storage.embedded import embedded_postgresql
from storage.jobs import JobStore, Limits, NewJob
from storage.queue import TASK, EnteredWorker
from storage.records import NewStage, StageKind

WORKERS = (10, 50, 100, 200)
OF_A_JOB = 32  # stages
WARM_UP_S = 3.0
SPARE_S = 15.0  # that the stages last for beyond what is measured
LOOK_S, BEAT_S = 1.0, 2.0  # as those of a real worker
Sample = tuple[float, float, float]  # when, seconds of the claim, seconds since the stage before


class Worker:
    """Does what a worker does to the database, and sleeps instead of working."""

    heartbeat_s = 10.0  # of the queue

    def __init__(self, url: str, stage_s: float) -> None:
        self._stage_s = stage_s
        self._id = uuid.uuid4()
        self._free_at = time.monotonic()
        self.samples: list[Sample] = []
        self._store = JobStore(Database(url, pool=4))
        self.app = procrastinate.App(
            connector=procrastinate.PsycopgConnector(
                conninfo=self._store.database.conninfo, min_size=1, max_size=4, timeout=60
            )
        )
        self.app.task(name=TASK, pass_context=True)(self._run_stage)

    def beat(self) -> int:
        """Report, and give the number in the registry."""
        report = {"name": str(self._id), "device": "cpu", "kinds": [*StageKind]}
        return self._store.enter_worker(self._id, **report).number

    def _run_stage(self, context: procrastinate.JobContext, stage_id: int) -> None:
        assert context.job.id is not None
        began = time.monotonic()
        claim = self._store.claim(stage_id, context.job.id, self._id)
        now = time.monotonic()
        if claim is None:
            return
        self.samples.append((now, now - began, now - self._free_at))
        while (left := now + self._stage_s - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_S))
            if left > LOOK_S:
                self._store.watch(claim)
        self._free_at = time.monotonic()
        self._store.complete(claim, {})

    async def run(self, go: Any, stop: Any) -> None:
        """Work between two events."""
        async with self.app.open_async():
            self.app.job_manager = EnteredWorker(self.app, await asyncio.to_thread(self.beat))
            beating = asyncio.create_task(self._keep_beating())
            while not go.is_set():
                await asyncio.sleep(0.1)
            self._free_at = time.monotonic()
            working = asyncio.create_task(
                self.app.run_worker_async(
                    concurrency=1, fetch_job_polling_interval=2.0, delete_jobs="successful",
                    install_signal_handlers=False, update_heartbeat_interval=self.heartbeat_s,
                )
            )  # fmt: skip
            while not stop.is_set() and not working.done():
                await asyncio.sleep(0.1)
            for task in (working, beating):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        self._store.database.close()

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await asyncio.to_thread(self.beat)


def crew(url: str, count: int, stage_s: float, go: Any, stop: Any, found: Any) -> None:
    """Run some workers in this process."""

    async def run() -> list[Sample]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(3 * count))
        workers = [Worker(url, stage_s) for _ in range(count)]
        await asyncio.gather(*(worker.run(go, stop) for worker in workers))
        return [sample for worker in workers for sample in worker.samples]

    found.put(asyncio.run(run()))


@click.command()
@click.option("--workers", "crews", multiple=True, type=int, default=WORKERS, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="That each number is measured.")
@click.option("--stage-s", default=2.0, show_default=True, help="Seconds of a stage.")
@click.option("--processes", default=os.cpu_count() or 1, show_default=True)
@click.option("--max-connections", default=2000, show_default=True, help="Of the server.")
@click.option("--pgbouncer", type=click.Path(exists=True, path_type=Path))
@click.option("--pool-mode", default="session", type=click.Choice(["session", "transaction"]))
def main(
    crews: tuple[int, ...],
    seconds: float,
    stage_s: float,
    processes: int,
    max_connections: int,
    pgbouncer: Path | None,
    pool_mode: str,
) -> None:
    """Print the table: a row for each number of workers."""
    through = f"PgBouncer, pool_mode={pool_mode}" if pgbouncer else "no PgBouncer"
    print(f"{conditions()}; {software('procrastinate', 'psycopg')}; {through}")
    print(f"stages of {stage_s:g} s, {OF_A_JOB} a job; {processes} processes; {seconds:g} s each")
    print(
        "| workers | stages/s | most possible | claim p50, ms | p95 | next stage p50, ms | p95 | "
        "connections | server, cores | workers, cores |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # root's server is another user
        with embedded_postgresql(folder / "data"):
            pass  # which writes the settings
        with (folder / "data" / "postgresql" / "postgresql.conf").open("a") as settings:
            settings.write(f"\nmax_connections = {max_connections}\n")
        with embedded_postgresql(folder / "data") as url:
            through_it = bounced(pgbouncer, url, folder, pool_mode) if pgbouncer else None
            with through_it or nullcontext(url) as reached:
                database = Database(url)
                database.migrate()
                for count in crews:
                    point = Point(database, folder, count=count, seconds=seconds, stage_s=stage_s)
                    print(point.measured(reached, min(processes, count)), flush=True)
                database.close()


class Point:
    """One row of the table."""

    def __init__(
        self, database: Database, folder: Path, *, count: int, seconds: float, stage_s: float
    ) -> None:
        self._database = database
        self._store = JobStore(database)
        self._count, self._seconds, self._stage_s = count, seconds, stage_s
        pid = (folder / "data" / "postgresql" / "postmaster.pid").read_text().split()[0]
        self._server = psutil.Process(int(pid))

    def measured(self, url: str, processes: int) -> str:
        """Start the workers, give them stages, and say what came of it."""
        spawn = get_context("spawn")
        go, stop, found = spawn.Event(), spawn.Event(), spawn.Queue()
        shares = [
            self._count // processes + (i < self._count % processes) for i in range(processes)
        ]
        crews = [
            spawn.Process(target=crew, args=(url, share, self._stage_s, go, stop, found))
            for share in shares
        ]
        for each in crews:
            each.start()
        self._clear()
        while len(self._store.workers(alive_s=60)) < self._count:
            if not all(each.is_alive() for each in crews):
                raise SystemExit("a process of workers has ended; it has said why")
            time.sleep(0.2)
        self._submit()
        go.set()
        time.sleep(WARM_UP_S)
        of_workers = [psutil.Process(each.pid) for each in crews]
        clocks = partial(seconds_of, self._server), lambda: sum(map(seconds_of, of_workers))
        began, before = time.monotonic(), [clock() for clock in clocks]
        connections = self._most_connections(began + self._seconds)
        ended, after = time.monotonic(), [clock() for clock in clocks]
        stop.set()
        samples = [s for _ in crews for s in found.get() if began <= s[0] <= ended]
        for each in crews:
            each.join()
        cores = [(a - b) / (ended - began) for b, a in zip(before, after, strict=True)]
        claims, gaps = spread([s[1] for s in samples]), spread([s[2] for s in samples])
        rate = len(samples) / (ended - began)
        return (
            f"| {self._count} | {rate:.1f} | {self._count / self._stage_s:.1f} | {claims} | "
            f"{gaps} | {connections} | {cores[0]:.2f} | {cores[1]:.2f} |"
        )

    def _clear(self) -> None:
        with self._database.transaction() as connection:
            for table in ("procrastinate_jobs", "pho.jobs", "procrastinate_workers"):
                connection.execute(text(f"DELETE FROM {table}"))  # noqa: S608 - ours

    def _submit(self) -> None:
        """Enough stages for all workers to the end."""
        lasts_s = WARM_UP_S + self._seconds + SPARE_S
        stages = round(self._count * lasts_s / self._stage_s)
        new = NewJob(
            spec={"model": "org/name", "pattern": "0.5"}, name="scale", trials=1, max_attempts=3,
            stages=[NewStage(kind=StageKind.PERPLEXITY, number=i) for i in range(OF_A_JOB)],
        )  # fmt: skip
        for _ in range(1 + stages // OF_A_JOB):
            self._store.submit(new, limits=Limits(unfinished=10**6))

    def _most_connections(self, until: float) -> int:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
        most = 0
        while (left := until - time.monotonic()) > 0:
            with self._database.transaction() as connection:
                most = max(most, connection.execute(query).scalar_one())
            time.sleep(min(left, 0.5))
        return most


def spread(seconds: list[float]) -> str:
    """The median and the 95th percentile, in milliseconds."""
    if len(seconds) < 2:
        return "- | -"
    cuts = quantiles(seconds, n=20, method="inclusive")
    return f"{1000 * cuts[9]:.1f} | {1000 * cuts[18]:.1f}"


def seconds_of(process: psutil.Process) -> float:
    """CPU time of a process and its children, those that have ended included."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
            if each.pid == process.pid:
                total += times.children_user + times.children_system
    return total


@contextmanager
def bounced(program: Path, url: str, folder: Path, pool_mode: str) -> Iterator[str]:
    """Run PgBouncer before a server, and give the URL of it."""
    server = make_url(url)
    host = str(server.query.get("host", server.host))
    place = folder / "bouncer"
    place.mkdir()
    (place / "users").write_text(f'"{server.username}" ""\n')
    (place / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={host} user={server.username}\n"
        "[pgbouncer]\nlisten_addr =\nauth_type = any\n"
        f"unix_socket_dir = {place}\nlisten_port = 5432\npool_mode = {pool_mode}\n"
        "max_client_conn = 5000\ndefault_pool_size = 1000\nmax_prepared_statements = 200\n"
        "track_extra_parameters = search_path\n"  # reported by PostgreSQL 18 and newer
        "ignore_startup_parameters = statement_timeout,idle_in_transaction_session_timeout\n"
    )
    log, command = place / "log", [str(program), str(place / "pgbouncer.ini")]
    if os.geteuid() == 0:  # PgBouncer does not run as root, as PostgreSQL does not
        shutil.chown(place, "pgserver")
        command[1:1] = ["-u", "pgserver"]
        data = folder / "data" / "postgresql"
        with (data / "pg_ident.conf").open("a") as names:
            names.write(f"pho pgserver {server.username}\n")
        os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGHUP)
        time.sleep(1)
    with log.open("w") as written:
        process = subprocess.Popen(command, stderr=written)
        try:
            while not (place / ".s.PGSQL.5432").exists():
                if process.poll() is not None:
                    raise SystemExit(f"PgBouncer does not start: {log.read_text()}")
                time.sleep(0.1)
            query = {**server.query, "host": str(place)}
            yield server.set(query=query).render_as_string(hide_password=False)
        finally:
            process.send_signal(signal.SIGQUIT)  # SIGTERM waits for those who are connected
            process.wait()


if __name__ == "__main__":
    main()
