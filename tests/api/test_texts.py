"""Texts that are uploaded: whole or not at all, one key's own, and bounded."""

import asyncio
import hashlib
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from pho_service.api import texts as operations
from pho_service.api.operations import sweep
from storage.tables import texts

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}
TEXT = b'{"text": "a few words"}\n{"text": "and some more"}\n'
ID = f"sha256:{hashlib.sha256(TEXT).hexdigest()}.jsonl"
OTHER = f"sha256:{'0' * 64}.txt"


def upload(client, content=TEXT, name="own.jsonl", headers=None, **params):
    return client.post(
        "/v1/texts", params={"name": name, **params}, content=content, headers=headers
    )


@pytest.fixture
def files(settings):
    """The names of all files of uploaded texts, whole or not."""
    return lambda: sorted(path.name for path in Path(settings.artifacts, "texts").glob("*"))


def test_a_text_is_named_by_its_content_and_is_there_once(client, files):
    first, again = upload(client), upload(client, name="same.jsonl")
    listed = client.get("/v1/texts").json()

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"] == ID
    assert first.headers["location"] == f"/v1/texts/{ID}"
    assert client.get(f"/v1/texts/{ID}").json()["bytes"] == len(TEXT)
    assert [text["id"] for text in listed["texts"]] == [ID]
    assert files() == [ID.removeprefix("sha256:")]
    assert client.delete(f"/v1/texts/{ID}").status_code == 204
    assert client.get(f"/v1/texts/{ID}").status_code == 404
    assert files() == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "it is empty"),
        ("a.jsonl", b"[1]\n", "its first line is not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', "it is not UTF-8 text"),
        ("a.txt", b"caf\xc3", "it is not UTF-8 text"),
        ("a.parquet", b"PAR1 and no end", "it is not a parquet file"),
    ],
)
def test_what_is_not_of_its_kind_is_refused_and_not_kept(
    client, refusal, files, name, content, says
):
    told = refusal(upload(client, content, name), 422, "invalid_text")["detail"]

    assert says in told
    assert files() == client.get("/v1/texts").json()["texts"] == []


def test_a_text_that_was_changed_on_its_way_is_refused(client, refusal, files):
    digest = hashlib.sha256(TEXT).hexdigest()
    refusal(upload(client, TEXT + b"x", sha256=digest), 422, "invalid_text")

    assert files() == []
    assert upload(client, sha256=digest).status_code == 201


@pytest.mark.parametrize("declared", [True, False])
def test_a_text_above_the_limit_is_refused_with_it(client_of, refusal, files, declared):
    client = client_of(max_upload_bytes=1024)
    content = b"x" * 2000 if declared else (b"x" * 500 for _ in range(4))
    told = refusal(upload(client, content, "a.txt"), 413, "body_too_large")["detail"]

    assert "larger than 1024 bytes" in told
    assert files() == []
    assert upload(client, b"x" * 1024, "a.txt").status_code == 201


def test_a_key_may_have_so_many_bytes_and_uploads(client_of, keys, bearer_of, refusal):
    client, mine, other = client_of(max_uploaded_bytes=1500), bearer_of("mine"), bearer_of("other")
    upload(client, b"x" * 1000, "a.txt", mine)
    refused = upload(client, b"y" * 1000, "a.txt", mine)

    assert "1000 bytes of texts" in refusal(refused, 429, "too_many_texts")["detail"]
    assert upload(client, b"y" * 1000, "a.txt", other).status_code == 201
    uploading = client.app.state.service.uploading
    uploading[keys.all()[0].id] = operations.AT_ONCE
    refusal(upload(client, b"z", "a.txt", mine), 429, "too_many_uploads")
    assert upload(client, b"z", "a.txt", other).status_code == 201


def sent(client, *messages):
    """What is answered to an upload that sends these, and then nothing."""
    scope = {
        "type": "http", "method": "POST", "path": "/v1/texts", "raw_path": b"/v1/texts",
        "query_string": b"name=a.txt", "headers": [(b"host", b"127.0.0.1:8000")], "scheme": "http",
        "http_version": "1.1", "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1),
        "root_path": "", "asgi": {"version": "3.0"},
    }  # fmt: skip
    left, answers = [*messages], []

    async def receive():
        if left:
            return left.pop(0)
        await asyncio.sleep(60)

    async def send(message):
        answers.append(message)

    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 30))
    return answers[0]["status"]


@pytest.mark.parametrize("end", [(), ({"type": "http.disconnect"},)])
def test_an_upload_that_stops_half_way_leaves_nothing(client, files, monkeypatch, end):
    monkeypatch.setattr(operations, "STALLED_S", 0.2)
    half = {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    assert sent(client, half, *end) == 408
    assert files() == client.get("/v1/texts").json()["texts"] == []
    assert not any(client.app.state.service.uploading.values())


def test_a_store_that_cannot_be_written_keeps_no_row(client_of, settings, refusal):
    Path(settings.artifacts).write_text("not a folder")
    client = client_of()

    refusal(upload(client), 503, "artifact_store_unavailable")
    assert client.get("/v1/texts").json()["texts"] == []


def places(text):
    """A job's documents, each of which names a text at another place, and the pointer to it."""
    more = {"text": "own.txt", "more_texts": [text]}
    yield "/calibration/text", {"calibration": {"text": text}}
    yield "/calibration/more_texts/0", {"calibration": more}
    yield "/confirm/text", {"confirm": {"text": text}}
    yield "/recovery/text", {"prune": True, "recovery": {"text": text}}


def test_a_key_names_its_own_texts_wherever_a_text_can_be_named(
    client, bearer_of, refusal, tmp_path, hand
):
    (tmp_path / "own.txt").write_text("words")
    mine, other = bearer_of("mine"), bearer_of("other", sees_all=True)
    upload(client, headers=mine)

    for pointer, changes in places(ID):
        document = {**DOCUMENT, **changes}
        taken = client.post("/v1/jobs", json=document, headers=mine)
        told = refusal(client.post("/v1/jobs", json=document, headers=other), 422, "no_such_text")
        assert taken.status_code == 202, taken.text
        assert told["errors"][0]["pointer"] == pointer
        refusal(client.post("/v1/plan", json=document, headers=other), 422, "no_such_text")
    hand.succeed(taken.json()["id"])
    transfer = f"/v1/jobs/{taken.json()['id']}:transfer"
    asked = {"models": ["org/other"], "report": {"text": ID}}
    refusal(client.post(transfer, json=asked, headers=other), 422, "no_such_text")
    assert client.post(transfer, json=asked, headers=mine).status_code == 202
    refusal(client.get(f"/v1/texts/{ID}", headers=other), 404, "no_such_text")
    refusal(client.delete(f"/v1/texts/{ID}", headers=other), 404, "no_such_text")
    assert client.get("/v1/texts", headers=other).json()["texts"] == []


@pytest.mark.parametrize("text", [OTHER, "sha256:abc.txt", f"sha256:{'0' * 64}", "sha256:../../x"])
def test_a_text_that_nobody_uploaded_is_refused_at_its_place(client, refusal, text):
    document = {**DOCUMENT, "calibration": {"text": text}}
    (error,) = refusal(client.post("/v1/jobs", json=document), 422, "no_such_text")["errors"]

    assert error["pointer"] == "/calibration/text"


def test_a_text_that_an_unfinished_job_names_stays(client, refusal, files):
    upload(client)
    job = client.post("/v1/jobs", json={**DOCUMENT, "confirm": {"text": ID}}).json()["id"]
    refused = client.delete(f"/v1/texts/{ID}")
    client.post(f"/v1/jobs/{job}:cancel")

    refusal(refused, 409, "text_in_use")
    assert client.delete(f"/v1/texts/{ID}").status_code == 204
    assert files() == []


def test_the_file_stays_while_another_key_has_it(client, bearer_of, files):
    mine, other = bearer_of("mine"), bearer_of("other")
    for headers in (mine, other):
        assert upload(client, headers=headers).status_code == 201
    client.delete(f"/v1/texts/{ID}", headers=mine)
    kept = files()
    client.delete(f"/v1/texts/{ID}", headers=other)

    assert kept == [ID.removeprefix("sha256:")]
    assert files() == []


def test_texts_that_no_job_has_named_for_long_are_deleted(client, hand, files, monkeypatch):
    service = client.app.state.service
    monkeypatch.setattr(
        service, "settings", service.settings.model_copy(update={"keep_pruned_days": 7.0})
    )
    for name, content in (("a.txt", b"unused"), ("b.txt", b"waits"), ("c.txt", b"new")):
        upload(client, content, name)
    waits = f"sha256:{hashlib.sha256(b'waits').hexdigest()}.txt"
    client.post("/v1/jobs", json={**DOCUMENT, "confirm": {"text": waits}})
    with hand.store.database.transaction() as connection:
        old = update(texts).where(texts.c.name != "c.txt")
        connection.execute(old.values(used_at=texts.c.used_at - timedelta(days=8)))
    sweep(service)

    assert [text["name"] for text in client.get("/v1/texts").json()["texts"]] == ["c.txt", "b.txt"]
    assert len(files()) == 2


def test_a_key_that_is_rotated_keeps_its_texts(client, keys):
    key, secret = keys.create("own", sees_all=False)
    upload(client, headers={"Authorization": f"Bearer {secret}"})
    _, new_secret = keys.rotate(key.prefix)
    answer = client.get("/v1/texts", headers={"Authorization": f"Bearer {new_secret}"})

    assert [text["id"] for text in answer.json()["texts"]] == [ID]
