"""The Python client against a front end that listens, and against what else may listen there."""

import json
import socket
import threading
import time
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import optuna
import pytest
from optuna.trial import create_trial
from pretended_user import FOUND, SPEC, Service, succeed
from sqlalchemy import delete, update
from sse_starlette import EventSourceResponse

from pho_service.client import Client
from pho_service.errors import InvalidInput, PhoError, ServiceError, ServiceUnavailable
from pho_service.host.settings import read_settings
from pho_service.spec.job import JobSpec
from storage.jobs import NewJob
from storage.keys import KeyStore
from storage.records import NewStage, StageKind
from storage.studies import open_storage
from storage.tables import events, jobs, stages

PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def service_of_file(url_of_file):
    running = Service(url_of_file, read_settings(max_requests_per_minute=0, workers=0))
    yield running
    running.stop()


@pytest.fixture
def database(emptied_database):
    return emptied_database


@pytest.fixture
def service(service_of_file, database):
    """A front end on a database without jobs; a test that stops it starts it again."""
    del database  # which is empty now
    return service_of_file


@pytest.fixture
def client(service):
    with Client(service.url) as opened:
        yield opened


@contextmanager
def meanwhile(*acts, after_s=0.5):
    """Do things in another thread, each after a while; they are done afterwards."""

    def run():
        for act in acts:
            time.sleep(after_s)
            act()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)


def test_a_listing_goes_over_all_pages(client, store):
    spec = JobSpec.model_validate(SPEC).model_dump(mode="json")
    first = NewStage(kind=StageKind.CALIBRATE)
    new = NewJob(spec=spec, name="n", stages=[first], trials=200, max_attempts=3)
    ids = [store.submit(new)[0].id for _ in range(120)]
    for job_id in ids[::2]:
        store.ask(job_id, "cancel")

    assert [job.id for job in client.jobs()] == ids[::-1]
    assert [job.id for job in client.jobs(["cancelled"])] == ids[::2][::-1]
    assert [job.id for job in client.jobs(models=[SPEC["model"]], sort="created")] == ids
    assert [job.id for job in client.jobs(name=str(ids[7]))] == [ids[7]]
    assert [*client.jobs(patterns=["7:8"])] == []


def test_trials_come_over_all_pages_by_number(client, store):
    job = client.submit({**SPEC, "islands": 2})
    with open_storage(store.database.studies_url) as storage:
        study = optuna.create_study(storage=storage, study_name=f"{job.name} island 1")
        attributes = {"method": "crepe", "scope": "layer", "coefficients": {"row": 1.0}}
        study.add_trials([create_trial(value=float(n), user_attrs=attributes) for n in range(230)])

    assert [t.value for t in client.trials(job.id, island=1)] == [float(n) for n in range(230)]
    assert [*client.trials(job.id)] == []


def test_events_come_as_they_happen_until_the_job_is_over(client, store):
    job = client.submit(SPEC).id
    with meanwhile(lambda: succeed(store, job, FOUND)):
        events = [*client.events(job)]

    assert [*client.events(job, after=events[1].id)] == events[2:]
    assert [(e.kind, e.data.get("state") or e.data.get("stage")) for e in events] == [
        ("state", "queued"), ("stage", "calibrate"), ("state", "running"), ("stage", "finish"),
        ("state", "succeeded"),
    ]  # fmt: skip


def test_signs_of_life_between_events_are_none(client, store, monkeypatch):
    monkeypatch.setattr(EventSourceResponse, "DEFAULT_PING_INTERVAL", 0.05)
    job = client.submit(SPEC).id
    with meanwhile(lambda: store.ask(job, "cancel"), after_s=1.0):
        events = [*client.events(job)]

    assert [event.data["state"] for event in events] == ["queued", "cancelled"]


def test_a_stream_that_the_service_cuts_off_is_an_outage(client, service):
    job = client.submit(SPEC).id
    with meanwhile(service.stop, service.start), pytest.raises(ServiceUnavailable):
        list(client.events(job))
    client.cancel(job)

    assert [e.data["state"] for e in client.events(job)] == ["queued", "cancelled"]


def test_wait(client, store, capsys):
    """Waiting gives the job as it ended, and draws how far it is."""
    job = client.submit({**SPEC, "trials": 40}).id
    with meanwhile(lambda: succeed(store, job, FOUND)):
        ended = client.wait(job, timeout_s=PATIENCE_S, progress=True)
    out, err = capsys.readouterr()

    assert (ended.state, ended.warnings) == ("succeeded", ["the best lies on the border"])
    assert ended == client.job(job)
    assert out == ""
    assert "succeeded" in err
    assert "/40" in err


def test_waiting_tells_no_time_left_while_no_worker_is_connected(client, capsys):
    job = client.submit({**SPEC, "trials": 40}).id
    with pytest.raises(TimeoutError):
        client.wait(job, timeout_s=0.0, progress=True)
    err = capsys.readouterr().err

    assert "queued, no worker is connected" in err
    assert "0/?" in err


def test_after_its_time_waiting_gives_up_with_an_outage_too(client, service, monkeypatch):
    monkeypatch.setattr("pho_service.client._OUTAGE_S", 120.0)
    job = client.submit(SPEC).id
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"is queued after 0\.3 s"):
        client.wait(job, timeout_s=0.3, progress=False)
    state = client.job(job).state
    with meanwhile(service.stop), pytest.raises((TimeoutError, ServiceUnavailable)):
        client.wait(job, timeout_s=1.0, progress=False)
    took_s = time.monotonic() - began
    service.start()

    assert state == "queued"
    assert took_s < 30


def test_waiting_survives_an_outage_but_not_of_a_service_that_was_never_there(
    client, service, store
):
    job = client.submit(SPEC).id
    with meanwhile(service.stop, lambda: succeed(store, job, FOUND), service.start):
        ended = client.wait(job, timeout_s=PATIENCE_S, progress=False)
    service.stop()
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="cannot be reached"):
        client.wait(job, progress=False)
    took_s = time.monotonic() - began
    service.start()

    assert ended.state == "succeeded"
    assert took_s < 10


def test_the_beginning_of_a_jobs_id_is_enough(client, store):
    first, second = (client.submit(SPEC).id for _ in range(2))
    with store.database.transaction() as connection:
        for of_a_job in (stages, events):
            connection.execute(delete(of_a_job))
        for job, number in ((first, 1), (second, 2)):
            alike = uuid.UUID(f"abcdef01-2345-4000-8000-00000000000{number}")
            connection.execute(update(jobs).where(jobs.c.id == job).values(id=alike))
    third = str(client.submit(SPEC).id)

    assert str(client.job(third[:6]).id) == third
    assert client.cancel(third.replace("-", "")[:12].upper()).state == "cancelled"
    with pytest.raises(ServiceError, match="several jobs begin with ABCDEF: abcdef01-") as told:
        client.job("ABCDEF")
    assert str(told.value).count("abcdef01-2345") == 2
    with pytest.raises(ServiceError, match="No job has an id that begins with 0000-0"):
        client.delete("0000-0")
    with pytest.raises(InvalidInput, match="'abc' is not a job's id"):
        client.job("abc")


def test_a_job_that_is_not_there_is_an_error_at_once(client):
    """Its events are no empty stream."""
    began = time.monotonic()
    for call in (
        lambda: client.wait(uuid.uuid4(), progress=False),
        lambda: next(client.events(uuid.uuid4())),
    ):
        with pytest.raises(ServiceError, match="No job has this id") as raised:
            call()

        assert (raised.value.status, raised.value.code) == (404, "no_such_job")
    assert time.monotonic() - began < 30


def test_wrong_values_are_told_with_their_places_one_a_line(client):
    with pytest.raises(ServiceError, match="/pattern: pattern 'half' is neither") as raised:
        client.submit({"model": "org/name", "pattern": "half", "trials": 0, "x": 1})
    lines = str(raised.value).splitlines()

    assert (raised.value.status, raised.value.code) == (422, "invalid_request")
    assert [line.split(":")[0] for line in lines] == ["/pattern", "/trials", "/x"]


def test_keys(service, database, monkeypatch):
    """A key is given, or comes from the environment; without one the error says how to get it."""
    _, secret = KeyStore(database).create("k", sees_all=False)
    with Client(service.url, secret) as client:
        assert [*client.jobs()] == []
    with Client(service.url) as client, pytest.raises(ServiceError, match="pho keys") as raised:
        client.workers()
    assert raised.value.status == 401
    monkeypatch.setenv("PHO_API_KEY", secret)
    monkeypatch.setenv("PHO_API_URL", f"{service.url}/")
    with Client() as client:
        assert [*client.jobs()] == []
    with Client(key="pho_wrong") as client, pytest.raises(ServiceError) as raised:
        client.submit(SPEC)
    assert "pho_wrong" not in str(raised.value)


@pytest.mark.parametrize("key", ["ключ", "two\nlines", "\x00", "nbsp\u00a0"])
def test_key_that_cannot_be_sent(key):
    with pytest.raises(PhoError) as raised, Client("http://127.0.0.1:1", key) as client:
        client.workers()

    assert key not in str(raised.value)


def test_if_nothing_listens_the_error_says_where_and_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client:
        for call in (
            client.workers,
            lambda: client.submit(SPEC),
            lambda: next(client.events(uuid.uuid4())),
        ):
            with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{port} cannot be reached"):
                call()
        with pytest.raises(ServiceUnavailable, match="pho serve"):
            client.workers()


@pytest.mark.parametrize(
    "url",
    ["nope", "127.0.0.1:8000", "ftp://127.0.0.1", "http://[", "http://h:99999", "http://a b",
     "", "http://\x00", "http://no.such.host.invalid"],
)  # fmt: skip
def test_an_address_that_leads_nowhere_is_an_error_that_names_it(url):
    with pytest.raises(PhoError) as raised, Client(url) as client:
        client.workers()

    assert repr(url)[1:-1] in str(raised.value)


def test_what_is_no_id_leads_to_no_other_place_of_the_service(client):
    job = client.submit(SPEC).id
    odd = ("x/../../workers", "../workers", "", "?", "#", "x\x00", "a b", "%", "..", "é")
    for job_id in (*odd, *(f"{job}{more}" for more in ("/trials", "?x", "#x", "/", ":cancel"))):
        for call in (client.job, client.cancel):
            with pytest.raises(PhoError):
                call(job_id)

    assert client.job(job).state == "queued"


def test_no_proxy_comes_in_between(service, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Client(service.url) as client:
        job = client.cancel(client.submit(SPEC).id)

        assert len([*client.events(job.id)]) == 2


@contextmanager
def stranger(status, body, content_type="text/html", *, first=()):
    """The URL of a server that always gives the same answer, but 429 to the first requests."""
    refusals = list(first)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            said, headers = body, {"Content-Type": content_type, "Location": "http://127.0.0.1:1/"}
            if refused := bool(refusals):
                said, headers["Retry-After"] = refusals.pop(0)
            self.send_response(429 if refused else status)
            for name, value in {**headers, "Content-Length": str(len(said))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "content_type"),
    [
        (200, b"<html>Welcome</html>", "text/html"),
        (200, b"{}", "application/json"),
        (200, b"[]", "application/json"),
        (200, b"{", "application/json"),
        (200, b"", "application/json"),
        (302, b"", "text/html"),
        (404, b"<html>Not Found</html>", "text/html"),
        (500, b"oops", "text/plain"),
        (500, b"\xff\xfe", "application/problem+json"),
        (400, b'{"detail": "x"}', "application/json"),
        (409, b"null", "application/problem+json"),
    ],
)
def test_what_no_pho_answers_is_an_error(status, body, content_type):
    with stranger(status, body, content_type) as url, Client(url) as client:
        for call in (
            lambda: client.submit(SPEC),
            lambda: client.job(uuid.uuid4()),
            lambda: [*client.jobs()],
            lambda: [*client.trials(uuid.uuid4())],
            lambda: client.best(uuid.uuid4()),
            lambda: client.report(uuid.uuid4()),
            lambda: client.cancel(uuid.uuid4()),
            client.workers,
            lambda: [*client.events(uuid.uuid4())],
        ):
            with pytest.raises(ServiceError):
                call()


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_without_a_service_behind_it_is_an_outage(status):
    with (
        stranger(status, b"<html>Bad Gateway</html>") as url,
        Client(url) as client,
        pytest.raises(ServiceUnavailable) as raised,
    ):
        client.workers()

    assert raised.value.status == status


def refusal(code):
    """A problem with status 429."""
    problem = {"title": "Too Many Requests", "status": 429, "detail": "Wait.", "code": code}
    return json.dumps(problem).encode()


@pytest.fixture
def slept(monkeypatch):
    """How long a client wanted to sleep, each time; it does not."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_who_is_told_to_come_again_later_does_so_for_any_request(slept):
    first = [(refusal("too_many_requests"), after) for after in ("3", "1", "soon")]
    event = b"id: 1\nevent: state\ndata: {}\n\n"
    with stranger(200, b'{"workers": []}', first=first) as url, Client(url) as client:
        assert client.workers() == []
    with (
        stranger(200, event, "text/event-stream", first=first[:1]) as url,
        Client(url) as client,
    ):
        assert [found.id for found in client.events(uuid.uuid4())] == [1]

    assert slept == [3, 1, 1, 3]


@pytest.mark.parametrize(
    ("code", "after"),
    [("too_many_requests", "600"), ("too_many_jobs", "60"), ("too_many_urgent_jobs", "5")],
)
def test_what_takes_too_long_is_an_error(slept, code, after):
    with (
        stranger(200, b"{}", first=[(refusal(code), after)]) as url,
        Client(url) as client,
        pytest.raises(ServiceError, match="Wait") as raised,
    ):
        client.workers()

    assert (raised.value.code, raised.value.retry_after_s) == (code, float(after))
    assert slept == []


def test_a_server_that_hangs_up_or_never_answers_is_an_outage():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up():
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            connection.close()

        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        hanging = meanwhile(hang_up, after_s=0)
        with Client(url) as client, hanging, pytest.raises(ServiceUnavailable):
            client.workers()
        with Client(url, timeout_s=0.3) as client, pytest.raises(ServiceUnavailable):
            client.workers()


def test_fields_that_a_newer_service_may_add_do_no_harm(client):
    job = client.job(client.submit(SPEC).id)
    newer = job.model_dump(mode="json") | {"cost": 5}
    newer["progress"] |= {"eta": "soon"}
    body = json.dumps(newer).encode()
    with stranger(200, body, "application/json") as url, Client(url) as other:
        found = other.job(job.id)

    assert found == job
