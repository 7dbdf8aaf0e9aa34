"""
Thousands of jobs of many keys, while a worker is killed every second: nothing is lost, and no key
waits for longer than its share allows.

Workers are those of scale.py, which sleep where a real one works, each a process of its own. Keys
submit all their jobs one key after the other, before the first worker starts: the last key has all
others before it. Every tenth job is twenty times as long as the others, and gives way between its
trials. Takes about ten minutes, and exits with 1 if a rule is violated:

    python benchmarks/many_jobs.py
    python benchmarks/many_jobs.py --jobs 40 --keys 4 --workers 2   # tries it out
"""

import asyncio
import os
import random
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import procrastinate
import psutil
from machine import conditions, software
from scale import Worker
from sqlalchemy import select

from storage.database import Database
from storage.embedded import embedded_postgresql
from storage.jobs import JobStore, NewJob
from storage.keys import KeyStore
from storage.records import AttemptEnd, JobState, NewStage, StageKind
from storage.studies import StorageError
from storage.tables import events, jobs
from workers.watch import Turns

LONG = 20  # trials of every tenth job
ALIVE_S = 4.0  # without a sign of life, until a worker counts as dead
SLOWER = 2.0  # times that a busy machine may take what sleeping alone would


class Sharing(Worker):
    """A worker whose turns end, as those of a real one do."""

    heartbeat_s = 1.0

    def __init__(self, url: str, trial_s: float, turn_s: float) -> None:
        super().__init__(url, trial_s)
        self._trial_s = trial_s
        self._turns = Turns(seconds=turn_s)

    async def run(self, go: Any, stop: Any) -> None:
        """Begin with the key whose turn it is."""
        self._store.next_turn(self._turns.kinds)
        await super().run(go, stop)

    def _run_stage(self, context: procrastinate.JobContext, stage_id: int) -> None:
        assert context.job.id is not None
        claim = self._store.claim(stage_id, context.job.id, self._id)
        if claim is None:
            return
        turns, done = self._turns, claim.stage.done
        turns.begin(claim.job)
        while done < claim.job.trials:
            time.sleep(self._trial_s)
            done += 1
            self._store.progress(claim, done=done, elapsed_s=0.0, best_value=None)
            if turns.is_over and self._store.another_waits(claim, turns.kinds):
                break
        if done < claim.job.trials:
            self._store.end_turn(claim)
        else:
            self._store.complete(claim, {}, ended=True)
        self._store.next_turn(turns.kinds, claim.job, over=turns.is_over)
        if turns.is_over:
            turns.renew()


def work(url: str, trial_s: float, turn_s: float, stop: Any) -> None:
    """Be one worker, until it is killed or told to stop."""
    begun = threading.Event()
    begun.set()
    asyncio.run(Sharing(url, trial_s, turn_s).run(begun, stop))


@click.command()
@click.option("--jobs", "count", default=2000, show_default=True)
@click.option("--keys", "owners", default=20, show_default=True)
@click.option("--workers", default=8, show_default=True)
@click.option("--trial-s", default=0.5, show_default=True, help="Seconds of a trial.")
@click.option("--turn-s", default=2.0, show_default=True, help="As PHO_TURN_S.")
@click.option("--kill-every-s", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    count: int, owners: int, workers: int, trial_s: float, turn_s: float, kill_every_s: float,
    seed: int,
) -> None:  # fmt: skip
    """Run the jobs, and print what came of each rule."""
    print(f"{conditions()}; {software('procrastinate', 'psycopg')}; seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        Path(name).chmod(0o711)  # root's server is another user
        with embedded_postgresql(Path(name) / "data") as url:
            database = Database(url)
            database.migrate()
            secrets = KeyStore(database)
            keys = [secrets.create(f"{i}", sees_all=False)[0].id for i in range(owners)]
            store = JobStore(database)
            for key in keys:
                for i in range(count // owners):
                    new = NewJob(
                        spec={"model": "org/name", "pattern": "0.5"}, name="n",
                        trials=1 if (i + 1) % 10 else LONG, max_attempts=20,
                        stages=[NewStage(kind=StageKind.SEARCH)],
                    )  # fmt: skip
                    store.submit(new, owner_id=key)
            crew = Crew(url, store, workers, (trial_s, turn_s), random.Random(seed))  # noqa: S311 - no secret
            began, kills = time.monotonic(), crew.until_done(kill_every_s)
            took_s = time.monotonic() - began
            allowed_s = SLOWER * (owners / workers + 1) * (turn_s + trial_s) + ALIVE_S
            broken = list(violations(store, keys, count // owners, allowed_s))
            lost = sum(t.count for t in store.tallies() if t.outcome is AttemptEnd.LOST)
            database.close()
    memory = "; ".join(f"{size >> 20} MiB" for size in crew.sizes)
    print(f"{count} jobs of {owners} keys, {workers} workers: {took_s:.0f} s, {kills} kills")
    print(f"{lost} attempts lost; memory of a worker that lived, in quarters of the jobs: {memory}")
    for each in broken:
        print(f"VIOLATED: {each}")
    raise SystemExit(1 if broken else 0)


class Crew:
    """Workers, of which one after the other is killed; the first is spared, and weighed."""

    def __init__(
        self, url: str, store: JobStore, count: int, seconds: tuple[float, float],
        chance: random.Random,
    ) -> None:  # fmt: skip
        # The server that forks them imports all of it once; it looks there alone.
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["many_jobs"])
        self._stop = self._context.Event()
        self._arguments = (url, *seconds, self._stop)
        self._store, self._chance = store, chance
        self._processes = [self._start() for _ in range(count)]
        self.sizes: list[int] = []

    def _start(self) -> Any:
        process = self._context.Process(target=work, args=self._arguments)
        process.start()
        return process

    def until_done(self, kill_every_s: float) -> int:
        """Kill, replace and heal until all jobs are over; tell how many were killed."""
        kills, total = 0, sum(self._store.counts()[0].values())
        spared = psutil.Process(self._processes[0].pid)
        while (done := self._store.counts()[0].get(JobState.SUCCEEDED, 0)) < total:
            print(f"{done} of {total}", end="\r", flush=True, file=sys.stderr)
            if done >= (len(self.sizes) + 1) * total // 4:
                self.sizes.append(spared.memory_info().rss)
            if len(self._processes) > 1:
                victim = self._chance.randrange(1, len(self._processes))
                self._processes[victim].kill()
                self._processes[victim] = self._start()
                kills += 1
            with suppress(StorageError):
                for entry in self._store.stalled(ALIVE_S):
                    self._store.give_again(entry, alive_s=ALIVE_S)
            time.sleep(kill_every_s)
        self.sizes.append(spared.memory_info().rss)
        self._stop.set()
        for process in self._processes:
            process.join(30)
            process.kill()
        return kills


def violations(
    store: JobStore, keys: list[uuid.UUID], each: int, allowed_s: float
) -> Iterator[str]:
    """What must not be."""
    with store.database.transaction() as connection:
        rows = connection.execute(
            select(jobs.c.id, jobs.c.owner_id, jobs.c.state).order_by(jobs.c.number)
        ).all()
        taken = connection.execute(
            select(events.c.job_id, events.c.created_at)
            .where(events.c.kind == "stage")
            .order_by(events.c.created_at)
        ).all()
    if unfinished := [row for row in rows if row.state is not JobState.SUCCEEDED]:
        yield f"{len(unfinished)} jobs have not succeeded"
    done = sum(t.count for t in store.tallies() if t.outcome is AttemptEnd.DONE)
    if done != len(rows):
        yield f"{done} stages were finished for {len(rows)} jobs"
    first, longest = taken[0].created_at, 0.0
    for key in keys:
        own = {row.id for row in rows if row.owner_id == key}
        if len(own) != each:
            yield f"a key has {len(own)} jobs instead of {each}"
        served = [first, *(row.created_at for row in taken if row.job_id in own)]
        waits = [(b - a).total_seconds() for a, b in pairwise(served)]
        longest = max(longest, *waits)
        if (most := max(waits)) > allowed_s:
            yield f"a key waited for {most:.0f} s, and its share allows {allowed_s:.0f}"
    print(f"a key waited for {longest:.1f} s at most; its share allows {allowed_s:.1f}")


if __name__ == "__main__":
    main()
