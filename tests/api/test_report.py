"""A job as a page: of every kind and in every state."""

import re

from storage.claims import LibraryAddition
from storage.records import JobState, StageKind

TRANSFER = {
    "target": "org/other", "key": "k", "model": {}, "proxies": {"ria": 0.5, "transferred": 0.25},
    "perplexities": {"ria": 25.0, "transferred": 20.0}, "own": None, "warnings": [],
}  # fmt: skip


def page(client, job_id):
    answer = client.get(f"/v1/jobs/{job_id}/report")
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text.partition("<footer>")[0]


def visible(text):
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]+>", " ", text, flags=re.DOTALL))


def transfer(client, hand, job_id, *results):
    """A transfer of what a job has found; workers have done some of its models."""
    models = ["org/other", "org/third"]
    job = client.post(f"/v1/jobs/{job_id}:transfer", json={"models": models}).json()
    for number, result in enumerate(results):
        claim = hand.take(job["id"], StageKind.TRANSFER, number)
        addition = LibraryAddition(claim.job.spec["configuration"], result)
        hand.store.complete(claim, result, library=[addition], ended=True)
    return str(job["id"])


def test_a_job_has_a_report_in_every_state(client, hand, submit):
    for state in JobState:
        job_id = submit()["id"]
        hand.bring(job_id, state)

        assert f"Search, {state}." in visible(page(client, job_id))


def test_search(client, hand, submit, configuration):
    """The page has what the job was asked, found and took."""
    job = submit(trials=8, seed=11)
    hand.record(job, 8, failed=3)
    hand.to_confirm(job["id"], 2)
    hand.measure(job["id"], 2, 17.25, 1.5)
    layers = [["model.layers.0", "mlp.up_proj", 0.25, 0.5]]
    hand.succeed(job["id"], "It lies on the border.", layers=layers)
    text = visible(page(client, job["id"]))

    for said in (
        job["name"], "model org/name", "seed 11", "It lies on the border.",
        "1 of 8 trials failed", "perplexity 1 of 1 1.5",
        "The largest is 0.2500, of model.layers.0.mlp.up_proj", "pho submit --job job.json",
    ):  # fmt: skip
        assert said in text
    assert f"kernel {configuration.coefficients.kernel_size}" in text
    assert "17.25" in text


def test_a_transfer_and_its_search_show_models(client, hand, submit):
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
    (entry,) = client.get("/v1/configurations").json()["configurations"]
    client.delete(f"/v1/configurations/{entry['id']}")
    assert "was not measured on other models" in visible(page(client, job_id))


def test_the_trials_of_all_islands_are_there_unless_they_are_too_many_which_is_said(
    client, hand, submit, monkeypatch
):
    job = submit(trials=8, islands=2)
    hand.record(job, 3)
    hand.record(job, 3, island=1)
    hand.calibrate(job["id"])
    claim = hand.take(job["id"], StageKind.SEARCH, 1)
    hand.store.progress(claim, done=3, elapsed_s=1.0, best_value=0.1)
    whole = visible(page(client, job["id"]))
    monkeypatch.setattr("pho_service.api.report.MOST_TRIALS", 3)
    text = visible(page(client, job["id"]))

    assert "5 rated trials" in whole  # the baseline of the second island is that of the first
    assert "3 rated trials" in text
    assert "3 more trials are not shown here" in text
