"""How large a job may be, and how much and how often somebody may ask."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from pho_service.api.bodies import BodyLimit
from pho_service.api.guard import KeyGuard, Rate, StreamLimit, host_of
from pho_service.api.protocol import BoundedProtocol, Connections
from pho_service.api.service import Caller
from pho_service.errors import InvalidInput
from pho_service.host.settings import read_settings
from pho_service.spec.limits import JobLimits
from storage.keys import KeyStore
from storage.records import TooManyTrials
from storage.states import JobState

Refusal = Callable[..., dict[str, Any]]
Submit = Callable[..., dict[str, Any]]

DOCUMENT = {"model": "org/name", "pattern": "0.5"}
SMALL = {"preset": "score", "calibration": {"samples": 10, "context_length": 100}, "confirm": None}


def bearer(secret: str) -> dict[str, str]:
    """As programs send it."""
    return {"Authorization": f"Bearer {secret}"}


# ---------------------------------------------------------------------- size of a job


@pytest.fixture
def limited(shared_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Of a service with narrow limits."""
    service = shared_client.app.state.service  # type: ignore[attr-defined]
    monkeypatch.setattr(service, "limits", JobLimits(trials=1000, tokens=10_000))
    return shared_client


@pytest.mark.parametrize(
    ("changes", "pointer", "says"),
    [
        ({"trials": 501, "islands": 2}, "/trials", "501 trials on 2 islands are 1002"),
        ({"calibration": {"samples": 101, "context_length": 100}}, "/calibration/samples", "10100"),
        ({"more_models": [f"org/m{i}" for i in range(10)]}, "/calibration/samples", "11000"),
        ({"confirm": {"candidates": 10, "windows": 10}}, "/confirm/windows", "11000"),
        (
            {"confirm": {"candidates": 1, "windows": 2}, "validation": {"candidates": 45}},
            "/confirm/windows",
            "10800",
        ),
        (
            {"confirm": {"candidates": 1, "windows": 1}, "objective": {"name": "perplexity"},
             "trials": 50, "islands": 2},
            "/confirm/windows",
            "11100",
        ),
    ],
)  # fmt: skip
def test_large_job(
    limited: TestClient, refusal: Refusal, changes: dict[str, Any], pointer: str, says: str
) -> None:
    """More trials or tokens than the operator allows are refused at the field, with the limit."""
    before = limited.get("/v1/jobs").json()
    answer = limited.post("/v1/jobs", json={**DOCUMENT, **SMALL, **changes})
    problem = refusal(answer, 422, "job_too_large")
    (error,) = problem["errors"]

    assert error["pointer"] == pointer
    assert says in error["detail"]
    assert "PHO_MAX_T" in error["detail"]
    assert limited.get("/v1/jobs").json() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 500, "islands": 2},
        {"calibration": {"samples": 100, "context_length": 100}},
        {"more_models": [f"org/m{i}" for i in range(9)]},
        {"confirm": {"candidates": 9, "windows": 10}},
    ],
)
def test_largest_job(limited: TestClient, changes: dict[str, Any]) -> None:
    """Just as much as is allowed is taken."""
    answer = limited.post("/v1/jobs", json={**DOCUMENT, **SMALL, **changes})

    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("objective", "most"), [("activation-reconstruction", 100), ("perplexity", 48)]
)
def test_large_extension(client_of: Any, refusal: Refusal, objective: str, most: int) -> None:
    """Nor does an extension make a job larger than is allowed, in trials or in tokens."""
    client = client_of(max_trials=100, max_tokens=6000)
    document = {
        **DOCUMENT, **SMALL, "trials": 40, "objective": {"name": objective},
        "confirm": {"candidates": 2, "windows": 1},
    }  # fmt: skip
    url = f"/v1/jobs/{client.post('/v1/jobs', json=document).json()['id']}:extend"
    refused = client.post(url, json={"trials": most - 40 + 1})

    assert refusal(refused, 422, "job_too_large")["errors"][0]["pointer"].startswith("/")
    assert client.post(url, json={"trials": most - 40}).json()["spec"]["trials"] == most


def test_large_extension_meanwhile(
    client_of: Any, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has the same limit, for two who extend a job at the same time."""
    client = client_of(max_trials=100)
    asked = []

    def ask(*_: Any, **more: Any) -> None:
        asked.append(more["max_trials"])
        raise TooManyTrials("somebody was faster")

    document = {**DOCUMENT, "trials": 40, "islands": 2}
    job = client.post("/v1/jobs", json=document).json()["id"]
    monkeypatch.setattr(client.app.state.service.jobs, "ask", ask)
    refusal(client.post(f"/v1/jobs/{job}:extend", json={"trials": 1}), 422)

    assert asked == [50]


def test_large_transfer(client_of: Any, refusal: Refusal, hand: Any, tmp_path: Path) -> None:
    """A transfer is counted over all of its models."""
    (tmp_path / "text.txt").write_text("of the report")
    client = client_of(max_trials=100, max_tokens=10_000)
    job = client.post("/v1/jobs", json={**DOCUMENT, **SMALL, "trials": 40}).json()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    url, confirm = f"/v1/jobs/{job}:transfer", {"candidates": 9, "windows": 10}
    for pointer, most, more in (
        ("/search/trials", {"search": {"trials": 50, "confirm": {"candidates": 1, "windows": 1}},
         "models": ["org/a", "org/b"]}, {"models": ["org/a", "org/b", "org/c"]}),
        ("/models", {"models": [f"org/m{i}" for i in range(10)]},
         {"models": [f"org/m{i}" for i in range(11)]}),
        ("/models", {"models": ["org/a"], "report": {"text": "text.txt", "windows": 90}},
         {"report": {"text": "text.txt", "windows": 91}}),
        ("/models", {"models": ["org/a"], "search": {"trials": 40, "confirm": confirm}},
         {"report": {"text": "text.txt", "windows": 1}}),
    ):  # fmt: skip
        refused = client.post(url, json={**most, **more})
        (error,) = refusal(refused, 422, "job_too_large")["errors"]

        assert error["pointer"] == pointer
        assert client.post(url, json=most).status_code == 202


# --------------------------------------------------------------------- how often


def test_too_often(client_of: Any, refusal: Refusal) -> None:
    """More requests in a minute than are allowed are refused, with the time to wait."""
    client = client_of(max_requests_per_minute=5)
    codes = [client.get("/v1/jobs").status_code for _ in range(5)]
    refused = client.get("/v1/workers")

    assert codes == [200] * 5
    assert "More than 5 requests" in refusal(refused, 429, "too_many_requests")["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_each_key_for_itself(client_of: Any, keys: KeyStore, refusal: Refusal) -> None:
    """What one key asks is not counted for another, nor for those without a key."""
    client = client_of(max_requests_per_minute=3)
    a, b = (keys.create(name, sees_all=False)[1] for name in "ab")
    for _ in range(3):
        client.get("/v1/jobs", headers=bearer(a))

    refusal(client.get("/v1/jobs", headers=bearer(a)), 429, "too_many_requests")
    assert client.get("/v1/jobs", headers=bearer(b)).status_code == 200
    refusal(client.get("/v1/jobs"), 401, "no_key")


def test_refused_requests_count(client_of: Any, refusal: Refusal) -> None:
    """Whoever asks without a needed key, or for what is not there, is counted too."""
    for path, keys_needed in (("/v1/jobs", True), ("/nope", False)):
        client = client_of(max_requests_per_minute=2, keys_needed=keys_needed)
        for _ in range(2):
            assert client.get(path).status_code in (401, 404)

        refusal(client.get(path), 429, "too_many_requests")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_are_not_counted(client_of: Any, path: str) -> None:
    """Whoever looks after the process may ask as often as it likes."""
    client = client_of(max_requests_per_minute=1)

    assert {client.get(path).status_code for _ in range(5)} == {200}


def test_no_limit(client_of: Any) -> None:
    """0 is no limit."""
    client = client_of(max_requests_per_minute=0, max_wrong_keys_per_minute=0)

    assert {client.get("/v1/jobs").status_code for _ in range(20)} == {200}
    assert {client.get("/v1/jobs", headers=bearer("x")).status_code for _ in range(20)} == {401}


def test_database_is_not_asked(
    client_of: Any, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is refused without a key costs no question to the database."""
    client = client_of(max_requests_per_minute=1, max_wrong_keys_per_minute=1)
    for headers in ({}, bearer("wrong")):
        client.get("/v1/jobs", headers=headers)
    for name in ("find", "exist"):
        monkeypatch.setattr(client.app.state.service.keys, name, None)

    refusal(client.get("/v1/jobs"), 429, "too_many_requests")
    refusal(client.get("/v1/jobs", headers=bearer("other")), 429, "too_many_wrong_keys")


def test_wrong_keys(client_of: Any, keys: KeyStore, refusal: Refusal) -> None:
    """After too many wrong keys no other wrong one is tried, but every right one opens."""
    client = client_of(max_wrong_keys_per_minute=3)
    for number in range(3):
        refusal(client.get("/v1/jobs", headers=bearer(f"pho_{number}")), 401, "no_key")

    refused = client.get("/v1/jobs", headers=bearer("pho_other"))
    assert "PHO_MAX_WRONG_KEYS_PER_MINUTE" in refusal(refused, 429, "too_many_wrong_keys")["detail"]
    assert int(refused.headers["retry-after"]) >= 1
    guard = next(m for m in _middleware(client.app) if isinstance(m, KeyGuard))
    for later in (0.0, 1.0):  # those that are right are asked for once a second
        guard._known_at -= later
        right = keys.create("unseen", sees_all=False)[1]
        guard._known_at -= 1.0
        assert client.get("/v1/jobs", headers=bearer(right)).status_code == 200


def test_wrong_keys_at_once(client_of: Any, keys: KeyStore) -> None:
    """Those that are tried at the same time count before it is known that they are wrong."""
    keys.create("some", sees_all=False)
    client = client_of(max_wrong_keys_per_minute=5)
    guard = KeyGuard(lambda *_: None, client.app.state.service)  # type: ignore[arg-type, return-value]

    async def run() -> list[int | None]:
        answers = [
            Answer(guard, {**SCOPE, "headers": [(b"authorization", b"Bearer %d" % i)]}, nothing)
            for i in range(30)
        ]
        await asyncio.gather(*(answer.task for answer in answers))
        return [answer.status for answer in answers]

    statuses = asyncio.run(run())
    assert statuses.count(401) == 5
    assert statuses.count(429) == 25


def _middleware(app: Any) -> Iterator[Any]:
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def test_revoked_key_is_forgotten(client_of: Any, keys: KeyStore, refusal: Refusal) -> None:
    """A key that was right and was revoked opens nothing, and counts as a wrong one."""
    client = client_of(max_wrong_keys_per_minute=1)
    key, secret = keys.create("gone", sees_all=False)
    assert client.get("/v1/jobs", headers=bearer(secret)).status_code == 200
    keys.revoke(str(key.id))

    refusal(client.get("/v1/jobs", headers=bearer(secret)), 401, "no_key")
    refusal(client.get("/v1/jobs", headers=bearer(secret)), 429, "too_many_wrong_keys")


def test_minute_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done a minute ago counts less and less, until nothing of it is left."""
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
    rate = Rate(10)
    counted = []
    for later in (0, 30, 45, 60, 61, 150):
        monkeypatch.setattr("time.time", lambda later=later: now + later)
        counted.append(sum(rate.count("somebody") for _ in range(20)))

    assert counted[0] == 10
    assert sum(counted[:4]) <= 20
    assert counted[5] == 10


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("testclient", "testclient"),
        (None, ""),
    ],
)
def test_host(address: str | None, expected: str) -> None:
    """A host is its IPv4 address or its IPv6 network, of which it may use every address."""
    assert host_of({"client": None if address is None else (address, 50_000)}) == expected


# ------------------------------------------------------------------------ streams


SCOPE: Scope = {
    "type": "http", "method": "GET", "path": "/v1/jobs", "headers": [], "client": ("192.0.2.7", 1),
}  # fmt: skip


def ask(app: Any, path: str, receive: Receive, caller: Caller | None = None) -> "Answer":
    """Begin one request of an ASGI application."""
    state = {"caller": caller or Caller(key_id=None, sees_all=True)}
    scope: Scope = {**SCOPE, "path": path, "state": state}
    return Answer(app, scope, receive)


class Answer:
    """A request that is being answered."""

    def __init__(self, app: Any, scope: Scope, receive: Receive) -> None:
        self.messages: list[Message] = []

        async def send(message: Message) -> None:
            self.messages.append(message)

        self.task = asyncio.ensure_future(app(scope, receive, send))

    @property
    def status(self) -> int | None:
        """None before it begins."""
        return self.messages[0]["status"] if self.messages else None


async def nothing() -> Message:
    """What comes of a body that does not come."""
    await asyncio.Event().wait()
    raise AssertionError


async def forever(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An application that answers, and goes on."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.Event().wait()


def test_streams() -> None:
    """One more open stream than is allowed is refused; a closed one makes room again."""

    async def run() -> list[int | None]:
        app = StreamLimit(forever, most=2)
        first, second, third = (ask(app, "/v1/jobs/x/events", nothing) for _ in range(3))
        other = ask(app, "/v1/jobs/x", nothing)
        await asyncio.sleep(0.01)
        first.task.cancel()
        await asyncio.sleep(0.01)
        fourth = ask(app, "/v1/jobs/x/events", nothing)
        await asyncio.sleep(0.01)
        for answer in (second, fourth, other):
            answer.task.cancel()
        await asyncio.sleep(0.01)
        assert not app._open  # nobody is remembered for nothing
        return [answer.status for answer in (first, second, third, other, fourth)]

    assert asyncio.run(run()) == [200, 200, 429, 200, 200]


def test_streams_of_the_service(client_of: Any) -> None:
    """The service has that limit, with the place where it is set."""
    client = client_of(max_streams=1)
    limit = next(m for m in client.app.user_middleware if m.cls is StreamLimit)
    job = client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    client.post(f"/v1/jobs/{job}:cancel")

    assert limit.kwargs == {"most": 1}
    for _ in range(3):  # each is over before the next
        assert client.get(f"/v1/jobs/{job}/events").status_code == 200


# --------------------------------------------------------------------- slow bodies


def test_slow_body() -> None:
    """A body that does not come in time is given up, and no one that came is hurried."""

    async def read(_scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run(*messages: Message) -> Answer:
        left = iter(messages)

        async def receive() -> Message:
            return next(left, None) or await nothing()

        answer = ask(BodyLimit(read, max_bytes=100, max_s=0.1), "/", receive)
        await asyncio.wait([answer.task])
        return answer

    part = {"type": "http.request", "body": b"x", "more_body": True}
    slow, quick = asyncio.run(run(part, part)), asyncio.run(run(part, {**part, "more_body": False}))

    assert "within 0.1 seconds" in str(slow.task.exception())
    assert quick.status == 200


class Impatient(BoundedProtocol):
    """For a test that does not wait for half a minute."""

    headers_s = 1.0


async def hello(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An application that answers."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """To a server that soon loses patience."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            hello, http=Impatient, timeout_keep_alive=3, log_config=None, lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with socket.create_connection(listener.getsockname()) as opened:
            opened.settimeout(60)
            yield opened
        server.should_exit = True
        thread.join()


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", REQUEST[:-2]])
def test_slow_headers(connection: socket.socket, sent: bytes) -> None:
    """A connection on which no whole request comes is closed, whatever has come of it."""
    began = time.monotonic()
    connection.sendall(sent)

    assert connection.recv(100) == b""
    assert time.monotonic() - began < 30


def test_slow_next_headers(connection: socket.socket) -> None:
    """So is one whose first request came in time, and the second does not."""
    connection.sendall(REQUEST)
    assert b"200 OK" in connection.recv(1000)
    connection.sendall(REQUEST[:10])

    while connection.recv(1000):
        pass


def test_patient_with_requests(connection: socket.socket) -> None:
    """One that is used on and on stays open."""
    for _ in range(6):
        connection.sendall(REQUEST)
        answer = b""
        while not answer.endswith(b"hello\r\n0\r\n\r\n"):
            part = connection.recv(1000)
            assert part
            answer += part
        time.sleep(0.25)


class Slow(BoundedProtocol):
    """For a test of clients that do not read."""

    write_s = 0.2


async def large(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An application whose answers no buffer of a system holds."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * 2**25})


@contextmanager
def served(app: Any, protocol: type[BoundedProtocol]) -> Iterator[tuple[str, int]]:
    """The address of an application that is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=protocol, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


def test_slow_reader() -> None:
    """A client that reads next to nothing of its answer is given up; one that reads gets all."""
    with served(large, Slow) as address:
        with socket.create_connection(address) as connection:
            connection.sendall(REQUEST)
            connection.settimeout(60)
            while not Slow.connections_open._all:
                time.sleep(0.01)
            while Slow.connections_open._all:  # the server closes it, though nothing is read
                time.sleep(0.01)
        with socket.create_connection(address) as connection:
            connection.sendall(REQUEST)
            read = 0
            while read < 2**25:
                read += len(connection.recv(2**22))
                time.sleep(0.01)


def test_idle_connections_make_room() -> None:
    """Who opens many connections that do nothing keeps nobody out; the oldest are closed."""
    protocol = type("Few", (BoundedProtocol,), {"connections_open": Connections(4, 4)})
    with served(hello, protocol) as address:
        idle = [socket.create_connection(address) for _ in range(12)]
        answers = []
        for _ in range(5):
            with socket.create_connection(address) as connection:
                connection.settimeout(60)
                connection.sendall(REQUEST)
                answers.append(connection.recv(100)[:15])
        for connection in idle:
            connection.close()

    assert answers == [b"HTTP/1.1 200 OK"] * 5


def test_busy_connections_of_a_host() -> None:
    """One host's connections that all are busy leave room for others', and are not ended."""

    class Busy:
        rests, host, transport = False, "", None

    connections = Connections(10, 2)
    mine: list[Any] = [Busy() for _ in range(4)]

    assert [connections.enter(each, "a") for each in mine] == [True, True, False, False]
    assert connections.enter(Busy(), "b")  # type: ignore[arg-type]
    connections.leave(mine[0], "a")
    assert connections.enter(mine[2], "a")
    for each in mine:
        connections.leave(each, "a")
    assert "a" not in connections._of


def test_forwarded_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose X-Forwarded-For is believed is set; nobody's is, unless it is."""
    assert read_settings().trusted_proxies == ()
    monkeypatch.setenv("PHO_TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8")
    assert read_settings().trusted_proxies == ("127.0.0.1", "10.0.0.0/8")
    monkeypatch.setenv("PHO_TRUSTED_PROXIES", "proxy.example")
    with pytest.raises(InvalidInput, match="PHO_TRUSTED_PROXIES"):
        read_settings()


def test_wrong_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is no number, or below none, is refused with its name."""
    for name, value in (
        ("PHO_MAX_TRIALS", "0"), ("PHO_MAX_TOKENS", "many"), ("PHO_MAX_STREAMS", "0"),
        ("PHO_MAX_REQUESTS_PER_MINUTE", "-1"), ("PHO_MAX_WRONG_KEYS_PER_MINUTE", "-1"),
    ):  # fmt: skip
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(InvalidInput, match=f"{name}='{value}'"):
                read_settings()
