"""
Write what a PHO of another version stores, for test_stored.py: a service's backup and its bundles,
and the files of the command line.

Run it with a checkout of that version before everything else on the path:

    git worktree add /tmp/older 7e0434d
    PYTHONPATH=/tmp/older:/tmp/older/benchmarks OMP_NUM_THREADS=1 \
        python tests/stored/write_stored.py tests/stored/7e0434d

Only what a user has is used: `pho`, the client and `python -m workers`; SQL, and SIGKILL, say when
a worker is to die.
"""

import gzip
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import torch
from local_service import service, write_text, write_tiny_model
from transformers import AutoModelForCausalLM

from pho_service.client import Client
from storage.embedded import running_url

PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]
TEXT = "--text text.txt --samples 6 --context-length 32 --kernel-sizes 3,5 --rows-per-layer 4"
SEARCH = f"search tiny --pattern 0.5 --preset score {TEXT} --projection-rows 16 --study sqlite:///study.db"
SHORT, LONGER = "--trials 20 --out config.json", "--trials 30 --out longer.json"
PRUNE = f"prune tiny --config config.json {TEXT} --projection-rows 16 --out pruned"
PATIENCE_S = 60.0
CONFIRM = {"text": "confirm.txt", "candidates": 2, "windows": 3}


def main(out: Path) -> None:
    """Fill a new folder."""
    with tempfile.TemporaryDirectory(prefix="pho-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # the database runs as another user
        spec = write_inputs(folder)
        out.mkdir()
        with service(folder, workers=0, heartbeat_s="0.3", stalled_after_s="1.5") as url:
            stored = _fill(url, folder, spec, out)
        _of_command_line(folder, out)
        stored |= {
            "folder": str(folder),
            "arithmetic": arithmetic(folder),
            "versions": versions(),
        }
    (out / "stored.json").write_text(json.dumps(stored, indent=1) + "\n")


def write_inputs(folder: Path) -> dict[str, Any]:
    """Two models and two texts, the same ones each time; the fields of a job on them."""
    write_tiny_model(folder, name="other", seed=1)
    spec = write_tiny_model(folder)
    write_text(folder / "text.txt", seed=0)
    write_text(folder / "confirm.txt", seed=1)
    return {**spec, "confirm": CONFIRM, "max_attempts": 20}


def arithmetic(folder: Path) -> str:
    """
    A hash of what this machine's torch makes of the model: losses and gradients to the last bit.

    Where it is another one, the same program gives other last digits.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)
    tokens = torch.randint(12, (6, 32), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of all that results name, or that numbers come from."""
    packages = ("pho-service", "torch", "transformers", "optuna", "cmaes", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _fill(url: str, folder: Path, spec: dict[str, Any], out: Path) -> dict[str, Any]:
    database_url = str(running_url(folder / "data"))
    small = {**spec, "trials": 20}
    interrupted = {
        "stopped": {**spec, "trials": 80, "seed": 3},
        "unmeasured": {**small, "seed": 4, "confirm": {**CONFIRM, "candidates": 8}},
    }
    with Client(url) as client, psycopg.connect(database_url, autocommit=True) as sql:

        def done(job: Any) -> Any:
            found = client.wait(job.id, show_progress=False)
            assert found.state == "succeeded", found.error
            return found

        with _worker(database_url, folder):
            jobs = {
                "finished": done(client.submit(small)),
                "best": done(client.submit({**small, "pattern": "2:4", "preset": "best"})),
                "extended": done(client.submit({**small, "seed": 1})),
                "joint": done(client.submit({**small, "more_models": ["other"], "confirm": None})),
            }
            done(client.extend(jobs["extended"].id, trials=10))
            own = {"trials": 12, "confirm": CONFIRM}
            report = {"text": "confirm.txt", "windows": 3}
            jobs["transfer"] = done(
                client.transfer(jobs["best"].id, ["other"], report=report, search=own)
            )
            whole = {name: done(client.submit(each)) for name, each in interrupted.items()}
            alone = {name: client.best(job.id) for name, job in whole.items()}
            for job in whole.values():
                client.delete(job.id)
        for name, is_now, kinds in (
            ("unmeasured", _before_perplexities, "calibrate,search,confirm,perplexity"),
            ("stopped", _in_the_search, "calibrate,search"),  # the other one stays as it is
        ):
            with _worker(database_url, folder, "--stages", kinds) as process:
                jobs[name] = _killed(client, sql, process, interrupted[name], is_now)
        stored = {"jobs": {name: _answer(client, job.id) for name, job in jobs.items()}}
        backup = ["backup", "--out", str(out / "backup.dump"), "--database-url", database_url]
        subprocess.run([*PHO, *backup], check=True, cwd=folder)
        key = client.best(jobs["finished"].id).calibration["key"]
        shutil.copy(folder / "data" / "artifacts" / "bundles" / f"{key}.safetensors", out)
        with _worker(database_url, folder):
            for name in interrupted:
                done(jobs[name])
        for name, job in jobs.items():
            if name == "transfer":
                text = json.dumps(client.transferred(job.id).model_dump(mode="json"), indent=2)
            else:
                text = json.dumps(client.best(job.id).model_dump(mode="json"), indent=2)
            (out / f"{name}.json").write_text(text + "\n")
        for name, best in alone.items():
            assert _but_for_study(best) == _but_for_study(client.best(jobs[name].id))
    return stored


@contextmanager
def _worker(database_url: str, folder: Path, *options: str) -> Iterator[int]:
    environment = {
        **os.environ,
        "PHO_DATABASE_URL": database_url,
        "PHO_DATA_DIR": str(folder / "data"),
        "PHO_CACHE_DIR": str(folder / "cache"),
        "PHO_MODEL_ROOTS": str(folder),
        "PHO_TEXT_ROOTS": str(folder),
        "PHO_HEARTBEAT_S": "0.3",
        "PHO_STALLED_AFTER_S": "1.5",
    }
    command = [sys.executable, "-m", "workers", *options]
    with subprocess.Popen(command, env=environment, cwd=folder) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


Moment = Callable[[Any, Any], bool]


def _in_the_search(sql: Any, job: Any) -> bool:
    query = "SELECT count(*) FROM optuna.trials JOIN optuna.studies USING (study_id) " \
        "WHERE study_name = %s"  # fmt: skip
    (count,) = sql.execute(query, [job.name]).fetchone()
    return bool(10 <= count <= 60)


def _before_perplexities(sql: Any, job: Any) -> bool:
    query = "SELECT result IS NULL FROM pho.stages WHERE job_id = %s AND kind = 'perplexity'"
    unmeasured = [empty for (empty,) in sql.execute(query, [job.id])]
    return bool(unmeasured) and all(unmeasured)


def _killed(client: Client, sql: Any, worker: int, document: Any, is_now: Moment) -> Any:
    """A job whose worker dies at a moment."""
    job = client.submit(document)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not is_now(sql, job):
            continue
        os.kill(worker, signal.SIGSTOP)
        time.sleep(0.1)
        if is_now(sql, job):
            os.kill(worker, signal.SIGKILL)
            time.sleep(1.0)  # until the server has rolled back what it left
            return job
        os.kill(worker, signal.SIGCONT)
    raise SystemExit(f"the moment of {job.name} was missed: run it again")


def _answer(client: Client, job_id: Any) -> dict[str, Any]:
    """What the service says of a job at the time of the backup."""
    job = client.job(job_id).model_dump(mode="json")
    answer = {name: job[name] for name in ("id", "name", "state", "warnings", "created_at")}
    islands = job["spec"].get("islands", 0)
    trials = [[t.value for t in client.trials(job_id, island=i)] for i in range(islands)]
    return {**answer, "trials": trials}


def _but_for_study(configuration: Any) -> dict[str, Any]:
    """The study is named after the job."""
    document = configuration.model_dump(mode="json")
    del document["search"]["study"]
    return document


def _of_command_line(folder: Path, out: Path) -> None:
    """A search, its pruned model, and the search with more trials."""
    environment = {**os.environ, "PHO_CACHE_DIR": str(folder / "cache")}

    def pho(words: str) -> None:
        subprocess.run([*PHO, *words.split()], check=True, cwd=folder, env=environment)

    pho(f"{SEARCH} {SHORT}")
    (out / "study.db.gz").write_bytes(gzip.compress((folder / "study.db").read_bytes(), mtime=0))
    pho(PRUNE)
    pho(f"{SEARCH} {LONGER}")
    for path in (
        folder / "config.json",
        folder / "longer.json",
        folder / "pruned" / "pruning.json",
        folder / "pruned" / "pruning" / "masks.safetensors",
    ):
        shutil.copy(path, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
