"""`pho serve` as a user starts it: a process with a database and workers of its own."""

import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import psutil
import pytest
from click.testing import CliRunner
from optuna.storages import RDBStorage
from sqlalchemy import text

from pho_service.api import serving
from pho_service.cli import main
from pho_service.client import Client
from pho_service.errors import InvalidInput, ServiceError
from pho_service.host.settings import read_settings
from storage.database import Database
from storage.embedded import Postmaster
from storage.keys import KeyStore

PATIENCE_S = 240.0
TRIALS = 300  # of a job that is stopped: long enough to be at it still
_TABLES = text("SELECT schemaname, tablename FROM pg_tables ORDER BY 1, 2")
PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited in vain until {what}")


def lives(process: int) -> bool:
    """Whether a process runs; one that nobody has fetched the exit code of does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Served:
    """
    A `pho serve` that has printed its addresses.

    Args:
        folder: For its log.
        words: Its options.
        environment: Its settings.
    """

    def __init__(self, folder: Path, words: list[str], environment: dict[str, str]) -> None:
        self._log = folder / f"serve-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*PHO, "serve", "--port", "0", *words],
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=log,
                # A shell that runs this in the background has its children ignore Ctrl-C.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        until(lambda: "Ctrl-C stops" in self.log or self.process.poll() is not None, "it serves")
        assert self.process.poll() is None, self.log
        found = re.search(r"^API +(http://\S+)/v1/jobs", self.log, re.MULTILINE)
        assert found is not None, self.log
        self.client = Client(found[1])

    @property
    def log(self) -> str:
        """All that it and its workers have said."""
        return self._log.read_text()

    def worker(self, *, other_than: int = 0) -> int:
        """The process of a worker, once it reports."""

        def look() -> int | None:
            pids = [int(w.name.rpartition(":")[2]) for w in self.client.workers()]
            return next((p for p in pids if p != other_than and lives(p)), None)

        return int(until(look, "a worker reports"))

    def stop(self, number: int) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


class Place:
    """
    Where services are started: the same data folder, models and texts each time.

    Args:
        folder: For all of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.environment = {
            **os.environ,
            "PHO_DATA_DIR": str(self.data),
            "PHO_MODEL_ROOTS": str(folder),
            "PHO_TEXT_ROOTS": str(folder),
            "PHO_HEARTBEAT_S": "0.5",
            "PHO_STALLED_AFTER_S": "2",
            "PHO_RETRY_AFTER_S": "0.2",
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("PHO_DATABASE_URL", None)
        self._served: list[Served] = []

    def serve(self, *words: object) -> Served:
        """Start a service."""
        self._served.append(Served(self.folder, [str(w) for w in words], self.environment))
        return self._served[-1]

    def pho(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run another verb beside it."""
        return subprocess.run(
            [*PHO, *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    @property
    def postgresql(self) -> int | None:
        """The process of the embedded PostgreSQL, if it runs."""
        file = self.data / "postgresql" / "postmaster.pid"
        try:
            pid = int(file.read_text().split()[0])
        except (FileNotFoundError, IndexError):  # it does not run, or only begins to
            return None
        return pid if lives(pid) else None

    def close(self) -> None:
        """End whatever still runs."""
        for served in self._served:
            served.client.close()
            if served.process.poll() is None:
                served.process.kill()
                served.process.wait()
        mine = [
            process
            for process in psutil.process_iter(["environ", "cwd"])
            if (process.info["environ"] or {}).get("PHO_DATA_DIR") == str(self.data)
            or process.info["cwd"] == str(self.data / "postgresql")
        ]
        for process in mine:
            with suppress(psutil.NoSuchProcess):  # PostgreSQL's others go with its first
                process.kill()
        until(lambda: not any(lives(process.pid) for process in mine), "all have ended")


@pytest.fixture
def place(model_folder: Path, texts: dict[str, Path]) -> Iterator[Place]:
    """With the tiny model and its texts, in a folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        model_folder.rename(folder / "model")
        for path in texts.values():
            path.rename(folder / path.name)
        found = Place(folder)
        yield found
        found.close()


def tiny() -> dict[str, Any]:
    """A job that takes some seconds."""
    return {
        "model": "model",
        "pattern": "0.5",
        "preset": "score",
        "calibration": {
            "text": "calibration.jsonl", "samples": 6, "context_length": 32, "rows_per_layer": 4,
            "projection_rows": 16, "kernel_sizes": [3, 5],
        },
        "confirm": {"text": "confirmation.jsonl", "windows": 3, "candidates": 2},
        "trials": TRIALS,
        "max_attempts": 20,  # on a busy machine, a worker that lives may be taken for dead
    }  # fmt: skip


def begun(served: Served) -> Any:
    """A job that is in the midst of its search."""
    job = served.client.submit(tiny()).id
    until(lambda: served.client.job(job).progress.of("search").done >= 8, "the search has begun")
    assert served.client.job(job).state == "running"
    return job


def test_first_job(place: Place) -> None:
    """
    From a bare folder to the best configuration and the job's study in the dashboard.

    In the midst of it the worker is killed, and then PostgreSQL: others take their places.
    """
    served = place.serve("--workers", 1)
    killed = served.worker()
    job = begun(served)
    os.kill(killed, signal.SIGKILL)
    another, postgresql = served.worker(other_than=killed), place.postgresql
    assert postgresql is not None
    os.kill(postgresql, signal.SIGKILL)
    until(lambda: place.postgresql not in (None, postgresql), "another one runs")
    until(lambda: httpx.get(f"{served.client.url}/readyz").status_code == 200, "it is ready")
    ended = served.client.wait(job, timeout_s=PATIENCE_S, show_progress=False)
    page = re.search(r"^Jobs +(http://\S+)/ ", served.log, re.MULTILINE)
    dashboard = re.search(r"^Dashboard +(http://\S+)", served.log, re.MULTILINE)
    database = re.search(r"^Database +(postgresql://\S+)", served.log, re.MULTILINE)
    printed = re.search(r"^Studies +(\S+)", served.log, re.MULTILINE)
    assert printed is not None
    (url,) = shlex.split(printed[1])
    listed = subprocess.run(
        [Path(sys.executable).with_name("optuna"), "studies", "--format", "json", "--storage", url],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    with urllib.request.urlopen(f"{served.client.url}/api/studies") as answer:  # noqa: S310 - ours
        studies = json.load(answer)["study_summaries"]

    assert ended.state == "succeeded", (ended.error, served.log)
    assert served.client.best(job).confirmation is not None
    assert [t.number for t in served.client.trials(job)] == [*range(TRIALS)]
    assert lives(another)
    assert f"worker {killed} ended with code -9; another starts" in served.log
    assert "PostgreSQL ended with code -9; it is started again" in served.log
    assert [study["study_name"] for study in studies] == [ended.name]
    assert [study["name"] for study in json.loads(listed.stdout)] == [ended.name], listed.stderr
    assert page is not None
    assert page[1] == served.client.url
    assert dashboard is not None
    assert dashboard[1] == f"{served.client.url}/dashboard"
    assert database is not None
    assert f"{place.data}/postgresql" in unquote(database[1])
    assert (place.data / "artifacts").is_dir()
    assert served.stop(signal.SIGTERM) == 0
    assert not place.postgresql


@pytest.fixture
def elsewhere(place: Place) -> Iterator[Postmaster]:
    """A PostgreSQL that the service only has the URL of."""
    server = Postmaster(place.folder / "elsewhere")
    server.start()
    yield server
    server.stop()


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_stopped_without_its_database(place: Place, elsewhere: Postmaster, how: str) -> None:
    """Also while its database is away, in the midst of a job and a request, it ends in seconds."""
    served = place.serve("--workers", 1, "--database-url", elsewhere.url)
    worker = served.worker()
    begun(served)
    postmaster = psutil.Process(elsewhere.process())
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.suspend()
    if how == "killed":
        for process in processes:
            process.kill()
    asking = threading.Thread(target=_ask, args=(f"{served.client.url}/v1/jobs",))
    asking.start()
    began = time.monotonic()
    code = served.stop(signal.SIGTERM)
    took_s = time.monotonic() - began
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()
    asking.join(PATIENCE_S)

    assert code == 0, served.log
    assert took_s < 20, served.log  # ten seconds, and as many for a machine with other work
    assert not lives(worker)


def _ask(url: str) -> None:
    with suppress(httpx.HTTPError):
        httpx.get(url, timeout=PATIENCE_S)


def test_ctrl_c_stops_everything_in_order_and_puts_down_what_was_being_done(place: Place) -> None:
    served = place.serve("--workers", 1)
    worker, postgresql = served.worker(), place.postgresql
    job = begun(served)
    events: list[Any] = []
    listening = threading.Thread(target=_listen, args=(served, job, events))
    listening.start()
    until(lambda: events, "there are events")
    began = time.monotonic()
    code = served.stop(signal.SIGINT)
    took_s = time.monotonic() - began
    listening.join(PATIENCE_S)

    assert code == 0, served.log
    assert took_s < 15
    assert postgresql is not None
    assert not lives(worker)
    assert not lives(postgresql)
    assert "Traceback" not in served.log
    put_down = place.serve("--workers", 0).client.job(job)
    assert put_down.state == "running"
    assert 8 <= put_down.progress.of("search").done < TRIALS


def _listen(served: Served, job: Any, events: list[Any]) -> None:
    """Collect events until the service goes."""
    try:
        for event in served.client.events(job):
            events.append(event)
    except ServiceError:
        pass


def test_killed(place: Place) -> None:
    """Killed itself, its workers stop by themselves, and a new one goes on with the job."""
    served = place.serve("--workers", 1)
    worker = served.worker()
    job = begun(served)
    served.process.kill()
    served.process.wait()
    until(lambda: not lives(worker), "the worker has stopped")
    again = place.serve("--workers", 1)
    ended = again.client.wait(job, timeout_s=PATIENCE_S, show_progress=False)

    assert ended.state == "succeeded", (ended.error, again.log)
    assert ended.progress.of("search").done == TRIALS
    assert again.stop(signal.SIGINT) == 0
    assert not place.postgresql  # which the first had started


@pytest.mark.thorough
def test_second(place: Place) -> None:
    """
    A data folder serves one service at a time; the other verbs work beside it.

    SIGTERM, which is what other programs send, stops all in order.
    """
    served = place.serve("--workers", 0)
    second = place.pho("serve", "--port", "0", "--workers", "0")
    key = place.pho("keys", "create", "laptop")
    with pytest.raises(ServiceError) as refused:
        served.client.workers()
    with Client(served.client.url, key.stdout.strip()) as client:
        workers = client.workers()
    postgresql = place.postgresql
    code = served.stop(signal.SIGTERM)

    assert second.returncode == 1
    assert "is in use by another `pho serve`" in second.stderr
    assert key.returncode == 0, key.stderr
    assert refused.value.status == 401
    assert workers == []
    assert code == 0, served.log
    assert postgresql is not None
    assert not lives(postgresql)
    assert "Traceback" not in served.log


def test_keys_without_a_service(place: Place) -> None:
    """Keys can be made before the first service; what was started for it stops again."""
    created = CliRunner().invoke(main, ["keys", "create", "first", "--data-dir", str(place.data)])
    listed = CliRunner().invoke(main, ["keys", "list", "--json", "--data-dir", str(place.data)])

    assert created.exit_code == 0, created.stderr
    assert created.stdout.startswith("pho_")
    assert [key["name"] for key in json.loads(listed.stdout)] == ["first"]
    assert not place.postgresql


@pytest.mark.thorough
def test_backup(place: Place) -> None:
    """
    What is backed up while a job runs is restored elsewhere, where the job ends as it does here.

    Bundles are not in it: the job makes its own again.
    """

    def pho(*words: object) -> Any:
        # In this process: the job would be over before another one has started.
        return CliRunner().invoke(main, [*map(str, words)])

    served = place.serve("--workers", 1)
    job = begun(served)
    dump, other = place.folder / "dump", place.folder / "elsewhere"
    written = pho("backup", "--out", dump, "--data-dir", place.data)
    again = pho("backup", "--out", dump, "--data-dir", place.data)
    here = served.client.wait(job, timeout_s=4 * PATIENCE_S, show_progress=False)
    found = served.client.best(job)
    over = pho("restore", dump, "--data-dir", place.data)
    served.stop(signal.SIGTERM)
    restored = pho("restore", dump, "--data-dir", other)
    elsewhere = place.serve("--workers", 1, "--data-dir", other)
    at_first = elsewhere.client.job(job).progress.of("search").done
    there = elsewhere.client.wait(job, timeout_s=4 * PATIENCE_S, show_progress=False)

    assert written.exit_code == 0, written.stderr
    assert "Bundles are not in it" in written.stderr
    assert dump.stat().st_mode & 0o777 == 0o600
    assert again.exit_code == 1
    assert "dump exists, and is not overwritten" in again.stderr
    assert over.exit_code == 1
    assert "the database is not empty" in over.stderr
    assert here.state == there.state == "succeeded", (here.error, there.error)
    assert restored.exit_code == 0, restored.stderr
    assert "Restored 1 jobs" in restored.stderr
    assert 8 <= at_first < TRIALS
    assert elsewhere.client.best(job) == found
    assert elsewhere.stop(signal.SIGTERM) == 0


def test_a_file_that_is_not_there_is_bad_usage() -> None:
    result = CliRunner().invoke(main, ["restore", "missing"])

    assert result.exit_code == 2
    assert "missing is not a file. Give one that `pho backup` wrote." in result.stderr


@pytest.mark.thorough
def test_json_logs(place: Place, database: Database, database_url: str) -> None:
    """
    Every line of the service and its workers is JSON and says what it is about.

    No password, key or token is in any, whatever fails.
    """
    url = database_url.replace("//postgres@", "//postgres:planted-password@")
    _, secret = KeyStore(database).create("laptop", sees_all=False)
    place.environment |= {
        "PHO_LOG_FORMAT": "json", "PHO_DATABASE_URL": url, "HF_TOKEN": "hf_plantedplantedplanted",
        "HF_HUB_OFFLINE": "1",  # a hub that does not answer is waited for
    }  # fmt: skip
    served = place.serve("--workers", 1)
    with Client(served.client.url, secret) as client:
        ended = [
            client.wait(client.submit({**tiny(), **more}).id, show_progress=False)
            for more in ({"trials": 12}, {"model": "short"})
        ]
        headers = {"X-Request-ID": "asked", "Authorization": "Bearer planted-key"}
        httpx.get(f"{served.client.url}/v1/jobs?key=planted-query", headers=headers)
    served.stop(signal.SIGTERM)
    lines = [
        line
        for line in served.log.splitlines()
        # nanobind: a library of torch's builds for GPUs, as the process ends
        if not re.match(
            r"Jobs|API|Dash|Data|Studies|1 local|nanobind:| - (leaked|\.\.\.)|See https:", line
        )
    ]
    logged = [json.loads(line) for line in lines]
    (asked,) = [line for line in logged if line.get("request") == "asked"]
    (done,) = [line for line in logged if line["message"] == f"finish of job {ended[0].id} done"]
    failed = [line for line in logged if line.get("job") == str(ended[1].id)]

    assert [job.state for job in ended] == ["succeeded", "failed"]
    assert "planted" not in served.log
    assert secret not in served.log
    assert (asked["status"], asked["path"], asked["key"]) == (401, "/v1/jobs", None)
    assert (done["stage"], done["attempt"]) == ("finish", 1)
    assert done["worker"].endswith(f":{done['process']}")
    assert {(line["stage"], line["attempt"]) for line in failed} == {("calibrate", 1)}
    assert any(line["key"] == secret[:10] for line in logged if line.get("status") == 202)
    assert not any(line["logger"].startswith(("alembic", "procrastinate")) for line in logged)


def test_that_the_database_cannot_be_reached_is_said_without_its_password() -> None:
    url = "postgresql://pho:planted@127.0.0.1:1/pho"
    words = ["serve", "--workers", "0", "--port", "0", "--database-url", url]
    result = CliRunner().invoke(main, words)

    assert result.exit_code == 1
    assert "127.0.0.1" in result.stderr
    assert "planted" not in result.output


def test_password_on_the_command_line(place: Place) -> None:
    """
    A password in --database-url is soon in no list of processes.

    A database that accepts and says nothing is told within ten seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        url = f"postgresql://pho:planted@127.0.0.1:{listener.getsockname()[1]}/pho"
        words = ["serve", "--workers", "0", "--port", "0", "--database-url", url]
        process = subprocess.Popen(
            [*PHO, *words], env=place.environment, cwd=place.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with process, listener.accept()[0]:
            began = time.monotonic()
            command = psutil.Process(process.pid).cmdline()
            said = process.communicate(timeout=PATIENCE_S)[0]
            took_s = time.monotonic() - began

    assert command[-5:] == ["serve", "--workers", "0", "--port", "0"]
    assert process.returncode == 1
    assert took_s < 10
    assert "timeout" in said
    assert "planted" not in said


@pytest.mark.thorough
def test_own_database(place: Place, database: Database, database_url: str) -> None:
    """A database that was given is used, and left running."""
    with database.transaction() as connection:
        before = connection.execute(_TABLES).all()
    served = place.serve("--workers", 0, "--database-url", database_url)
    printed = re.search(r"^Studies +'(\S+)'", served.log, re.MULTILINE)
    assert printed is not None
    optuna = RDBStorage(printed[1])
    studies = optuna.get_all_studies()
    optuna.remove_session()
    optuna.engine.dispose()
    with database.transaction() as connection:
        after = connection.execute(_TABLES).all()
    job = served.client.submit({"model": "org/name", "pattern": "0.5"})
    code = served.stop(signal.SIGINT)
    with database.transaction() as connection:
        stored = connection.exec_driver_sql("SELECT id FROM pho.jobs").scalar_one()

    assert code == 0, served.log
    assert studies == []
    assert after == before  # no tables of Optuna's where it looks first
    assert stored == job.id
    assert not (place.data / "postgresql").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait(host: str) -> None:
    """An answer is sent at once, not when the client's system has confirmed the one before."""
    with serving._listening(read_settings(host=host, port=0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address[:2]), listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_local_workers_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch, local workers are refused before anything starts, with both ways out."""
    monkeypatch.setattr(serving, "find_spec", lambda _: None)

    with pytest.raises(InvalidInput, match=r"need torch.*pho-service\[worker\].*--workers 0"):
        serving.serve(read_settings(workers=1), print)
