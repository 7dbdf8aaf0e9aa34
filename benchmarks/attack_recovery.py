"""
What a recovery, a search by minutes, or a tokenizer that writes could use up or mix.
"""

import json
import random
import shutil
from contextlib import suppress
from datetime import timedelta
from typing import Any

import httpx
import psutil
from attack_bounds import TURN_S, _keys
from attack_target import Attack, Target
from local_service import WORDS, write_text

from storage.database import Database
from storage.keys import KeyStore, Quota

LONG = {"tokens": 5_000_000, "text": "long.txt"}  # some minutes of asking alone
BEGUN_S = 300.0  # until a recovery begins, on a busy machine
PIECE_S = 10.0  # a window, a checkpoint, and the reading of two models, on a busy machine
MOST_BYTES = 10**6  # of a result


def _recovering(
    target: Target, seed: int, headers: dict[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """A job whose recovery has begun, and what it looks like then."""
    words = random.Random(seed).choices(WORDS, k=300_000)  # noqa: S311 - no secret
    (target.folder / "long.txt").write_text(" ".join(words))
    spec = {**target.spec, "prune": True, "recovery": LONG}
    answer = httpx.post(f"{target.url}/v1/jobs", json=spec, headers=headers, timeout=60)
    assert answer.status_code == 202, answer.text
    path = f"{target.url}/v1/jobs/{answer.json()['id']}"
    return path, target.reached(path, "Asking the dense model", headers, seconds=BEGUN_S)


def _long_recovery(target: Target) -> str | None:
    """A small job of another key begins within two turns and a piece."""
    mine, yours = _keys(target)
    path, shown = _recovering(target, target.seed, mine)
    if shown["state"] != "running":
        return f"the recovery never began: {shown['state']} {shown.get('error')}"
    took, most = target.small_job_s(yours), 2 * TURN_S + PIECE_S
    httpx.post(f"{path}:cancel", headers=mine, timeout=60)
    return f"it waited for {took:.0f} s, and turns have {TURN_S:g}" if took > most else None


def _text_swapped(target: Target) -> str | None:
    """The text of a recovery is another one when a second worker goes on with it."""
    path, shown = _recovering(target, target.seed)
    if shown["state"] != "running":
        return f"the recovery never began: {shown['state']} {shown.get('error')}"
    write_text(target.folder / "long.txt", seed=target.seed + 1)
    for process in target.service.all_workers():
        with suppress(psutil.Error):
            process.kill()
    ended = target.wait(path.rpartition("/")[2], seconds=180)
    if ended["state"] == "failed":
        return None if "changed" in ended["error"]["message"] else ended["error"]["message"][:200]
    httpx.post(f"{path}:cancel", timeout=60)
    return f"it is {ended['state']}"


def _writing_tokenizer(target: Target) -> str | None:
    """A decoder that makes a megabyte of every letter of a kind."""
    shutil.copytree(target.folder / "tiny", target.folder / "writes", dirs_exist_ok=True)
    file = target.folder / "writes" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["decoder"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "C" * 10**6}
    file.write_text(json.dumps(tokenizer))
    write_text(target.folder / "confirm.txt", seed=target.seed)
    confirm = {"text": "confirm.txt", "finalists": 1, "windows": 4}
    answer = target.submit(model="writes", confirm=confirm, trials=8)
    if answer.status_code == 422:
        return None if "decoder" in answer.text else answer.text[:200]
    job = target.wait(answer.json()["id"])
    size = len(target.get(f"/v1/jobs/{job['id']}/best").content)
    return f"it was taken, is {job['state']}, and its result has {size >> 20} MiB"


def _large_recovery(target: Target) -> str | None:
    """Recoveries that no disk and no memory have room for."""
    wrong = []
    for recovery, says in (
        ({"tokens": 9 * 10**8}, "of disk are needed"),
        ({"tokens": 2 * 10**9}, "PHO_MAX_TOKENS"),
        ({"minutes": 100_000}, "PHO_MAX_RECOVERY_MINUTES"),
    ):
        answer = target.submit(prune=True, recovery=recovery)
        if answer.status_code == 422 and says in answer.text:
            continue
        wrong.append(f"{recovery}: {answer.status_code} {answer.text[:200]}")
        if answer.status_code == 202:
            httpx.post(f"{target.url}/v1/jobs/{answer.json()['id']}:cancel", timeout=60)
    return "; ".join(wrong)


def _few_minutes(target: Target) -> str | None:
    """A search of less than a second takes the least sizes, and ends."""
    document = {key: target.spec[key] for key in ("model", "pattern", "preset", "confirm")}
    document |= {"calibration": {"text": "text.txt"}, "minutes": 0.01}
    answer = httpx.post(f"{target.url}/v1/jobs", json=document, timeout=60)
    if answer.status_code != 202:
        return f"{answer.status_code} {answer.text[:200]}"
    ended = target.wait(answer.json()["id"])
    return None if ended["state"] == "succeeded" else f"it is {ended['state']}: {ended['error']}"


def _minutes_and_quotas(target: Target) -> str | None:
    """Recoveries by the clock, of a key whose quota has room for 20,000 tokens."""
    database, quota = Database(target.service.database_url, pool=1), Quota(20_000, timedelta(7))
    secret = KeyStore(database).create("little", sees_all=False, quota=quota)[1]
    database.close()
    headers, wrong = {"authorization": f"Bearer {secret}"}, []
    for recovery in ({}, {"minutes": 30}, {"minutes": 1000}, {"tokens": 30_000}):
        spec = {**target.spec, "prune": True, "recovery": recovery}
        answer = httpx.post(f"{target.url}/v1/jobs", json=spec, headers=headers, timeout=60)
        if answer.status_code not in (422, 429):
            wrong.append(f"{recovery}: {answer.status_code}")
            job = f"{target.url}/v1/jobs/{answer.json()['id']}"
            httpx.post(f"{job}:cancel", headers=headers, timeout=60)
    answer = httpx.post(f"{target.url}/v1/jobs", json=target.spec, headers=headers, timeout=60)
    if answer.status_code != 202:
        wrong.append(f"one without a recovery: {answer.status_code}")
    return "; ".join(wrong)


RECOVERIES = (
    Attack(name="writing tokenizer", about="1 MB for a letter", run=_writing_tokenizer),
    Attack(name="large recovery", about="2 of tokens, 1 of minutes", run=_large_recovery),
    Attack(name="recovery text swapped", about="and the worker killed", run=_text_swapped),
    Attack(name="few minutes", about="a search of 0.01 minutes", run=_few_minutes),
)
RECOVERIES_WITH_KEYS = (
    Attack(name="long recovery", about="5 million tokens, and another key", run=_long_recovery),
    Attack(name="minutes and quotas", about="4 recoveries, 20,000 tokens", run=_minutes_and_quotas),
)
