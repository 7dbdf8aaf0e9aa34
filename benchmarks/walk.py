"""
How much of the code one call enters: own files and functions, beside Optuna's `optimize`.

    python benchmarks/walk.py                  # all of them
    python benchmarks/walk.py command service  # only these

A random model of 18,432 weights is calibrated and searched for 24 trials. Its finalists are
confirmed on a held-out text and measured beside the published methods. Each walk has a process of
its own with an empty cache, so it calibrates; `cached` is the command again, with the bundle in the
cache and without the study. Everything is imported before. The service is walked from POST to the
end of the job, with the front end and a worker in one process.
"""

import inspect
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import click
from local_service import write_text, write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(str(ROOT / name) + os.sep for name in ("pho_service", "storage", "workers"))
TRIALS = 24
UNFINISHED = ("queued", "running")


class Walk:
    """The functions that are entered in all threads while it is on."""

    def __init__(self, below: tuple[str, ...]) -> None:
        self._below = below
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """What :func:`sys.setprofile` calls."""
        code = frame.f_code
        if event != "call" or not code.co_flags & inspect.CO_OPTIMIZED:  # a module, or a class
            return
        if code.co_filename.startswith(self._below):
            self._seen.add((code.co_filename, code.co_qualname))

    def __enter__(self) -> "Walk":
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def __str__(self) -> str:
        files = {file for file, _ in self._seen}
        return f"{len(files)} files, {len(self._seen)} functions"


def command(folder: Path) -> Walk:
    """`pho search MODEL`, empty cache."""
    from pho_service.cli import main

    os.environ["PHO_CACHE_DIR"] = str(folder / "cache")

    options = ["--pattern", "0.5", "--preset", "score", "--trials", str(TRIALS), "--samples", "6"]
    options += ["--context-length", "32", "--kernel-sizes", "3,5", "--rows-per-layer", "4"]
    texts = ["--text", str(folder / "text.txt"), "--confirm-text", str(folder / "held-out.txt")]
    arguments = ["search", str(folder / "tiny"), *options, *texts, "--confirm-windows", "3"]
    os.chdir(folder)
    with Walk(PACKAGES) as walk:
        main([*arguments, "--out", "config.json"], standalone_mode=False)
    return walk


def cached(folder: Path) -> Walk:
    """`pho search MODEL`, bundle in the cache."""
    command(folder)
    (folder / "study.db").unlink()  # else the second search has nothing left to do
    return command(folder)


def python(folder: Path) -> Walk:
    """`pho.calibrate` and `pho.search` on a model in memory, no cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pho_service as pho

    model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    with Walk(PACKAGES) as walk:
        bundle = pho.calibrate(
            model, tokenizer, folder / "text.txt",
            samples=6, context_length=32, kernel_sizes=(3, 5), rows_per_layer=4,
        )  # fmt: skip
        pho.search(
            bundle, pattern="0.5", preset="score", trials=TRIALS,
            model=model, tokenizer=tokenizer, confirm=folder / "held-out.txt", confirm_windows=3,
        )  # fmt: skip
    return walk


def service(folder: Path) -> Walk:
    """POST /v1/jobs until the job has succeeded, empty cache, one process."""
    from fastapi.testclient import TestClient

    from pho_service.api.app import create_app
    from pho_service.host.settings import read_settings
    from storage.database import Database
    from storage.embedded import embedded_postgresql
    from workers.worker import WorkerOptions, run_worker

    document = {
        **write_tiny_model(folder), "trials": TRIALS,
        "confirm": {"text": "held-out.txt", "windows": 3},
    }  # fmt: skip
    os.environ.update(
        PHO_DATA_DIR=str(folder / "data"), PHO_CACHE_DIR=str(folder / "cache"),
        PHO_MODEL_ROOTS=str(folder), PHO_TEXT_ROOTS=str(folder),
    )  # fmt: skip
    settings, ended = read_settings(), []

    def ask(client: TestClient) -> None:
        try:
            job_id = client.post("/v1/jobs", json=document).raise_for_status().json()["id"]
            while (job := client.get(f"/v1/jobs/{job_id}").json())["state"] in UNFINISHED:
                time.sleep(0.2)
            ended.append(job)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # ends the worker

    with embedded_postgresql(folder / "data") as url:
        database = Database(url)
        database.migrate()
        app = create_app(database, settings)
        with TestClient(app, "http://localhost") as client, Walk(PACKAGES) as walk:
            asking = threading.Thread(target=ask, args=(client,))
            asking.start()
            run_worker(url, settings, WorkerOptions(device="cpu"))
            asking.join()
        database.close()
    if not ended or ended[0]["state"] != "succeeded":
        sys.exit(f"the job has not succeeded: {ended}")
    return walk


def optuna(folder: Path) -> Walk:
    """Optuna's `optimize` with CMA-ES on SQLite, for comparison."""
    import optuna as other

    other.logging.set_verbosity(other.logging.ERROR)
    below = (str(Path(other.__file__).parent) + os.sep,)
    study = other.create_study(
        storage=f"sqlite:///{folder}/study.db", sampler=other.samplers.CmaEsSampler(seed=0)
    )
    with Walk(below) as walk:
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=TRIALS)
    return walk


def import_all() -> None:
    """Import all of the product, so that a walk enters no function for an import alone."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages([package], f"{Path(package).name}."):
            if "migrations" not in module.name and "__main__" not in module.name:
                import_module(module.name)


WALKS: dict[str, Callable[[Path], Walk]] = {
    "command": command, "cached": cached, "python": python, "service": service, "optuna": optuna,
}  # fmt: skip


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*WALKS]))
@click.option("--here", hidden=True, type=click.Choice([*WALKS]), help="One, in this process.")
def main(names: tuple[str, ...], here: str | None) -> None:
    """Walk each in a process of its own, and print a line each."""
    if here is None:
        for name in names or WALKS:
            walk = partial(subprocess.run, [sys.executable, __file__, "--here", name])
            done = walk(capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stdout}{done.stderr}")
            about = (WALKS[name].__doc__ or "").strip().rstrip(".")
            print(f"{name}: {done.stdout.splitlines()[-1]} ({about})", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="pho-") as folder:
        write_tiny_model(Path(folder))
        write_text(Path(folder, "held-out.txt"), seed=1)
        write_text(Path(folder, "text.txt"), seed=0)
        import_all()
        walk = WALKS[here](Path(folder))
        os.chdir("/")
    print(walk)


if __name__ == "__main__":
    main()
