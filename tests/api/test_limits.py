"""How large a job may be, and how much and how often somebody may ask."""

import asyncio
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from starlette.types import Scope
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from pho_service.api.guard import KeyGuard, Rate, host_of
from pho_service.api.service import Service
from pho_service.errors import InvalidInput
from pho_service.host.settings import read_settings
from pho_service.planning.costs import named_machine
from pho_service.spec.fields import JobLimits
from storage.claims import worker_name
from storage.records import JobState, TooManyTrials

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}
SMALL = {"preset": "score", "calibration": {"samples": 10, "context_length": 100}, "confirm": None}


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def limited(client, monkeypatch):
    service = client.app.state.service  # type: ignore[attr-defined]
    monkeypatch.setattr(service, "limits", JobLimits(trials=1000, tokens=10_000))
    return client


def test_a_job_that_is_too_large_is_refused_at_the_field_with_the_limit(limited, refusal):
    one, ten = ({"finalists": n, "windows": n} for n in (1, 10))
    by_perplexity = {"objective": {"name": "perplexity"}, "trials": 50, "islands": 2}
    before = limited.get("/v1/jobs").json()
    for changes, pointer, says in (
        ({"trials": 501, "islands": 2}, "/trials", "501 trials on 2 islands are 1002"),
        ({"more_models": [f"org/m{i}" for i in range(10)]}, "/calibration/samples", "11000"),
        ({"confirm": ten}, "/confirm/windows", "11000"),
        ({"confirm": {**one, "windows": 2}, "validation": {"candidates": 45}},
         "/confirm/windows", "10800"),
        ({"confirm": one, **by_perplexity}, "/confirm/windows", "11100"),
    ):  # fmt: skip
        answer = limited.post("/v1/jobs", json={**DOCUMENT, **SMALL, **changes})
        (error,) = refusal(answer, 422, "job_too_large")["errors"]

        assert error["pointer"] == pointer
        assert says in error["detail"]
        assert "PHO_MAX_T" in error["detail"]
    assert limited.get("/v1/jobs").json() == before
    for changes in ({"trials": 500, "islands": 2}, {"confirm": {"finalists": 9, "windows": 10}}):
        answer = limited.post("/v1/jobs", json={**DOCUMENT, **SMALL, **changes})
        assert answer.status_code == 202, answer.text  # just as much as is allowed


@pytest.fixture
def spelling(tmp_path, write_small):
    """The name of a model for which each word is a token."""
    write_small(tmp_path / "spelling")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "spelling" / "tokenizer.json"))
    return "spelling"


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_text_that_leaves_no_window_to_confirm_on_is_refused_at_once(
    client, refusal, spelling, tmp_path, name
):
    words = "word " * 310  # ten windows of 32 tokens, the first of which BOS may be
    (tmp_path / name).write_text(words if name == "text.txt" else json.dumps({"text": words}))
    how = {"text": name, "context_length": 32, "samples": 10}
    document = {"model": spelling, "pattern": "0.5", "calibration": how}
    refused = refusal(client.post("/v1/jobs", json=document), 422)
    form = {"model": spelling, "pattern": "0.5", "calibration/text": name}
    form |= {"calibration/context_length": "32", "calibration/samples": "10"}
    page = client.post("/new", data=form)

    (error,) = refused["errors"]
    assert error["pointer"] == "/calibration/samples"
    assert error["detail"] == (
        f"{name} fills 10 windows of 32 tokens, and the calibration takes 10: none is left to "
        "confirm on. Give confirm.text, or fewer calibration.samples."
    )
    assert page.status_code == 422
    assert "none is left to confirm on" in page.text
    for changes in (
        {"calibration": {**how, "samples": 9}}, {"confirm": None}, {"confirm": {"text": name}},
        {"calibration": {"text": name}},
    ):  # fmt: skip
        assert client.post("/v1/jobs", json={**document, **changes}).status_code == 202, changes
    short = {**how, "context_length": 128, "samples": 1}
    (tmp_path / name).write_text('{"text": "a few words"}')
    refused = refusal(client.post("/v1/jobs", json={**document, "calibration": short}), 422)
    assert "fills 0 windows of 128 tokens. Give a longer text." in refused["detail"]


def test_a_tokenizer_that_cannot_be_read_in_seconds_is_left_to_the_worker(
    client, spelling, tmp_path, monkeypatch
):
    (tmp_path / "text.txt").write_text("word")
    how = {"text": "text.txt", "context_length": 32, "samples": 10}
    document = {"model": spelling, "pattern": "0.5", "calibration": how}
    statuses = [client.post("/v1/jobs", json=document).status_code]
    (tmp_path / "text.txt").write_text("another")
    with monkeypatch.context() as hurried:
        hurried.setattr("pho_service.planning.windows._TIMEOUT_S", 0.01)
        statuses.append(client.post("/v1/jobs", json=document).status_code)
    (tmp_path / spelling / "tokenizer.json").write_text("{}")
    statuses.append(client.post("/v1/jobs", json=document).status_code)

    assert statuses == [422, 202, 202]


@pytest.mark.parametrize(
    ("objective", "most"), [("activation-reconstruction", 100), ("perplexity", 48)]
)
def test_extensions_have_limits(client_of, refusal, objective, most):
    client = client_of(max_trials=100, max_tokens=6000)
    document = {
        **DOCUMENT, **SMALL, "trials": 40, "objective": {"name": objective},
        "confirm": {"finalists": 2, "windows": 1},
    }  # fmt: skip
    url = f"/v1/jobs/{client.post('/v1/jobs', json=document).json()['id']}:extend"
    refused = client.post(url, json={"trials": most - 40 + 1})

    assert refusal(refused, 422, "job_too_large")["errors"][0]["pointer"].startswith("/")
    assert client.post(url, json={"trials": most - 40}).json()["spec"]["trials"] == most


def test_two_extend_at_once(client_of, refusal, monkeypatch):
    client = client_of(max_trials=100)
    asked = []

    def ask(*_, **more):
        asked.append(more["max_trials"])
        raise TooManyTrials("somebody was faster")

    document = {**DOCUMENT, "trials": 40, "islands": 2}
    job = client.post("/v1/jobs", json=document).json()["id"]
    monkeypatch.setattr(client.app.state.service.jobs, "ask", ask)
    refusal(client.post(f"/v1/jobs/{job}:extend", json={"trials": 1}), 422)

    assert asked == [50]


def test_transfers_have_limits(client_of, refusal, hand, tmp_path):
    (tmp_path / "text.txt").write_text("of the report")
    client = client_of(max_trials=100, max_tokens=10_000)
    job = client.post("/v1/jobs", json={**DOCUMENT, **SMALL, "trials": 40}).json()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    url, confirm = f"/v1/jobs/{job}:transfer", {"finalists": 9, "windows": 10}
    for pointer, most, more in (
        ("/search/trials", {"search": {"trials": 50, "confirm": {"finalists": 1, "windows": 1}},
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


def test_each_key_is_counted_by_itself_and_whoever_is_refused_too(client_of, bearer_of, refusal):
    client = client_of(max_requests_per_minute=3)
    a, b = bearer_of("a"), bearer_of("b")
    codes = [client.get("/v1/jobs", headers=a).status_code for _ in range(3)]
    refused = client.get("/v1/workers", headers=a)

    assert codes == [200] * 3
    assert "More than 3 requests" in refusal(refused, 429, "too_many_requests")["detail"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert client.get("/v1/jobs", headers=b).status_code == 200
    assert [client.get(path).status_code for path in ("/v1/jobs", "/nope", "/")] == [401] * 3
    refusal(client.get("/v1/jobs"), 429, "too_many_requests")


def test_who_is_refused_without_a_key_costs_no_question_to_the_database(
    client_of, refusal, monkeypatch
):
    client = client_of(max_requests_per_minute=1, max_wrong_keys_per_minute=1)
    for headers in ({}, bearer("wrong")):
        client.get("/v1/jobs", headers=headers)
    for name in ("find", "exist"):
        monkeypatch.setattr(client.app.state.service.keys, name, None)

    refusal(client.get("/v1/jobs"), 429, "too_many_requests")
    refusal(client.get("/v1/jobs", headers=bearer("other")), 429, "too_many_wrong_keys")


def test_after_wrong_keys_a_right_one_opens(client_of, keys, refusal):
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


def test_a_revoked_key_is_a_wrong_one(client_of, keys, refusal):
    client = client_of(max_wrong_keys_per_minute=1)
    key, secret = keys.create("gone", sees_all=False)
    assert client.get("/v1/jobs", headers=bearer(secret)).status_code == 200
    keys.revoke(str(key.id))

    refusal(client.get("/v1/jobs", headers=bearer(secret)), 401, "no_key")
    refusal(client.get("/v1/jobs", headers=bearer(secret)), 429, "too_many_wrong_keys")


SCOPE: Scope = {
    "type": "http", "method": "GET", "path": "/v1/jobs", "headers": [], "client": ("192.0.2.7", 1),
}  # fmt: skip


def test_wrong_keys_at_the_same_time_count_at_once(client_of, keys):
    keys.create("some", sees_all=False)
    client = client_of(max_wrong_keys_per_minute=5)
    guard = KeyGuard(lambda *_: None, client.app.state.service)  # type: ignore[arg-type, return-value]

    async def run():
        statuses = []

        async def ask(number):
            async def send(message):
                statuses.append(message.get("status"))

            headers = [(b"authorization", b"Bearer %d" % number)]
            await guard({**SCOPE, "headers": headers}, asyncio.Event().wait, send)

        await asyncio.gather(*map(ask, range(30)))
        return statuses

    statuses = asyncio.run(run())
    assert statuses.count(401) == 5
    assert statuses.count(429) == 25


def _middleware(app):
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def test_what_was_done_a_minute_ago_counts_less_and_less(monkeypatch):
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
    rate = Rate(10)
    counted = []
    for later in (0, 30, 45, 60, 61, 150):
        monkeypatch.setattr("time.time", lambda later=later: now + later)
        counted.append(sum(rate.count("somebody") for _ in range(20)))

    assert all(Rate(0).count("somebody") for _ in range(20))  # which is no limit
    assert counted[0] == 10
    assert sum(counted[:4]) <= 20
    assert counted[5] == 10


def test_a_host_is_its_ipv4_address_or_its_ipv6_network_of_which_it_may_use_every_address(
    monkeypatch,
):
    for address, expected in (
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("testclient", "testclient"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ):  # fmt: skip
        assert host_of({"client": (address, 50_000)}) == expected
    assert host_of({"client": None}) == ""
    # Whose X-Forwarded-For is believed is set.
    assert read_settings().trusted_proxies == ()
    monkeypatch.setenv("PHO_TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8")
    assert read_settings().trusted_proxies == ("127.0.0.1", "10.0.0.0/8")
    monkeypatch.setenv("PHO_TRUSTED_PROXIES", "proxy.example")
    with pytest.raises(InvalidInput, match="PHO_TRUSTED_PROXIES"):
        read_settings()


@pytest.mark.parametrize(
    ("recovery", "pointer", "says"),
    [
        ({"minutes": 3}, "/recovery/minutes", "the job asks for 901000 tokens"),
        ({"minutes": 1441}, "/recovery/minutes", "PHO_MAX_RECOVERY_MINUTES"),
        ({}, "/recovery/minutes", "the job asks for 9001000 tokens"),
        ({"tokens": 899_001}, "/recovery/tokens", "the job asks for 900001 tokens"),
    ],
)
def test_the_minutes_of_a_recovery_count_as_the_tokens_that_they_are_planned_for(
    client_of, refusal, recovery, pointer, says
):
    """Of a model that is not on this machine, 300,000 a minute."""
    client = client_of(max_tokens=900_000)
    document = {**DOCUMENT, **SMALL, "prune": True}
    answer = client.post("/v1/jobs", json={**document, "recovery": recovery})
    (error,) = refusal(answer, 422, "job_too_large")["errors"]

    assert (error["pointer"], says in error["detail"]) == (pointer, True), error
    fits = client.post("/v1/jobs", json={**document, "recovery": {"minutes": 2.9}})
    assert fits.status_code == 202, fits.text


def test_a_recovery_in_what_the_minutes_leave_counts_as_all_of_them(client_of, refusal):
    client = client_of(max_tokens=2_700_000)
    document = {**DOCUMENT, "prune": True}
    short = client.post("/v1/jobs", json={**document, "minutes": 5})
    long = client.post("/v1/jobs", json={**document, "minutes": 7})
    (error,) = refusal(long, 422, "job_too_large")["errors"]
    without = client.post("/v1/jobs", json={**document, "minutes": 7, "recovery": None})

    assert short.status_code == without.status_code == 202, short.text
    assert error["pointer"] == "/minutes"


def test_a_recovery_that_has_no_room_on_the_disk_or_in_memory_is_refused_in_the_plans_words(
    client, refusal, monkeypatch, model_folder
):
    document = {**DOCUMENT, **SMALL, "prune": True, "recovery": {"tokens": 5000}}
    service = client.app.state.service
    monkeypatch.setattr(service.pruned, "free", lambda: 10**7)
    disk = client.post("/v1/jobs", json={**document, "model": model_folder.name})
    monkeypatch.setattr(service.pruned, "free", lambda: 10**9)
    away = client.post("/v1/jobs", json={**document, "model": model_folder.name})
    small = replace(named_machine("cpu"), memory_bytes=8 * 10**8, main_bytes=8 * 10**8)
    monkeypatch.setattr("pho_service.api.service.named_machine", lambda _: small)
    here = SimpleNamespace(name=worker_name(1), device="cpu")
    monkeypatch.setattr(Service, "_alive", [here])
    memory = client.post("/v1/jobs", json={**document, "model": model_folder.name})

    assert away.status_code == 202, away.text
    for answer, says in ((disk, "19.5 MiB of disk are needed"), (memory, "MiB of main memory are")):
        (error,) = refusal(answer, 422, "job_too_large")["errors"]
        assert error["pointer"] == "/recovery/tokens"
        assert says in error["detail"]
