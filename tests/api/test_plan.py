"""``POST /v1/plan``: a job's document, and what it would take."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
from transformers import LlamaConfig

from pho_service.api.service import AT_ONCE
from pho_service.api.submission import Card
from pho_service.errors import ModelError
from pho_service.planning.costs import CARDS
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


def test_pages_plan_what_the_hubs_cache_has_and_ask_nobody(
    client, submit, hand, tmp_path, write_header, monkeypatch
):
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
