"""What one can do with jobs over HTTP, and what they tell of themselves."""

import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from sqlalchemy import delete, update

from pho_service.api.submission import HubWatch
from pho_service.spec.configuration import write_configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import MAX_TRIALS
from storage.records import JobState, StageKind
from storage.studies import open_storage, open_study, study_name
from storage.tables import events, jobs, stages

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}
NOBODY = "00000000-0000-0000-0000-000000000000"
# By verb: a state where it works, the state after it, and a state where it does not.
VERBS = {
    "cancel": (JobState.RUNNING, "cancelling", JobState.SUCCEEDED),
    "pause": (JobState.RUNNING, "pausing", JobState.FAILED),
    "resume": (JobState.FAILED, "queued", JobState.CANCELLED),
    "extend": (JobState.SUCCEEDED, "queued", JobState.PAUSING),
}


# Its beginning does for every address of a job: method, what follows the id, and what is sent.
ADDRESSES = (
    ("GET", "", None), ("GET", "/trials", None), ("GET", "/best", None), ("GET", "/events", None),
    ("GET", "/report", None), ("GET", "/artifacts", None), ("GET", "/artifacts.tar", None),
    ("GET", "/artifacts/x", None), ("GET", "/transfer", None), ("POST", ":cancel", None),
    ("POST", ":pause", None), ("POST", ":resume", None), ("POST", ":prune", None),
    ("POST", ":extend", {"trials": 1}), ("POST", ":transfer", {"models": ["org/other"]}),
    ("DELETE", "", None),
)  # fmt: skip


def ids(answer):
    return [job["id"] for job in answer.json()["jobs"]]


def test_what_is_local_stays_local_ever_after(client, tmp_path):
    for name in ("org/name", "other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    headers = {"Idempotency-Key": "a"}
    document = {**DOCUMENT, "calibration": {"dataset": "other"}}
    place = client.post("/v1/jobs", json=document, headers=headers).headers["Location"]
    job = client.get(place).json()
    shutil.rmtree(tmp_path / "org")
    again = client.post("/v1/jobs", json=document, headers=headers)
    answer = client.post("/v1/jobs", json={**DOCUMENT, "calibration": {"dataset": "other"}})
    hub = client.get(answer.headers["Location"]).json()

    assert job["spec"]["model"] == "./org/name"
    assert job["spec"]["calibration"]["dataset"] == "./other"
    assert again.json()["id"] == job["id"]
    assert hub["spec"]["model"] == "org/name"


def test_a_submit_is_answered_at_once_with_202_and_the_place(client):
    answer = client.post("/v1/jobs", json=DOCUMENT)
    short = answer.json()
    job = client.get(short["links"]["job"]).json()

    assert answer.status_code == 202
    assert short.keys() == {"id", "name", "state", "warnings", "links"}
    assert answer.headers["location"] == short["links"]["job"] == f"/v1/jobs/{job['id']}"
    assert client.get(short["links"]["page"]).status_code == 200
    assert {name: job[name] for name in ("id", "name", "state")} == {
        name: short[name] for name in ("id", "name", "state")
    }
    assert job["spec"] == JobSpec.model_validate(DOCUMENT).model_dump(mode="json")
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


def test_a_submit_warns_of_a_near_name_a_hub_that_is_away_and_a_shorter_context(
    client, tmp_path, write_small, refusal
):
    write_small(tmp_path / "example" / "small-llama")
    (tmp_path / "text.txt").write_text("text")
    here = {"model": "example/small-llama", "calibration": {"text": "text.txt"}}
    typo = {**here, "model": "example/small-lama"}
    (shorter,) = client.post("/v1/jobs", json={**DOCUMENT, **here}).json()["warnings"]
    near, away = client.post("/v1/jobs", json={**DOCUMENT, **typo}).json()["warnings"]

    usual = {**here, "calibration": {"dataset": "wikitxt2"}}
    warned = client.post("/v1/jobs", json={**DOCUMENT, **usual}).json()["warnings"]

    assert "wikitxt2 is taken for a data set on the hub. Did you mean wikitext2?" in warned
    assert shorter == "Windows have 128 tokens, since example/small-llama reads no more."
    assert near.endswith("Did you mean example/small-llama?")
    assert "cannot be reached from this service: example/small-lama can only" in away
    none = {**DOCUMENT, **here, "steps": {"linears": {"ignore": ["*.o_projj"]}}}
    (error,) = refusal(client.post("/v1/jobs", json=none), 422)["errors"]
    assert error["pointer"] == "/steps/linears"
    assert "'*.o_projj' matches none" in error["detail"]


def test_one_submission_waits_for_a_hub_that_hangs_and_no_other(client, monkeypatch):
    asked, over = threading.Event(), threading.Event()

    def hangs():
        asked.set()
        over.wait(60)
        return False

    monkeypatch.setattr("pho_service.api.submission.hub_answers", hangs)
    monkeypatch.setattr("pho_service.api.submission.HUB", HubWatch())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/jobs", json=DOCUMENT)
        assert asked.wait(60)
        others = [client.post("/v1/jobs", json=DOCUMENT).json()["warnings"] for _ in range(2)]
        over.set()
    later = client.post("/v1/jobs", json=DOCUMENT).json()["warnings"]

    assert others == [[], []]
    assert first.result().json()["warnings"] == later
    assert "cannot be reached" in later[0]


def test_the_longest_names_give_studies_names_that_fit(submit, hand):
    model, pattern = "a" * 96 + "/" + "b" * 96, "0." + "5" * 62
    with open_storage(hand.store.database.studies_url) as storage:
        for name in (None, "x" * 100):
            job = submit(model=model, pattern=pattern, name=name, islands=64)

            open_study(storage, study_name(job["name"], 63), direction="minimize")


def test_same_key_twice(client, submit, refusal):
    """An Idempotency-Key makes one job; with another document, or an odd one, it is refused."""
    headers = {"Idempotency-Key": "a-b-c"}
    first = submit(headers=headers)
    second = submit(headers=headers, trials=200, calibration={"samples": 128})
    other = client.post("/v1/jobs", json={**DOCUMENT, "seed": 1}, headers=headers)

    problem = refusal(other, 422, "idempotency_key_reused")
    assert problem["errors"][0]["parameter"] == "Idempotency-Key"
    assert second["id"] == first["id"]
    for key in ("", "with space", "x" * 256, "tab\t", "caf\xe9"):
        headers = {"Idempotency-Key": key.encode("latin-1")}
        answer = client.post("/v1/jobs", json=DOCUMENT, headers=headers)
        assert refusal(answer, 422)["errors"][0]["parameter"].lower() == "idempotency-key"
    assert ids(client.get("/v1/jobs")) == [first["id"]]


def test_more_unfinished_jobs_are_refused_for_now(client_of, refusal, hand):
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


def test_filters_leave_the_jobs_that_have_it_all(client, submit):
    named = submit(name="Zeta", model="org/a")["id"]
    other = submit(name="alpha", pattern="2:4", more_models=["org/a"])["id"]
    last = submit(name="beta", pattern=None, patterns=["0.5", "2:4"])["id"]

    def listed(**params):
        return ids(client.get("/v1/jobs", params=params))

    first = client.get("/v1/jobs", params={"sort": "name", "page_size": 2}).json()
    token = first["next_page_token"]
    client.post(f"/v1/jobs/{last}:pause")

    assert listed(state=["paused", "failed"]) == [last]
    assert listed(state="running") == []
    assert listed(model="org/a") == [other, named]
    assert listed(pattern=["2:4"]) == [last, other]
    assert listed(pattern="0.5", model="org/a") == listed(name="ZETA") == [named]
    assert listed(name=named[:8]) == listed(name=named[:8], id=named[:4]) == [named]
    assert listed(name="", sort="-name") == [named, last, other]
    assert listed(model="a\x00") == []
    whole = client.get("/v1/jobs", params={"page_size": 3}).json()
    assert whole["next_page_token"] is None  # also after a full page
    assert [job["id"] for job in first["jobs"]] == [other, last]
    assert listed(sort="name", page_size=2, page_token=token) == [named]
    assert listed(sort="name", page_token="9" * 18) == []


def test_a_wrong_parameter_is_named_with_its_rule(client, refusal):
    for params, says in (
        ({"page_token": "x"}, "not one of our tokens"),
        ({"page_token": "9223372036854775808"}, "not one of our tokens"),  # 2**63
        ({"page_size": "0"}, "'0' should be greater than or equal to 1"),
        ({"state": "done"}, "'queued', 'running', 'pausing'"),
        ({"sort": "size"}, "'created', '-created', 'name'"),
    ):
        problem = refusal(client.get("/v1/jobs", params=params), 422, "invalid_request")
        (error,) = problem["errors"]

        assert [error["parameter"]] == [*params]
        assert says in error["detail"]


PARTS = ("", "/trials", "/best", "/events", "/report", *(f":{verb}" for verb in VERBS))


def test_what_is_no_job_is_404_or_422(client, refusal):
    for what in PARTS:
        method = "POST" if ":" in what else "GET"
        for job_id in ("1", "x", "%00", "'", "-1", "1" * 40, "%ff"):
            answer = client.request(method, f"/v1/jobs/{job_id}{what}", json={"trials": 1})

            assert answer.status_code in (404, 422)
            refusal(answer, answer.status_code)
        answer = client.request(method, f"/v1/jobs/{uuid.uuid4()}{what}", json={"trials": 1})
        refusal(answer, 404, "no_such_job")


def test_progress_of_a_search(client, submit, hand):
    """Trials, best value and time left, if it can be known, are those of all islands together."""
    job = submit(trials=40, islands=2)["id"]
    hand.calibrate(job)
    claims = [hand.take(job, StageKind.SEARCH, i) for i in range(2)]
    before = client.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"]
    hand.store.progress(claims[0], done=10, elapsed_s=20.0, best_value=0.5)
    hand.store.progress(claims[1], done=6, elapsed_s=12.0, best_value=0.25)
    shown = client.get(f"/v1/jobs/{job}").json()
    hand.store.complete(claims[0], {})
    alone = client.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"]
    client.post(f"/v1/jobs/{job}:pause")

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
    assert before is None
    assert alone == 68.0  # of the island that goes on
    assert client.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"] is None


def test_a_failed_job_says_why(client, submit, hand, refusal):
    job = submit()["id"]
    hand.fail(job, type="NumericalError", message="NaN in 4.q", layer="4.q", other="dropped")
    shown = client.get(f"/v1/jobs/{job}").json()

    assert shown["state"] == "failed"
    assert shown["finished_at"] is not None
    refusal(client.get(f"/v1/jobs/{job}/best"), 409, "no_configuration")
    assert shown["error"] == {
        "type": "NumericalError", "message": "NaN in 4.q", "layer": "4.q", "stage": "calibrate",
        "attempts": 1, "candidate": None,
    }  # fmt: skip


def test_trial(client, submit, hand, configuration):
    """A trial tells what was tried and what came of it; they come by number, page by page."""
    job = submit()
    hand.record(job, 4, failed=2)
    url = f"/v1/jobs/{job['id']}/trials?page_size=2"
    first = client.get(url).json()
    last = client.get(f"{url}&page_token={first['next_page_token']}").json()
    (_, complete), (failed, _) = first["trials"], last["trials"]

    assert [t["number"] for t in first["trials"] + last["trials"]] == [0, 1, 2, 3]
    assert last["next_page_token"] is None
    assert client.get(f"{url}&page_token={10**18 - 1}").json()["trials"] == []  # no number so large
    assert complete == {
        "island": 0, "number": 1, "state": "complete", "method": "crepe", "value": 0.1,
        "perplexity": None, "scope": "layer",
        "coefficients": configuration.coefficients.to_dict(), "failure": None, "seconds": 0.5,
    }  # fmt: skip
    assert (failed["state"], failed["value"], failed["failure"]) == (
        "failed", None, "NaN in layer 3",
    )  # fmt: skip


def test_confirmed_trials_have_perplexities_an_unknown_island_is_refused(
    client, submit, hand, refusal
):
    job, other = submit(islands=2), submit(islands=2)["id"]
    hand.record(job, 3, island=0)
    hand.record(job, 3, island=1)
    hand.to_confirm(job["id"], 0, 3)  # trial 0 of island 0, trial 1 of island 1
    hand.measure(job["id"], 3, perplexity=20.0, seconds=1.0)
    hand.measure(job["id"], 0, perplexity=30.0, seconds=1.0)
    url = f"/v1/jobs/{job['id']}/trials"

    for island, expected in ((0, [30.0, None, None]), (1, [None, 20.0, None])):
        trials = client.get(url, params={"island": island}).json()["trials"]
        assert [t["perplexity"] for t in trials] == expected
        assert {t["island"] for t in trials} == {island}
    empty = client.get(f"/v1/jobs/{other}/trials", params={"island": 1}).json()
    assert empty == {"trials": [], "next_page_token": None}
    refusal(client.get(url, params={"island": 2}), 404, "no_such_island")
    for island in ("64", "-1", "x"):
        (error,) = refusal(client.get(url, params={"island": island}), 422)["errors"]
        assert error["parameter"] == "island"


def test_the_best_configuration_is_byte_for_byte_the_file_that_pho_search_writes(
    client, submit, hand, configuration, tmp_path
):
    job = submit()["id"]
    hand.succeed(job)
    write_configuration(configuration, tmp_path / "config.json")
    answer = client.get(f"/v1/jobs/{job}/best")

    assert answer.headers["content-type"] == "application/json"
    assert answer.content == (tmp_path / "config.json").read_bytes()


def test_the_best_configuration_which_is_shared_does_not_say_where_the_services_folders_lie(
    client, submit, hand, configuration, tmp_path
):
    job = submit()["id"]
    hand.succeed(job)
    lies = {"name": str(tmp_path / "org" / "mine"), "family": "llama"}
    found = {**configuration.model_dump(mode="json"), "model": lies}
    with hand.store.database.transaction() as connection:
        connection.execute(update(jobs).where(jobs.c.id == uuid.UUID(job)).values(best=found))

    shown = client.get(f"/v1/jobs/{job}/best").json()
    assert shown == {**found, "model": {"name": "org/mine", "family": "llama"}}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_its_work_or_is_a_conflict_that_says_the_state(
    client, submit, hand, refusal, verb
):
    allowed, then, refused = VERBS[verb]
    document = {"trials": 5} if verb == "extend" else None
    paths = {state: f"/v1/jobs/{submit()['id']}" for state in (allowed, refused)}
    for state, path in paths.items():
        hand.bring(path.removeprefix("/v1/jobs/"), state)
    before = client.get(paths[refused]).json()
    done, not_done = (client.post(f"{path}:{verb}", json=document) for path in paths.values())

    assert (done.status_code, done.json()["state"]) == (202, then)
    assert client.get(paths[allowed]).json() == done.json()
    assert refusal(not_done, 409, "state_conflict")["state"] == refused
    assert client.get(paths[refused]).json() == before


def test_a_result_stays_while_the_job_goes_on(client, submit, hand):
    job = submit(trials=40, islands=2)["id"]
    hand.succeed(job, "the best lies on the border")
    shown = client.get(f"/v1/jobs/{job}").json()
    before = client.get(f"/v1/jobs/{job}/best").content
    extended = client.post(f"/v1/jobs/{job}:extend", json={"trials": 10}).json()

    assert (extended["spec"]["trials"], extended["progress"]["total"]) == (50, 100)
    assert shown["state"] == "succeeded"
    assert shown["best"] == {
        "method": "crepe", "objective": 0.0123456789012345678, "perplexity": 17.25,
        "perplexities": None, "report": None,
    }  # fmt: skip
    assert shown["warnings"] == ["the best lies on the border"]
    assert client.get(f"/v1/jobs/{job}/best").content == before


def test_a_wrong_or_an_early_extension_is_refused_there(client, submit, hand, refusal):
    measuring = submit()["id"]
    hand.to_confirm(measuring, 0, 7)
    hand.take(measuring, StageKind.PERPLEXITY, 7)
    early = client.post(f"/v1/jobs/{measuring}:extend", json={"trials": 1})
    problem = refusal(early, 409, "state_conflict")
    assert problem["state"] == "running"
    assert "wait until it has succeeded" in problem["detail"]
    url = f"/v1/jobs/{submit(trials=MAX_TRIALS - 5)['id']}:extend"
    for document, pointer, says in (
        ({"trials": 6}, "/trials", str(MAX_TRIALS)),
        ({}, "/trials", "required"),
        ({"trials": 0}, "/trials", "0 should be greater than or equal to 1"),
        ([5], "", "not a JSON object"),
        ({"trials": 1, "islands": 2}, "/islands", "unknown field; known are trials"),
    ):
        (error,) = refusal(client.post(url, json=document), 422, "invalid_request")["errors"]

        assert error["pointer"] == pointer
        assert says in error["detail"]
    assert client.post(url, json={"trials": 5}).json()["spec"]["trials"] == MAX_TRIALS


def test_a_deletion_that_is_cut_off_leaves_the_job_with_all_its_studies(
    client, submit, hand, monkeypatch
):
    job, deleted = submit(islands=2), optuna.delete_study
    for island in range(2):
        hand.record(job, 2, island=island)
    hand.bring(job["id"], JobState.CANCELLED)
    before = hand.studies()

    def cut_off(study_name, storage):
        deleted(study_name=study_name, storage=storage)
        raise OSError("the database is away")

    with monkeypatch.context() as broken:
        broken.setattr(optuna, "delete_study", cut_off)
        failed = client.delete(f"/v1/jobs/{job['id']}")

    assert failed.status_code == 500
    assert hand.studies() == before
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert hand.studies() == []


def test_a_deletion_takes_all_studies(client, submit, hand, refusal):
    job, cut_off, other = submit(islands=2), submit(islands=2), submit()
    for each, island in ((job, 0), (job, 1), (cut_off, 1), (other, 0)):
        hand.record(each, 2, island=island)
    for each in (job, cut_off):
        hand.bring(each["id"], JobState.CANCELLED)
        answer = client.delete(f"/v1/jobs/{each['id']}")
        assert (answer.status_code, answer.content) == (204, b"")
    refused = refusal(client.delete(f"/v1/jobs/{other['id']}"), 409, "state_conflict")

    assert refused["detail"] == "A job that is queued cannot be deleted. Cancel it first."
    assert hand.studies() == [other["name"]]
    assert ids(client.get("/v1/jobs")) == [other["id"]]
    refusal(client.delete(f"/v1/jobs/{job['id']}"), 404, "no_such_job")


def at_addresses(client, job_id, headers=None):
    """The answers of all addresses of a job, each with what it was."""
    for method, rest, body in ADDRESSES:
        path = f"/v1/jobs/{job_id}{rest}"
        yield f"{method} {rest}", client.request(method, path, json=body, headers=headers)


def test_every_address_of_a_job_takes_the_beginning_of_its_id(client, hand, submit):
    job, twin = (submit()["id"] for _ in range(2))
    for job_id in (job, twin):
        hand.succeed(job_id)
    short = {name: answer.status_code for name, answer in at_addresses(client, job[:12].upper())}
    whole = {name: answer.status_code for name, answer in at_addresses(client, twin)}

    assert short == whole
    assert [*short.values()].count(404) == 0


def test_the_beginning_of_an_id_finds_jobs_of_the_callers_key_alone(
    client, hand, bearer_of, refusal
):
    mine, other = bearer_of("mine"), bearer_of("other")
    alike = [f"abcdef01-2345-4000-8000-00000000000{number}" for number in range(3)]
    for job_id, headers in zip(alike, (mine, other, other), strict=True):
        submitted = client.post("/v1/jobs", json=DOCUMENT, headers=headers).json()["id"]
        with hand.store.database.transaction() as connection:
            for table in (stages, events):
                connection.execute(delete(table).where(table.c.job_id == uuid.UUID(submitted)))
            change = update(jobs).where(jobs.c.id == uuid.UUID(submitted))
            connection.execute(change.values(id=uuid.UUID(job_id)))

    assert client.get("/v1/jobs/abcdef", headers=mine).json()["id"] == alike[0]
    for _, answer in at_addresses(client, "abcdef01", other):
        told = refusal(answer, 404, "ambiguous_id")["detail"]
        assert [job_id in told for job_id in alike] == [False, True, True]


@pytest.mark.parametrize("name", ["abcdef01", "abc", "a.b", NOBODY])
def test_what_begins_no_jobs_id_is_no_such_job_at_every_address(client, refusal, name):
    for _, answer in at_addresses(client, name):
        assert refusal(answer, 404, "no_such_job")["detail"].startswith("No job has ")
    assert client.get(f"/jobs/{name}/report").status_code == 404


def test_the_report_below_a_jobs_page_leads_to_the_report(client, submit):
    job = submit()["id"]
    answer = client.get(f"/jobs/{job[:8]}/report", follow_redirects=False)

    assert answer.headers["location"] == f"/v1/jobs/{job}/report"
    assert client.get(f"/jobs/{job}/report").status_code == 200


def test_jobs_are_compared_by_the_beginnings_of_their_ids(client, submit):
    first, second = submit()["id"], submit()["id"]

    assert client.get("/compare", params={"job": [first[:12], second]}).status_code == 200
    assert client.get("/compare", params={"job": [first[:12], first]}).status_code == 422


def test_a_share_may_be_a_number_as_in_python(client, submit, refusal):
    assert submit(pattern=0.5)["spec"]["pattern"] == "0.5"
    assert submit(pattern=None, patterns=[0.5, "2:4"])["spec"]["patterns"] == ["0.5", "2:4"]
    for odd in (True, 1, 0, -0.5, {}):
        answer = client.post("/v1/jobs", json={**DOCUMENT, "pattern": odd})
        assert refusal(answer, 422)["errors"][0]["pointer"] == "/pattern"


def test_labels_are_shown_and_jobs_are_found_by_them(client, submit):
    job = submit(labels={"team": "a", "run": "2026-12"})
    submit(labels={"team": "b"})
    page, listing = (
        client.get(f"/jobs/{job['id']}").text,
        client.get("/", params={"label": "team=a"}),
    )

    assert job["labels"] == job["spec"]["labels"] == {"team": "a", "run": "2026-12"}
    assert ids(client.get("/v1/jobs", params={"label": ["team=a", "run"]})) == [job["id"]]
    assert "team=a, run=2026-12" in page
    assert job["name"] in listing.text
    assert "team=b" not in listing.text


@pytest.mark.parametrize(
    "labels",
    [
        {"team": "<b>"}, {"a b": "x"}, {"": "x"}, {"team": ""}, {"team": "x" * 64}, {"-a": "x"},
        {"team": 1}, {"a\nb": "x"}, {f"l{i}": "x" for i in range(17)}, ["team"],
    ],
)  # fmt: skip
def test_labels_that_are_no_short_words_are_refused(client, refusal, labels):
    answer = client.post("/v1/jobs", json={**DOCUMENT, "labels": labels})

    assert refusal(answer, 422)["errors"][0]["pointer"].startswith("/labels")
