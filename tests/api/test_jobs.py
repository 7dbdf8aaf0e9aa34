"""What one can do with jobs over HTTP, and what they tell of themselves."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from pho_service.spec.configuration import Configuration, write_configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import MAX_TRIALS
from storage.records import JobState, StageKind
from storage.studies import open_storage, open_study, study_name
from storage.tables import jobs

Submit = Callable[..., dict[str, Any]]
Refusal = Callable[..., dict[str, Any]]

DOCUMENT = {"model": "org/name", "pattern": "0.5"}


def ids(answer: Any) -> list[str]:
    """The jobs of a page."""
    return [job["id"] for job in answer.json()["jobs"]]


# ---------------------------------------------------------------------------- submit


def test_local_stays_local(client: TestClient, tmp_path: Path) -> None:
    """What is local when it is submitted is kept as a path, and never asked of the hub."""
    for name in ("org/name", "other"):
        (tmp_path / name).mkdir(parents=True)
    headers = {"Idempotency-Key": "a"}
    document = {**DOCUMENT, "calibration": {"dataset": "other"}}
    job = client.post("/v1/jobs", json=document, headers=headers).json()
    shutil.rmtree(tmp_path / "org")
    again = client.post("/v1/jobs", json=document, headers=headers)
    hub = client.post("/v1/jobs", json={**DOCUMENT, "calibration": {"dataset": "other"}}).json()

    assert job["spec"]["model"] == "./org/name"
    assert job["spec"]["calibration"]["dataset"] == "./other"
    assert again.json()["id"] == job["id"]
    assert hub["spec"]["model"] == "org/name"


def test_submitted(client: TestClient) -> None:
    """A submit is answered at once with 202 and the place where the job is."""
    answer = client.post("/v1/jobs", json=DOCUMENT)
    job = answer.json()

    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert client.get(answer.headers["location"]).json() == job
    assert job["state"] == "queued"
    assert job["name"] == f"name 0.5 layer {job['id'].replace('-', '')[:12]}"
    assert job["stage"] is job["best"] is job["error"] is None
    assert job["started_at"] is job["finished_at"] is None
    assert job["progress"] == {
        "pieces": [
            {"stage": "calibrate", "unit": "parts", "done": 0, "total": 1},
            {"stage": "search", "unit": "trials", "done": 0, "total": 200},
        ],
        "done": 0, "total": 200, "best_value": None, "seconds_left": None, "step": None,
    }  # fmt: skip


def test_defaults(submit: Submit) -> None:
    """What is left out of a document has the documented defaults, and the job shows them."""
    spec = submit()["spec"]

    assert spec == JobSpec.model_validate(DOCUMENT).model_dump(mode="json")
    assert spec["scope"] is None
    assert spec["sampler"] == "cmaes"
    assert (spec["trials"], spec["islands"], spec["seed"], spec["priority"]) == (200, 1, 0, 0)
    assert (spec["calibration"]["samples"], spec["calibration"]["context_length"]) == (128, 2048)
    assert spec["confirm"] == {"text": None, "candidates": 5, "windows": 16}
    assert spec["timeout_s"] is None


def test_a_job_may_name_what_lies_below_the_folders_for_models_and_texts(
    submit: Submit, model_folder: Path, texts: dict[str, Path]
) -> None:
    job = submit(
        model=str(model_folder),
        calibration={"text": str(texts["calibration"])},
        confirm={"text": texts["confirmation"].name},
    )

    assert job["name"].startswith("model 0.5 layer ")


def test_long_name(submit: Submit, hand: Any) -> None:
    """The longest names that are accepted give studies names that their storage takes."""
    model, pattern = "a" * 96 + "/" + "b" * 96, "0." + "5" * 62
    for name in (None, "x" * 100):
        job = submit(model=model, pattern=pattern, name=name, islands=64)

        with open_storage(hand.store.database.studies_url) as storage:
            open_study(storage, study_name(job["name"], 63), direction="minimize")


# ----------------------------------------------------------------------- idempotency


def test_same_key_twice(client: TestClient, submit: Submit) -> None:
    """The same Idempotency-Key twice makes one job, also if defaults are spelled out."""
    headers = {"Idempotency-Key": "a-b-c"}
    first = submit(headers=headers)
    second = submit(headers=headers, trials=200, calibration={"samples": 128})

    assert second["id"] == first["id"]
    assert ids(client.get("/v1/jobs")) == [first["id"]]


def test_same_key_other_document(client: TestClient, submit: Submit, refusal: Refusal) -> None:
    """With another document it is refused, and no job is made."""
    headers = {"Idempotency-Key": "a-b-c"}
    job = submit(headers=headers)
    answer = client.post("/v1/jobs", json={**DOCUMENT, "seed": 1}, headers=headers)

    problem = refusal(answer, 422, "idempotency_key_reused")
    assert problem["errors"][0]["parameter"] == "Idempotency-Key"
    assert ids(client.get("/v1/jobs")) == [job["id"]]


@pytest.mark.parametrize("key", ["", "with space", "x" * 256, "tab\t", "caf\xe9"])
def test_bad_idempotency_key(shared_client: TestClient, refusal: Refusal, key: str) -> None:
    """A key that is empty, too long or not printable is refused by name."""
    answer = shared_client.post(
        "/v1/jobs", json=DOCUMENT, headers={"Idempotency-Key": key.encode("latin-1")}
    )

    assert refusal(answer, 422)["errors"][0]["parameter"].lower() == "idempotency-key"


# ----------------------------------------------------------------------------- quota


def test_too_many(client_of: Any, refusal: Refusal, hand: Any) -> None:
    """More unfinished jobs than allowed are refused with a time to wait, until one is over."""
    client = client_of(max_unfinished_jobs=1)
    first = client.post("/v1/jobs", json=DOCUMENT, headers={"Idempotency-Key": "one"})
    again = client.post("/v1/jobs", json=DOCUMENT, headers={"Idempotency-Key": "one"})
    refused = client.post("/v1/jobs", json=DOCUMENT)
    hand.succeed(first.json()["id"])
    later = client.post("/v1/jobs", json=DOCUMENT)

    assert again.json()["id"] == first.json()["id"]
    refusal(refused, 429, "too_many_jobs")
    assert int(refused.headers["retry-after"]) > 0
    assert later.status_code == 202


# ------------------------------------------------------------------------------ list


def test_pages(client: TestClient, submit: Submit) -> None:
    """Pages give every job once, newest first, while others arrive."""
    jobs = [submit()["id"] for _ in range(5)]
    seen, token = [], None
    for _ in range(3):
        params = {"page_size": 2} | ({"page_token": token} if token else {})
        answer = client.get("/v1/jobs", params=params)
        seen += ids(answer)
        token = answer.json()["next_page_token"]
        submit()  # arrives between two pages

    assert seen == jobs[::-1]
    assert token is None


def test_full_last_page(client: TestClient, submit: Submit) -> None:
    """A last page that is full has no token to an empty one."""
    jobs = [submit()["id"] for _ in range(3)]
    answer = client.get("/v1/jobs", params={"page_size": 3})

    assert ids(answer) == jobs[::-1]
    assert answer.json()["next_page_token"] is None


def test_states(client: TestClient, submit: Submit, hand: Any) -> None:
    """A list of states leaves the jobs in one of them, over several pages too."""
    by_state = {}
    for state in (JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.FAILED):
        job = submit()["id"]
        hand.bring(job, state)
        by_state.setdefault(state, []).insert(0, job)
    params: dict[str, Any] = {"state": ["failed", "cancelled"], "page_size": 2}
    first = client.get("/v1/jobs", params=params)
    params["page_token"] = first.json()["next_page_token"]
    failed, cancelled = by_state[JobState.FAILED], by_state[JobState.CANCELLED]

    assert ids(client.get("/v1/jobs", params={"state": "failed"})) == failed
    assert ids(first) == [failed[0], cancelled[0]]
    assert ids(client.get("/v1/jobs", params=params)) == [failed[1]]
    assert ids(client.get("/v1/jobs", params={"state": "running"})) == []


def test_filters(client: TestClient, submit: Submit) -> None:
    """Models, patterns and names leave the jobs that have them; pages go on in any order."""
    named = submit(name="Zeta", model="org/a")["id"]
    other = submit(name="alpha", pattern="2:4", more_models=["org/a"])["id"]
    last = submit(name="beta", pattern=None, patterns=["0.5", "2:4"])["id"]

    def listed(**params: Any) -> list[str]:
        return ids(client.get("/v1/jobs", params=params))

    first = client.get("/v1/jobs", params={"sort": "name", "page_size": 2}).json()
    token = first["next_page_token"]

    assert listed(model="org/a") == [other, named]
    assert listed(pattern=["2:4"]) == [last, other]
    assert listed(pattern="0.5", model="org/a") == listed(name="ZETA") == [named]
    assert listed(name=named[:8]) == listed(name=named[:8], id=named[:4]) == [named]
    assert listed(name="", sort="-name") == [named, last, other]
    assert listed(model="a\x00") == []
    assert [job["id"] for job in first["jobs"]] == [other, last]
    assert listed(sort="name", page_size=2, page_token=token) == [named]
    assert listed(sort="name", page_token="9" * 18) == []


@pytest.mark.parametrize(
    ("params", "parameter", "says"),
    [
        ({"page_token": "x"}, "page_token", "not one of our tokens"),
        ({"page_token": "9223372036854775808"}, "page_token", "not one of our tokens"),  # 2**63
        ({"page_token": "\x00"}, "page_token", "not one of our tokens"),
        ({"page_size": "0"}, "page_size", "greater than or equal to 1"),
        ({"state": "done"}, "state", "'queued', 'running', 'pausing'"),
        ({"sort": "size"}, "sort", "'created', '-created', 'name'"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_rule(
    shared_client: TestClient, refusal: Refusal, params: dict[str, str], parameter: str, says: str
) -> None:
    (error,) = refusal(shared_client.get("/v1/jobs", params=params), 422, "invalid_request")[
        "errors"
    ]

    assert error["parameter"] == parameter
    assert says in error["detail"]


# ------------------------------------------------------------------------------ show


@pytest.mark.parametrize("what", ["", "/trials", "/best", "/events"])
def test_no_such_job(shared_client: TestClient, refusal: Refusal, what: str) -> None:
    """A job that is not there is 404."""
    refusal(shared_client.get(f"/v1/jobs/{uuid.uuid4()}{what}"), 404, "no_such_job")


@pytest.mark.parametrize("what", ["", "/trials", "/best", "/events", ":cancel", ":extend"])
def test_no_job_id(shared_client: TestClient, refusal: Refusal, what: str) -> None:
    """What is no id at all is the caller's fault."""
    method = "POST" if ":" in what else "GET"
    for job_id in ("1", "x", "%00", "'", "-1", "1" * 40, "%ff"):
        answer = shared_client.request(method, f"/v1/jobs/{job_id}{what}", json={"trials": 1})

        assert answer.status_code in (404, 422)
        refusal(answer, answer.status_code)


def test_progress_of_a_search(client: TestClient, submit: Submit, hand: Any) -> None:
    """Trials, best value and time left are those of all islands together."""
    job = submit(trials=40, islands=2)["id"]
    hand.calibrate(job)
    claims = [hand.take(job, StageKind.SEARCH, i) for i in range(2)]
    hand.store.progress(claims[0], done=10, elapsed_s=20.0, best_value=0.5)
    hand.store.progress(claims[1], done=6, elapsed_s=12.0, best_value=0.25)
    shown = client.get(f"/v1/jobs/{job}").json()

    assert (shown["state"], shown["stage"]) == ("running", "search")
    assert shown["started_at"] is not None
    assert shown["progress"] == {
        "pieces": [
            {"stage": "calibrate", "unit": "parts", "done": 1, "total": 1},
            {"stage": "search", "unit": "trials", "done": 16, "total": 80},
        ],
        "done": 16, "total": 80, "best_value": 0.25,
        "seconds_left": 64.0,  # 64 trials, 2 s each, by 2 workers
        "step": None,
    }  # fmt: skip


def test_no_time_left_of_what_has_ended(client: TestClient, submit: Submit, hand: Any) -> None:
    job = submit(trials=40, islands=2)["id"]
    hand.calibrate(job)
    claims = [hand.take(job, StageKind.SEARCH, i) for i in range(2)]
    hand.store.progress(claims[0], done=10, elapsed_s=20.0, best_value=0.5)
    hand.store.progress(claims[1], done=10, elapsed_s=20.0, best_value=0.25)
    hand.store.complete(claims[0], {})

    assert client.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"] == 60.0


def test_no_pace_yet(client: TestClient, submit: Submit, hand: Any) -> None:
    """Before the first trial, nobody knows the time left."""
    job = submit(trials=40)["id"]
    hand.calibrate(job)
    hand.take(job, StageKind.SEARCH)

    assert client.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"] is None


def test_no_time_left_while_paused(client: TestClient, submit: Submit, hand: Any) -> None:
    job = submit(trials=40)["id"]
    hand.calibrate(job)
    claim = hand.take(job, StageKind.SEARCH)
    hand.store.progress(claim, done=10, elapsed_s=20.0, best_value=0.5)
    client.post(f"/v1/jobs/{job}:pause")

    assert client.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"] is None


def test_best_of_gini(client: TestClient, submit: Submit, hand: Any) -> None:
    """For an objective that is maximised, the best value is the highest."""
    job = submit(trials=40, islands=2, objective={"name": "gini"})["id"]
    hand.calibrate(job)
    for island, value in enumerate((0.5, 0.25)):
        claim = hand.take(job, StageKind.SEARCH, island)
        hand.store.progress(claim, done=10, elapsed_s=1.0, best_value=value)

    assert client.get(f"/v1/jobs/{job}").json()["progress"]["best_value"] == 0.5


def test_progress_of_perplexities(client: TestClient, submit: Submit, hand: Any) -> None:
    """After the search, perplexities are counted, and their time."""
    job = submit(trials=40)["id"]
    hand.calibrate(job)
    hand.search(job)
    hand.confirm(job, 0, 7, 9)
    hand.measure(job, 7, perplexity=20.0, seconds=3.0)
    hand.take(job, StageKind.PERPLEXITY, 9)
    shown = client.get(f"/v1/jobs/{job}").json()

    assert shown["stage"] == "perplexity"
    assert (shown["progress"]["done"], shown["progress"]["total"]) == (1, 3)
    assert shown["progress"]["pieces"][-1]["unit"] == "perplexities"
    assert shown["progress"]["seconds_left"] == 6.0


def test_failed(client: TestClient, submit: Submit, hand: Any) -> None:
    """A failed job keeps the cause: type, message, stage, attempts and layer."""
    job = submit()["id"]
    hand.fail(job, type="NumericalError", message="NaN in 4.q", layer="4.q", other="dropped")
    shown = client.get(f"/v1/jobs/{job}").json()

    assert shown["state"] == "failed"
    assert shown["finished_at"] is not None
    assert shown["error"] == {
        "type": "NumericalError", "message": "NaN in 4.q", "layer": "4.q", "stage": "calibrate",
        "attempts": 1, "candidate": None,
    }  # fmt: skip


def test_lost_workers(client: TestClient, submit: Submit, hand: Any, refusal: Refusal) -> None:
    """A job whose workers die again and again fails, and says so in its error."""
    job = submit(max_attempts=1)["id"]
    claim = hand.take(job, StageKind.CALIBRATE)
    again = hand.store.claim(claim.stage.id, _queue_id(hand, claim), uuid.uuid4())
    shown = client.get(f"/v1/jobs/{job}").json()

    assert again is None
    assert shown["error"]["type"] == "WorkerLost"
    refusal(client.get(f"/v1/jobs/{job}/best"), 409, "no_configuration")


def _queue_id(hand: Any, claim: Any) -> int:
    with hand.store.database.transaction() as connection:
        query = "SELECT queue_id FROM pho.stages WHERE id = %s"
        return int(connection.exec_driver_sql(query, (claim.stage.id,)).scalar_one())


def test_succeeded(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job that succeeded shows its winner and what to know about it."""
    job = submit()["id"]
    hand.succeed(job, "the best lies on the border")
    shown = client.get(f"/v1/jobs/{job}").json()

    assert shown["state"] == "succeeded"
    assert shown["best"] == {
        "method": "crepe", "objective": 0.0123456789012345678, "perplexity": 17.25,
        "perplexities": None,
    }  # fmt: skip
    assert shown["warnings"] == ["the best lies on the border"]


# ---------------------------------------------------------------------------- trials


def test_trials(client: TestClient, submit: Submit, hand: Any) -> None:
    """Trials come by number, page by page, each once."""
    job = submit()
    hand.record(job, 7)
    numbers, token = [], None
    for _ in range(3):
        params = {"page_size": 3} | ({"page_token": token} if token else {})
        page = client.get(f"/v1/jobs/{job['id']}/trials", params=params).json()
        numbers += [t["number"] for t in page["trials"]]
        token = page["next_page_token"]

    assert numbers == [*range(7)]
    assert token is None


def test_trial(client: TestClient, submit: Submit, hand: Any, configuration: Configuration) -> None:
    """A trial tells what was tried and what came of it."""
    job = submit()
    hand.record(job, 3, failed=2)
    _, complete, failed = client.get(f"/v1/jobs/{job['id']}/trials").json()["trials"]

    assert complete == {
        "island": 0, "number": 1, "state": "complete", "method": "crepe", "value": 0.1,
        "perplexity": None, "scope": "layer",
        "coefficients": configuration.coefficients.to_dict(), "failure": None, "seconds": 0.5,
    }  # fmt: skip
    assert (failed["state"], failed["value"], failed["failure"]) == (
        "failed", None, "NaN in layer 3",
    )  # fmt: skip


def test_confirmed_trials(client: TestClient, submit: Submit, hand: Any) -> None:
    """A confirmed trial has its perplexity, in the island that it is from."""
    job = submit(islands=2)
    hand.record(job, 3, island=0)
    hand.record(job, 3, island=1)
    hand.calibrate(job["id"])
    hand.search(job["id"])
    hand.confirm(job["id"], 0, 3)  # trial 0 of island 0, trial 1 of island 1
    hand.measure(job["id"], 3, perplexity=20.0, seconds=1.0)
    hand.measure(job["id"], 0, perplexity=30.0, seconds=1.0)
    url = f"/v1/jobs/{job['id']}/trials"

    for island, expected in ((0, [30.0, None, None]), (1, [None, 20.0, None])):
        trials = client.get(url, params={"island": island}).json()["trials"]
        assert [t["perplexity"] for t in trials] == expected
        assert {t["island"] for t in trials} == {island}


def test_a_search_that_has_not_begun_has_no_trials(client: TestClient, submit: Submit) -> None:
    url = f"/v1/jobs/{submit()['id']}/trials"

    assert client.get(url).json() == {"trials": [], "next_page_token": None}


def test_unknown_island(client: TestClient, submit: Submit, hand: Any, refusal: Refusal) -> None:
    """An island that the job does not have is refused by name, not shown as empty."""
    job = submit(islands=2)
    hand.record(job, 3)
    url = f"/v1/jobs/{job['id']}/trials"

    assert client.get(url, params={"island": 1}).json()["trials"] == []
    refusal(client.get(url, params={"island": 2}), 404, "no_such_island")
    for island in ("64", "-1", "x"):
        (error,) = refusal(client.get(url, params={"island": island}), 422)["errors"]
        assert error["parameter"] == "island"


# ------------------------------------------------------------------------------ best


def test_the_best_configuration_is_byte_for_byte_the_file_that_pho_search_writes(
    client: TestClient, submit: Submit, hand: Any, configuration: Configuration, tmp_path: Path
) -> None:
    job = submit()["id"]
    hand.succeed(job)
    write_configuration(configuration, tmp_path / "config.json")
    answer = client.get(f"/v1/jobs/{job}/best")

    assert answer.headers["content-type"] == "application/json"
    assert answer.content == (tmp_path / "config.json").read_bytes()


def test_the_best_configuration_which_is_shared_does_not_say_where_the_services_folders_lie(
    client: TestClient, submit: Submit, hand: Any, configuration: Configuration, tmp_path: Path
) -> None:
    job = submit()["id"]
    hand.succeed(job)
    lies = {"name": str(tmp_path / "org" / "mine"), "family": "llama"}
    found = {**configuration.model_dump(mode="json"), "model": lies}
    with hand.store.database.transaction() as connection:
        connection.execute(update(jobs).where(jobs.c.id == uuid.UUID(job)).values(best=found))

    shown = client.get(f"/v1/jobs/{job}/best").json()
    assert shown == {**found, "model": {"name": "org/mine", "family": "llama"}}


@pytest.mark.parametrize("state", [s for s in JobState if s is not JobState.SUCCEEDED])
def test_a_job_without_a_configuration_is_a_conflict_that_names_its_state(
    client: TestClient, submit: Submit, hand: Any, refusal: Refusal, state: JobState
) -> None:
    job = submit()["id"]
    hand.bring(job, state)
    problem = refusal(client.get(f"/v1/jobs/{job}/best"), 409, "no_configuration")

    assert problem["state"] == state


# ----------------------------------------------------------------------------- verbs

ALLOWED = {
    "cancel": {
        "queued": "cancelled", "running": "cancelling", "pausing": "cancelling",
        "paused": "cancelled", "cancelling": "cancelling", "cancelled": "cancelled",
    },
    "pause": {"queued": "paused", "running": "pausing", "pausing": "pausing", "paused": "paused"},
    "resume": {
        "queued": "queued", "running": "running", "pausing": "running", "paused": "queued",
        "failed": "queued",
    },
    "extend": {
        "queued": "queued", "running": "running", "paused": "paused", "succeeded": "queued",
    },
}  # fmt: skip
DELETABLE = ("paused", "cancelled", "succeeded", "failed")


@pytest.mark.parametrize("state", JobState)
def test_verbs(
    client: TestClient, submit: Submit, hand: Any, refusal: Refusal, state: JobState
) -> None:
    """In each state each verb does its work, or is a conflict that says the state."""
    for verb, allowed in ALLOWED.items():
        job = submit()["id"]
        hand.bring(job, state)
        before = client.get(f"/v1/jobs/{job}").json()
        document = {"trials": 5} if verb == "extend" else None
        answer = client.post(f"/v1/jobs/{job}:{verb}", json=document)

        if state in allowed:
            assert (answer.status_code, answer.json()["state"]) == (202, allowed[state])
            assert client.get(f"/v1/jobs/{job}").json() == answer.json()
        else:
            assert refusal(answer, 409, "state_conflict")["state"] == state
            assert client.get(f"/v1/jobs/{job}").json() == before


@pytest.mark.parametrize("state", JobState)
def test_only_a_job_that_is_over_or_paused_can_be_deleted_otherwise_nothing_is(
    client: TestClient, submit: Submit, hand: Any, refusal: Refusal, state: JobState
) -> None:
    job = submit()
    hand.record(job, 2)
    hand.bring(job["id"], state)
    answer = client.delete(f"/v1/jobs/{job['id']}")

    if state in DELETABLE:
        assert (answer.status_code, answer.content) == (204, b"")
        assert hand.studies() == []
        refusal(client.get(f"/v1/jobs/{job['id']}"), 404)
    else:
        assert refusal(answer, 409, "state_conflict")["state"] == state
        assert hand.studies() == [job["name"]]


def test_conflict_says_the_way_out(client: TestClient, submit: Submit, refusal: Refusal) -> None:
    problem = refusal(client.delete(f"/v1/jobs/{submit()['id']}"), 409)

    assert problem["detail"] == "A job that is queued cannot be deleted. Cancel it first."


@pytest.mark.parametrize("verb", [*ALLOWED, "delete"])
def test_verb_on_no_job(shared_client: TestClient, refusal: Refusal, verb: str) -> None:
    """A verb on a job that is not there is 404."""
    url = f"/v1/jobs/{uuid.uuid4()}"
    if verb == "delete":
        answer = shared_client.delete(url)
    else:
        answer = shared_client.post(f"{url}:{verb}", json={"trials": 1})

    refusal(answer, 404, "no_such_job")


# ---------------------------------------------------------------------------- extend


def test_extended(client: TestClient, submit: Submit) -> None:
    """A job has more trials after it was extended, as if it had been submitted with them."""
    job = submit(trials=40, islands=2)["id"]
    extended = client.post(f"/v1/jobs/{job}:extend", json={"trials": 10}).json()

    assert extended["spec"]["trials"] == 50
    assert extended["progress"]["total"] == 100


def test_extended_keeps_the_best(client: TestClient, submit: Submit, hand: Any) -> None:
    """While a job that has succeeded searches on, its configuration stays."""
    job = submit()["id"]
    hand.succeed(job)
    before = client.get(f"/v1/jobs/{job}/best").content
    client.post(f"/v1/jobs/{job}:extend", json={"trials": 10})

    assert client.get(f"/v1/jobs/{job}/best").content == before


def test_extend_during_the_confirmation(
    client: TestClient, submit: Submit, hand: Any, refusal: Refusal
) -> None:
    """Between search and success a job cannot be extended, and the answer says when it can."""
    job = submit()["id"]
    hand.calibrate(job)
    hand.search(job)
    hand.confirm(job, 0, 7)
    hand.take(job, StageKind.PERPLEXITY, 7)
    problem = refusal(
        client.post(f"/v1/jobs/{job}:extend", json={"trials": 1}), 409, "state_conflict"
    )

    assert problem["state"] == "running"
    assert "wait until it has succeeded" in problem["detail"]


def test_extend_beyond_the_maximum(client: TestClient, submit: Submit, refusal: Refusal) -> None:
    """A job gets no more trials than it could have been submitted with."""
    job = submit(trials=MAX_TRIALS - 5)["id"]
    url = f"/v1/jobs/{job}:extend"
    (error,) = refusal(client.post(url, json={"trials": 6}), 422, "invalid_request")["errors"]

    assert error["pointer"] == "/trials"
    assert str(MAX_TRIALS) in error["detail"]
    assert client.post(url, json={"trials": 5}).json()["spec"]["trials"] == MAX_TRIALS


@pytest.mark.parametrize(
    ("document", "pointer", "says"),
    [
        ({}, "/trials", "required"),
        ({"trials": 0}, "/trials", "greater than or equal to 1"),
        ({"trials": "5"}, "/trials", "integer"),
        ({"trials": MAX_TRIALS + 1}, "/trials", "10000"),
        ([5], "", "not a JSON object"),
    ],
)
def test_a_wrong_number_of_trials_is_refused_at_its_place(
    shared_client: TestClient, refusal: Refusal, document: Any, pointer: str, says: str
) -> None:
    job = shared_client.post("/v1/jobs", json=DOCUMENT).json()["id"]
    answer = shared_client.post(f"/v1/jobs/{job}:extend", json=document)
    (error,) = refusal(answer, 422, "invalid_request")["errors"]

    assert error["pointer"] == pointer
    assert says in error["detail"]


def test_an_unknown_field_is_refused_with_those_that_an_extension_has(
    client: TestClient, submit: Submit, refusal: Refusal
) -> None:
    url = f"/v1/jobs/{submit()['id']}:extend"
    answer = client.post(url, json={"trials": 1, "islands": 2})
    (error,) = refusal(answer, 422, "invalid_request")["errors"]

    assert error == {"pointer": "/islands", "detail": "unknown field; known are trials"}


# ---------------------------------------------------------------------------- delete


def test_delete_all_islands(client: TestClient, submit: Submit, hand: Any) -> None:
    """A deletion takes the studies of all islands with it, and those of no other job."""
    job, other = submit(islands=2), submit()
    for island in range(2):
        hand.record(job, 2, island=island)
    hand.record(other, 2)
    hand.bring(job["id"], JobState.CANCELLED)
    client.delete(f"/v1/jobs/{job['id']}")

    assert hand.studies() == [other["name"]]
    assert ids(client.get("/v1/jobs")) == [other["id"]]


def test_delete_that_was_cut_off(client: TestClient, submit: Submit, hand: Any) -> None:
    job = submit(islands=2)
    hand.record(job, 2, island=1)  # that of island 0 is gone
    hand.bring(job["id"], JobState.CANCELLED)

    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert hand.studies() == []
