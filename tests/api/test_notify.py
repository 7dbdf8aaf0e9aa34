"""Webhooks that tell of the end of a job: the receiver of the docs, and where none may go."""

import json
import re
import socket
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text

from pho_service.api.operations import tell_next
from pho_service.errors import InvalidInput
from pho_service.host import webhooks
from pho_service.host.settings import read_settings
from pho_service.host.webhooks import NotDelivered, WebhookRules, is_public, send, signature
from storage.notifications import GIVE_UP_AFTER, LEASE_S, take_notification
from storage.records import JobState
from storage.tables import notifications

DOCS = Path(__file__).parents[2] / "docs" / "service.md"
SECRET = "of the tests alone"  # noqa: S105 - of nothing
RULES = WebhookRules(hosts=("localhost", "127.0.0.1"), secret=SECRET.encode(), private=True)
DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}


@pytest.fixture
def received(monkeypatch):
    """The receiver of the docs, which listens; and what it does, as a test changes it."""
    monkeypatch.setenv("PHO_NOTIFY_SECRET", SECRET)
    (code,) = re.findall(r"<!-- receiver -->\n```python\n(.*?)```", DOCS.read_text(), re.S)
    printed = []
    names = {"__name__": "receiver", "print": lambda said, **_: printed.append(said)}
    exec(code, names)  # noqa: S102 - the docs'
    mine = names["Receiver"]
    found = {"printed": printed, "asked": 0, "before": lambda _: False}

    class Receiver(mine):  # type: ignore[misc]
        def do_POST(self):  # noqa: N802 - http.server's
            found["asked"] += 1
            if not found["before"](self):
                super().do_POST()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    found["url"] = f"http://localhost:{server.server_address[1]}/pho"
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(client_of, monkeypatch):
    """A front end that may send to this machine; the test says when."""
    monkeypatch.setattr("pho_service.api.app.AT_ONCE", 0)
    return client_of(
        notify_hosts=("localhost",), notify_secret=SecretStr(SECRET), notify_private=True
    )


def answer(status):
    """What a receiver does that answers so."""

    def act(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(status)
        handler.send_header("Location", "http://localhost:1/")
        handler.end_headers()
        return True

    return act


def due_now(service):
    """Let no time pass before the next attempt; gives what is stored of each message."""
    with service.database.transaction() as connection:
        connection.execute(text("UPDATE pho.notifications SET due_at = now()"))
        return connection.execute(select(notifications)).all()


def test_each_end(client, submit, hand, received):
    """The receiver of the docs is told of each end once, by a signature that it checks."""
    service = client.app.state.service  # type: ignore[attr-defined]
    jobs = {}
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        jobs[state.value] = submit(notify=received["url"])["id"]
        hand.bring(jobs[state.value], state)
    submit()
    while tell_next(service):
        pass

    assert {said["state"]: said["job_id"] for said in received["printed"]} == jobs
    assert {said["type"] for said in received["printed"]} == {"job.ended"}
    (failed,) = (said for said in received["printed"] if said["state"] == "failed")
    assert failed["error"] == {"type": "ModelError", "message": "org/name is not there."}
    assert received["asked"] == 3
    assert all(row.ended_at and row.error is None for row in due_now(service))


def test_transfer(client, submit, hand, refusal, received):
    """A transfer is told of as a search is; where it may not be told, it is refused."""
    service = client.app.state.service  # type: ignore[attr-defined]
    job_id = submit()["id"]
    hand.bring(job_id, JobState.SUCCEEDED)
    asked = {"models": ["org/other"], "notify": "https://evil.example/x"}
    problem = refusal(client.post(f"/v1/jobs/{job_id}:transfer", json=asked), 422)
    asked["notify"] = received["url"]
    transfer = client.post(f"/v1/jobs/{job_id}:transfer", json=asked).json()
    client.post(f"/v1/jobs/{transfer['id']}:cancel")

    assert problem["errors"][0]["pointer"] == "/notify"
    assert tell_next(service)
    assert [(said["job_id"], said["state"]) for said in received["printed"]] == [
        (transfer["id"], "cancelled")
    ]


def test_killed_sender(client, submit, hand, received):
    """A message whose sender died is sent by the next one, with the same id; doubles are told."""
    service = client.app.state.service  # type: ignore[attr-defined]
    hand.bring(submit(notify=received["url"])["id"], JobState.CANCELLED)
    taken = take_notification(service.database)
    assert taken is not None
    assert not tell_next(service)  # it has it for some time
    body = json.dumps({"id": str(taken.id), **taken.document}).encode()
    send(service.webhooks, taken.url, str(taken.id), body)  # and dies before it could note that
    due_now(service)
    assert tell_next(service)

    assert received["asked"] == 2
    assert [said["id"] for said in received["printed"]] == [str(taken.id)]


def test_what_is_not_taken_is_sent_again_later_each_time_until_it_is_given_up(
    client, submit, hand, received, monkeypatch
):
    service = client.app.state.service  # type: ignore[attr-defined]
    monkeypatch.setattr("pho_service.host.webhooks._AT_ONCE", 1)
    received["before"] = answer(302)
    hand.bring(submit(notify=received["url"])["id"], JobState.CANCELLED)
    assert tell_next(service)
    assert not tell_next(service)  # not yet
    for _ in range(GIVE_UP_AFTER - 1):
        due_now(service)
        assert tell_next(service)
    (row,) = due_now(service)

    assert not tell_next(service)
    assert row.attempts == received["asked"] == GIVE_UP_AFTER
    assert "answers 302. Redirects are not followed." in row.error
    assert row.ended_at is not None


def test_a_receiver_that_stumbles_once_is_asked_again_within_seconds_one_that_is_away_is_told(
    received,
):
    statuses = iter([500, 200])
    received["before"] = lambda handler: answer(next(statuses))(handler)
    slept = []
    send(RULES, received["url"], "an-id", b"{}", sleep=slept.append)

    assert received["asked"] == 2
    assert slept == [0.5]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(NotDelivered, match="cannot be reached"):
        send(RULES, f"http://127.0.0.1:{port}/", "an-id", b"{}", sleep=lambda _: None)


def test_a_receiver_that_drips_is_given_up_in_time(received, monkeypatch):
    """Each read ends soon, and the answer never: the whole request has a time."""

    def drip(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        with suppress(OSError):
            for _ in range(40):
                handler.wfile.write(b"a")
                time.sleep(0.05)
        return True

    received["before"] = drip
    most_s = 3 * (webhooks.TIMEOUT_S + 10)  # of the requests, and what lies between them
    monkeypatch.setattr("pho_service.host.webhooks.TIMEOUT_S", 0.3)
    slept = []
    with pytest.raises(NotDelivered, match=r"has not answered within 0\.3 s"):
        send(RULES, received["url"], "an-id", b"{}", sleep=slept.append)

    assert len(slept) == 2  # between three requests, though a busy receiver may not see each
    assert received["asked"]
    assert most_s < LEASE_S  # nobody else takes it meanwhile


def test_a_host_that_is_slow_holds_up_its_own_messages_alone(client, submit, hand, received):
    service = client.app.state.service  # type: ignore[attr-defined]
    slow = received["url"].replace("localhost", "LOCALHOST") + "?of=another"
    for url in (received["url"], slow):
        hand.bring(submit(notify=url)["id"], JobState.CANCELLED)
    told = []
    received["before"] = lambda _: bool(told.append(tell_next(service)))

    assert tell_next(service)
    assert told == [False]  # the other one is not sent while this one is
    assert tell_next(service)


def test_other_webhooks_are_refused(client_of, refusal):
    nobody = client_of(notify_secret=SecretStr(SECRET))
    some = client_of(notify_hosts=("hooks.example", "10.*"), notify_secret=SecretStr(SECRET))
    unsigned = client_of(notify_hosts=("*",))
    for client, url, told in (
        (nobody, "https://hooks.example/x", "Allowed hosts are: none"),
        (unsigned, "https://hooks.example/x", "PHO_NOTIFY_SECRET"),
        (some, "https://hooks.example.evil/x", "are not allowed here"),
        (some, "http://10.0.0.1/x", "not a public address"),
        (some, "ftp://hooks.example/x", "is not a URL that a webhook can go to"),
        (some, "https://user:word@hooks.example/x", "without user and password"),
        (some, "https://[::1", "is not a URL"),
    ):
        problem = refusal(client.post("/v1/jobs", json={**DOCUMENT, "notify": url}), 422)
        assert told in problem["detail"]
        assert problem["errors"][0]["pointer"] == "/notify"
    taken = some.post("/v1/jobs", json={**DOCUMENT, "notify": "https://HOOKS.example/x"})
    assert taken.status_code == 202


def test_private_addresses(received, monkeypatch):
    """A name that stands for a private address is not called, also if it did not before."""
    closed = WebhookRules(hosts=("*",), secret=b"x", private=False)
    with pytest.raises(InvalidInput, match="not a public address"):
        send(closed, received["url"], "an-id", b"{}")
    answers = iter(["127.0.0.1", "10.1.1.1"])
    resolved = []

    def rebinding(host, port, **_):
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    real, connected = socket.getaddrinfo, received["url"].replace("localhost", "other.example")
    monkeypatch.setattr("pho_service.host.webhooks.socket.getaddrinfo", rebinding)
    monkeypatch.setattr(
        "socket.create_connection", lambda address, *_, **__: _connect(real, address)
    )
    open_ = WebhookRules(hosts=("other.example",), secret=SECRET.encode(), private=True)
    send(open_, connected, "an-id", b"{}")

    assert resolved == ["other.example"]  # once: what was checked is what was called
    assert received["printed"] == [{}]
    public = ("93.184.215.14", "2606:4700::1111")
    private = (
        "127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",  # noqa: S104
        "224.0.0.1", "::1", "fe80::1", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1",
        "2002:a00:1::", "2001:0:a00:1::",
    )  # fmt: skip
    assert all(is_public(ip_address(a)) for a in public)
    assert not any(is_public(ip_address(a)) for a in private)


def _connect(getaddrinfo, address):
    """A connection to an address, never to a name."""
    ip_address(address[0])  # raises for a name
    ((family, kind, *_, place), *_) = getaddrinfo(*address, type=socket.SOCK_STREAM)
    opened = socket.socket(family, kind)
    opened.connect(place)
    return opened


def test_it_is_that_of_standard_webhooks_by_the_example_of_its_specifications_libraries():
    rules = WebhookRules.of(read_settings(notify_secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"))
    body = b'{"test": 2432232314}'

    assert rules.secret is not None
    assert signature(rules.secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )
    with pytest.raises(InvalidInput, match="not base64"):
        WebhookRules.of(read_settings(notify_secret="whsec_?"))
