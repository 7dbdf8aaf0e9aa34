"""Who gets in, and which jobs a key reaches."""

import base64
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.api import jobs
from storage.keys import KeyStore
from storage.records import StageKind

Refusal = Callable[..., dict[str, Any]]
Headers = dict[str, str]

DOCUMENT = {"model": "org/name", "pattern": "0.5"}
NOBODY = "00000000-0000-0000-0000-000000000000"

# Everything that there is but the pages for people, by method and path.
OPERATIONS = [
    ("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/{}"), ("DELETE", "/v1/jobs/{}"),
    ("GET", "/v1/jobs/{}/trials"), ("GET", "/v1/jobs/{}/best"), ("GET", "/v1/jobs/{}/events"),
    ("GET", "/v1/jobs/{}/report"),
    ("POST", "/v1/jobs/{}:cancel"), ("POST", "/v1/jobs/{}:pause"), ("POST", "/v1/jobs/{}:resume"),
    ("POST", "/v1/jobs/{}:extend"), ("GET", "/v1/configurations"), ("POST", "/v1/configurations"),
    ("GET", f"/v1/configurations/{NOBODY}"), ("DELETE", f"/v1/configurations/{NOBODY}"),
    ("GET", "/v1/workers"), ("GET", "/metrics"), ("GET", "/docs"),
    ("GET", "/openapi.json"), ("GET", "/dashboard"), ("GET", "/api/studies"),
    ("GET", "/static/bundle.js"), ("GET", "/nope"), ("GET", "/v1/nope"), ("POST", "/api/studies"),
]  # fmt: skip


def bearer(secret: str) -> Headers:
    """As programs send it."""
    return {"Authorization": f"Bearer {secret}"}


def basic(user: str, password: str) -> Headers:
    """As browsers send it."""
    value = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {value}"}


@pytest.fixture
def secret(keys: KeyStore) -> str:
    """Of a key that sees its own jobs."""
    return keys.create("own", sees_all=False)[1]


# ----------------------------------------------------------------------- who gets in


def test_as_long_as_no_key_was_made_anybody_on_this_machine_may_come_in(client: TestClient) -> None:
    assert client.get("/v1/jobs").status_code == 200


def test_needed_from_the_start(client_of: Any, refusal: Refusal) -> None:
    """Where keys are needed, nobody comes in before the first is made either."""
    refusal(client_of(keys_needed=True).get("/v1/jobs"), 401, "no_key")


def test_anonymous(client: TestClient, refusal: Refusal, secret: str) -> None:
    """Once there is a key, nothing is answered without one, and the way in is named."""
    del secret
    for method, path in OPERATIONS:
        answer = client.request(method, path.format(NOBODY), json={"trials": 1})
        scheme = "Bearer" if path.startswith("/v1") else 'Basic realm="PHO"'

        assert "pho keys create" in refusal(answer, 401, "no_key")["detail"]
        assert answer.headers["www-authenticate"] == scheme


def test_link_to_a_report(client: TestClient, secret: str) -> None:
    """A browser that follows a link to a report logs in first; the report opens after it."""
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    job = client.post("/v1/jobs", json=DOCUMENT, headers=bearer(secret)).json()["id"]
    link = f"/v1/jobs/{job}/report"
    led = client.get(link, headers=browser)
    form = {"key": secret, "next": link}
    report = client.post("/login", data=form, headers=browser)

    assert led.url.path == "/login"
    assert report.url.path == link
    assert "PHO report</title>" in report.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_open(client_of: Any, path: str) -> None:
    """Whoever looks after the process needs no key, and may ask under any name."""
    client = client_of(keys_needed=True)

    assert client.get(path).json() == {"status": "ok"}
    assert client.get(path, headers={"Host": "10.1.2.3:8000"}).status_code == 200


def test_right_key(client: TestClient, secret: str) -> None:
    """A key is taken in each of the ways that it may be given."""
    for headers in (
        bearer(secret),
        {"Authorization": f"bearer   {secret} "},
        {"authorization": f"BEARER {secret}"},
        basic("", secret),
        basic("anybody", secret),
    ):
        assert client.get("/v1/jobs", headers=headers).status_code == 200, headers


def test_wrong_key(client: TestClient, refusal: Refusal, secret: str) -> None:
    """Whatever is not the key is refused."""
    for headers in (
        bearer("pho_wrong"),
        bearer(secret[:-1]),
        bearer(secret + "x"),
        bearer(secret.swapcase()),
        bearer(""),
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic /////w=="},  # no UTF-8
        {"Authorization": "Negotiate abc"},
        {"Authorization": f"Digest {secret}"},
        {"X-Api-Key": secret},
        basic(secret, ""),
        basic("", f"{secret}:"),
    ):
        refusal(client.get("/v1/jobs", headers=headers), 401, "no_key")
    refusal(client.get("/v1/jobs", params={"key": secret}), 401)
    for raw in (b"Bearer \xff\xfe", b"Bearer \x80", b"Basic \xe9"):
        answer = client.get("/v1/jobs", headers={b"authorization": raw})
        refusal(answer, 401, "no_key")


def test_wrong_key_without_keys(client: TestClient, refusal: Refusal) -> None:
    """Who gives a wrong key is told so, even if none is needed."""
    refusal(client.get("/v1/jobs", headers=bearer("pho_wrong")), 401, "no_key")


def test_revoked(client: TestClient, refusal: Refusal, keys: KeyStore) -> None:
    """A key that is revoked opens nothing from then on, and anonymous callers stay out."""
    key, secret = keys.create("short", sees_all=True)
    before = client.get("/v1/jobs", headers=bearer(secret))
    keys.revoke(key.prefix)

    assert before.status_code == 200
    refusal(client.get("/v1/jobs", headers=bearer(secret)), 401, "no_key")
    refusal(client.get("/v1/jobs"), 401, "no_key")


def test_expired(client: TestClient, refusal: Refusal, keys: KeyStore) -> None:
    """A key that has expired opens nothing, and the answer says that it may have."""
    _, secret = keys.create("short", sees_all=True, lasts=timedelta(seconds=-1))

    refused = refusal(client.get("/v1/jobs", headers=bearer(secret)), 401, "no_key")
    assert "has expired" in refused["detail"]


def test_first_key_while_running(client: TestClient, refusal: Refusal, keys: KeyStore) -> None:
    """The first key closes a service that runs already."""
    before = client.get("/v1/jobs")
    _, secret = keys.create("first", sees_all=False)

    assert before.status_code == 200
    refusal(client.get("/v1/jobs"), 401)
    assert client.get("/v1/jobs", headers=bearer(secret)).status_code == 200


# --------------------------------------------------------------------- other sites


HOSTS = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0",  # noqa: S104 - not bound, asked for
    "localhost@evil.example", "[::2]", "", "[", "[::1", "a]b", "localhost evil", "%", "\xe9",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/jobs", "/dashboard", "/metrics", "/docs"])
def test_foreign_host(shared_client: TestClient, refusal: Refusal, path: str) -> None:
    """Without keys, a request under another name than this machine's is refused."""
    for host in HOSTS:
        answer = shared_client.get(path, headers={b"host": host.encode("latin-1")})
        refusal(answer, 403, "other_site")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.8.8:1", "[::1]", "[::1]:8000"]
)
def test_own_host(shared_client: TestClient, host: str) -> None:
    """All names of this machine for itself are its own."""
    assert shared_client.get("/v1/jobs", headers={"Host": host}).status_code == 200


ORIGINS = [
    "http://evil.example", "https://localhost.evil.example", "null", "", "file://",
    "http://localhost@evil.example", "http://[", "http://[::1", "x", "http://", "\xe9",
]  # fmt: skip


def test_foreign_origin(shared_client: TestClient, refusal: Refusal) -> None:
    """Without keys, no page of another site can change anything through a browser here."""
    for origin in ORIGINS:
        answer = shared_client.post(
            "/v1/jobs", json=DOCUMENT, headers={b"origin": origin.encode("latin-1")}
        )
        refusal(answer, 403, "other_site")

    assert shared_client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("origin", ["http://localhost:8000", "http://127.0.0.1", "https://[::1]"])
def test_a_page_of_this_machine_may(shared_client: TestClient, origin: str) -> None:
    answer = shared_client.post("/v1/jobs", json=DOCUMENT, headers={"Origin": origin})

    assert answer.status_code == 202


def test_no_answer_lets_another_sites_page_read_it(client: TestClient) -> None:
    answer = client.get("/v1/jobs", headers={"Origin": "http://evil.example"})

    assert not [h for h in answer.headers if h.startswith("access-control-")]


def test_foreign_host_with_key(client: TestClient, secret: str) -> None:
    """With a key, the name that a service is reached by does not matter."""
    headers = {**bearer(secret), "Host": "pho.example", "Origin": "https://pho.example"}

    assert client.post("/v1/jobs", json=DOCUMENT, headers=headers).status_code == 202


# ------------------------------------------------------------------- whose jobs they are


@pytest.fixture
def others(client: TestClient, keys: KeyStore, hand: Any) -> dict[str, Any]:
    """A job of another key, which has succeeded."""
    headers = bearer(keys.create("other", sees_all=False)[1])
    job = client.post("/v1/jobs", json=DOCUMENT, headers=headers).json()
    hand.succeed(job["id"])
    assert isinstance(job, dict)
    return job


def test_anothers_job(
    client: TestClient, refusal: Refusal, secret: str, others: dict[str, Any], hand: Any
) -> None:
    """To a key, another key's job is not there in any operation, nor does any change it."""
    before = hand.store.page()
    headers = {**bearer(secret), "X-Request-ID": "a"}
    for method, path in OPERATIONS:
        if "{}" in path:
            anothers, nobodys = (
                client.request(method, path.format(job), json={"trials": 1}, headers=headers)
                for job in (others["id"], NOBODY)
            )

            refusal(anothers, 404, "no_such_job")
            assert anothers.json() == nobodys.json()
    assert hand.store.page() == before


def test_anonymous_jobs(client: TestClient, refusal: Refusal, keys: KeyStore) -> None:
    """Jobs from before the first key are seen by keys that see all, and by no other."""
    job = client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    own, admin = (bearer(keys.create("k", sees_all=s)[1]) for s in (False, True))

    refusal(client.get(f"/v1/jobs/{job}", headers=own), 404)
    assert client.get(f"/v1/jobs/{job}", headers=admin).json()["id"] == job


def test_own_list(client: TestClient, secret: str, others: dict[str, Any]) -> None:
    """A key lists its own jobs, page by page, with any filter."""
    own = [
        client.post("/v1/jobs", json=DOCUMENT, headers=bearer(secret)).json()["id"]
        for _ in range(3)
    ]
    headers = bearer(secret)
    first = client.get("/v1/jobs", params={"page_size": 2}, headers=headers).json()
    params = {"page_size": 2, "page_token": first["next_page_token"]}
    second = client.get("/v1/jobs", params=params, headers=headers).json()
    succeeded = client.get("/v1/jobs", params={"state": "succeeded"}, headers=headers).json()

    assert [j["id"] for j in first["jobs"] + second["jobs"]] == own[::-1]
    assert second["next_page_token"] is None
    assert succeeded["jobs"] == []
    assert others["id"] not in own


def test_sees_all(client: TestClient, keys: KeyStore, others: dict[str, Any]) -> None:
    """A key that sees all reaches every job with every operation."""
    headers = bearer(keys.create("admin", sees_all=True)[1])
    url = f"/v1/jobs/{others['id']}"

    assert [j["id"] for j in client.get("/v1/jobs", headers=headers).json()["jobs"]] == [
        others["id"]
    ]
    for what in ("", "/trials", "/best", "/events"):
        assert client.get(url + what, headers=headers).status_code == 200
    assert client.post(f"{url}:extend", json={"trials": 1}, headers=headers).status_code == 202
    assert client.post(f"{url}:cancel", headers=headers).status_code == 202
    assert client.delete(url, headers=headers).status_code == 204


def test_urgent_jobs_are_few(client_of: Any, keys: KeyStore, refusal: Refusal) -> None:
    """A key may have few unfinished jobs that go before others', and as many others as before."""
    client = client_of(max_urgent_jobs=1)
    key = bearer(keys.create("a", sees_all=False)[1])
    urgent = client.post("/v1/jobs", json={**DOCUMENT, "priority": 1}, headers=key)
    refused = client.post("/v1/jobs", json={**DOCUMENT, "priority": 100}, headers=key)

    assert urgent.status_code == 202
    assert "PHO_MAX_URGENT_JOBS" in refusal(refused, 429, "too_many_urgent_jobs")["detail"]
    assert client.post("/v1/jobs", json=DOCUMENT, headers=key).status_code == 202
    client.post(f"/v1/jobs/{urgent.json()['id']}:cancel", headers=key)
    again = client.post("/v1/jobs", json={**DOCUMENT, "priority": 100}, headers=key)
    assert again.status_code == 202


def test_finished_jobs_are_limited(client_of: Any, keys: KeyStore, refusal: Refusal) -> None:
    """Submitting and cancelling for ever fills no disk: what is over must be deleted once."""
    client = client_of(max_finished_jobs=2)
    key = bearer(keys.create("a", sees_all=False)[1])
    for _ in range(2):
        job = client.post("/v1/jobs", json=DOCUMENT, headers=key).json()["id"]
        client.post(f"/v1/jobs/{job}:cancel", headers=key)

    refused = client.post("/v1/jobs", json=DOCUMENT, headers=key)
    assert "PHO_MAX_FINISHED_JOBS" in refusal(refused, 429, "too_many_finished_jobs")["detail"]
    client.delete(f"/v1/jobs/{job}", headers=key)
    assert client.post("/v1/jobs", json=DOCUMENT, headers=key).status_code == 202


def test_workers_do_not_tell(client: TestClient, keys: KeyStore, secret: str, hand: Any) -> None:
    """The list of workers does not tell a key of another key's job."""
    other = bearer(keys.create("other", sees_all=False)[1])
    job = client.post("/v1/jobs", json=DOCUMENT, headers=other).json()["id"]
    hand.store.enter_worker(hand.worker_id, name="host:1", device="cpu", kinds=list(StageKind))
    hand.take(job, StageKind.CALIBRATE)
    own, others = (
        client.get("/v1/workers", headers=h).json()["workers"] for h in (bearer(secret), other)
    )

    assert [w["job_id"] for w in others] == [job]
    assert [(w["name"], w["job_id"], w["stage"]) for w in own] == [("worker 1", None, None)]
    admin = bearer(keys.create("admin", sees_all=True)[1])
    (seen,) = client.get("/v1/workers", headers=admin).json()["workers"]
    assert (seen["name"], seen["job_id"], seen["stage"]) == ("host:1", job, "calibrate")


def test_they_count_everybodys_jobs_so_they_are_for_keys_that_see_all(
    client: TestClient, keys: KeyStore, secret: str, refusal: Refusal
) -> None:
    refusal(client.get("/metrics", headers=bearer(secret)), 403, "not_for_this_key")
    admin = bearer(keys.create("admin", sees_all=True)[1])
    assert client.get("/metrics", headers=admin).status_code == 200


def test_revoked_key_ends_its_streams(
    client_of: Any, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "EVENTS_EVERY_S", 0.01)
    client = client_of()
    key, secret = keys.create("gone", sees_all=False)
    job = client.post("/v1/jobs", json=DOCUMENT, headers=bearer(secret)).json()["id"]
    looked = []

    def is_open(key_id: Any) -> bool:
        looked.append(key_id)
        if len(looked) == 3:
            keys.revoke(str(key.id))
        return KeyStore.is_open(keys, key_id)

    monkeypatch.setattr(client.app.state.service.keys, "is_open", is_open)
    answer = client.get(f"/v1/jobs/{job}/events", headers=bearer(secret))

    assert answer.text.count("event: state") == 1
    assert looked == [key.id] * 3


def test_first_key_ends_streams_without(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "EVENTS_EVERY_S", 0.01)
    client = client_of()
    job = client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    monkeypatch.setattr(client.app.state.service.keys, "exist", iter([False, False, True]).__next__)

    assert client.get(f"/v1/jobs/{job}/events").text.count("event: state") == 1


def test_the_dashboard_which_shows_every_study_is_for_keys_that_see_all(
    client: TestClient, keys: KeyStore, refusal: Refusal, secret: str
) -> None:
    admin = basic("", keys.create("admin", sees_all=True)[1])
    for path in ("/dashboard", "/api/studies", "/csv/1", "/artifacts/1/2"):
        problem = refusal(client.get(path, headers=bearer(secret)), 403, "not_for_this_key")

        assert "--all-jobs" in problem["detail"]
        assert client.get(path, headers=admin).status_code not in (401, 403)


# ------------------------------------------------------------------------- secrecy


def test_secrets_stay_secret(
    client: TestClient, keys: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer and no line of the log has a key in it, right or wrong."""
    _, right = keys.create("k", sees_all=True)
    wrong = "pho_" + "w" * 43
    texts = []
    with caplog.at_level(logging.DEBUG):
        for secret in (right, wrong):
            for headers in (bearer(secret), basic("", secret)):
                for method, path in OPERATIONS:
                    answer = client.request(
                        method, path.format(NOBODY), json={"trials": 0}, headers=headers
                    )
                    texts.append(answer.text + str(answer.headers))

    encoded = [base64.b64encode(f":{s}".encode()).decode() for s in (right, wrong)]
    for secret in (right, wrong, *encoded):
        assert not [t for t in texts if secret in t]
        assert secret not in caplog.text


def test_many_at_once(client: TestClient, keys: KeyStore) -> None:
    """Callers with different keys at the same time get their own jobs each."""
    headers = [bearer(keys.create(str(i), sees_all=False)[1]) for i in range(4)]

    def ask(number: int) -> tuple[set[str], set[str]]:
        mine = headers[number % 4]
        name = f"of {number % 4}"
        for _ in range(3):
            client.post("/v1/jobs", json={**DOCUMENT, "name": name}, headers=mine)
        jobs = client.get("/v1/jobs", headers=mine).json()["jobs"]
        return {name}, {j["spec"]["name"] for j in jobs}

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(ask, range(8))]

    assert all(expected == seen for expected, seen in found)
