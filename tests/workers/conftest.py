"""
Workers as real processes on a real PostgreSQL, and the same searches without a service.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import optuna
import pytest
import torch
from sqlalchemy import select, text, update

from pho_service.api.submission import enter
from pho_service.errors import PhoError
from pho_service.host.access import Access
from pho_service.host.artifacts import PrunedStore
from pho_service.host.settings import read_settings
from pho_service.models.calibration import cached_bundle, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.texts import ReportText, read_windows
from pho_service.pipeline.confirmation import rate_by_all_proxies
from pho_service.pipeline.rating import rate_pruned
from pho_service.pipeline.search import search_job
from pho_service.pipeline.work import Work
from pho_service.spec.job import JobSpec
from pho_service.tuning.validation import qualities, random_candidates
from storage.database import Database
from storage.jobs import JobStore
from storage.records import JobState, StageState
from storage.studies import open_storage, study_name
from storage.tables import stages, workers
from workers.conductor import Conductor
from workers.inputs import BundleStore, WorkerInputs
from workers.watch import Turns
from workers.worker import Again, WorkerOptions, _Worker

PATIENCE_S = 240.0  # then a test fails
SETTINGS = {
    "PHO_HEARTBEAT_S": "0.3",
    "PHO_STALLED_AFTER_S": "3",
    "PHO_RETRY_AFTER_S": "0.2",
    "OMP_NUM_THREADS": "1",
}
CALIBRATION = {
    "samples": 6, "context_length": 32, "rows_per_layer": 4, "projection_rows": 16,
    "kernel_sizes": [3, 5],
}  # fmt: skip

Trials = list[tuple[Any, ...]]


@pytest.fixture
def home(model_folder, texts, tmp_path_factory):
    """A folder with the model and the texts, at the same place in every test of a run."""
    folder = tmp_path_factory.getbasetemp() / "home"
    if not folder.is_dir():
        folder.mkdir()
        shutil.copytree(model_folder, folder / "model")
        for path in texts.values():
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def spec_of(home):
    """A small job with some values changed; those of ``calibration`` and ``confirm`` one by one."""

    def build(*, calibration=None, confirm="some", **changes):
        some = {"text": str(home / "confirmation.jsonl"), "windows": 3}
        text = str(home / "calibration.jsonl")
        document = {
            "model": str(home / "model"),
            "pattern": "0.5",
            "preset": "score",
            "calibration": {"text": text, **CALIBRATION, **(calibration or {})},
            "confirm": some if isinstance(confirm, str) else confirm and {**some, **confirm},
            "trials": 22,  # two generations
            "max_attempts": 20,  # on a busy machine, workers that live may be taken for dead
        }
        return JobSpec.model_validate({**document, **changes})

    return build


WARM = """
import json, os, signal, sys
import optuna_dashboard, workers.worker
from workers.__main__ import main

exits = sys.argv[1]

def reap(*_):
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        with open(f"{exits}/{process}.new", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
        os.rename(f"{exits}/{process}.new", f"{exits}/{process}")

signal.signal(signal.SIGCHLD, reap)
for line in sys.stdin:
    order = json.loads(line)
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(order["environment"])
        exec(order["sabotage"])
        main(order["arguments"], prog_name="pho worker")
    print(process, flush=True)
"""


class WarmStart:
    """Starts workers at once: a process that has imported everything becomes one by a fork."""

    def __init__(self, folder):
        self._exits = folder
        self._parent = subprocess.Popen(
            [sys.executable, "-c", WARM, str(folder)], env={**os.environ, **SETTINGS},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, arguments, environment, log, sabotage):
        """A new worker's process, which runs some code first."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        order = {
            "arguments": arguments, "environment": dict(environment), "log": str(log),
            "sabotage": sabotage,
        }  # fmt: skip
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def exit_code(self, process):
        """None as long as it runs."""
        try:
            return int((self._exits / str(process)).read_text())
        except FileNotFoundError:
            return None

    def close(self):
        """After the last worker has ended."""
        self._parent.communicate()


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    found = WarmStart(tmp_path_factory.mktemp("exits"))
    yield found
    found.close()


class JobIsOver(AssertionError):
    """A job ended before the moment that a test waits for."""


class Crew:
    """Some workers of one database."""

    JobIsOver = JobIsOver  # tests cannot import from here

    def __init__(self, warm_start, url, root, folder):
        self.warm_start = warm_start
        self.database = Database(url, pool=5)
        self.store = JobStore(self.database)
        self.folder = folder
        self._root = root
        self._url = url
        self._processes = []

    def until(self, condition, *, every_s=0.02):
        """The first true value of ``condition``."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s in vain\n{self.logs()}"
            time.sleep(every_s)
        return value

    def start(self, *options, sabotage=""):
        """
        Start a worker, as `python -m workers` does, which runs ``sabotage`` first; its process. One
        that takes its place does not run that.
        """
        environment = {
            **os.environ,
            **SETTINGS,
            "PHO_MODEL_ROOTS": str(self._root),
            "PHO_TEXT_ROOTS": str(self._root),
            "PHO_DATA_DIR": str(self.folder / "data"),
            "PHO_CACHE_DIR": str(self.folder / "cache"),
        }
        self.folder.mkdir(exist_ok=True)
        log = self.folder / f"worker-{len(self._processes)}.log"
        arguments = ["--database-url", self._url, *options]
        process = self.warm_start.start(arguments, environment, log, sabotage)
        self._processes.append(process)
        return process

    @property
    def alive(self):
        """The workers that have not ended."""
        return {p for p in self._processes if self.warm_start.exit_code(p) is None}

    def man(self, count):
        """See that so many workers are at work."""
        while len(self.alive) < count:
            self.start()
        self.until(lambda: self.alive <= {*self.at_work()})

    def at_work(self):
        """The workers that report, by their process."""
        return {
            int(w.name.rpartition(":")[2]): w
            for w in self.store.workers(alive_s=float(SETTINGS["PHO_STALLED_AFTER_S"]))
        }

    def submit(self, spec):
        return enter(self.store, spec)

    def wait(self, job, *states):
        """The job once it is in one of these states, or over."""

        def settled():
            now = self.store.get(job.id)
            return now if now.state in states or now.state.is_over else None

        found = self.until(settled, every_s=0.05)
        assert found is not None
        return found

    def succeeded(self, job):
        """The job once it has succeeded."""
        found = self.wait(job)
        assert found.state is JobState.SUCCEEDED, (found.error, self.logs())
        return found

    def done(self, spec):
        """Submit a job that must succeed."""
        return self.succeeded(self.submit(spec))

    def busy(self, job, kind, *, done=0, attempt=1):
        """The process that works on a stage of this kind, once it has ``done`` trials."""

        def look():
            process = self._worker_of(job, kind, done, attempt)
            state = process or self.store.get(job.id).state
            if not process and state.is_over:
                raise JobIsOver(state)
            return process

        process = self.until(look, every_s=0.005)
        assert process is not None
        return process

    def _worker_of(self, job, kind, done, attempt):
        query = (
            select(workers.c.name)
            .join(stages, stages.c.worker_id == workers.c.id)
            .where(
                stages.c.job_id == job.id,
                stages.c.kind == kind,
                stages.c.state == StageState.RUNNING,
                stages.c.done >= done,
                stages.c.attempt >= attempt,
            )
        )
        with self.database.transaction() as connection:
            name = connection.execute(query).scalar()
        return name and int(name.rpartition(":")[2])

    @contextmanager
    def frozen(self, job, kind, *, done=0, attempt=1, when=lambda: True):
        """
        Stop the process that works on a stage, once that has ``done`` trials, was begun ``attempt``
        times, and ``when``, asked meanwhile, says yes; wake it afterwards.
        """
        while True:
            process = self.busy(job, kind, done=done, attempt=attempt)
            try:
                os.kill(process, signal.SIGSTOP)
            except ProcessLookupError:  # it ended since the record was read
                continue
            try:
                self.until(partial(_has_stopped, process))
                if self._worker_of(job, kind, done, attempt) == process and when():
                    yield process
                    return
            finally:
                if process in self.alive:
                    os.kill(process, signal.SIGCONT)
            time.sleep(0.003)

    def kill(self, job, kind, **moment):
        """kill -9 the process that works on a stage, at the moment that :meth:`frozen` takes."""
        with self.frozen(job, kind, **moment) as process:
            os.kill(process, signal.SIGKILL)
            self.ended(process)
        return process

    def ended(self, process):
        """The exit code of a worker that ends."""
        self.until(lambda: process not in self.alive, every_s=0.005)
        code = self.warm_start.exit_code(process)
        assert code is not None
        return code

    def in_a_write(self):
        """Whether a worker has a transaction open that holds on to a stage."""
        query = text(
            "SELECT count(*) FROM pg_locks WHERE relation = 'pho.stages'::regclass "
            "AND mode = 'RowShareLock' AND pid <> pg_backend_pid()"
        )
        with self.database.transaction() as connection:
            return bool(connection.execute(query).scalar())

    def queued(self, job):
        """The states of a job's entries in the queue."""
        query = text(
            "SELECT status::text FROM procrastinate.procrastinate_jobs entry "
            "JOIN pho.stages ON stages.id = (entry.args ->> 'stage_id')::bigint "
            "WHERE stages.job_id = :job"
        )
        with self.database.transaction() as connection:
            return list(connection.execute(query, {"job": job.id}).scalars())

    def trials(self, job):
        """What the studies of all islands hold."""
        return trials_of_job(self.database, job)

    def logs(self):
        """The last that the workers said."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-9000:]}"
            for path in sorted(self.folder.glob("worker-*.log"))
        )

    def close(self):
        for process in self.alive:
            os.kill(process, signal.SIGKILL)
            self.ended(process)
        self.database.close()


def _has_stopped(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def trials_of_job(database, job):
    """What the studies of all islands hold."""
    with open_storage(database.studies_url) as storage:
        return [
            trials_of(optuna.load_study(study_name=study_name(job.name, i), storage=storage))
            for i in range(JobSpec.model_validate(job.spec).islands)
        ]


def trials_of(study):
    """All of a study's trials, but for how long they took and what was measured later."""
    later = {"seconds", "divergence", "perplexity", "chosen"}
    return [
        (t.number, t.state, t.value, t.params,
         {k: v for k, v in t.user_attrs.items() if k not in later})
        for t in study.get_trials()
    ]  # fmt: skip


@contextmanager
def crew_of(warm_start, url, root, folder):
    """A crew on a database, with no workers."""
    found = Crew(warm_start, url, root, folder)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def crew(warm_start, new_database, tmp_path_factory):
    """Workers that the tests of a file share; a test says how many it needs."""
    root = tmp_path_factory.getbasetemp()
    with crew_of(warm_start, new_database(), root, tmp_path_factory.mktemp("crew")) as found:
        yield found


@pytest.fixture
def own_crew(warm_start, database_url, tmp_path):
    """No workers yet, and a database that nobody else uses."""
    with crew_of(warm_start, database_url, tmp_path.parent, tmp_path / "crew") as found:
        yield found


@pytest.fixture
def calibrated(tmp_path):
    """The model of a job, the text, and the bundle that `pho calibrate` makes, in ``tmp_path``."""
    return partial(_calibrated, folder=tmp_path)


def _calibrated(spec, folder):
    model = load_model(spec.model, device="cpu", stream=spec.stream)
    settings = spec.calibration.settings()
    text = calibration_text(model, TextSource(path=spec.calibration.text), settings)
    return model, text, cached_bundle(model, text, settings, folder)


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What a search gives that runs in one process, without a service."""

    configuration: dict[str, Any]
    trials: Trials
    ranks: dict[str, float]


_known: dict[str, Undisturbed] = {}


@pytest.fixture
def undisturbed(tmp_path):
    """`pho search` for the same model, texts and seed as a job of one island."""

    def run(spec):
        key = spec.model_dump_json()
        if key not in _known:
            _known[key] = _searched(spec, tmp_path / uuid.uuid4().hex)
        return _known[key]

    return run


def _searched(spec, folder):
    model, calibration, bundle = _calibrated(spec, folder)
    report = None
    if spec.confirm is not None and spec.confirm.text is None:
        held_out = calibration.held_out[: spec.confirm.windows]
        report = ReportText(windows=held_out, record=calibration.record)
    elif spec.confirm is not None:
        windows, record = read_windows(
            model,
            TextSource(path=spec.confirm.text),
            context_length=spec.calibration.context_length,
            bos=spec.calibration.settings().bos,
            max_windows=spec.confirm.windows,
        )
        report = ReportText(windows=windows, record=record)
    plan = spec.plan(0)
    study = optuna.create_study(direction=plan.direction)
    result = search_job(
        spec.request(0),
        Work.of(bundle, model=model, confirm=report, calibration=calibration.calibration),
        study=study,
    )
    configuration = result.configuration.model_dump(mode="json")
    del configuration["search"]["study"]
    ranks = {}
    if spec.validation is not None and report is not None:
        asked = spec.validation
        candidates = random_candidates(
            plan.space, plan.pattern, count=asked.candidates, seed=asked.seed
        )
        perplexities = [
            rate_pruned(model, bundle.statistics(), candidate, report.windows)[0].perplexity
            for candidate in candidates
        ]
        proxies = rate_by_all_proxies(bundle, candidates, device="cpu")
        judged = qualities(proxies, perplexities, seed=asked.seed)
        ranks = {name: quality.spearman for name, quality in judged.items()}
    return Undisturbed(configuration=configuration, trials=trials_of(study), ranks=ranks)


@pytest.fixture
def found():
    """A job's configuration as `pho search` writes it: but for the name of the study."""

    def strip(job):
        configuration = job.best
        assert configuration is not None
        search = {k: v for k, v in configuration["search"].items() if k != "study"}
        return {**configuration, "search": search}

    return strip


class Hand:
    """Does the stages of jobs one by one, in this process, as the test says."""

    def __init__(self, database, folder, bundles):
        self.store = JobStore(database)
        self.folder = folder
        self.bundles = bundles
        self.inputs = self.new_inputs()

    def write_reported(self):
        """Another text beside the others: the last one's documents in the opposite order."""
        lines = (self.folder / "report.jsonl").read_text().splitlines(keepends=True)
        (self.folder / "reported.jsonl").write_text("".join(reversed(lines)))

    def new_inputs(self):
        access = Access(
            model_roots=(self.folder,), text_roots=(self.folder,), hub_models=("*",),
            hub_datasets=(), task_roots=(self.folder / "tasks",),
        )  # fmt: skip
        place = str(self.bundles)
        pruned = PrunedStore(place, self.bundles)
        return WorkerInputs(access, BundleStore(place, self.bundles), pruned, torch.device("cpu"))

    def submit(self, spec):
        return enter(self.store, spec)

    def waiting(self, job):
        """The stages that could be begun now, the parts of one before it."""
        found = [
            s for s in self.store.get(job.id).stages
            if s.state in (StageState.WAITING, StageState.RUNNING)
        ]  # fmt: skip
        return sorted(found, key=lambda stage: stage.part_of is None)

    def entry(self, stage):
        """The number of a stage in the queue."""
        with self.store.database.transaction() as connection:
            query = select(stages.c.queue_id).where(stages.c.id == stage.id)
            return int(connection.execute(query).scalar_one())

    def take(self, job, number=None):
        """Claim the first stage that could be begun now, or the first with a number."""
        stage = next(s for s in self.waiting(job) if number in (None, s.number))
        claim = self.store.claim(stage.id, self.entry(stage), uuid.uuid4())
        assert claim is not None
        return claim

    def step(self, job):
        """Do the next stage; if it fails, the job has failed."""
        claim = self.take(job)
        try:
            Conductor(self.store, self.inputs, Event(), Turns()).run(claim)
        except PhoError as error:
            described = {"type": type(error).__name__, "message": str(error)}
            self.store.fail(claim, described, retry=False)
            raise

    def until(self, job, kind):
        """Do what comes before the first stage of a kind; None: everything."""
        while (waiting := self.waiting(job)) and waiting[0].kind is not kind:
            self.step(job)
        return self.store.get(job.id)

    def done(self, spec):
        """Submit a job that must succeed."""
        job = self.until(self.submit(spec), None)
        assert job.state is JobState.SUCCEEDED
        return job

    def work(self, job, *, at=0, do=lambda: None, turn_s=0.0, most=100):
        """
        Do its stages, ``most`` of them, as a worker does, which says what went wrong, while it may
        go on. As soon as a search has ``at`` trials, something is done, once.
        """
        worker = _Worker(
            self.store.database, read_settings(turn_s=turn_s), WorkerOptions(), self.inputs
        )
        progress, todo = worker._store.progress, [do]

        def noted(claim, *, done, **more):
            if todo and done >= at:
                todo.pop()()
            return progress(claim, done=done, **more)

        worker._store.progress = noted  # type: ignore[method-assign]
        for _ in range(most):
            waiting = self.waiting(job)
            if not waiting or not self.store.get(job.id).state.may_work:
                break
            with suppress(Again):
                worker._run_stage(waiting[0].id, self.entry(waiting[0]))
        return self.store.get(job.id)

    def failed(self, spec):
        """Submit a job that must fail; why it did."""
        job = self.work(self.submit(spec))
        assert job.state is JobState.FAILED
        assert job.error is not None
        return job.error

    def trials(self, job):
        """What the studies of all islands hold."""
        return trials_of_job(self.store.database, job)

    def edit(self, job, kind, change, number=None):
        """Change what a stage, the first of a kind or the one with a number, has stored."""
        of_kind = self.store.get(job.id).of_kind(kind)
        stage = next(s for s in of_kind if number in (None, s.number))
        result = dict(stage.result or {})
        change(result)
        with self.store.database.transaction() as connection:
            connection.execute(update(stages).where(stages.c.id == stage.id).values(result=result))


@pytest.fixture
def hand(shared_database, home, tmp_path):
    """No job yet; the model and the texts are in a folder that the test may change."""
    shutil.copytree(home, tmp_path / "disk")
    return Hand(shared_database, tmp_path / "disk", tmp_path / "bundles")


@pytest.fixture
def desk(shared_database, home, tmp_path):
    return Hand(shared_database, home, tmp_path / "bundles")


@pytest.fixture
def small(spec_of):
    """A small job on that folder, with relative names."""

    def build(**changes):
        calibration = {"text": "calibration.jsonl", **changes.pop("calibration", {})}
        confirm = changes.pop("confirm", {})
        if confirm is not None:
            confirm = {"text": "confirmation.jsonl", "finalists": 2, **confirm}
        given = {"model": "./model", "trials": 10, **changes}
        return spec_of(calibration=calibration, confirm=confirm, **given)

    return build
