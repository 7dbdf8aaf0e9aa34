"""What a job has found, on other models: asked for, followed, and shown."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.library import parse_library_file
from pho_service.spec.configuration import Configuration
from storage.claims import Entry
from storage.keys import KeyStore
from storage.records import JobState, StageKind

Refusal = Callable[..., dict[str, Any]]
MODELS = {"models": ["org/one", "org/two"]}


@pytest.fixture
def searched(submit: Callable[..., dict[str, Any]], hand: Any) -> str:
    """The id of a job that has a configuration."""
    job_id = str(submit()["id"])
    hand.succeed(job_id)
    return job_id


@pytest.fixture
def report(tmp_path: Path) -> dict[str, str]:
    """A text to measure on, as the document names it."""
    path = tmp_path / "report.txt"
    path.write_text("words")
    return {"text": str(path)}


def result(name: str, transferred: float = 20.0) -> dict[str, Any]:
    """What a worker stores of a model."""
    return {
        "target": name,
        "key": "k",
        "model": {"name": name, "family": "gemma3_text", "parameters": 10**8},
        "perplexities": {"dense": 10.0, "wanda": 24.0, "ria": 25.0, "transferred": transferred},
        "proxies": {"wanda": 0.4, "ria": 0.5, "transferred": 0.3},
        "gain": 5.0,
        "regret": None,
        "proxy_regret": None,
        "own": None,
        "report": None,
        "warnings": ["it does not hold"] if transferred > 25 else [],
    }


def done(hand: Any, job_id: str, *results: dict[str, Any]) -> None:
    """Let workers finish the stages of a transfer."""
    for number, each in enumerate(results):
        claim = hand.take(job_id, StageKind.TRANSFER, number)
        configuration = claim.job.spec["configuration"]
        hand.store.complete(claim, each, library=[Entry(configuration, each)], ended=True)


def test_submit(client: TestClient, hand: Any, searched: str, configuration: Configuration) -> None:
    """A transfer is a job with a stage a model; the search stays as it was."""
    answer = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS)
    job = answer.json()
    stored = hand.store.get(uuid.UUID(job["id"]))

    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"]) == ("transfer", "queued")
    assert job["spec"]["source"] == searched
    assert job["spec"]["configuration"] == configuration.model_dump(mode="json")
    assert (job["progress"]["done"], job["progress"]["total"]) == (0, 2)
    assert [s.kind for s in stored.stages] == [StageKind.TRANSFER] * 2
    assert client.get(f"/v1/jobs/{searched}").json()["state"] == "succeeded"


def test_calibration(client: TestClient, searched: str) -> None:
    """Models are calibrated as the job, with the kernel size of what it found."""
    job = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS).json()
    calibration = client.get(f"/v1/jobs/{searched}").json()["spec"]["calibration"]

    assert job["spec"]["calibration"] == {**calibration, "kernel_sizes": [3, 5, 9, 15]}


def test_measured(client: TestClient, hand: Any, searched: str) -> None:
    """What is measured is shown model by model; the last model ends the job."""
    job = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS).json()
    path = f"/v1/jobs/{job['id']}"
    none = client.get(f"{path}/transfer").json()
    done(hand, job["id"], result("org/one"))
    one = client.get(path).json()
    claim = hand.take(job["id"], StageKind.TRANSFER, 1)
    hand.store.complete(
        claim,
        result("org/two", 26.0),
        library=[Entry(job["spec"]["configuration"], result("org/two", 26.0))],
        ended=True,
    )
    both = client.get(path).json()
    file = parse_library_file(client.get(f"{path}/transfer").json(), "it")

    assert none["targets"] == []
    assert (one["state"], one["progress"]["done"]) == ("running", 1)
    assert (both["state"], both["warnings"]) == ("succeeded", ["it does not hold"])
    assert [target.target for target in file.targets] == ["org/one", "org/two"]
    assert file.targets[0].perplexities["ria"] == 25.0


def test_ranked_by_what_was_measured(client: TestClient, hand: Any, searched: str) -> None:
    job = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS).json()
    done(hand, job["id"], result("org/one"), {"target": "org/two", "key": "", "error": {},
                                              "warnings": []})  # fmt: skip
    (match,) = client.get("/v1/configurations?pattern=0.5&family=gemma3_text").json()[
        "configurations"
    ]

    assert match["job_id"] == searched
    assert match["expected_gains"]["perplexity"] == pytest.approx(1 - 20 / 25)
    assert [m["model"]["name"] for m in match["measured"]] == ["one"]
    assert any("on one, 20.0% below RIA's perplexity" in reason for reason in match["reasons"])


def test_same_key(client: TestClient, refusal: Refusal, searched: str) -> None:
    """The same idempotency key makes one job; with another document it is refused."""
    headers = {"Idempotency-Key": "a"}
    path = f"/v1/jobs/{searched}:transfer"
    first, second = (client.post(path, json=MODELS, headers=headers).json() for _ in range(2))
    other = client.post(path, json={"models": ["org/three"]}, headers=headers)

    assert first["id"] == second["id"]
    refusal(other, 422, "idempotency_key_reused")


@pytest.mark.parametrize("state", [s for s in JobState if s is not JobState.SUCCEEDED])
def test_a_job_without_a_configuration_has_nothing_to_transfer(
    client: TestClient, hand: Any, submit: Any, refusal: Refusal, state: JobState
) -> None:
    job_id = submit()["id"]
    hand.bring(job_id, state)
    problem = refusal(
        client.post(f"/v1/jobs/{job_id}:transfer", json=MODELS), 409, "no_configuration"
    )

    assert problem["state"] == state


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", ":transfer", MODELS),
        ("POST", ":extend", {"trials": 5}),
        ("GET", "/best", None),
        ("GET", "/trials", None),
    ],
)
def test_a_transfer_has_no_trials_and_no_configuration_of_its_own(
    client: TestClient, refusal: Refusal, searched: str, method: str, path: str, body: Any
) -> None:
    job = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS).json()
    answer = client.request(method, f"/v1/jobs/{job['id']}{path}", json=body)

    assert f"/v1/jobs/{job['id']}/transfer" in refusal(answer, 409, "not_a_search")["detail"]


def test_no_transfer(client: TestClient, refusal: Refusal, searched: str) -> None:
    """A search has measured nothing elsewhere."""
    problem = refusal(client.get(f"/v1/jobs/{searched}/transfer"), 409, "not_a_transfer")

    assert ":transfer" in problem["detail"]


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_verbs(client: TestClient, searched: str, verb: str) -> None:
    """A transfer is paused, resumed and cancelled as a search."""
    job = client.post(f"/v1/jobs/{searched}:transfer", json=MODELS).json()
    answer = client.post(f"/v1/jobs/{job['id']}:{verb}")
    states = {"pause": "paused", "resume": "queued", "cancel": "cancelled"}

    assert answer.status_code == 202
    assert answer.json()["state"] == states[verb]


def test_delete(client: TestClient, hand: Any, searched: str) -> None:
    """A transfer that is over is deleted; what it measured stays in the library."""
    job = client.post(f"/v1/jobs/{searched}:transfer", json={"models": ["org/one"]}).json()
    done(hand, job["id"], result("org/one"))
    gone = client.delete(f"/v1/jobs/{job['id']}")
    (entry,) = client.get("/v1/configurations").json()["configurations"]

    assert gone.status_code == 204
    assert client.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert [m["gains"]["perplexity"] is not None for m in entry["measured"]] == [True]


@pytest.mark.parametrize(
    ("changes", "pointer", "rule"),
    [
        ({"models": []}, "/models", "at least 1"),
        ({"models": ["a", "a"]}, "/models", "a is given twice"),
        ({"models": "a"}, "/models", "list"),
        ({"models": ["/etc/passwd"]}, "/models/0", "/etc/passwd"),
        ({"report": {"text": "/etc/passwd"}}, "/report/text", "/etc/passwd"),
        ({"report": {}}, "/report", "a text or a dataset is required"),
        ({"report": {"dataset": "wikitext2", "split": "train"}}, "/report", "leave split out"),
        ({"report": {"dataset": "./no"}}, "/report/dataset", "./no"),
        ({"report": {"text": "r.txt", "windows": 0}}, "/report/windows", "greater than or equal"),
        ({"search": {"trials": 0}}, "/search/trials", "greater than or equal to 1"),
        ({"search": {"confirm": {"text": "/x"}}}, "/search/confirm/text", "/x"),
        ({"calibration": {"text": "/etc/hosts"}}, "/calibration/text", "/etc/hosts"),
        ({"pattern": "2:4"}, "/pattern", "unknown field; known are models"),
        ({"configuration": {}}, "/configuration", "unknown field"),
    ],
)
def test_wrong(
    client: TestClient, refusal: Refusal, searched: str, changes: dict[str, Any], pointer: str,
    rule: str,
) -> None:  # fmt: skip
    """What is wrong is named with its place and the rule; no job is made."""
    answer = client.post(f"/v1/jobs/{searched}:transfer", json={**MODELS, **changes})
    problem = refusal(answer, 422, "invalid_request")

    assert pointer in [error.get("pointer") for error in problem["errors"]]
    assert any(rule in error["detail"] for error in problem["errors"])
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def test_report(client: TestClient, searched: str, report: dict[str, str]) -> None:
    """The report text and the own search are kept with the job."""
    document = {**MODELS, "report": report, "search": {}, "name": "mine"}
    job = client.post(f"/v1/jobs/{searched}:transfer", json=document).json()

    assert job["name"].startswith("mine ")
    assert {name: v for name, v in job["spec"]["report"].items() if v is not None} == {
        **report, "field": "text",
    }  # fmt: skip
    assert job["spec"]["search"]["trials"] == 200


def test_report_on_a_data_set(client: TestClient, searched: str) -> None:
    for report in (
        {"dataset": "wikitext2"},
        {"dataset": "org/wiki", "dataset_config": "wikitext-2-raw-v1", "split": "test"},
    ):
        answer = client.post(f"/v1/jobs/{searched}:transfer", json={**MODELS, "report": report})
        kept = answer.json()["spec"]["report"]

        assert {name: kept[name] for name in report} == report


def test_another_key_can_neither_transfer_a_job_nor_see_what_was_measured(
    client_of: Callable[..., TestClient], keys: KeyStore, hand: Any
) -> None:
    client = client_of(keys_needed=True)
    mine, theirs = (
        {"Authorization": f"Bearer {keys.create(name, sees_all=False)[1]}"}
        for name in ("mine", "theirs")
    )
    document = {"model": "org/name", "pattern": "0.5"}
    job = client.post("/v1/jobs", json=document, headers=mine).json()
    hand.succeed(job["id"])
    transfer = client.post(f"/v1/jobs/{job['id']}:transfer", json=MODELS, headers=mine).json()

    assert (
        client.post(f"/v1/jobs/{job['id']}:transfer", json=MODELS, headers=theirs).status_code
        == 404
    )
    assert client.get(f"/v1/jobs/{transfer['id']}/transfer", headers=theirs).status_code == 404
    assert client.get(f"/v1/jobs/{transfer['id']}/transfer", headers=mine).status_code == 200


def test_joint(hand: Any, submit: Any) -> None:
    """A job over several models calibrates each, and is not confirmed."""
    job = submit(more_models=["org/two", "org/three"])
    stored = hand.store.get(uuid.UUID(job["id"]))

    assert job["spec"]["confirm"] is None
    assert job["name"].startswith("name + two + three 0.5 layer")
    assert [(s.kind, s.number) for s in stored.stages] == [
        (StageKind.CALIBRATE, number) for number in range(3)
    ]
    assert len({stage.params["lock"] for stage in stored.stages}) == 3
