"""``POST /v1/plan``: a job's document, and what it would take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from transformers import LlamaConfig

from pho_service.api.plan import Card
from pho_service.planning.costs import CARDS


@pytest.fixture
def model(shared_folder: Path, write_header: Callable[[Path, LlamaConfig], None]) -> str:
    """A model of which only the headers are there."""
    write_header(
        shared_folder / "seven", LlamaConfig(dtype="bfloat16", max_position_embeddings=4096)
    )
    return "seven"


def ask(client: TestClient, model: str, query: str = "", **fields: Any) -> Any:
    """The answer to a job's document."""
    document = {"model": model, "pattern": "0.5", "preset": "score", **fields}
    return client.post(f"/v1/plan{query}", json=document)


def test_the_api_names_the_cards_that_can_be_planned_for_and_no_others() -> None:
    assert {*get_args(Card)} == {*CARDS, "cpu"}


def test_answer(shared_client: TestClient, model: str) -> None:
    """On an H100 by default, on another card and memory if that is asked; nothing is stored."""
    default = ask(shared_client, model).json()
    small = ask(shared_client, model, f"?card=4090&device_memory={8 * 2**30}").json()

    assert default["fits"]
    assert default["machine"]["name"] == "H100"
    assert default["model"]["parameters"] == pytest.approx(6.74e9, rel=0.01)
    assert not small["fits"]
    assert small["machine"]["memory_bytes"] == 8 * 2**30
    assert any("--stream" in way for way in small["ways_out"])
    assert shared_client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("fields", "query", "pointer", "words"),
    [
        ({"model": "missing.gguf"}, "", "/model", "does not exist below"),
        ({"model": "../seven"}, "", "/model", "does not lie below"),
        (
            {"calibration": {"context_length": 8192}},
            "",
            "/calibration/context_length",
            "8192 is more than seven can read: 4096.",
        ),
        ({"trials": 0}, "", "/trials", "greater than or equal to 1"),
        ({}, "?card=K80", None, "H200"),
        ({}, "?device_memory=80", None, "1000000000"),
    ],
)
def test_the_field_and_the_rule_are_named_and_no_path_outside_of_the_roots(
    shared_client: TestClient,
    shared_folder: Path,
    model: str,
    fields: dict[str, Any],
    query: str,
    pointer: str | None,
    words: str,
) -> None:
    answer = ask(shared_client, fields.pop("model", model), query, **fields)

    assert answer.status_code == 422
    assert words in answer.text
    if pointer is not None:
        assert answer.json()["errors"][0]["pointer"] == pointer
    if "read: 4096" in words:
        assert str(shared_folder) not in answer.text
