"""A job as a page: of every kind and in every state."""

import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.spec.configuration import Configuration
from storage.claims import Entry, Found
from storage.keys import KeyStore
from storage.records import JobState, StageKind

Refusal = Callable[..., dict[str, Any]]
NOBODY = "00000000-0000-0000-0000-000000000000"
TRANSFER = {
    "target": "org/other", "key": "k", "model": {}, "proxies": {"ria": 0.5, "transferred": 0.25},
    "perplexities": {"ria": 25.0, "transferred": 20.0}, "own": None, "warnings": [],
}  # fmt: skip


def page(client: TestClient, job_id: str) -> str:
    """The page of a job, without its footer."""
    answer = client.get(f"/v1/jobs/{job_id}/report")
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text.partition("<footer>")[0]


def visible(text: str) -> str:
    """The words of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]+>", " ", text, flags=re.DOTALL))


def transfer(client: TestClient, hand: Any, job_id: str, *results: dict[str, Any]) -> str:
    """A transfer of what a job has found; workers have done some of its models."""
    models = ["org/other", "org/third"]
    job = client.post(f"/v1/jobs/{job_id}:transfer", json={"models": models}).json()
    for number, result in enumerate(results):
        claim = hand.take(job["id"], StageKind.TRANSFER, number)
        hand.store.complete(
            claim, result, library=[Entry(claim.job.spec["configuration"], result)], ended=True
        )
    return str(job["id"])


@pytest.mark.parametrize("state", JobState)
def test_every_state(client: TestClient, hand: Any, submit: Any, state: JobState) -> None:
    """A job has a page at any time, and it says where the job is."""
    job_id = submit()["id"]
    hand.bring(job_id, state)

    assert f"Search, {state}." in visible(page(client, job_id))


def test_search(client: TestClient, hand: Any, submit: Any, configuration: Configuration) -> None:
    """The page has what the job was asked, found and took."""
    job = submit(trials=8, seed=11)
    hand.record(job, 8, failed=3)
    hand.calibrate(job["id"])
    hand.search(job["id"])
    hand.confirm(job["id"], 2)
    hand.measure(job["id"], 2, 17.25, 1.5)
    hand.succeed(job["id"], "It lies on the border.")
    text = visible(page(client, job["id"]))

    for said in (
        job["name"], "model org/name", "seed 11", "It lies on the border.",
        "1 of 8 trials failed", "perplexity 1 of 1 1.5",
        "they are stored when a job ends well", "pho submit --job job.json",
    ):  # fmt: skip
        assert said in text
    assert f"kernel {configuration.coefficients.kernel_size}" in text
    assert "17.25" in text


def test_islands(client: TestClient, hand: Any, submit: Any) -> None:
    """The trials of all islands are there, also of a search that goes on."""
    job = submit(trials=8, islands=2)
    hand.record(job, 3)
    hand.record(job, 2, island=1)
    text = visible(page(client, job["id"]))

    assert "4 rated trials" in text  # the baseline of the second island is that of the first


def test_layers(client: TestClient, hand: Any, submit: Any, configuration: Configuration) -> None:
    """What the last stage has stored of layers is drawn."""
    job_id = submit()["id"]
    hand.calibrate(job_id)
    hand.search(job_id)
    hand.confirm(job_id)
    cells = [["model.layers.0", "mlp.up_proj", 0.25, 0.5]]
    hand.store.complete(
        hand.take(job_id, StageKind.FINISH),
        {"layers": {"org/name": cells}},
        found=Found(best=configuration.model_dump(mode="json"), warnings=[]),
        ended=True,
    )

    assert "The largest is 0.2500, of model.layers.0.mlp.up_proj" in visible(page(client, job_id))


def test_transfer(client: TestClient, hand: Any, submit: Any) -> None:
    """A transfer's page has its models; the page of the search that it is of has them, too."""
    job_id = submit()["id"]
    hand.succeed(job_id)
    before = visible(page(client, job_id))
    transfer_id = transfer(client, hand, job_id, TRANSFER)
    mine, source = (visible(page(client, each)) for each in (transfer_id, job_id))

    assert "was not measured on other models" in before
    assert f"what job {job_id} found" in mine
    assert "Transfer, running." in mine
    assert "transfer 1 of 2" in mine
    for text in (mine, source):
        assert "other 25.00 20.00 20.0%" in text


def test_many_trials(
    client: TestClient, hand: Any, submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more trials than can be read in seconds, whole islands are left out, and it is said."""
    monkeypatch.setattr("pho_service.api.report.MOST_TRIALS", 3)
    job = submit(trials=8, islands=2)
    hand.record(job, 3)
    hand.record(job, 3, island=1)
    hand.calibrate(job["id"])
    claim = hand.take(job["id"], StageKind.SEARCH, 1)
    hand.store.progress(claim, done=3, elapsed_s=1.0, best_value=0.1)
    text = visible(page(client, job["id"]))

    assert "3 rated trials" in text
    assert "3 more trials are left out" in text


def test_a_job_that_is_not_there_has_no_page(client: TestClient, refusal: Refusal) -> None:
    refusal(client.get(f"/v1/jobs/{NOBODY}/report"), 404, "no_such_job")


def test_another_keys_job_is_not_seen(client: TestClient, keys: KeyStore, refusal: Refusal) -> None:
    mine, other = (
        {"Authorization": f"Bearer {keys.create(name, sees_all=False)[1]}"} for name in "ab"
    )
    job = client.post("/v1/jobs", json={"model": "a", "pattern": "0.5"}, headers=mine).json()
    path = f"/v1/jobs/{uuid.UUID(job['id'])}/report"

    assert client.get(path, headers=mine).status_code == 200
    refusal(client.get(path, headers=other), 404, "no_such_job")


def test_gone_from_the_library(client: TestClient, submit: Any, hand: Any) -> None:
    """A configuration that was taken out of the library has no transfers any more."""
    job_id = submit()["id"]
    hand.succeed(job_id)
    transfer(client, hand, job_id, TRANSFER)
    (entry,) = client.get("/v1/configurations").json()["configurations"]
    client.delete(f"/v1/configurations/{entry['id']}")

    assert "was not measured on other models" in visible(page(client, job_id))
