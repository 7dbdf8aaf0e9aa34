"""Who gets in, and which jobs a key reaches."""

import base64
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from pho_service.api import jobs
from pho_service.spec.fields import JobLimits
from pho_service.spec.job import JobSpec
from storage.keys import KeyStore, Quota
from storage.records import StageKind

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}
NOBODY = "00000000-0000-0000-0000-000000000000"


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def basic(user, password):
    value = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {value}"}


@pytest.fixture
def secret(keys):
    return keys.create("own", sees_all=False)[1]


@pytest.mark.usefixtures("secret")
def test_anonymous(client, refusal, operations):
    """Once there is a key, nothing is answered without one, and the way in is named."""
    for method, path in operations:
        answer = client.request(method, path.format(NOBODY), json={"trials": 1})
        scheme = "Bearer" if path.startswith("/v1") else 'Basic realm="PHO"'

        assert "pho keys create" in refusal(answer, 401, "no_key")["detail"]
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
        assert answer.headers["www-authenticate"] == scheme


def test_a_job_that_the_quota_has_no_room_for(client, keys, refusal, hand):
    """The answer says what is used, what the job would take, and when to come again."""
    tokens = JobSpec.model_validate(DOCUMENT).check_size(JobLimits(trials=10**6, tokens=10**9))
    quota = Quota(2 * tokens + 1, timedelta(hours=12))
    headers = bearer(keys.create("team", sees_all=False, quota=quota)[1])
    other = bearer(keys.create("other", sees_all=False)[1])
    job = client.post("/v1/jobs", json=DOCUMENT, headers=headers).json()["id"]
    client.post("/v1/jobs", json=DOCUMENT, headers=headers)
    refused = client.post("/v1/jobs", json=DOCUMENT, headers=headers)
    hand.succeed(job)
    extended = client.post(f"/v1/jobs/{job}:extend", json={"trials": 1}, headers=headers)
    pruned = client.post(f"/v1/jobs/{job}:prune", headers=headers)
    page = client.post("/new", data={"model": "org/name", "pattern": "0.5"}, headers=headers)
    large = {**DOCUMENT, "calibration": {"samples": 512, "context_length": 2048}}

    told = refusal(refused, 429, "quota_exceeded")["detail"]
    assert f"The quota of key 'team' is {quota}. {2 * tokens:,} tokens are used" in told
    assert f"planned to take {tokens:,} tokens. Enough is free from 20" in told
    assert 11 * 3600 < int(refused.headers["retry-after"]) <= 12 * 3600
    for answer in (extended, pruned):
        refusal(answer, 429, "quota_exceeded")
    assert page.status_code == 429
    assert "Enough is free from" in page.text
    never = refusal(client.post("/v1/jobs", json=large, headers=headers), 422, "job_too_large")
    assert "more than the whole quota" in never["detail"]
    assert client.post("/v1/jobs", json=DOCUMENT, headers=other).status_code == 202


def test_a_job_that_fails_before_it_has_begun_gives_its_tokens_back(client, keys, hand, refusal):
    tokens = JobSpec.model_validate(DOCUMENT).check_size(JobLimits(trials=10**6, tokens=10**9))
    quota = Quota(tokens, timedelta(hours=12))
    headers = bearer(keys.create("team", sees_all=False, quota=quota)[1])
    first = client.post("/v1/jobs", json=DOCUMENT, headers=headers).json()["id"]
    hand.fail(first)
    second = client.post("/v1/jobs", json=DOCUMENT, headers=headers)
    again = client.post(f"/v1/jobs/{first}:resume", headers=headers)

    assert second.status_code == 202
    refusal(again, 429, "quota_exceeded")
    hand.fail(second.json()["id"])
    assert client.post(f"/v1/jobs/{first}:resume", headers=headers).status_code == 202


def test_where_keys_are_needed_nobody_comes_in_before_but_probes_by_any_name(client_of, refusal):
    client = client_of(keys_needed=True, max_requests_per_minute=1)
    refusal(client.get("/v1/jobs"), 401, "no_key")
    for path in ("/healthz", "/readyz"):
        assert client.get(path).json()["status"] == "ok"
        assert client.get(path, headers={"Host": "10.1.2.3:8000"}).status_code == 200


def test_a_key_may_be_given_in_each_of_these_ways_and_no_other(client, refusal, secret):
    for headers in (
        bearer(secret),
        {"Authorization": f"bearer   {secret} "},
        {"authorization": f"BEARER {secret}"},
        basic("", secret),
        basic("anybody", secret),
    ):
        assert client.get("/v1/jobs", headers=headers).status_code == 200, headers
    for headers in (
        *map(bearer, ("pho_wrong", secret[:-1], secret + "x", secret.swapcase(), "")),
        *(
            {"Authorization": value}
            for value in ("", "Bearer", "Basic", "Basic !!!", "Negotiate abc", f"Digest {secret}")
        ),
        {"Authorization": "Basic /////w=="},  # no UTF-8
        {"X-Api-Key": secret},
        basic(secret, ""),
        basic("", f"{secret}:"),
    ):
        refusal(client.get("/v1/jobs", headers=headers), 401, "no_key")
    refusal(client.get("/v1/jobs", params={"key": secret}), 401)
    for raw in (b"Bearer \xff\xfe", b"Bearer \x80", b"Basic \xe9"):
        answer = client.get("/v1/jobs", headers={b"authorization": raw})
        refusal(answer, 401, "no_key")


def test_the_first_key_closes_a_service_one_that_ended_opens_nothing(client, refusal, keys):
    before = client.get("/v1/jobs")
    wrong = client.get("/v1/jobs", headers=bearer("pho_wrong"))
    key, revoked = keys.create("first", sees_all=False)
    after = client.get("/v1/jobs", headers=bearer(revoked))
    _, expired = keys.create("short", sees_all=True, lasts=timedelta(seconds=-1))
    keys.revoke(key.prefix)

    assert (before.status_code, after.status_code) == (200, 200)
    refusal(wrong, 401, "no_key")
    for secret in (revoked, expired):
        refused = refusal(client.get("/v1/jobs", headers=bearer(secret)), 401, "no_key")
        assert "has expired, or was revoked" in refused["detail"]
    refusal(client.get("/v1/jobs"), 401, "no_key")


HOSTS = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0",  # noqa: S104 - not bound, asked for
    "localhost@evil.example", "[::2]", "", "[", "[::1", "a]b", "localhost evil", "%", "\xe9",
]  # fmt: skip


def test_requests_by_other_names_are_refused_those_of_this_machine_or_a_key_will_do(
    client, refusal, bearer_of
):
    for path in ("/v1/jobs", "/dashboard", "/metrics", "/docs"):
        for host in HOSTS:
            answer = client.get(path, headers={b"host": host.encode("latin-1")})
            refusal(answer, 403, "other_site")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.8.8:1", "[::1]", "[::1]:8000"):
        assert client.get("/v1/jobs", headers={"Host": host}).status_code == 200, host
    for origin in ("http://localhost:8000", "http://127.0.0.1", "https://[::1]"):
        answer = client.post("/v1/jobs", json=DOCUMENT, headers={"Origin": origin})
        assert answer.status_code == 202, origin
    headers = {**bearer_of("own"), "Host": "pho.example", "Origin": "https://pho.example"}
    assert client.post("/v1/jobs", json=DOCUMENT, headers=headers).status_code == 202


ORIGINS = [
    "http://evil.example", "https://localhost.evil.example", "null", "", "file://",
    "http://localhost@evil.example", "http://[", "http://[::1", "x", "http://", "\xe9",
]  # fmt: skip


def test_without_keys_no_other_site_changes_anything(client, refusal):
    for origin in ORIGINS:
        answer = client.post(
            "/v1/jobs", json=DOCUMENT, headers={b"origin": origin.encode("latin-1")}
        )
        refusal(answer, 403, "other_site")

    read = client.get("/v1/jobs", headers={"Origin": "http://evil.example"})
    assert read.json()["jobs"] == []
    assert not [h for h in read.headers if h.startswith("access-control-")]  # nor can it read that


@pytest.fixture
def others(client, bearer_of, hand):
    """A job of another key, which has succeeded."""
    headers = bearer_of("other")
    job = client.post("/v1/jobs", json=DOCUMENT, headers=headers).json()
    hand.succeed(job["id"])
    assert isinstance(job, dict)
    return job


def test_to_a_key_the_job_of_another_is_not_there_in_any_operation_nor_changed(
    client, refusal, secret, others, hand, operations
):
    before = hand.store.page()
    headers = {**bearer(secret), "X-Request-ID": "a"}
    for method, path in operations:
        if "{}" in path:
            body = {"models": ["org/a"]} if path.endswith(":transfer") else {"trials": 1}
            anothers, nobodys = (
                client.request(method, path.format(job), json=body, headers=headers)
                for job in (others["id"], NOBODY)
            )

            refusal(anothers, 404, "no_such_job")
            assert anothers.json() == nobodys.json()
    assert hand.store.page() == before


@pytest.mark.usefixtures("others")
def test_a_key_lists_its_own_jobs_with_any_filter(client, secret):
    headers = bearer(secret)
    own = [client.post("/v1/jobs", json=DOCUMENT, headers=headers).json()["id"] for _ in range(3)]
    first = client.get("/v1/jobs", params={"page_size": 2}, headers=headers).json()
    params = {"page_size": 2, "page_token": first["next_page_token"]}
    second = client.get("/v1/jobs", params=params, headers=headers).json()
    succeeded = client.get("/v1/jobs", params={"state": "succeeded"}, headers=headers).json()

    assert [j["id"] for j in first["jobs"] + second["jobs"]] == own[::-1]
    assert second["next_page_token"] is None
    assert succeeded["jobs"] == []


def test_an_admin_reaches_all_and_alone_what_was_submitted_without_a_key(
    client, bearer_of, hand, refusal
):
    keyless = client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    headers, other = bearer_of("admin", sees_all=True), bearer_of("other")
    others = client.post("/v1/jobs", json=DOCUMENT, headers=other).json()
    hand.succeed(others["id"])
    refusal(client.get(f"/v1/jobs/{keyless}", headers=other), 404)
    url = f"/v1/jobs/{others['id']}"

    listed = client.get("/v1/jobs", headers=headers).json()["jobs"]
    assert [j["id"] for j in listed] == [others["id"], keyless]
    for what in ("", "/trials", "/best", "/events"):
        assert client.get(url + what, headers=headers).status_code == 200
    assert client.post(f"{url}:extend", json={"trials": 1}, headers=headers).status_code == 202
    assert client.post(f"{url}:cancel", headers=headers).status_code == 202
    assert client.delete(url, headers=headers).status_code == 204


def test_a_key_may_have_few_urgent_jobs_and_few_that_are_over(client_of, bearer_of, refusal):
    client = client_of(max_urgent_jobs=1, max_finished_jobs=2)
    key = bearer_of("a")
    urgent = client.post("/v1/jobs", json={**DOCUMENT, "priority": 1}, headers=key)
    refused = client.post("/v1/jobs", json={**DOCUMENT, "priority": 100}, headers=key)

    assert urgent.status_code == 202
    assert "PHO_MAX_URGENT_JOBS" in refusal(refused, 429, "too_many_urgent_jobs")["detail"]
    assert client.post("/v1/jobs", json=DOCUMENT, headers=key).status_code == 202
    client.post(f"/v1/jobs/{urgent.json()['id']}:cancel", headers=key)
    again = client.post("/v1/jobs", json={**DOCUMENT, "priority": 100}, headers=key)
    assert again.status_code == 202
    job = again.json()["id"]
    client.post(f"/v1/jobs/{job}:cancel", headers=key)
    refused = client.post("/v1/jobs", json=DOCUMENT, headers=key)
    assert "PHO_MAX_FINISHED_JOBS" in refusal(refused, 429, "too_many_finished_jobs")["detail"]
    client.delete(f"/v1/jobs/{job}", headers=key)
    assert client.post("/v1/jobs", json=DOCUMENT, headers=key).status_code == 202


def test_workers_do_not_tell(client, bearer_of, secret, hand):
    other = bearer_of("other")
    job = client.post("/v1/jobs", json=DOCUMENT, headers=other).json()["id"]
    hand.store.enter_worker(hand.worker_id, name="host:1", device="cpu", kinds=list(StageKind))
    hand.take(job, StageKind.CALIBRATE)
    own, others = (
        client.get("/v1/workers", headers=h).json()["workers"] for h in (bearer(secret), other)
    )

    assert [w["job_id"] for w in others] == [job]
    assert [(w["name"], w["job_id"], w["stage"]) for w in own] == [("worker 1", None, None)]
    admin = bearer_of("admin", sees_all=True)
    (seen,) = client.get("/v1/workers", headers=admin).json()["workers"]
    assert (seen["name"], seen["job_id"], seen["stage"]) == ("host:1", job, "calibrate")


def test_revoked_key_ends_its_streams(client_of, keys, monkeypatch):
    monkeypatch.setattr(jobs, "EVENTS_EVERY_S", 0.01)
    client = client_of()
    key, secret = keys.create("gone", sees_all=False)
    job = client.post("/v1/jobs", json=DOCUMENT, headers=bearer(secret)).json()["id"]
    service = client.app.state.service
    looked, told, found = [], [], service.jobs.events

    def is_open(key_id):
        looked.append(key_id)
        if len(looked) == 3:
            keys.revoke(str(key.id))
        return KeyStore.is_open(keys, key_id)

    def events(*given, **named):
        told.append(given)
        assert len(told) < 10, "the stream goes on"
        return found(*given, **named)

    monkeypatch.setattr(service.keys, "is_open", is_open)
    monkeypatch.setattr(service.jobs, "events", events)
    answer = client.get(f"/v1/jobs/{job}/events", headers=bearer(secret))

    assert answer.text.count("event: state") == 1
    assert looked == [key.id] * 3


def test_first_key_ends_streams_without(client_of, monkeypatch):
    monkeypatch.setattr(jobs, "EVENTS_EVERY_S", 0.01)
    client = client_of()
    job = client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    monkeypatch.setattr(client.app.state.service.keys, "exist", iter([False, False, True]).__next__)

    assert client.get(f"/v1/jobs/{job}/events").text.count("event: state") == 1


def test_dashboard_and_metrics_which_show_everybodys_jobs_are_for_keys_that_see_all(
    client, keys, refusal, secret
):
    admin = basic("", keys.create("admin", sees_all=True)[1])
    for path in ("/dashboard", "/api/studies", "/csv/1", "/artifacts/1/2", "/metrics"):
        problem = refusal(client.get(path, headers=bearer(secret)), 403, "not_for_this_key")

        assert "--all-jobs" in problem["detail"]
        assert client.get(path, headers=admin).status_code not in (401, 403)


def test_no_answer_and_no_line_of_the_log_has_a_key_in_it_right_or_wrong(
    client, keys, operations, caplog
):
    _, right = keys.create("k", sees_all=True)
    wrong = "pho_" + "w" * 43
    texts = []
    with caplog.at_level(logging.DEBUG):
        for secret in (right, wrong):
            for headers in (bearer(secret), basic("", secret)):
                for method, path in operations:
                    answer = client.request(
                        method, path.format(NOBODY), json={"trials": 0}, headers=headers
                    )
                    texts.append(answer.text + str(answer.headers))

    encoded = [base64.b64encode(f":{s}".encode()).decode() for s in (right, wrong)]
    for secret in (right, wrong, *encoded):
        assert not [t for t in texts if secret in t]
        assert secret not in caplog.text


def test_callers_at_the_same_time_get_their_own_jobs(client, bearer_of):
    headers = [bearer_of(str(i)) for i in range(4)]

    def ask(number):
        mine = headers[number % 4]
        name = f"of {number % 4}"
        for _ in range(3):
            client.post("/v1/jobs", json={**DOCUMENT, "name": name}, headers=mine)
        jobs = client.get("/v1/jobs", headers=mine).json()["jobs"]
        return {name}, {j["spec"]["name"] for j in jobs}

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(ask, range(8))]

    assert all(expected == seen for expected, seen in found)
