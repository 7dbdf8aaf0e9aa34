"""Workers that are killed, frozen or cut off: the job ends as an undisturbed one does."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from storage.database import Database
from storage.embedded import Postmaster
from storage.records import JobState, StageKind

TRIALS = 60
LONG = 600  # trials; long enough to be waited for


OTHERS = (StageKind.TRANSFER, StageKind.POINT, StageKind.TASKS)
OF_A_SEARCH = [k for k in StageKind if k not in OTHERS]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.thorough)
        if kind in (StageKind.CONFIRM, StageKind.FINISH)
        else kind
        for kind in OF_A_SEARCH
    ],
)
def test_killed(kind: StageKind, crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """Killed in any stage, a worker is replaced by another, which ends with the same result."""
    alone = undisturbed(spec_of(trials=TRIALS))
    spec = spec_of(trials=TRIALS, prune=kind is StageKind.PRUNE)
    crew.man(2)
    for _ in range(10):  # a short stage may be over before it is seen, on a busy machine
        job = crew.submit(spec)
        with suppress(crew.JobIsOver):
            crew.kill(job, kind, done=14 if kind is StageKind.SEARCH else 0)
            break
    job = crew.succeeded(job)

    assert max(s.attempt for s in job.of_kind(kind)) > 1
    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


def test_killed_in_a_point(crew: Any, spec_of: Any, undisturbed: Any) -> None:
    """Killed while it searches one of several patterns, too."""
    confirm = {"candidates": 2}
    alone = undisturbed(spec_of(trials=TRIALS, confirm=confirm, preset="score")).configuration
    crew.man(2)
    for _ in range(10):
        job = crew.submit(
            spec_of(pattern=None, patterns=["0.5"], trials=TRIALS, confirm=confirm, preset="score")
        )
        with suppress(crew.JobIsOver):
            crew.kill(job, StageKind.POINT)
            break
    (point,) = crew.succeeded(job).of_kind(StageKind.POINT)
    found = point.result["configuration"]
    del found["search"]["study"]

    assert point.attempt > 1
    assert found == alone


def test_killed_in_a_write(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """Also in the midst of recording a generation."""
    alone = undisturbed(spec_of(trials=TRIALS))
    crew.man(2)
    job = crew.submit(spec_of(trials=TRIALS))
    crew.kill(job, StageKind.SEARCH, done=6, when=crew.in_a_write)
    job = crew.succeeded(job)

    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


def test_killed_while_pausing(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A pause that a dead worker cannot follow is followed for it, and can be ended."""
    alone = undisturbed(spec_of(trials=TRIALS))
    crew.man(2)
    job = crew.submit(spec_of(trials=TRIALS))
    with crew.frozen(job, StageKind.SEARCH, done=14) as process:
        asked = crew.store.ask(job.id, "pause")
        os.kill(process, signal.SIGKILL)
        crew.ended(process)
    paused = crew.wait(job, JobState.PAUSED)
    crew.store.ask(job.id, "resume")
    job = crew.succeeded(job)

    assert asked.state is JobState.PAUSING
    assert paused.state is JobState.PAUSED
    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


def test_killed_too_often(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A stage that has killed max_attempts workers fails its job, which can be resumed."""
    alone = undisturbed(spec_of(trials=TRIALS, max_attempts=2))
    crew.man(3)
    job = crew.submit(spec_of(trials=TRIALS, max_attempts=2))
    crew.kill(job, StageKind.SEARCH, done=14)
    crew.kill(job, StageKind.SEARCH, attempt=2)
    failed = crew.wait(job)
    crew.store.ask(job.id, "resume")
    job = crew.succeeded(job)

    assert failed.state is JobState.FAILED
    assert (failed.error["type"], failed.error["stage"]) == ("WorkerLost", "search")
    assert "2 workers died" in failed.error["message"]
    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


def test_frozen(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """Frozen beyond the limit, a worker has lost its stage and writes nothing when it wakes."""
    alone = undisturbed(spec_of(trials=TRIALS))
    crew.man(2)
    job = crew.submit(spec_of(trials=TRIALS))
    with crew.frozen(job, StageKind.SEARCH, done=14):
        job = crew.succeeded(job)
    crew.man(2)
    time.sleep(1.0)  # for it, to write what it should not

    assert crew.store.get(job.id) == job
    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


@pytest.mark.thorough
def test_frozen_in_a_write(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """Also if it froze in the midst of a write: its locks hold up nobody for long."""
    alone = undisturbed(spec_of(trials=TRIALS))
    crew.man(2)
    job = crew.submit(spec_of(trials=TRIALS))
    with crew.frozen(job, StageKind.SEARCH, done=6, when=crew.in_a_write):
        job = crew.succeeded(job)
    crew.man(2)
    time.sleep(1.0)

    assert crew.store.get(job.id) == job
    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


@pytest.mark.thorough
def test_woken_after_a_kill(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A worker that has lost its stage does not take it out of the queue when it wakes."""
    alone = undisturbed(spec_of(trials=TRIALS))
    crew.man(2)
    job = crew.submit(spec_of(trials=TRIALS))
    with crew.frozen(job, StageKind.SEARCH, done=14):
        crew.kill(job, StageKind.SEARCH, attempt=2)
    job = crew.succeeded(job)

    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


@pytest.mark.thorough
def test_woken_to_stop(crew: Any, spec_of: Any, undisturbed: Any, found: Any) -> None:
    """A worker that wakes and hands back takes nothing away from the one that works now."""
    alone = undisturbed(spec_of(trials=LONG))
    crew.man(2)
    job = crew.submit(spec_of(trials=LONG))
    with crew.frozen(job, StageKind.SEARCH, done=14) as first:
        crew.busy(job, StageKind.SEARCH, attempt=2)
        os.kill(first, signal.SIGTERM)
    code = crew.ended(first)
    queued = crew.queued(job)
    crew.busy(job, StageKind.SEARCH, attempt=2)  # the other goes on
    job = crew.succeeded(job)

    assert code == 0
    assert queued == ["doing"]
    assert crew.trials(job) == [alone.trials]
    assert found(job) == alone.configuration


def test_stopped_twice(own_crew: Any, spec_of: Any) -> None:
    """Told to stop again, to its very end, a worker hands its stage back and says no more."""
    own_crew.man(1)
    job = own_crew.submit(spec_of(trials=LONG))
    process = own_crew.busy(job, StageKind.SEARCH, done=14)
    while process in own_crew.alive:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        time.sleep(0.002)
    code = own_crew.ended(process)

    assert code == 0
    assert own_crew.queued(job) == ["todo"]
    assert "Traceback" not in own_crew.logs()


@pytest.fixture
def small_disk(crew: Any) -> Iterator[Path]:
    """The place of the bundles, with 32 KiB of space until it is unmounted."""
    folder = crew.folder / "data" / "artifacts" / "bundles"
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a disk that is full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk that is full cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def test_full_disk(crew: Any, spec_of: Any, undisturbed: Any, found: Any, small_disk: Path) -> None:
    """A full disk fails the job clearly; with space again, it is resumed and ends right."""
    spec = spec_of(calibration={"seed": 1})
    crew.man(1)
    failed = crew.wait(crew.submit(spec))
    left = list(small_disk.iterdir())
    subprocess.run(["umount", str(small_disk)], check=True)
    crew.store.ask(failed.id, "resume")
    job = crew.succeeded(failed)

    assert failed.state is JobState.FAILED
    assert (failed.error["type"], failed.error["stage"]) == ("OutputError", "calibrate")
    assert "the disk is full" in failed.error["message"]
    assert left == []
    assert found(job) == undisturbed(spec).configuration


@pytest.fixture
def restart(tmp_path: Path, crew: Any) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A crew on a PostgreSQL of its own, and what restarts that as after a crash."""
    server = Postmaster(tmp_path / "postgresql")

    def crash() -> None:
        server.stop(0.0)
        server.start()

    server.start()
    try:
        database = Database(server.url)
        database.migrate()
        database.close()
        own = type(crew)(crew.warm_start, server.url, tmp_path.parent, tmp_path / "crew")
        try:
            yield own, crash
        finally:
            own.close()
    finally:
        server.stop()


def test_postgresql_restarts(
    restart: tuple[Any, Callable[[], None]], spec_of: Any, undisturbed: Any, found: Any
) -> None:
    """When PostgreSQL crashes in a search, the same worker goes on, and it is no failed attempt."""
    own, crash = restart
    spec = spec_of(trials=TRIALS, max_attempts=1)
    own.man(1)
    job = own.submit(spec)
    processes = []
    for done in (6, 30):
        processes.append(own.busy(job, StageKind.SEARCH, done=done))
        own.until(own.in_a_write, every_s=0.001)
        crash()
    job = own.succeeded(job)

    assert processes[0] == processes[1]
    assert own.trials(job) == [undisturbed(spec).trials]
    assert found(job) == undisturbed(spec).configuration


def test_started_before_the_service(own_crew: Any, spec_of: Any) -> None:
    """A worker that finds the tables of an older version waits until the service makes its own."""

    def migrated_to(version: str) -> None:
        with own_crew.database.transaction() as connection:
            connection.execute(
                text("UPDATE pho.alembic_version SET version_num = :version"), {"version": version}
            )

    with own_crew.database.transaction() as connection:
        head = connection.scalar(text("SELECT version_num FROM pho.alembic_version"))
    migrated_to("0010")
    job = own_crew.submit(spec_of())
    own_crew.start()
    own_crew.until(lambda: "`pho serve` makes them" in own_crew.logs())
    seen = own_crew.at_work()
    migrated_to(head)

    assert seen == {}
    assert own_crew.succeeded(job)
