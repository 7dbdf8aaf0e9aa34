"""
Faults: inputs that change during a job, a database that dies or falls silent, processes that end.
"""

import random
import shutil
import signal
import time
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
import psutil
from attack_target import Attack, Target
from local_service import WORDS
from replaced_files import mixtures

from storage.database import Database
from storage.jobs import JobStore

READY_S = 60.0
STOPPED_S = 15.0  # ten seconds for the service, and some for a busy machine
CONFIRMED = {"confirm": {"text": "confirm.txt", "finalists": 8, "windows": 64}}


def _ready(target: Target) -> bool:
    return target.get("/readyz").status_code == 200


def _write(target: Target, seed: int) -> None:
    """A text to confirm on, which shares no passage with the one that calibrates."""
    words = random.Random(seed).choices(WORDS, k=12_000)  # noqa: S311 - no secret
    (target.folder / "confirm.txt").write_text(" ".join(words))


def _paused(target: Target, **fields: object) -> str:
    """A job that is paused once a perplexity was measured; its id."""
    _write(target, target.seed)
    job = target.job(**{**CONFIRMED, **fields})

    def begun() -> bool:
        shown = target.get(f"/v1/jobs/{job}").json()
        return _measured(shown)[0] > 0 or shown["state"] in ("succeeded", "failed")

    target.until(begun, seconds=120)
    with suppress(httpx.HTTPError):
        httpx.post(f"{target.url}/v1/jobs/{job}:pause", timeout=30)
    target.until(
        lambda: target.get(f"/v1/jobs/{job}").json()["state"] in ("paused", "succeeded"),
        seconds=60,
    )
    return job


def _measured(shown: dict[str, Any]) -> tuple[int, int]:
    """The perplexities of a job that are measured, and all of them as far as they are known."""
    pieces = [p for p in shown["progress"]["pieces"] if p["stage"] == "perplexity"]
    return sum(p["done"] for p in pieces), sum(p["total"] for p in pieces)


def _mixed(target: Target, job: str) -> str | None:
    """After it goes on: failed in words, or one text and one set of weights in all stages."""
    shown = target.get(f"/v1/jobs/{job}").json()
    done, total = _measured(shown)
    if shown["state"] == "succeeded" or done == total:
        return "all was measured before anything changed, so nothing was tried"
    httpx.post(f"{target.url}/v1/jobs/{job}:resume", timeout=30)
    ended = target.wait(job)
    if ended["state"] == "failed":
        return None if "changed" in ended["error"]["message"] else ended["error"]["message"][:200]
    if ended["state"] != "succeeded":
        return f"it is {ended['state']}"
    database = Database(target.service.database_url, pool=1)
    found = [*mixtures(JobStore(database).get(UUID(job)))]
    database.close()
    return "; ".join(found)


def _text_swapped(target: Target) -> str | None:
    """The text that confirms is another one after the first perplexity."""
    job = _paused(target)
    _write(target, target.seed + 1)
    return _mixed(target, job)


def _model_swapped(target: Target) -> str | None:
    """The model is another one after the first perplexity."""
    folder = target.folder / "swapped"
    shutil.copytree(target.folder / "tiny", folder, dirs_exist_ok=True)
    job = _paused(target, model="swapped")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-400:] = bytes(400)
    weights.write_bytes(content)
    for process in target.service.all_workers():  # another one has to read it anew
        with suppress(psutil.Error):
            process.kill()
    return _mixed(target, job)


def _model_gone(target: Target) -> str | None:
    """A folder that is deleted is missing, and not asked of the hub."""
    folder = target.folder / "org" / "gone"
    shutil.copytree(target.folder / "tiny", folder, dirs_exist_ok=True)
    job = _paused(target, model="org/gone")
    shutil.rmtree(folder)
    httpx.post(f"{target.url}/v1/jobs/{job}:resume", timeout=30)
    ended = target.wait(job)
    if ended["state"] == "succeeded":
        return "the worker had it still, so nothing was tried"
    said = str(ended.get("error", {}).get("message", ended["state"]))
    return f"it was asked of the hub: {said[:200]}" if "hub" in said.lower() else None


def _postmaster(target: Target) -> str | None:
    """kill -9 of PostgreSQL: it is started again, and a job that ran goes on."""
    job = target.job(trials=200)
    server = target.service.postmaster()
    if server is None:
        return "there is no PostgreSQL"
    server.kill()
    if not target.until(lambda: _ready(target), seconds=READY_S):
        return f"not ready after {READY_S:.0f} s"
    ended = target.wait(job, seconds=180)
    return None if ended.get("state") == "succeeded" else f"the job is {ended.get('state')}"


def _frozen_database(target: Target) -> str | None:
    """SIGSTOP of PostgreSQL, 45 requests meanwhile: they end, and all is well afterwards."""
    server = target.service.postmaster()
    if server is None:
        return "there is no PostgreSQL"
    family = [server, *server.children(recursive=True)]
    for process in family:
        with suppress(psutil.Error):
            process.suspend()
    try:
        with httpx.Client(timeout=1) as client:
            for _ in range(45):
                with suppress(httpx.HTTPError):
                    client.get(f"{target.url}/v1/jobs", timeout=0.1)
        time.sleep(5)
    finally:
        for process in family:
            with suppress(psutil.Error):
                process.resume()
    return None if target.until(lambda: _ready(target), seconds=60) else "not ready after 60 s"


def _worker_killed(target: Target) -> str | None:
    """kill -9 of every worker in the middle of a job."""
    job = target.job(trials=400)
    target.until(lambda: target.get(f"/v1/jobs/{job}").json()["state"] == "running")
    for process in target.service.all_workers():
        with suppress(psutil.Error):
            process.kill()
    ended = target.wait(job, seconds=180)
    return None if ended.get("state") == "succeeded" else f"the job is {ended.get('state')}"


def _stopped_without_database(target: Target) -> str | None:
    """SIGTERM while PostgreSQL does not answer: all ends soon."""
    server = target.service.postmaster()
    family = [server, *server.children(recursive=True)] if server else []
    for process in family:
        with suppress(psutil.Error):
            process.suspend()
    try:
        started = time.monotonic()
        target.service.end_api(signal.SIGTERM)
        took = time.monotonic() - started
    finally:
        for process in family:
            with suppress(psutil.Error):
                process.resume()
    target.service.start_api()
    return f"it took {took:.0f} s" if took > STOPPED_S else None


FAULTS = (
    Attack(name="text swapped", about="in the middle of a confirmation", run=_text_swapped),
    Attack(name="model swapped", about="in the middle of a confirmation", run=_model_swapped),
    Attack(name="model gone", about="a folder whose name could be the hub's", run=_model_gone),
    Attack(name="PostgreSQL killed", about="kill -9 while a job runs", run=_postmaster),
    Attack(name="PostgreSQL frozen", about="SIGSTOP, and 45 requests", run=_frozen_database),
    Attack(name="worker killed", about="kill -9 while a job runs", run=_worker_killed),
    Attack(
        name="stopped without database", about="SIGTERM while PostgreSQL is frozen",
        run=_stopped_without_database, health=False,
    ),
)  # fmt: skip
