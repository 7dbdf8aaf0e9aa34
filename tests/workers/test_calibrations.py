"""One calibration shared out over several workers: the same bundle, made once."""

import signal

import pytest

from pho_service.models.calibration import bundle_path
from pho_service.spec.calibration import SHARDS
from storage.records import JobState, StageKind, StageState

SHARED = "import pho_service.spec; pho_service.spec.calibration.SHARDED_FROM = 1\n"

# Each call of a function writes a line; none ends before two jobs need the bundle.
NOTED = """
import os, time
import {module} as module
from storage.jobs import JobStore
from workers.inputs import BundleStore

def note(line):
    with open("{notes}", "a") as file:
        file.write(line + "\\n")

def noted(*args, real=module.{function}, **kwargs):
    note("made")
    while open("{notes}").read().count("entered") < 2:
        time.sleep(0.001)
    return real(*args, **kwargs)

def enter(self, *args, real=BundleStore.ensure, **kwargs):
    note("entered")
    return real(self, *args, **kwargs)

def share(self, *args, real=JobStore.complete, then=(), **kwargs):
    done = real(self, *args, then=then, **kwargs)
    if then:
        note("entered")
    return done

module.{function}, BundleStore.ensure, JobStore.complete = noted, enter, share
"""
DEADLY = """
import os, signal
import workers.pieces as module

def measure(model, text, settings, number, progress, real=module.measure_shard):
    if number == 2 and not os.path.exists("{flag}"):
        open("{flag}", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, text, settings, number, progress)

module.measure_shard = measure
"""


@pytest.fixture
def shared(monkeypatch, spec_of):
    """A job whose calibration is cut into six shards, here too."""
    monkeypatch.setattr("pho_service.spec.calibration.SHARDED_FROM", 1)
    return spec_of(calibration={"seed": 7}, trials=10)


@pytest.fixture
def alone(calibrated, tmp_path):
    """The bundle of a job as `pho calibrate` makes it, in one process."""
    return lambda spec: bundle_path(tmp_path, calibrated(spec)[2].key).read_bytes()


def bundles(artifacts):
    """All that the workers have made."""
    assert list((artifacts / "shards").iterdir()) == []  # removed once it is made
    return [path.read_bytes() for path in (artifacts / "bundles").iterdir()]


def shards_made(*jobs):
    """How many of each shard's parts really gathered it."""
    parts = [part for job in jobs for part in job.shards]
    made = [part.number % SHARDS for part in parts if part.result["made"]]
    return [made.count(shard) for shard in range(6)]


@pytest.mark.thorough
def test_in_shards_the_bundle_and_what_is_found_are_those_of_one_process(
    desk, shared, alone, undisturbed, found
):
    """Also if it is paused while its parts wait: it goes on where it was."""
    job = desk.submit(shared)
    job = desk.work(job, most=3)  # what says how many parts there are, and two of them
    desk.store.ask(job.id, "pause")
    paused = desk.work(job)
    job = desk.work(desk.store.ask(job.id, "resume"))

    assert paused.state is JobState.PAUSED
    assert bundles(desk.bundles) == [alone(shared)]
    assert shards_made(job) == [1] * 6
    assert [(s.state, s.attempt) for s in job.shards] == [(StageState.DONE, 1)] * 6
    assert found(job) == undisturbed(shared).configuration


@pytest.mark.thorough
def test_killed_in_a_shard(own_crew, shared, alone, tmp_path):
    """A worker that dies in the midst of a shard loses that one alone, and none counts twice."""
    sabotage = SHARED + DEADLY.format(flag=tmp_path / "flag")
    mortal = [own_crew.start(sabotage=sabotage) for _ in range(2)]
    job = own_crew.done(shared)

    codes = [own_crew.warm_start.exit_code(process) for process in mortal]
    attempts = [part.attempt for part in job.shards]
    assert sorted(codes, key=str) == [-signal.SIGKILL, None]
    assert attempts == [1, 1, 2, 1, 1, 1]
    assert shards_made(job) == [1] * 6
    assert bundles(own_crew.folder / "data" / "artifacts") == [alone(shared)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "module", "function"),
    [
        (SHARED, "workers.pieces", "measure_shard"),
        ("", "pho_service.models.calibration", "calibrate"),
    ],
    ids=["in shards", "whole"],
)
def test_made_once(own_crew, spec_of, home, tmp_path, before, module, function):
    """Two jobs that need the same bundle at the same time make it once, whatever they call it."""
    notes = tmp_path / "notes"
    notes.touch()
    noted = NOTED.format(notes=notes, module=module, function=function)
    for _ in range(2):
        own_crew.start("--stages", "calibrate", sabotage=before + noted)
    text = {"calibration": {"seed": 8}}
    jobs = [
        own_crew.submit(spec_of(model=name, **text))
        for name in (f"{home}/model", f"{home}/../{home.name}/model")
    ]
    for job in jobs:
        own_crew.until(lambda job=job: own_crew.store.get(job.id).of_kind(StageKind.SEARCH))
    jobs = [own_crew.store.get(job.id) for job in jobs]

    locks = [[p.params["lock"] for p in job.shards] for job in jobs]
    assert jobs[0].spec["model"] != jobs[1].spec["model"]
    assert locks[0] == locks[1]
    assert len(list((own_crew.folder / "data" / "artifacts" / "bundles").iterdir())) == 1
    assert notes.read_text().split().count("made") == (6 if before else 1)
