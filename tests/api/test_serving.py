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
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import httpx
import psutil
import pytest
from click.testing import CliRunner
from sqlalchemy import text

from pho_service.api import serving
from pho_service.cli import main
from pho_service.client import Client
from pho_service.errors import InvalidInput, ServiceError
from pho_service.host.settings import read_settings
from storage.embedded import Postmaster
from storage.keys import KeyStore

PATIENCE_S = 240.0
MANY = 1000  # trials of one that goes on while others start
TRIALS = 200  # of a job that is stopped: long enough to be at it still
FEW = 80  # of one that stands still for some seconds whenever something is killed
_TABLES = text("SELECT schemaname, tablename FROM pg_tables ORDER BY 1, 2")
PHO = [sys.executable, "-c", "from pho_service.cli import main; main()"]

pytestmark = pytest.mark.thorough  # but for one service, and what needs none


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)  # to ask costs the service as much as its work
    raise AssertionError(f"waited in vain until {what}")


def lives(process):
    """Whether a process runs; one that nobody has fetched the exit code of does not."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Served:
    """A `pho serve` that has printed its addresses."""

    def __init__(self, folder, words, environment):
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
    def log(self):
        return self._log.read_text()

    def worker(self, *, other_than=0):
        """The process of a worker, once it reports."""

        def look():
            pids = [int(w.name.rpartition(":")[2]) for w in self.client.workers()]
            return next((p for p in pids if p != other_than and lives(p)), None)

        return int(until(look, "a worker reports"))

    def stop(self, number):
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


class Place:
    """Where services are started: the same data folder, models and texts each time."""

    def __init__(self, folder):
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
        self._served = []

    def serve(self, *words):
        self._served.append(Served(self.folder, [str(w) for w in words], self.environment))
        return self._served[-1]

    @property
    def postgresql(self):
        """The process of the embedded PostgreSQL, if it runs."""
        file = self.data / "postgresql" / "postmaster.pid"
        try:
            pid = int(file.read_text().split()[0])
        except (FileNotFoundError, IndexError):  # it does not run, or only begins to
            return None
        return pid if lives(pid) else None

    def close(self):
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
def place(model_folder, texts):
    with tempfile.TemporaryDirectory(prefix="pho-") as name:
        folder = Path(name)
        model_folder.rename(folder / "model")
        for path in texts.values():
            path.rename(folder / path.name)
        found = Place(folder)
        yield found
        found.close()


def tiny():
    """A job that takes some seconds."""
    return {
        "model": "model",
        "pattern": "0.5",
        "preset": "score",
        "calibration": {
            "text": "calibration.jsonl", "samples": 6, "context_length": 32, "rows_per_layer": 4,
            "projection_rows": 16, "kernel_sizes": [3, 5],
        },
        "confirm": {"text": "confirmation.jsonl", "windows": 3, "finalists": 2},
        "trials": TRIALS,
        "max_attempts": 20,  # on a busy machine, a worker that lives may be taken for dead
    }  # fmt: skip


def begun(served, **changes):
    job = served.client.submit({**tiny(), **changes}).id
    until(lambda: served.client.job(job).progress.of("search").done >= 8, "the search has begun")
    assert served.client.job(job).state == "running"
    return job


@pytest.mark.thorough(False)
def test_a_bare_folder_leads_to_a_result_whatever_is_killed(place):
    served = place.serve("--workers", 1)
    killed = served.worker()
    job = begun(served, trials=FEW)
    os.kill(killed, signal.SIGKILL)
    another, postgresql = served.worker(other_than=killed), place.postgresql
    assert postgresql is not None
    os.kill(postgresql, signal.SIGKILL)
    until(lambda: place.postgresql not in (None, postgresql), "another one runs")
    until(lambda: httpx.get(f"{served.client.url}/readyz").status_code == 200, "it is ready")
    ended = served.client.wait(job, timeout_s=PATIENCE_S, progress=False)
    printed = dict(re.findall(r"^(Jobs|Dashboard|Database|Studies) +(\S+)", served.log, re.M))
    (url,) = shlex.split(printed["Studies"])
    listed = subprocess.run(
        [Path(sys.executable).with_name("optuna"), "studies", "--format", "json", "--storage", url],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    with urllib.request.urlopen(f"{served.client.url}/api/studies") as answer:  # noqa: S310 - ours
        studies = json.load(answer)["study_summaries"]

    assert ended.state == "succeeded", (ended.error, served.log)
    assert served.client.best(job).confirmation is not None
    assert [t.number for t in served.client.trials(job)] == [*range(FEW)]
    assert lives(another)
    assert f"worker {killed} ended with code -9; another starts" in served.log
    assert "PostgreSQL ended with code -9; it is started again" in served.log
    assert [study["study_name"] for study in studies] == [ended.name]
    assert [study["name"] for study in json.loads(listed.stdout)] == [ended.name], listed.stderr
    assert printed["Jobs"] == f"{served.client.url}/"
    assert printed["Dashboard"] == f"{served.client.url}/dashboard"
    assert f"{place.data}/postgresql" in unquote(printed["Database"])
    assert (place.data / "artifacts").is_dir()
    assert served.stop(signal.SIGTERM) == 0
    assert not place.postgresql


@pytest.fixture
def elsewhere(place):
    """A PostgreSQL that the service only has the URL of."""
    server = Postmaster(place.folder / "elsewhere")
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_its_database_it_still_ends(place, elsewhere, how):
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


def _ask(url):
    with suppress(httpx.HTTPError):
        httpx.get(url, timeout=PATIENCE_S)


def test_ctrl_c_puts_the_job_down_and_a_kill_leaves_no_worker(place):
    served = place.serve("--workers", 1)
    worker, postgresql = served.worker(), place.postgresql
    job = begun(served)
    events = []
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
    assert "Traceback" not in served.log, served.log
    killed = place.serve("--workers", 1)
    put_down = killed.client.job(job)
    worker = killed.worker()
    assert put_down.state == "running"
    assert 8 <= put_down.progress.of("search").done < TRIALS
    killed.process.kill()
    killed.process.wait()
    until(lambda: not lives(worker), "the worker has stopped")
    again = place.serve("--workers", 1)
    ended = again.client.wait(job, timeout_s=PATIENCE_S, progress=False)

    assert ended.state == "succeeded", (ended.error, again.log)
    assert ended.progress.of("search").done == TRIALS
    dashboard = f"{again.client.url}/dashboard"  # its packages are imported when it is opened
    opened = httpx.get(dashboard, follow_redirects=True, timeout=PATIENCE_S)
    assert opened.status_code == 200
    assert again.stop(signal.SIGINT) == 0
    assert "given up" not in again.log  # the dashboard's threads wait for nothing
    assert not place.postgresql  # which the one that was killed had started


def _listen(served, job, events):
    with suppress(ServiceError):
        for event in served.client.events(job):
            events.append(event)


@pytest.mark.thorough(False)
def test_keys_can_be_made_before_the_first_service(place):
    created = CliRunner().invoke(main, ["keys", "create", "first", "--data-dir", str(place.data)])
    listed = CliRunner().invoke(main, ["keys", "list", "--json", "--data-dir", str(place.data)])

    assert created.exit_code == 0, created.stderr
    assert created.stdout.startswith("pho_")
    assert [key["name"] for key in json.loads(listed.stdout)] == ["first"]
    assert not place.postgresql


def test_what_is_backed_up_while_a_job_runs_is_restored_elsewhere(place):

    def pho(*words):
        # In this process: the job would be over before another one has started.
        return CliRunner().invoke(main, [*map(str, words)])

    served = place.serve("--workers", 1)
    job = begun(served)
    dump, other = place.folder / "dump", place.folder / "elsewhere"
    written = pho("backup", "--out", dump, "--data-dir", place.data)
    again = pho("backup", "--out", dump, "--data-dir", place.data)
    here = served.client.wait(job, timeout_s=4 * PATIENCE_S, progress=False)
    found = served.client.best(job)
    served.stop(signal.SIGTERM)
    restored = pho("restore", dump, "--data-dir", other)
    elsewhere = place.serve("--workers", 1, "--data-dir", other)
    at_first = elsewhere.client.job(job).progress.of("search").done
    there = elsewhere.client.wait(job, timeout_s=4 * PATIENCE_S, progress=False)

    assert written.exit_code == 0, written.stderr
    assert "Backups omit bundles" in written.stderr
    assert dump.stat().st_mode & 0o777 == 0o600
    assert again.exit_code == 1
    assert "dump exists, and is not overwritten" in again.stderr
    assert here.state == there.state == "succeeded", (here.error, there.error)
    assert restored.exit_code == 0, restored.stderr
    assert "Restored 1 jobs" in restored.stderr
    assert 8 <= at_first < TRIALS
    assert elsewhere.client.best(job) == found
    assert elsewhere.stop(signal.SIGTERM) == 0


@pytest.fixture
def replicas(place, database, database_url):
    """Two services on one database, of which the second has the worker; and a key."""
    _, secret = KeyStore(database).create("laptop", sees_all=True)
    place.environment |= {"PHO_DATABASE_URL": database_url, "PHO_MAX_REQUESTS_PER_MINUTE": "100000"}
    served = [place.serve("--workers", count) for count in (0, 1)]
    for each in served:
        each.client.close()
        each.client = Client(each.client.url, secret)
    return served[0], served[1], secret


def cut_off(served, job, *, after):
    """The events that somebody sees who follows a job at a service which is killed."""
    with pytest.raises(ServiceError):  # noqa: PT012 - wherever in the stream it comes
        for event in served.client.events(job, after=after):
            yield event
            served.process.kill()


def test_what_one_replica_was_told_another_goes_on_with(replicas, database):
    """Jobs, logins, pages, streams and keys are the database's; one replica is killed meanwhile."""
    first, second, secret = replicas
    job = first.client.submit(tiny(), idempotency_key="once").id
    again = second.client.submit(tiny(), idempotency_key="once").id
    others = [each.client.submit(tiny()).id for each in (first, second, first)]
    for other in others:
        second.client.cancel(other)
    seen = []

    def follow(served, *, most):
        after = seen[-1].id if seen else 0
        for event in served.client.events(job, after=after):
            seen.append(event)
            if len(seen) == most:
                return

    until(lambda: first.client.job(job).progress.of("search").done, "it searches")
    for served, most in ((first, 3), (second, 5), (first, 7)):
        follow(served, most=most)
    pages = []
    token = None
    for served in (first, second, first, second):
        params = {"page_size": 1} | ({"page_token": token} if token else {})
        headers = {"Authorization": f"Bearer {secret}"}
        page = httpx.get(f"{served.client.url}/v1/jobs", params=params, headers=headers).json()
        pages += [found["id"] for found in page["jobs"]]
        token = page["next_page_token"]
    logged_in = httpx.post(f"{first.client.url}/login", data={"key": secret})
    cookie = {"Cookie": logged_in.headers["set-cookie"].partition(";")[0]}
    for event in cut_off(first, job, after=seen[-1].id):
        seen.append(event)
    follow(second, most=0)
    ended = second.client.wait(job, timeout_s=PATIENCE_S, progress=False)
    whole = [*second.client.events(job)]
    other = httpx.get(f"{second.client.url}/jobs/{job}", headers=cookie)
    KeyStore(database).revoke(secret[:10])
    closed = [
        httpx.get(f"{second.client.url}/v1/jobs", headers=headers).status_code
        for headers in (cookie, {"Authorization": f"Bearer {secret}"})
    ]

    assert again == job
    assert pages == [*map(str, reversed([job, *others]))]
    assert token is None
    assert ended.state == "succeeded", (ended.error, second.log)
    assert [event.id for event in seen] == [event.id for event in whole]
    assert other.status_code == 200
    assert str(job) in other.text
    assert closed == [401, 401]
    assert "Traceback" not in second.log


def test_replicas_and_workers_are_replaced_one_by_one_while_jobs_run(place, replicas):
    *running, secret = replicas
    document = {**tiny(), "trials": MANY}
    job = running[0].client.submit(document).id
    until(lambda: running[1].client.job(job).progress.of("search").done >= 8, "it searches")
    late = running[0].client.submit({**tiny(), "trials": 40, "prune": True}).id
    answers = []
    over = threading.Event()

    def ask():
        """As a proxy does: of those that are ready, one."""
        while not over.wait(0.1):
            for served in list(running):
                with suppress(httpx.TransportError):
                    headers = {"Authorization": f"Bearer {secret}"}
                    url = f"{served.client.url}/v1/jobs/{job}"
                    answers.append(httpx.get(url, headers=headers, timeout=60).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    codes, replaced = [], [*running]
    for old in replaced:
        new = place.serve("--workers", 1)
        new.client.close()
        new.client = Client(new.client.url, secret)
        running.append(new)
        running.remove(old)  # the proxy sends nothing more there
        codes.append(old.stop(signal.SIGTERM))
    states = [running[0].client.job(each).state for each in (job, late)]
    ended = [
        running[0].client.wait(each, timeout_s=PATIENCE_S, progress=False) for each in (job, late)
    ]
    twin = running[1].client.submit(document).id
    alone = running[1].client.wait(twin, timeout_s=PATIENCE_S, progress=False)
    over.set()
    asking.join(PATIENCE_S)
    best = [running[0].client.best(each).coefficients for each in (job, twin)]
    artifacts = running[0].client.artifacts(late)

    assert codes == [0, 0]
    assert "succeeded" not in states  # they were replaced half way
    assert [each.state for each in ended] == ["succeeded"] * 2, [each.error for each in ended]
    assert {*answers} == {200}
    assert alone.state == "succeeded"
    assert best[0] == best[1]
    assert [trial.value for trial in running[0].client.trials(job)] == [
        trial.value for trial in running[1].client.trials(twin)
    ]
    assert "config.json" in {file.name for file in artifacts.files}


def test_json_logs(place, database, database_url):
    """Every line is JSON and says what it is about, no secret is in any; a given database stays."""
    with database.transaction() as connection:
        before = connection.execute(_TABLES).all()
    url = database_url.replace("//pho@", "//pho:planted-password@")
    _, secret = KeyStore(database).create("laptop", sees_all=False)
    place.environment |= {
        "PHO_LOG_FORMAT": "json", "PHO_DATABASE_URL": url, "HF_TOKEN": "hf_plantedplantedplanted",
        "HF_HUB_OFFLINE": "1",  # a hub that does not answer is waited for
    }  # fmt: skip
    served = place.serve("--workers", 1)
    with Client(served.client.url, secret) as client:
        ended = [
            client.wait(client.submit({**tiny(), **more}).id, progress=False)
            for more in ({"trials": 12}, {"model": "short"})
        ]
        headers = {"X-Request-ID": "asked", "Authorization": "Bearer planted-key"}
        httpx.get(f"{served.client.url}/v1/jobs?key=planted-query", headers=headers)
    served.stop(signal.SIGTERM)
    with database.transaction() as connection:
        after = connection.execute(_TABLES).all()
    lines = [
        line
        for line in served.log.splitlines()
        # nanobind: a library of torch's builds for GPUs, as the process ends
        if not re.match(
            r"Jobs|API|Dash|Data|Studies|Local|nanobind:| - (leaked|\.\.\.)|See https:", line
        )
    ]
    logged = [json.loads(line) for line in lines]
    (asked,) = [line for line in logged if line.get("request") == "asked"]
    (done,) = [line for line in logged if line["message"] == f"finish of job {ended[0].id} done"]
    failed = [line for line in logged if line.get("job") == str(ended[1].id)]

    assert [job.state for job in ended] == ["succeeded", "failed"]
    assert after == before
    assert not (place.data / "postgresql").exists()
    assert "planted" not in served.log
    assert secret not in served.log
    assert (asked["status"], asked["path"], asked["key"]) == (401, "/v1/jobs", None)
    assert (done["stage"], done["attempt"]) == ("finish", 1)
    assert done["worker"].endswith(f":{done['process']}")
    assert {(line["stage"], line["attempt"]) for line in failed} == {("calibrate", 1)}
    assert any(line["key"] == secret[:10] for line in logged if line.get("status") == 202)
    assert not any(line["logger"].startswith(("alembic", "procrastinate")) for line in logged)


def test_a_password_is_in_no_list_of_processes(place):
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


@pytest.mark.thorough(False)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_answer_is_sent_without_waiting_for_the_clients_system(host):
    with serving._listening(read_settings(host=host, port=0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address[:2]), listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.thorough(False)
def test_without_torch_local_workers_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda _: None)

    with pytest.raises(InvalidInput, match=r"need torch: pip install .*'torch>=.*--workers 0"):
        serving.serve(read_settings(workers=1), print)
