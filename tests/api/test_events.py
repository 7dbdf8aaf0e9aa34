"""The stream of what happens to a job."""

import asyncio
import json
import re
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from storage.records import JobState, NewStage, StageKind


@dataclass(frozen=True, kw_only=True)
class Event:
    """As a browser would give it to a page."""

    id: int
    kind: str
    data: dict[str, Any]


def events_of(text):
    """Read a stream by the rules of the HTML standard."""
    found = []
    for block in re.split(r"\r?\n\r?\n", text):
        lines = [line for line in re.split(r"\r?\n", block) if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append(
                Event(id=int(fields["id"]), kind=fields["event"], data=json.loads(fields["data"]))
            )
    return found


@pytest.fixture
def history(submit, hand, configuration):
    """A job that was paused and resumed, failed once, and succeeded."""
    job = submit(trials=40)["id"]
    claim = hand.take(job, StageKind.CALIBRATE)
    hand.store.fail(claim, {"type": "OSError", "message": "disk: ü\n\nx"}, retry=True)
    hand.store.ask(uuid.UUID(job), "pause")
    hand.store.ask(uuid.UUID(job), "resume")
    hand.calibrate(job)
    claim = hand.take(job, StageKind.SEARCH)
    for done in (8, 16, 40):
        hand.store.progress(claim, done=done, elapsed_s=1.0, best_value=1 / done)
    hand.store.complete(claim, {}, then=[NewStage(kind=StageKind.FINISH)])
    hand.finish(job, configuration.model_dump(mode="json"))
    return job


def test_the_stream_of_a_job_that_is_over_tells_all(client, history):
    answer = client.get(f"/v1/jobs/{history}/events")
    events = events_of(answer.text)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert [
        (e.kind, e.data.get("state") or e.data.get("done") or e.data.get("stage")) for e in events
    ] == [
        ("state", "queued"), ("stage", "calibrate"), ("state", "running"), ("retry", "calibrate"),
        ("state", "paused"), ("state", "queued"), ("stage", "calibrate"), ("state", "running"),
        ("stage", "search"),
        ("progress", 8), ("progress", 16), ("progress", 40), ("stage", "finish"),
        ("state", "succeeded"),
    ]  # fmt: skip
    assert [e.id for e in events] == sorted({e.id for e in events})
    retry = next(e.data for e in events if e.kind == "retry")
    progress = next(e.data for e in events if e.kind == "progress")
    told = "OSError", "disk: ü\n\nx", 1
    assert (retry["type"], retry["message"], retry["attempts"]) == told
    assert (progress["number"], progress["best_value"]) == (0, 0.125)
    assert [e.data.get("attempt") for e in events if e.kind == "stage"] == [None, 2, None, None]
    assert all(datetime.fromisoformat(e.data["at"]).tzinfo for e in events)


def test_after_any_event_comes_the_next_what_is_no_id_is_refused_by_name(client, history, refusal):
    url = f"/v1/jobs/{history}/events"
    events = events_of(client.get(url).text)

    for seen, last in enumerate(events, start=1):
        answer = client.get(url, headers={"Last-Event-ID": str(last.id)})
        assert events_of(answer.text) == events[seen:]
    for beyond in ("9" * 9, str(2**63 - 1)):
        answer = client.get(url, headers={"Last-Event-ID": beyond})
        assert (answer.status_code, events_of(answer.text)) == (200, [])
    for last in ("x", "-1", "1.5", str(2**63), "9" * 5000):
        answer = client.get(url, headers={"Last-Event-ID": last})
        (error,) = refusal(answer, 422, "invalid_request")["errors"]
        assert error["parameter"].lower() == "last-event-id"
    assert client.head(url).status_code in (200, 405)  # and does not hang


def test_a_long_history_comes_whole(client, submit, hand):
    job = submit()["id"]
    hand.calibrate(job)
    claim = hand.take(job, StageKind.SEARCH)
    with hand.store.database.transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO pho.events (job_id, kind, data)"
            " SELECT %s, 'progress', json_build_object('done', n) FROM generate_series(1, 1200) n",
            (job,),
        )
    hand.store.fail(claim, {"type": "X", "message": "x"}, retry=False)
    events = events_of(client.get(f"/v1/jobs/{job}/events").text)

    assert [e.data["done"] for e in events if e.kind == "progress"] == [*range(1, 1201)]
    assert events[-1].data["state"] == "failed"


class Listener:
    """Is on the line while things happen: the test client would wait for the end."""

    def __init__(self, app, job, after=None):
        self._app = app
        self._gone = asyncio.Event()
        self._new = asyncio.Event()
        self.text = ""
        headers = [(b"host", b"localhost")]
        if after is not None:
            headers.append((b"last-event-id", str(after).encode()))
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "scheme": "http", "path": f"/v1/jobs/{job}/events", "query_string": b"",
            "raw_path": b"", "root_path": "", "headers": headers, "server": ("localhost", 80),
            "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self._asked = False

    async def __aenter__(self):
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        return self

    async def __aexit__(self, *_):
        self._gone.set()
        await asyncio.wait_for(self.task, 10)

    async def _receive(self):
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.text += message.get("body", b"").decode()
        self._new.set()

    @property
    def events(self):
        return events_of(self.text)

    async def until(self, count):
        async with asyncio.timeout(10):
            while len(self.events) < count:
                self._new.clear()
                await self._new.wait()
        return self.events


def test_who_was_cut_off_hears_of_all_once(client, submit, hand):
    job = submit()["id"]

    async def follow():
        async with Listener(client.app, job) as first:
            await first.until(1)
        await asyncio.to_thread(hand.calibrate, job)
        async with Listener(client.app, job, after=first.events[-1].id) as second:
            await second.until(2)
            await asyncio.to_thread(hand.store.ask, uuid.UUID(job), "cancel")
            await asyncio.wait_for(second.task, 10)
        return first.events, second.events

    first, second = asyncio.run(follow())

    assert first + second == events_of(client.get(f"/v1/jobs/{job}/events").text)
    assert len(first) == 1


def test_the_stream_of_a_deleted_job_ends(client, submit, hand):
    job = submit()["id"]
    hand.bring(job, JobState.PAUSED)

    async def follow():
        async with Listener(client.app, job) as listener:
            await listener.until(2)
            await asyncio.to_thread(client.delete, f"/v1/jobs/{job}")
            await asyncio.wait_for(listener.task, 10)
            return listener.events

    assert [e.data["state"] for e in asyncio.run(follow())] == ["queued", "paused"]


def test_many_listeners_leave_others_free(client, submit, hand):
    job = submit()["id"]

    async def follow():
        listeners = [Listener(client.app, job) for _ in range(50)]
        async with asyncio.TaskGroup() as group:
            for listener in listeners:
                group.create_task(listener.__aenter__())
        for listener in listeners:
            await listener.until(1)
        answer = await asyncio.to_thread(client.get, "/v1/jobs")
        await asyncio.to_thread(hand.store.ask, uuid.UUID(job), "cancel")
        await asyncio.gather(*(asyncio.wait_for(li.task, 20) for li in listeners))
        return answer.status_code, {len(li.events) for li in listeners}

    assert asyncio.run(follow()) == (200, {2})
