"""Workers whose process can do no more: the stage is handed back, and a new process goes on."""

import json
import os
import signal
import threading
import time
import uuid
from types import SimpleNamespace

from sqlalchemy import text

from pho_service.host.settings import read_settings
from storage.jobs import NewJob
from storage.keys import KeyStore
from storage.records import JobState, NewStage, StageKind
from storage.studies import DatabaseGone
from workers.worker import WorkerOptions, _Worker

BROKEN = """
import torch
from pho_service.pipeline.search import _Steps

def fail(self, validated, run):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

_Steps.choose = fail
"""
ENDLESS = """
import time
import workers.inputs

def load(*args, **kwargs):
    while True:
        time.sleep(0.001)

workers.inputs.load_model = load
"""


def test_broken_context(own_crew, spec_of, undisturbed, found):
    """A GPU that fails costs the job no attempt: a new process, under the same number, ends it."""
    spec = spec_of(max_attempts=1)
    process = own_crew.start(sabotage=BROKEN)
    job = own_crew.done(spec)

    assert own_crew.alive == {process}
    assert [s.attempt for s in job.of_kind(StageKind.CONFIRM)] == [2]
    assert "the GPU failed: CUDA error: an illegal memory access" in own_crew.logs()
    assert found(job) == undisturbed(spec).configuration


def test_a_tokenizer_that_panics_fails_the_job_in_words_at_once(hand, spec_of):
    folder = hand.folder / "model"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "((a+)+)+z"}, "behavior": "Isolated"}
    tokenizer["pre_tokenizer"] = {**split, "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "text.txt").write_text("a" * 100)
    text = {"text": str(folder / "text.txt")}
    spec = spec_of(model=str(folder), calibration=text, confirm=None, max_attempts=3)
    error = hand.failed(spec)

    assert (error["type"], error["attempts"]) == ("ModelError", 1)
    assert "retry-limit-in-match over" in error["message"]
    assert "tokenizer.json" in error["message"]


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


def test_a_worker_that_starts_lets_in_the_key_that_was_not_served_for_longest(desk):
    """Or those that are killed before their first turn is over would all serve the oldest job."""
    store, kinds = desk.store, (StageKind.TRANSFER,)
    keys = [KeyStore(store.database).create(n, sees_all=False)[0].id for n in "ab"]
    stages = [NewStage(kind=kinds[0])]
    new = NewJob(spec={}, name="n", stages=stages, priority=99, trials=1, max_attempts=9)
    waiting = [store.submit(new, owner_id=key)[0] for key in keys for _ in "12"]
    served = []
    for _ in range(3):
        worker = _Worker(store.database, read_settings(), WorkerOptions(kinds=kinds), desk.inputs)
        worker._enter_anew()
        with store.database.transaction() as connection:
            fetched = text(
                "SELECT id, (args->>'stage_id')::int FROM procrastinate_fetch_job_v2(:kinds, NULL)"
            )
            entry, stage = connection.execute(fetched, {"kinds": [*kinds]}).one()
        served.append(keys.index(store.claim(stage, entry, uuid.uuid4()).job.owner_id))
        worker._leave()
    for job in waiting:
        store.ask(job.id, "cancel")

    assert served == [0, 1, 0]


def test_told_to_stop_in_an_outage_a_worker_waits_no_more_and_leaves_its_stage_in_the_queue():
    settings = SimpleNamespace(heartbeat_s=1.0, turn_s=0.0)
    nothing = SimpleNamespace()
    worker = _Worker(nothing, settings, WorkerOptions(), nothing)
    reports = []

    def report():
        reports.append(time.monotonic())
        if len(reports) == 2:
            threading.Timer(0.01, worker._stop).start()
        raise DatabaseGone("refused")

    assert worker._when_possible(report)
    assert len(reports) in (2, 3)
