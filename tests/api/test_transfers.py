"""What a job has found, on other models: asked for, followed, and shown."""

import uuid

import pytest

from pho_service.library import parse_library_file
from storage.claims import LibraryAddition
from storage.records import JobState, StageKind

MODELS = {"models": ["org/one", "org/two"]}


@pytest.fixture
def searched(submit, hand):
    job_id = str(submit()["id"])
    hand.succeed(job_id)
    return job_id


def result(name, transferred=20.0):
    return {
        "target": name, "key": "k",
        "model": {"name": name, "family": "gemma3_text", "parameters": 10**8},
        "perplexities": {"dense": 10.0, "wanda": 24.0, "ria": 25.0, "transferred": transferred},
        "proxies": {"wanda": 0.4, "ria": 0.5, "transferred": 0.3}, "gain": 5.0, "regret": None,
        "proxy_regret": None, "own": None, "report": None,
        "warnings": ["it does not hold"] if transferred > 25 else [],
    }  # fmt: skip


def done(hand, job_id, *results, first=0):
    for number, each in enumerate(results, first):
        claim = hand.take(job_id, StageKind.TRANSFER, number)
        configuration = claim.job.spec["configuration"]
        hand.store.complete(claim, each, library=[LibraryAddition(configuration, each)], ended=True)


def test_submit(client, hand, searched, configuration, refusal):
    """A transfer is a job with a stage a model, calibrated as the search, which stays as it was."""
    calibration = client.get(f"/v1/jobs/{searched}").json()["spec"]["calibration"]
    path, headers = f"/v1/jobs/{searched}:transfer", {"Idempotency-Key": "a"}
    answer = client.post(path, json=MODELS, headers=headers)
    again = client.post(path, json=MODELS, headers=headers).json()
    other = client.post(path, json={"models": ["org/three"]}, headers=headers)
    job = answer.json()
    stored = hand.store.get(uuid.UUID(job["id"]))

    assert answer.status_code == 202
    assert again["id"] == job["id"]
    refusal(other, 422, "idempotency_key_reused")
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"]) == ("transfer", "queued")
    assert job["spec"]["source"] == searched
    assert job["spec"]["configuration"] == configuration.model_dump(mode="json")
    assert job["spec"]["calibration"] == {**calibration, "kernel_sizes": [3, 5, 9, 15]}
    assert (job["progress"]["done"], job["progress"]["total"]) == (0, 2)
    assert [s.kind for s in stored.stages] == [StageKind.TRANSFER] * 2
    assert client.get(f"/v1/jobs/{searched}").json()["state"] == "succeeded"


def test_models_are_shown_once_measured(client, hand, searched):
    job = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS).json()
    path = f"/v1/jobs/{job['id']}"
    none = client.get(f"{path}/transfer").json()
    done(hand, job["id"], result("org/one"))
    one = client.get(path).json()
    done(hand, job["id"], result("org/two", 26.0), first=1)
    both = client.get(path).json()
    file = parse_library_file(client.get(f"{path}/transfer").json(), "it")

    assert none["targets"] == []
    assert (one["state"], one["progress"]["done"]) == ("running", 1)
    assert (both["state"], both["warnings"]) == ("succeeded", ["it does not hold"])
    assert [target.target for target in file.targets] == ["org/one", "org/two"]
    assert file.targets[0].perplexities["ria"] == 25.0


def test_a_transfer_has_no_trials_and_no_configuration_of_its_own_a_search_no_transfers(
    client, hand, submit, refusal, searched
):
    job_id = submit()["id"]
    hand.bring(job_id, JobState.FAILED)
    answer = client.post(f"/v1/jobs/{job_id}:transfer", json=MODELS)
    assert refusal(answer, 409, "no_configuration")["state"] == "failed"
    job = f"/v1/jobs/{client.post(f'/v1/jobs/{searched}:transfer', json=MODELS).json()['id']}"
    for method, path, body in (
        ("POST", ":transfer", MODELS), ("POST", ":extend", {"trials": 5}), ("GET", "/best", None),
        ("GET", "/trials", None),
    ):  # fmt: skip
        answer = client.request(method, f"{job}{path}", json=body)
        assert f"{job}/transfer" in refusal(answer, 409, "not_a_search")["detail"]

    problem = refusal(client.get(f"/v1/jobs/{searched}/transfer"), 409, "not_a_transfer")
    assert ":transfer" in problem["detail"]
    states = [client.post(f"{job}:{v}").json()["state"] for v in ("pause", "resume", "cancel")]

    assert states == ["paused", "queued", "cancelled"]  # it has the verbs of a search
    assert client.delete(job).status_code == 204
    assert client.get(job).status_code == 404


def test_what_is_wrong_is_named_with_its_place_and_the_rule_and_no_job_is_made(
    client, refusal, searched
):
    for changes, pointer, rule in (
        ({"models": []}, "/models", "at least 1"),
        ({"models": ["a", "a"]}, "/models", "a is given twice"),
        ({"models": ["/etc/passwd"]}, "/models/0", "/etc/passwd"),
        ({"report": {"text": "/etc/passwd"}}, "/report/text", "/etc/passwd"),
        ({"report": {}}, "/report", "a text or a dataset is required"),
        ({"report": {"dataset": "wikitext2", "split": "train"}}, "/report", "leave split out"),
        ({"report": {"dataset": "./no"}}, "/report/dataset", "./no"),
        ({"search": {"confirm": {"text": "/x"}}}, "/search/confirm/text", "/x"),
        ({"calibration": {"text": "/etc/hosts"}}, "/calibration/text", "/etc/hosts"),
        ({"pattern": "2:4"}, "/pattern", "unknown field; known are models"),
    ):
        answer = client.post(f"/v1/jobs/{searched}:transfer", json={**MODELS, **changes})
        errors = refusal(answer, 422, "invalid_request")["errors"]

        assert pointer in [error.get("pointer") for error in errors]
        assert any(rule in error["detail"] for error in errors)
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def test_report(client, searched, texts):
    """The report text or data set and the own search are kept with the job."""
    for asked in (
        {"text": str(texts["report"]), "field": "text"},
        {"dataset": "wikitext2"},
        {"dataset": "org/wiki", "dataset_config": "wikitext-2-raw-v1", "split": "test"},
    ):
        document = {**MODELS, "report": asked, "search": {}, "name": "mine"}
        job = client.post(f"/v1/jobs/{searched}:transfer", json=document).json()
        kept = job["spec"]["report"]

        assert {name: kept[name] for name in asked} == asked
        assert job["name"].startswith("mine ")
        assert job["spec"]["search"]["trials"] == 200


def test_another_key_sees_nothing(client, bearer_of, submit, hand):
    mine, theirs = bearer_of("mine"), bearer_of("theirs")
    job = f"/v1/jobs/{submit(headers=mine)['id']}"
    hand.succeed(job.removeprefix("/v1/jobs/"))
    made = client.post(f"{job}:transfer", json=MODELS, headers=mine).json()
    path = f"/v1/jobs/{made['id']}/transfer"

    assert client.post(f"{job}:transfer", json=MODELS, headers=theirs).status_code == 404
    assert [client.get(path, headers=key).status_code for key in (theirs, mine)] == [404, 200]
