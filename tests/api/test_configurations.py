"""`/v1/configurations`: what is found, imported, exported and deleted, and by whom."""

import json
from datetime import UTC, datetime

import pytest

from pho_service.spec.configuration import Configuration

HERE = "/v1/configurations"
NOBODY = f"{HERE}/00000000-0000-0000-0000-000000000000"
JSON = {"Content-Type": "application/json"}


def document(perplexity=18.0, *, family="llama", **changes):
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


def transfer(*targets, **changes):
    return {
        "format": "pho-transfer", "version": 1, "source": "c.json", "configuration": document(),
        "targets": [*targets], **changes,
    }  # fmt: skip


def target(family, transferred):
    """What a configuration was worth on a model where RIA's perplexity is 40."""
    return {
        "target": f"org/{family}", "model": {"name": f"org/{family}-2", "family": family},
        "perplexities": {"ria": 40.0, "transferred": transferred}, "proxies": {"ria": 0.5},
        "key": "00ff",
    }  # fmt: skip


def complete(values):
    return Configuration.model_validate(values).model_dump(mode="json")


@pytest.fixture
def imported(client):
    """Import what is new; gives its path."""

    def put(values, headers=None):
        answer = client.post(HERE, json=values, headers=headers)
        assert answer.status_code == 201, answer.text
        return str(answer.headers["location"])

    return put


@pytest.fixture
def found(client):
    """What a search with these parameters finds."""

    def ask(headers=None, **params):
        answer = client.get(HERE, params=params, headers=headers)
        assert answer.status_code == 200, answer.text
        configurations = answer.json()["configurations"]
        assert isinstance(configurations, list)
        return configurations

    return ask


def test_what_a_job_has_found_is_in_the_library_with_its_id_and_stays_when_it_goes(
    submit, hand, found, client, configuration
):
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


def test_the_most_promising_come_first(client, found, imported):
    imported(document(23.0))
    best = imported(document(12.0, family="gemma2"))
    imported(document(6.0, pattern="2:4", scope="row"))
    wanted = {"pattern": "0.5", "family": "gemma3_text", "parameters": 134_515_008 * 4}
    first, second, third = found(**wanted)
    at_most = client.get(HERE, params={**wanted, "limit": 2}).json()

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
    assert at_most == {"configurations": [first, second], "considered": 3}
    age = datetime.now(UTC) - datetime.fromisoformat(first["created_at"])
    assert 0 <= age.total_seconds() < 60


def test_a_wrong_parameter_is_named_with_its_rule(client, refusal):
    for params, parameter, rule in (
        ({"pattern": "5:2"}, "pattern", "N=5 of M=2"),
        ({"pattern": "0.5", "scope": "column"}, "scope", "'row', 'layer' or 'global'"),
        ({"family": ""}, "family", "at least 1 character"),
    ):
        problem = refusal(client.get(HERE, params=params), 422, "invalid_request")
        (error,) = problem["errors"]

        assert error["parameter"] == parameter
        assert rule in error["detail"]
        assert problem["detail"].startswith(f"{parameter}: ")


def test_what_was_imported_comes_back_and_is_there_once_so_is_a_transfer_but_for_own_bests(
    client, found, imported
):
    values = document()
    first = client.post(HERE, json=values)
    path = first.headers["location"]
    answer = client.get(path)
    again = client.post(HERE, json=dict(reversed(answer.json().items())))
    (entry,) = found()

    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == complete(values)
    assert answer.json()["coefficients"]["row"] == 0.1 + 0.2
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.headers["location"] == path == f"{HERE}/{entry['id']}"
    assert first.json() == again.json() == entry
    assert entry["fits"]

    client.delete(path)
    values = transfer(target("opt", 30.0), target("gpt2", 60.0))
    first, second = values["targets"]
    path = imported({**values, "targets": [{**first, "own": document()}, second]})
    exported = client.get(path).json()

    assert exported == {
        **values, "source": path.removeprefix(f"{HERE}/"), "configuration": complete(document()),
    }  # fmt: skip
    assert client.post(HERE, json=exported).status_code == 200
    assert client.get(path).json() == exported


def test_what_is_no_configuration_is_422_names_the_rule_and_leaves_nothing(client, refusal, found):
    for body, rule in (
        (json.dumps(document(version=3)), "format version 3, but this PHO reads version 2"),
        (json.dumps(document(model={"name": "\ud800"})), "a value that JSON cannot represent"),
        ("{}", "is not a configuration of PHO"),
        *((body, "") for body in (b"", b"[]", b"5", b"{", b"\xff")),
    ):
        answer = client.post(HERE, content=body, headers=JSON)

        assert rule in refusal(answer, 422, "invalid_request")["detail"]
    assert found() == []


def test_a_deleted_entry_is_gone_alone(client, refusal, imported):
    path, other = imported(document()), imported(document(12.0))
    gone = client.delete(path)

    assert (gone.status_code, gone.content) == (204, b"")
    for method, where in (("GET", path), ("DELETE", path), ("GET", NOBODY), ("DELETE", NOBODY)):
        problem = refusal(client.request(method, where), 404, "no_such_configuration")
        assert "GET /v1/configurations" in problem["detail"]
    (left,) = client.get(HERE).json()["configurations"]
    assert f"{HERE}/{left['id']}" == other
    assert imported(document()) != path


def test_to_a_key_another_keys_entry_is_not_there_and_stays_whether_found_or_imported(
    client, refusal, imported, bearer_of, submit, hand, found
):
    mine, other, everybody = bearer_of("a"), bearer_of("b"), bearer_of("all", sees_all=True)
    job = submit(headers=mine)["id"]
    hand.succeed(job)
    path = imported(document(), mine)
    for method in ("GET", "DELETE"):
        anothers, nobodys = (
            client.request(method, where, headers={**other, "X-Request-ID": "a"})
            for where in (path, NOBODY)
        )

        refusal(anothers, 404, "no_such_configuration")
        assert anothers.json() == nobodys.json()
    assert {each["job_id"] for each in found(mine)} == {None, job}
    assert found(other) == []
    assert client.delete(path, headers=everybody).status_code == 204


def test_an_entry_that_was_ranked_is_read_no_more_until_it_was_measured_elsewhere(
    client, configuration, monkeypatch
):
    document = configuration.model_dump(mode="json")
    client.post(HERE, json=document)
    first = client.get(HERE, params={"pattern": "0.5"}).json()
    store = client.app.state.service.configurations  # type: ignore[attr-defined]
    read, get = [], store.get
    monkeypatch.setattr(store, "get", lambda entry_id: read.append(entry_id) or get(entry_id))

    assert client.get(HERE, params={"pattern": "0.5"}).json() == first
    assert read == []
    measured = transfer(target("opt", 20.0), configuration=document)
    assert client.post(HERE, json=measured).status_code == 200
    (match,) = client.get(HERE).json()["configurations"]
    assert len(read) == 1
    assert [m["model"]["name"] for m in match["measured"]] == ["opt-2"]


def test_imports_are_limited(client_of, configuration, refusal):
    client = client_of(max_configurations=1)
    document = configuration.model_dump(mode="json")
    assert client.post("/v1/configurations", json=document).status_code == 201
    document["search"] = {"trials": 41}

    refused = client.post("/v1/configurations", json=document)
    assert "PHO_MAX_CONFIGURATIONS" in refusal(refused, 429, "too_many_configurations")["detail"]
