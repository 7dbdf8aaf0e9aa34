"""What a worker does when a text, the database or its start goes wrong."""

import json
import threading
import time
import uuid
from types import SimpleNamespace

from sqlalchemy import text

from pho_service.host.settings import read_settings
from storage.jobs import NewJob
from storage.keys import KeyStore
from storage.records import NewStage, StageKind
from storage.studies import DatabaseGone
from workers.worker import WorkerOptions, _Worker


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
