"""
Workers as processes that are killed, frozen, cut off, drained or broken.

The job ends as an undisturbed one does.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import text

from pho_service.spec.job import JobSpec
from storage.database import Database
from storage.embedded import Postmaster
from storage.records import Drain, JobState, StageKind, StageState

TRIALS = 60
LONG = 600  # trials; long enough to be waited for
SLOW_REPORTS = """
import time
from storage.jobs import JobStore
report = JobStore.enter_worker
JobStore.enter_worker = lambda *given, **named: (time.sleep(0.5), report(*given, **named))[1]
"""
BROKEN = """
import torch
from pho_service.pipeline.search import _SearchPieces

def fail(self, validated, run):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

_SearchPieces.choose = fail
"""
ENDLESS = """
import time
import workers.inputs

def load(*args, **kwargs):
    while True:
        time.sleep(0.001)

workers.inputs.load_model = load
"""

pytestmark = [
    pytest.mark.thorough,  # but for one kill and one fault
    pytest.mark.usefixtures("many_words"),
]


OTHERS = (StageKind.TRANSFER, StageKind.POINT, StageKind.TASKS)
OF_A_SEARCH = [k for k in StageKind if k not in OTHERS]


@pytest.fixture
def job(crew, spec_of):
    """A job that two workers have."""
    crew.man(2)
    return crew.submit(spec_of(trials=TRIALS))


@pytest.fixture
def ends_right(crew, undisturbed, found):
    """Waits for a job; whether it has the trials and the result of one that nothing happened to."""

    def wait(job):
        done = crew.succeeded(job)
        alone = undisturbed(JobSpec.model_validate({**job.spec, "prune": False}))
        return (crew.trials(done), found(done)) == ([alone.trials], alone.configuration)

    return wait


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.thorough(kind is not StageKind.SEARCH))
        for kind in OF_A_SEARCH
    ],
)
def test_killed_in_any_stage_a_worker_is_replaced_by_another_which_ends_with_the_same_result(
    kind, crew, spec_of, ends_right
):
    crew.man(2)
    for _ in range(10):  # a short stage may be over before it is seen, on a busy machine
        job = crew.submit(spec_of(trials=TRIALS, prune=kind is StageKind.PRUNE))
        with suppress(crew.JobIsOver):
            crew.kill(job, kind, done=14 if kind is StageKind.SEARCH else 0)
            break

    assert ends_right(job)
    assert max(s.attempt for s in crew.store.get(job.id).of_kind(kind)) > 1


def test_killed_while_it_searches_one_of_several_patterns_too(crew, spec_of, undisturbed):
    asked = {"trials": TRIALS, "confirm": {"finalists": 2}}
    crew.man(2)
    for _ in range(10):
        job = crew.submit(spec_of(pattern=None, patterns=["0.5"], **asked))
        with suppress(crew.JobIsOver):
            crew.kill(job, StageKind.POINT)
            break
    (point,) = crew.succeeded(job).of_kind(StageKind.POINT)
    found = point.result["configuration"]
    del found["search"]["study"]

    assert point.attempt > 1
    assert found == undisturbed(spec_of(**asked)).configuration


def test_killed_while_it_prunes_with_blocks_that_the_confirmation_trained_the_bytes_are_the_same(
    crew, spec_of
):
    steps = {"update": "least-squares", "reconstruction": {"method": "block"}}
    spec = spec_of(preset="crepe", trials=10, confirm={"finalists": 1}, steps=steps, prune=True)

    def weights(job):
        files = crew.succeeded(job).pruning.result["files"]
        return {f["name"]: f["sha256"] for f in files if f["name"].endswith(".safetensors")}

    def waiting():
        pruned = crew.folder / "data/artifacts/pruned" / str(job.id)
        return len([*pruned.glob(".*.blocks/*.safetensors")]) == 2

    crew.man(2)
    alone = weights(crew.submit(spec))
    for _ in range(10):
        job = crew.submit(spec)
        with suppress(crew.JobIsOver):
            crew.kill(job, StageKind.PRUNE, when=waiting)
            break

    assert weights(job) == alone
    assert crew.store.get(job.id).pruning.attempt > 1
    assert len(alone) == 2  # the weights and the masks


def test_killed_in_the_midst_of_recording_a_generation_too(crew, job, ends_right):
    crew.kill(job, StageKind.SEARCH, done=6, when=crew.in_a_write)

    assert ends_right(job)


def test_a_pause_that_a_dead_worker_cannot_follow_is_followed_for_it_and_can_be_ended(
    crew, job, ends_right
):
    with crew.frozen(job, StageKind.SEARCH, done=14) as process:
        asked = crew.store.ask(job.id, "pause")
        os.kill(process, signal.SIGKILL)
        crew.ended(process)
    paused = crew.wait(job, JobState.PAUSED)
    crew.store.ask(job.id, "resume")

    assert ends_right(job)
    assert asked.state is JobState.PAUSING
    assert paused.state is JobState.PAUSED


def test_a_stage_that_has_killed_max_attempts_workers_fails_its_job_which_can_be_resumed(
    crew, spec_of, ends_right
):
    crew.man(3)
    job = crew.submit(spec_of(trials=TRIALS, max_attempts=2))
    crew.kill(job, StageKind.SEARCH, done=14)
    with suppress(crew.JobIsOver):  # a worker that was too slow to report has died, too
        crew.kill(job, StageKind.SEARCH, attempt=2)
    failed = crew.wait(job)
    crew.store.ask(job.id, "resume")

    assert ends_right(job)
    assert failed.state is JobState.FAILED
    assert (failed.error["type"], failed.error["stage"]) == ("WorkerLost", "search")
    assert "2 workers died" in failed.error["message"]


@pytest.mark.parametrize("in_a_write", [False, True])
def test_frozen_beyond_the_limit_a_worker_has_lost_its_stage_and_writes_nothing_when_it_wakes(
    crew, job, ends_right, in_a_write
):
    """In the midst of a write, too: its locks hold up nobody for long."""
    moment = {"done": 6, "when": crew.in_a_write} if in_a_write else {"done": 14}
    with crew.frozen(job, StageKind.SEARCH, **moment):
        done = crew.succeeded(job)
    crew.man(2)
    time.sleep(1.0)  # for it, to write what it should not

    assert "Traceback" not in crew.logs()
    assert crew.store.get(job.id) == done
    assert ends_right(job)


def test_a_worker_that_has_lost_its_stage_does_not_take_it_out_of_the_queue_when_it_wakes(
    crew, job, ends_right
):
    with crew.frozen(job, StageKind.SEARCH, done=14):
        crew.kill(job, StageKind.SEARCH, attempt=2)

    assert ends_right(job)


def test_a_worker_that_wakes_and_hands_back_takes_nothing_away_from_the_one_that_works_now(
    crew, spec_of, ends_right
):
    crew.man(2)
    job = crew.submit(spec_of(trials=LONG))
    with crew.frozen(job, StageKind.SEARCH, done=14) as first:
        crew.busy(job, StageKind.SEARCH, attempt=2)
        os.kill(first, signal.SIGTERM)
    code = crew.ended(first)
    queued = crew.queued(job)
    crew.busy(job, StageKind.SEARCH, attempt=2)  # the other goes on

    assert (code, queued) == (0, ["doing"])
    assert ends_right(job)


def test_told_to_stop_a_worker_hands_its_search_back_at_once_and_another_ends_it(
    crew, job, ends_right
):
    """Until then it is listed with its device, its stages, and what it is busy with."""
    with crew.frozen(job, StageKind.SEARCH, done=14) as process:
        worker = crew.at_work()[process]
        os.kill(process, signal.SIGTERM)
    started = time.monotonic()
    code = crew.ended(process)
    took_s = time.monotonic() - started
    gone = process not in crew.at_work()

    assert ends_right(job)
    assert (worker.device, worker.stages) == ("cpu", list(StageKind))
    assert (worker.job_id, worker.stage) == (job.id, StageKind.SEARCH)
    assert (code, gone) == (0, True)
    assert took_s < 10
    (search,) = crew.store.get(job.id).of_kind(StageKind.SEARCH)
    assert (search.attempt, search.failures) == (2, 0)


def test_restricted(own_crew, spec_of):
    """A worker with --stages does those alone, and is listed with them."""
    worker = own_crew.start("--stages", "calibrate, search")
    own_crew.man(1)
    job = own_crew.submit(spec_of())
    listed = own_crew.at_work()[worker].stages
    own_crew.until(lambda: own_crew.store.get(job.id).of_kind(StageKind.CONFIRM))
    time.sleep(0.5)  # for it, to take what it should not
    job = own_crew.store.get(job.id)

    assert listed == ["calibrate", "search"]
    assert [(s.kind, s.state) for s in job.stages] == [
        (StageKind.CALIBRATE, StageState.DONE),
        (StageKind.SEARCH, StageState.DONE),
        (StageKind.CONFIRM, StageState.WAITING),
    ]


def test_stopped_twice(own_crew, spec_of):
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
def small_disk(desk):
    """The place of the bundles, with 32 KiB of space until it is unmounted."""
    folder = Path(desk.bundles / "bundles")
    folder.mkdir(parents=True)
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


def test_a_full_disk_fails_the_job_clearly_with_space_again_it_is_resumed_and_ends_right(
    desk, spec_of, undisturbed, found, small_disk
):
    failed = desk.work(desk.submit(spec_of()))
    left = list(small_disk.iterdir())
    subprocess.run(["umount", str(small_disk)], check=True)
    job = desk.work(desk.store.ask(failed.id, "resume"))

    assert failed.state is JobState.FAILED
    assert (failed.error["type"], failed.error["stage"]) == ("OutputError", "calibrate")
    assert "the disk is full" in failed.error["message"]
    assert str(small_disk.parent) not in failed.error["message"]  # every key may read it
    assert left == []
    assert found(job) == undisturbed(spec_of()).configuration


@pytest.fixture
def restart(tmp_path, crew):
    """A crew on a PostgreSQL of its own, and what restarts that as after a crash."""
    server = Postmaster(tmp_path / "postgresql")

    def crash():
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


def test_postgresql_restarts(restart, spec_of, undisturbed, found):
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


def test_an_upgrade_with_jobs_half_way(own_crew, spec_of, undisturbed, found):
    """All workers end, one by a kill; new ones wait for the tables, and end what was begun."""
    crew = own_crew
    specs = [
        spec_of(trials=TRIALS),
        spec_of(trials=TRIALS, seed=1),
        spec_of(seed=2),  # waits for a worker
        spec_of(seed=3),  # is paused
    ]
    crew.man(2)
    jobs = [crew.submit(spec) for spec in specs[:2]]
    with crew.frozen(jobs[0], StageKind.SEARCH, done=14) as killed:
        jobs += [crew.submit(spec) for spec in specs[2:]]
        crew.store.ask(jobs[3].id, "pause")
        os.kill(killed, signal.SIGKILL)
    for process in crew.alive - {killed}:
        os.kill(process, signal.SIGTERM)
    crew.until(lambda: not crew.alive)
    states = {job.id: crew.store.get(job.id).state for job in jobs}
    with crew.database.transaction() as connection:  # as if the service had yet to migrate it
        version = connection.scalar(text("DELETE FROM pho.alembic_version RETURNING version_num"))
    early = crew.start()
    crew.until(lambda: "`pho serve` makes them" in crew.logs())
    idle = early not in crew.at_work()
    with crew.database.transaction() as connection:
        connection.execute(
            text("INSERT INTO pho.alembic_version VALUES (:version)"), {"version": version}
        )
    crew.start()
    crew.store.ask(jobs[3].id, "resume")
    ended = [crew.succeeded(job) for job in jobs]
    alone = [undisturbed(spec) for spec in specs]

    assert "succeeded" not in states.values()
    assert states[jobs[3].id] == "paused"
    assert [crew.trials(job) for job in ended] == [[each.trials] for each in alone]
    assert [found(job) for job in ended] == [each.configuration for each in alone]
    assert idle
    (search,) = ended[0].of_kind(StageKind.SEARCH)
    assert search.attempt > 1


@pytest.mark.thorough(False)
def test_broken_context(own_crew, spec_of, undisturbed, found):
    """A GPU that fails costs the job no attempt: a new process, under the same number, ends it."""
    spec = spec_of(max_attempts=1)
    process = own_crew.start(sabotage=BROKEN)
    job = own_crew.done(spec)

    assert own_crew.alive == {process}
    assert [s.attempt for s in job.of_kind(StageKind.CONFIRM)] == [2]
    assert "the GPU failed: CUDA error: an illegal memory access" in own_crew.logs()
    assert found(job) == undisturbed(spec).configuration


def test_cancelled_while_it_loads(own_crew, spec_of):
    """A model that is loaded for ever can be cancelled; a new process is its worker."""
    process = own_crew.start(sabotage=ENDLESS)
    job = own_crew.submit(spec_of())
    own_crew.busy(job, StageKind.CALIBRATE)
    own_crew.store.ask(job.id, "cancel")
    cancelled = own_crew.wait(job, JobState.CANCELLED)
    queued = own_crew.queued(job)

    assert cancelled.state is JobState.CANCELLED
    assert queued == []
    assert own_crew.alive == {process}


def test_stopped_while_it_loads(own_crew, spec_of):
    """Told to stop, a worker that loads for ever hands its stage back and ends within 10 s."""
    process = own_crew.start(sabotage=ENDLESS)
    job = own_crew.submit(spec_of())
    own_crew.busy(job, StageKind.CALIBRATE)
    told = time.monotonic()
    os.kill(process, signal.SIGTERM)
    code = own_crew.ended(process)
    took_s = time.monotonic() - told

    assert code == 0
    assert took_s < 10
    assert own_crew.queued(job) == ["todo"]
    assert own_crew.at_work() == {}
    assert own_crew.store.get(job.id).stages[0].failures == 0


def test_without_work_for_so_long_a_worker_ends_and_until_then_does_what_comes(own_crew, spec_of):
    """Meanwhile it touches the file of the probes; a report on its way is not behind the last."""
    alive = own_crew.folder / "alive"
    variable = f"os.environ['PHO_LIVENESS_FILE'] = {str(alive)!r}"
    worker = own_crew.start("--exit-when-idle", "2", sabotage=f"{variable}\n{SLOW_REPORTS}")
    own_crew.man(1)
    job = own_crew.done(spec_of())
    touched = alive.stat().st_mtime
    own_crew.until(lambda: alive.stat().st_mtime > touched)

    assert own_crew.ended(worker) == 0
    assert {stage.attempt for stage in job.stages} == {1}
    assert own_crew.at_work() == {}
    assert "no stage came for 2 s" in own_crew.logs()
    assert "Traceback" not in own_crew.logs()


def test_a_file_for_probes_that_cannot_be_written_is_refused(own_crew):
    variable = "os.environ['PHO_LIVENESS_FILE'] = '/proc/alive'"
    worker = own_crew.start(sabotage=variable)

    assert own_crew.ended(worker) == 2
    assert "PHO_LIVENESS_FILE=/proc/alive cannot be written" in own_crew.logs()


@pytest.mark.parametrize("how", list(Drain))
def test_drained_a_worker_finishes_its_stage_or_hands_it_back_takes_none_and_ends(
    how, own_crew, spec_of
):
    worker = own_crew.start()
    job = own_crew.submit(spec_of(trials=LONG))
    own_crew.busy(job, StageKind.SEARCH, done=14)
    own_crew.store.drain(own_crew.at_work()[worker].id, how, alive_s=60.0)
    code = own_crew.ended(worker)
    stages = own_crew.store.get(job.id).stages
    (search,) = (stage for stage in stages if stage.kind is StageKind.SEARCH)

    assert code == 0
    assert own_crew.at_work() == {}
    assert {*own_crew.queued(job)} == {"todo"}
    assert (search.attempt, search.failures) == (1, 0)
    expected = StageState.DONE if how is Drain.FINISH else StageState.WAITING
    assert search.state is expected


def test_a_dead_workers_stage_comes_again_while_all_others_are_busy(own_crew, spec_of):
    own_crew.man(1)
    busy = own_crew.submit(spec_of(trials=10_000))
    own_crew.busy(busy, StageKind.SEARCH, done=14)
    own_crew.man(2)
    other = own_crew.submit(spec_of(trials=LONG, name="other"))
    own_crew.kill(other, StageKind.SEARCH, done=14)
    own_crew.until(lambda: own_crew.queued(other) == ["todo"])
    (search,) = own_crew.store.get(busy.id).of_kind(StageKind.SEARCH)

    assert (search.state, search.attempt) == (StageState.RUNNING, 1)


def test_on_another_artifact_store_than_the_api_a_worker_takes_nothing_until_that_is_mended(
    own_crew, spec_of
):
    own_crew.store.set_artifact_store("the api's")
    job = own_crew.submit(spec_of())
    own_crew.start()
    own_crew.until(lambda: "is not the artifact store that the API sees" in own_crew.logs())
    own_crew.until(lambda: "" in own_crew.store.stores(60.0)[1])
    queued = own_crew.queued(job)
    own = Path(own_crew.folder, "data", "artifacts", "store-id")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("the api's")

    assert own_crew.succeeded(job)
    assert queued == ["todo"]
    own_crew.until(lambda: own_crew.store.stores(60.0)[1] == ["the api's"])
