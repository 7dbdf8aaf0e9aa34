"""``POST /v1/plan``: a job's document, and what it would take."""

from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from transformers import LlamaConfig

from pho_service.api.plan import Card
from pho_service.planning.costs import CARDS


def ask(client: TestClient, query: str = "", **fields: Any) -> Any:
    document = {"model": "seven", "pattern": "0.5", "preset": "score", **fields}
    return client.post(f"/v1/plan{query}", json=document)


def test_the_api_names_the_cards_that_can_be_planned_for_and_no_others() -> None:
    assert {*get_args(Card)} == {*CARDS, "cpu"}


def test_the_default_card_is_an_h100(client: TestClient, tmp_path: Path, write_header: Any) -> None:
    write_header(tmp_path / "seven", LlamaConfig(dtype="bfloat16", max_position_embeddings=4096))
    default = ask(client).json()
    small = ask(client, f"?card=4090&device_memory={8 * 2**30}").json()
    long = ask(client, calibration={"context_length": 8192})

    assert default["fits"]
    assert default["machine"]["name"] == "H100"
    assert default["model"]["parameters"] == pytest.approx(6.74e9, rel=0.01)
    assert not small["fits"]
    assert small["machine"]["memory_bytes"] == 8 * 2**30
    assert any("--stream" in way for way in small["ways_out"])
    assert long.json()["errors"][0]["pointer"] == "/calibration/context_length"
    assert "8192 is more than seven can read: 4096." in long.text
    assert str(tmp_path) not in long.text
    assert client.get("/v1/jobs").json()["jobs"] == []


def test_what_cannot_be_planned_is_refused_with_the_rule(client: TestClient, refusal: Any) -> None:
    for query, fields, words in (
        ("", {"model": "../seven"}, "does not lie below"),
        ("?card=K80", {}, "H200"),
        ("?device_memory=80", {}, "1000000000"),
    ):
        assert words in refusal(ask(client, query, **fields), 422)["errors"][0]["detail"]
