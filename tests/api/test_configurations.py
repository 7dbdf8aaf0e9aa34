"""`/v1/configurations`: what is found, imported, exported and deleted, and by whom."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.spec.configuration import Configuration
from storage.keys import KeyStore

Refusal = Callable[..., dict[str, Any]]
Headers = dict[str, str]

HERE = "/v1/configurations"
NOBODY = f"{HERE}/00000000-0000-0000-0000-000000000000"
JSON = {"Content-Type": "application/json"}


def document(perplexity: float = 18.0, *, family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A configuration's file: RIA's perplexity was 24."""
    score = {
        "row": 0.1 + 0.2, "column": 1e-17, "neighbourhood": 0.25, "kernel_size": 5,
        "activation_exponent": 0.5,
    }  # fmt: skip
    return {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": score,
        "confirmation": {
            "perplexity": perplexity, "tokens": 9, "context_length": 8,
            "text": {"ü\u2713": 2**53 + 1},
        },
        "baselines": [{"method": "ria-layer", "trial": 3, "perplexity": 24.0}],
        "model": {"name": f"org/{family}-1", "family": family, "parameters": 134_515_008},
        **changes,
    }  # fmt: skip


def transfer(*targets: Any, **changes: Any) -> dict[str, Any]:
    """A transfer's file."""
    return {
        "format": "pho-transfer", "version": 1, "source": "c.json", "configuration": document(),
        "targets": [*targets], **changes,
    }  # fmt: skip


def target(family: str, transferred: float) -> dict[str, Any]:
    """What a configuration was worth on a model where RIA's perplexity is 40."""
    return {
        "target": f"org/{family}", "model": {"name": f"org/{family}-2", "family": family},
        "perplexities": {"ria": 40.0, "transferred": transferred}, "proxies": {"ria": 0.5},
        "key": "00ff",
    }  # fmt: skip


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's file with all its defaults."""
    return Configuration.model_validate(values).model_dump(mode="json")


@pytest.fixture
def imported(client: TestClient) -> Callable[..., str]:
    """Import what is new; gives its path."""

    def put(values: Any, headers: Headers | None = None) -> str:
        answer = client.post(HERE, json=values, headers=headers)
        assert answer.status_code == 201, answer.text
        return str(answer.headers["location"])

    return put


@pytest.fixture
def found(client: TestClient) -> Callable[..., list[dict[str, Any]]]:
    """What a search with these parameters finds."""

    def ask(headers: Headers | None = None, **params: Any) -> list[dict[str, Any]]:
        answer = client.get(HERE, params=params, headers=headers)
        assert answer.status_code == 200, answer.text
        configurations = answer.json()["configurations"]
        assert isinstance(configurations, list)
        return configurations

    return ask


@pytest.fixture
def bearers(keys: KeyStore) -> dict[str, Headers]:
    """Of two keys that see what is theirs, and of one that sees all."""
    return {
        name: {"Authorization": f"Bearer {keys.create(name, sees_all=name == 'all')[1]}"}
        for name in ("a", "b", "all")
    }


# ------------------------------------------------------------------------------ finding


def test_an_empty_library_is_an_empty_list(client: TestClient) -> None:
    assert client.get(HERE).json() == {"configurations": [], "considered": 0}


def test_from_a_job(
    submit: Callable[..., dict[str, Any]], hand: Any, found: Callable[..., Any],
    client: TestClient, configuration: Configuration,
) -> None:  # fmt: skip
    """What a job has found is in the library with the job's id, and stays when the job goes."""
    job = submit()
    hand.succeed(job["id"])
    (before,) = found()
    gone = client.delete(f"/v1/jobs/{job['id']}")
    (after,) = found()

    assert gone.status_code == 204
    assert before["job_id"] == job["id"]
    assert (before["method"], before["pattern"], before["scope"]) == ("crepe", "0.5", "layer")
    assert after == before
    exported = client.get(f"{HERE}/{after['id']}").json()
    assert exported == configuration.model_dump(mode="json")


def test_ranked(found: Callable[..., Any], imported: Callable[..., str]) -> None:
    """The most promising comes first, with the numbers that say so."""
    imported(document(23.0))
    best = imported(document(12.0, family="gemma2"))
    imported(document(6.0, pattern="2:4", scope="row"))
    first, second, third = found(pattern="0.5", family="gemma3_text", parameters=134_515_008 * 4)

    assert first["id"] == best.removeprefix(f"{HERE}/")
    others = {"divergence": None, "proxy": None}
    assert first["gains"] == {"perplexity": pytest.approx(0.5), **others}
    expected = pytest.approx(0.5 * 0.95 * 0.98**2)
    assert first["expected_gains"] == {"perplexity": expected, **others}
    assert first["models"] == [{"name": "gemma2-1", "family": "gemma2", "parameters": 134_515_008}]
    assert first["reasons"] == [
        "pattern 0.5, scope layer",
        "found on gemma2-1, gemma2, 135 M parameters: a family related to the one asked for",
        "where it was found, 50.0% below RIA's perplexity (gemma2-1)",
    ]
    assert [each["fits"] for each in (first, second, third)] == [True, True, False]
    assert second["gains"]["perplexity"] == pytest.approx(1 / 24)
    assert "but 0.5 is asked for" in third["reasons"][0]
    assert first["job_id"] is None
    age = datetime.now(UTC) - datetime.fromisoformat(first["created_at"])
    assert 0 <= age.total_seconds() < 60


def test_limit(client: TestClient, imported: Callable[..., str]) -> None:
    """At most so many are listed, the best; all were considered."""
    for perplexity in (20.0, 12.0, 22.0):
        imported(document(perplexity))
    answer = client.get(HERE, params={"limit": 2}).json()

    assert answer["considered"] == 3
    shares = [each["gains"]["perplexity"] for each in answer["configurations"]]
    assert shares == pytest.approx([1 - 12 / 24, 1 - 20 / 24])


@pytest.mark.parametrize(
    ("params", "parameter", "rule"),
    [
        ({"pattern": "5:2"}, "pattern", "N=5 of M=2"),
        ({"pattern": "0." + "5" * 64}, "pattern", "64 characters"),
        ({"pattern": "0.5", "scope": "column"}, "scope", "'row', 'layer' or 'global'"),
        ({"limit": 0}, "limit", "greater than or equal to 1"),
        ({"family": ""}, "family", "at least 1 character"),
    ],
)
def test_what_cannot_be_asked_for_names_the_parameter_and_the_rule(
    client: TestClient, refusal: Refusal, params: dict[str, Any], parameter: str, rule: str
) -> None:
    problem = refusal(client.get(HERE, params=params), 422, "invalid_request")
    (error,) = problem["errors"]

    assert error["parameter"] == parameter
    assert rule in error["detail"]
    assert problem["detail"].startswith(f"{parameter}: ")


# ------------------------------------------------------------------- import and export


def test_import(client: TestClient, found: Callable[..., Any]) -> None:
    """A new document is 201 and one that is there 200, at the same place."""
    first = client.post(HERE, json=document())
    again = client.post(HERE, json=dict(reversed(document().items())))
    (entry,) = found()

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.headers["location"] == again.headers["location"] == f"{HERE}/{entry['id']}"
    assert first.json() == again.json() == entry
    assert entry["fits"]


def test_export(client: TestClient, imported: Callable[..., str]) -> None:
    """What was imported comes back, number by number, and can be imported again."""
    values = document()
    path = imported(values)
    answer = client.get(path)
    again = client.post(HERE, content=answer.content, headers=JSON)

    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == complete(values)
    assert answer.json()["coefficients"]["row"] == 0.1 + 0.2
    assert (again.status_code, again.headers["location"]) == (200, path)


def test_export_of_a_transfer(client: TestClient, imported: Callable[..., str]) -> None:
    """So does a transfer, with all that was measured, but for the own bests that were found."""
    values = transfer(target("opt", 30.0), target("gpt2", 60.0))
    first, second = values["targets"]
    path = imported({**values, "targets": [{**first, "own": document()}, second]})
    exported = client.get(path).json()

    assert exported == {
        **values, "source": path.removeprefix(f"{HERE}/"), "configuration": complete(document()),
    }  # fmt: skip
    assert client.post(HERE, json=exported).status_code == 200
    assert client.get(path).json() == exported


NESTED: list[Any] = []
for _ in range(200):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (document(version=3), "format version 3, but this PHO reads version 2"),
        (document(speed=1), "speed: Extra inputs"),
        (document(pattern="5:2"), "keeps N=5 of M=2"),
        (document(model={"name": "\ud800"}), "a value that JSON cannot represent"),
        ({}, "is not a configuration of PHO"),
    ],
)
def test_what_is_no_configuration_is_422_names_the_rule_and_leaves_nothing(
    client: TestClient, refusal: Refusal, found: Callable[..., Any], values: Any, rule: str
) -> None:
    answer = client.post(HERE, content=json.dumps(values), headers=JSON)

    assert rule in refusal(answer, 422, "invalid_request")["detail"]
    assert found() == []


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"{", b"\xff", b'"' + b"x" * 100 + b'"'])
def test_no_document(client: TestClient, refusal: Refusal, body: bytes) -> None:
    """A body that is no object is refused."""
    refusal(client.post(HERE, content=body, headers=JSON), 422, "invalid_request")


# ------------------------------------------------------------------------- one of them


def test_delete(client: TestClient, refusal: Refusal, imported: Callable[..., str]) -> None:
    """A deleted entry is gone, the others stay, and it can be imported anew."""
    path, other = imported(document()), imported(document(12.0))
    gone = client.delete(path)

    assert (gone.status_code, gone.content) == (204, b"")
    refusal(client.get(path), 404, "no_such_configuration")
    refusal(client.delete(path), 404, "no_such_configuration")
    (left,) = client.get(HERE).json()["configurations"]
    assert f"{HERE}/{left['id']}" == other
    assert imported(document()) != path


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_nothing_there(client: TestClient, refusal: Refusal, method: str) -> None:
    """What nobody has is 404, and so is what is no id."""
    problem = refusal(client.request(method, NOBODY), 404, "no_such_configuration")

    assert "GET /v1/configurations" in problem["detail"]
    refusal(client.request(method, f"{HERE}/x"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", HERE), ("DELETE", HERE), ("POST", NOBODY), ("PATCH", NOBODY)],
)
def test_wrong_method(client: TestClient, refusal: Refusal, method: str, path: str) -> None:
    """A method that a path does not know is 405."""
    refusal(client.request(method, path, json={}), 405, "method_not_allowed")


# -------------------------------------------------------------------------------- keys


def test_what_a_job_has_found_belongs_to_the_key_of_the_job(
    found: Callable[..., Any], submit: Callable[..., dict[str, Any]], hand: Any,
    bearers: dict[str, Headers],
) -> None:  # fmt: skip
    job = submit(headers=bearers["a"])
    hand.succeed(job["id"])

    assert [each["job_id"] for each in found(bearers["a"])] == [job["id"]]
    assert found(bearers["b"]) == []


def test_to_a_key_another_keys_entry_is_not_there_and_stays(
    client: TestClient, refusal: Refusal, imported: Callable[..., str], bearers: dict[str, Headers]
) -> None:
    path = imported(document(), bearers["a"])
    for method in ("GET", "DELETE"):
        anothers, nobodys = (
            client.request(method, where, headers={**bearers["b"], "X-Request-ID": "a"})
            for where in (path, NOBODY)
        )

        refusal(anothers, 404, "no_such_configuration")
        assert anothers.json() == nobodys.json()
    assert client.get(path, headers=bearers["a"]).status_code == 200
    assert client.delete(path, headers=bearers["all"]).status_code == 204


def test_no_key(client: TestClient, refusal: Refusal, bearers: dict[str, Headers]) -> None:
    """Once there are keys, nothing is found, imported or deleted without one."""
    del bearers
    for method, path in (("GET", HERE), ("POST", HERE), ("GET", NOBODY), ("DELETE", NOBODY)):
        refusal(client.request(method, path, json=document()), 401, "no_key")


def test_list_reads_no_documents(
    client: TestClient, configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once an entry was ranked, its document is read no more, until it was measured elsewhere."""
    document = configuration.model_dump(mode="json")
    client.post("/v1/configurations", json=document)
    first = client.get("/v1/configurations", params={"pattern": "0.5"}).json()
    store = client.app.state.service.configurations  # type: ignore[attr-defined]
    read, get = [], store.get
    monkeypatch.setattr(store, "get", lambda entry_id: read.append(entry_id) or get(entry_id))

    assert client.get("/v1/configurations", params={"pattern": "0.5"}).json() == first
    assert read == []
    target = {"target": "t", "model": {"name": "m", "family": "llama"}, "proxies": {"ria": 1.0,
              "transferred": 0.5}}  # fmt: skip
    transfer = {"format": "pho-transfer", "version": 1, "source": "s", "configuration": document,
                "targets": [target]}  # fmt: skip
    assert client.post("/v1/configurations", json=transfer).status_code == 200
    (match,) = client.get("/v1/configurations").json()["configurations"]
    assert len(read) == 1
    assert [m["model"]["name"] for m in match["measured"]] == ["m"]


def test_a_key_may_import_so_many_with_the_setting_that_says_so(
    client_of: Any, configuration: Configuration, refusal: Any
) -> None:
    client = client_of(max_configurations=1)
    document = configuration.model_dump(mode="json")
    assert client.post("/v1/configurations", json=document).status_code == 201
    document["search"] = {"trials": 41}

    refused = client.post("/v1/configurations", json=document)
    assert "PHO_MAX_CONFIGURATIONS" in refusal(refused, 429, "too_many_configurations")["detail"]
