"""How large a job may be, and how much and how often somebody may ask."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Scope

from pho_service.api.guard import KeyGuard, Rate, host_of
from pho_service.errors import InvalidInput
from pho_service.host.settings import read_settings
from pho_service.spec.fields import JobLimits
from storage.keys import KeyStore
from storage.records import JobState, TooManyTrials

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
def test_just_as_much_as_is_allowed_is_taken(limited: TestClient, changes: dict[str, Any]) -> None:
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


def test_0_is_no_limit(client_of: Any) -> None:
    client = client_of(max_requests_per_minute=0, max_wrong_keys_per_minute=0)

    assert {client.get("/v1/jobs").status_code for _ in range(20)} == {200}
    assert {client.get("/v1/jobs", headers=bearer("x")).status_code for _ in range(20)} == {401}


def test_who_is_refused_without_a_key_costs_no_question_to_the_database(
    client_of: Any, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
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


SCOPE: Scope = {
    "type": "http", "method": "GET", "path": "/v1/jobs", "headers": [], "client": ("192.0.2.7", 1),
}  # fmt: skip


def test_wrong_keys_at_once(client_of: Any, keys: KeyStore) -> None:
    """Those that are tried at the same time count before it is known that they are wrong."""
    keys.create("some", sees_all=False)
    client = client_of(max_wrong_keys_per_minute=5)
    guard = KeyGuard(lambda *_: None, client.app.state.service)  # type: ignore[arg-type, return-value]

    async def run() -> list[int | None]:
        statuses: list[int | None] = []

        async def ask(number: int) -> None:
            async def send(message: Message) -> None:
                statuses.append(message.get("status"))

            headers = [(b"authorization", b"Bearer %d" % number)]
            await guard({**SCOPE, "headers": headers}, asyncio.Event().wait, send)

        await asyncio.gather(*map(ask, range(30)))
        return statuses

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
        ("PHO_MAX_TRIALS", "0"), ("PHO_MAX_TOKENS", "many"),
        ("PHO_MAX_REQUESTS_PER_MINUTE", "-1"), ("PHO_MAX_WRONG_KEYS_PER_MINUTE", "-1"),
    ):  # fmt: skip
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(InvalidInput, match=f"{name}='{value}'"):
                read_settings()
