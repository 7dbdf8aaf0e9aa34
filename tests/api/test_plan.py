"""``POST /v1/plan``: a job's document, and what it would take."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from itertools import islice
from typing import get_args
from unittest.mock import Mock

import pytest
from transformers import LlamaConfig

from pho_service.api.plan import Card
from pho_service.api.service import AT_ONCE
from pho_service.errors import ModelError
from pho_service.planning.costs import CARDS
from storage.keys import Quota
from storage.records import StageKind


def ask(client, query="", **fields):
    document = {"model": "seven", "pattern": "0.5", "preset": "score", **fields}
    return client.post(f"/v1/plan{query}", json=document)


def test_the_api_names_the_cards_that_can_be_planned_for_and_no_others():
    assert {*get_args(Card)} == {*CARDS, "cpu"}


def test_the_default_card_is_an_h100(client, tmp_path, write_header):
    write_header(tmp_path / "seven", LlamaConfig(dtype="bfloat16", max_position_embeddings=4096))
    default = ask(client).json()
    small = ask(client, f"?card=4090&device_memory={8 * 2**30}").json()
    long = ask(client, calibration={"context_length": 8192})

    assert default["fits"]
    assert default["machine"]["name"] == "H100"
    assert default["model"]["parameters"] == pytest.approx(6.74e9, rel=0.01)
    assert not small["fits"]
    assert small["machine"]["memory_bytes"] == 8 * 2**30
    assert any("stream=true" in way for way in small["ways_out"])
    assert long.json()["errors"][0]["pointer"] == "/calibration/context_length"
    assert "8192 is more than seven can read: 4096." in long.text
    assert str(tmp_path) not in long.text
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_what_cannot_be_planned_is_refused_with_the_rule(client, refusal):
    for query, fields, words in (
        ("", {"model": "../seven"}, "does not lie below"),
        ("?card=K80", {}, "H200"),
        ("?device_memory=80", {}, "1000000000"),
    ):
        assert words in refusal(ask(client, query, **fields), 422)["errors"][0]["detail"]


def test_a_quota_in_hours_counts_what_plans_say(
    client, keys, tmp_path, write_header, refusal, hand,
    monkeypatch,
):  # fmt: skip
    """Of the stages that a request is for; a job that cannot be planned is refused."""
    write_header(tmp_path / "seven", LlamaConfig(dtype="bfloat16", max_position_embeddings=4096))
    key, secret = keys.create(
        "team", sees_all=False, quota=Quota(3600, timedelta(days=7), "seconds")
    )
    headers = {"Authorization": f"Bearer {secret}"}
    document = {"model": "seven", "pattern": "0.5", "preset": "score", "trials": 2000}

    def post(path="/v1/jobs", **changes):
        return client.post(path, json={**document, **changes}, headers=headers)

    planned = post("/v1/plan").json()["stages"]
    stages = {stage["title"].partition(",")[0]: stage["seconds"][1] for stage in planned}
    job = post().json()["id"]
    used = [keys.used()[key.id]]
    hand.succeed(job)
    client.post(f"/v1/jobs/{job}:prune", headers=headers)
    used.append(keys.used()[key.id])
    repeat = {"Idempotency-Key": "once"}
    once = [client.post("/v1/jobs", json=document, headers=headers | repeat)]
    with monkeypatch.context() as patch:  # what is done already is not planned again
        patch.setattr("pho_service.api.service.read_shapes", Mock(side_effect=ModelError("away")))
        once.append(client.post("/v1/jobs", json=document, headers=headers | repeat))
        pruning = client.post(f"/v1/jobs/{job}:prune", headers=headers)
    large = post(calibration={"samples": 60_000})
    away = post(model="org/name")

    assert once[0].json()["id"] == once[1].json()["id"]
    assert pruning.status_code == 202
    writing = stages["prune"] + stages["save"]
    assert used[0] == math.ceil(sum(stages.values()) - writing)
    reading = stages["read the model"] + stages["hash the weights"] + stages["calibrate"]
    assert used[1] - used[0] == math.ceil(reading + writing)
    told = refusal(large, 422, "job_too_large")["detail"]
    assert "The quota of key 'team' is 1 h of an H100 in 7 days." in told
    (error,) = refusal(away, 422)["errors"]
    assert error["pointer"] == "/model"
    assert "The quota of this key counts hours" in error["detail"]


@pytest.mark.parametrize("path", ["/v1/plan", "/new/check"])
def test_plans_take_few_threads_whoever_asks(client, monkeypatch, path, at_once):
    """The headers of a large model take seconds, and the hub may take twenty."""

    def read(*_, **__):
        with at_once:
            time.sleep(0.05)
        raise ModelError("it took long")

    monkeypatch.setattr("pho_service.api.service.read_shapes", read)
    document, own = {"model": "org/name", "pattern": "0.5"}, {"Sec-Fetch-Site": "same-origin"}
    sent = {"json": document} if path == "/v1/plan" else {"data": document, "headers": own}
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: client.post(path, **sent), range(8))]

    assert ["it took long" in answer.text for answer in answers] == [True] * 8
    assert at_once.most == AT_ONCE


def test_submissions_that_are_planned_take_few_threads_and_others_are_told_to_come_again(
    client, keys, monkeypatch, at_once, refusal
):
    over = threading.Event()

    def read(*_, **__):
        with at_once:
            over.wait(60)
        raise ModelError("it took long")

    monkeypatch.setattr("pho_service.api.service.read_shapes", read)
    monkeypatch.setattr("pho_service.api.service.TURN_S", 0.1)
    quota = Quota(3600, timedelta(days=7), "seconds")
    _, secret = keys.create("team", sees_all=False, quota=quota)
    document, own = {"model": "org/name", "pattern": "0.5"}, {"Authorization": f"Bearer {secret}"}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/v1/jobs", json=document, headers=own) for _ in range(8)]
        late = [each.result() for each in islice(as_completed(asked), 8 - AT_ONCE)]
        over.set()

    assert at_once.most == AT_ONCE
    assert [each.result().status_code for each in asked].count(422) == AT_ONCE
    assert "are being planned" in refusal(late[0], 429, "too_many_requests")["detail"]
    assert late[0].headers["Retry-After"] == "5"


def test_pages_plan_what_the_hubs_cache_has_and_ask_nobody(
    client, submit, hand, tmp_path, write_header,
    monkeypatch,
):  # fmt: skip
    """A hub that hangs would hold a thread for twenty seconds at each look at a job."""
    cache = tmp_path / "hub" / "models--org--cached"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    write_header(cache / "snapshots" / "abc", LlamaConfig(dtype="bfloat16"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = []
    monkeypatch.setattr("pho_service.planning.shapes._of_hub", lambda name, _: asked.append(name))
    job = submit(model="org/cached")
    hand.store.enter_worker(hand.worker_id, name="host:1", device="cpu", kinds=[*StageKind])

    assert "left in all" in client.get(f"/jobs/{job['id']}").text
    assert "Stages of the plan" in client.get(f"/new?job={job['id']}").text
    assert asked == []
