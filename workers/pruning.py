"""
The piece of a job that writes the pruned model into the artifact store.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.errors import OutputError
from pho_service.models.saving import RECIPE
from pho_service.pipeline.prune import prune_job
from pho_service.progress import Run
from pho_service.spec.configuration import Configuration
from storage.jobs import JobStore
from storage.pruned import chosen
from storage.records import Claim, Job, NoSuchJob
from workers.inputs import Inputs
from workers.watch import Watch

if TYPE_CHECKING:
    from workers.conductor import Opened


def prune_piece(
    opened: "Opened", inputs: Inputs, claim: Claim, watch: Watch, run: Run
) -> dict[str, Any]:
    """
    Prune the model of a job with what it has found, as `pho prune` does it, and keep the files.

    What an attempt before has written whole is taken up; so are the blocks that its reconstruction
    had trained.
    """
    began = time.monotonic()
    found = chosen(claim.job, claim.stage.about)
    key = configuration_key(found)
    folder = inputs.pruned.workplace(claim.job.id, key)
    if not (folder / RECIPE).is_file():
        configuration = Configuration.model_validate(claim.job.with_tasks(found))
        _prune(opened, inputs, configuration, folder, run)
    files = described(folder, run)
    watch.look(now=True)
    inputs.pruned.keep(claim.job.id, key, [file["name"] for file in files])
    return {"key": key, "files": files, "seconds": round(time.monotonic() - began, 3)}


def configuration_key(configuration: Mapping[str, Any]) -> str:
    """The name of a pruned model: the same for the same configuration of a job."""
    document = json.dumps(configuration, sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def described(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each file of a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = []
    with run.progress("Hashing the files", len(paths)) as advance:
        for path in paths:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            found.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256})
            advance(1)
    return found


def _prune(
    opened: "Opened", inputs: Inputs, configuration: Configuration, folder: Path, run: Run
) -> None:
    try:
        with store_faults_told():
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(".pho-*"):  # of an attempt that was killed
                shutil.rmtree(left, ignore_errors=True)
            prune_job(
                opened.model(),
                opened.bundle(),
                configuration,
                folder,
                calibration=opened.calibration(),
                progress=run.progress,
            )
    finally:
        inputs.clear()  # the model is not dense any more


@contextmanager
def store_faults_told() -> Iterator[None]:
    """Inside, an artifact store that is full or away raises OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the artifact store cannot be written: {error.strerror or error}. See that there is "
            "room, and that it can be reached; then resume the job."
        ) from error


def remove_if_deleted(store: JobStore, inputs: Inputs, job: Job) -> None:
    """A job that was deleted meanwhile leaves nothing behind."""
    try:
        store.get(job.id)
    except NoSuchJob:
        inputs.pruned.remove(job.id)
