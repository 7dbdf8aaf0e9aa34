"""The pruned model of a job: asked for, listed, downloaded in parts, and deleted in time."""

import hashlib
import io
import shutil
import tarfile
import uuid
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from pho_service.api import artifacts
from pho_service.api.answers import Artifact
from pho_service.api.operations import sweep
from pho_service.client import Client
from pho_service.errors import OutputError, ServiceError, ServiceUnavailable
from pho_service.host.download import pull
from storage.records import JobState, StageKind

FILES = {"model.safetensors": bytes(range(256)) * 40, "pruning/masks.safetensors": b"masks"}
WEIGHTS = FILES["model.safetensors"]
DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def client(client_of, store):
    """A front end with that store, which keeps pruned models for ten days."""
    return client_of(artifacts=str(store), keep_pruned_days=10.0)


@pytest.fixture
def prune(hand, store):

    def write(job):
        claim = hand.take(job, StageKind.PRUNE)
        described = []
        for name, content in FILES.items():
            path = store / "pruned" / job / "key" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            described.append({"name": name, "bytes": len(content), "sha256": sha256})
        hand.store.complete(claim, {"key": "key", "files": described}, ended=True)

    return write


@pytest.fixture
def pruned(client, submit, hand, prune):
    """A job with a pruned model; its path."""
    job = submit()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    assert client.post(f"/v1/jobs/{job}:prune").status_code == 202
    prune(job)
    return f"/v1/jobs/{job}"


def test_asked_twice(client, submit, hand, prune):
    """A second :prune gives the same answer and no second stage, before the files and after."""
    job = submit()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    first = client.post(f"/v1/jobs/{job}:prune").json()
    second = client.post(f"/v1/jobs/{job}:prune").json()
    prune(job)
    third = client.post(f"/v1/jobs/{job}:prune").json()

    assert first == second
    assert (first["state"], first["pruned"]) == ("queued", "waiting")
    assert (third["state"], third["pruned"]) == ("succeeded", "done")
    assert third["best"] is not None


def test_too_early_or_too_late(client, submit, hand, refusal):
    for state, told in {
        JobState.QUEUED: "Wait until it has succeeded",
        JobState.RUNNING: "Wait until it has succeeded",
        JobState.PAUSED: "Resume it",
        JobState.FAILED: "resume it first",
        JobState.CANCELLED: "Submit it again",
    }.items():
        job = submit()["id"]
        hand.bring(job, state)

        problem = refusal(client.post(f"/v1/jobs/{job}:prune"), 409, "state_conflict")
        assert problem["state"] == state
        assert told in problem["detail"]
        assert client.get(f"/v1/jobs/{job}").json()["state"] == state
        refusal(client.get(f"/v1/jobs/{job}/artifacts"), 409, "not_pruned")

    asked = {**DOCUMENT, "more_models": ["org/other"], "prune": True}
    assert "one model is pruned" in refusal(client.post("/v1/jobs", json=asked), 422)["detail"]
    several = submit(more_models=["org/other"])["id"]
    refusal(client.post(f"/v1/jobs/{several}:prune"), 409, "several_models")


def test_failed_while_pruning(client, submit, hand, refusal):
    """A pruning that fails takes nothing away: the configuration stays, and a resume goes on."""
    job = submit()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    client.post(f"/v1/jobs/{job}:prune")
    error = {"type": "OutputError", "message": "the disk is full."}
    hand.store.fail(hand.take(job, StageKind.PRUNE), error, retry=False)

    refusal(client.post(f"/v1/jobs/{job}:prune"), 409, "state_conflict")
    assert client.get(f"/v1/jobs/{job}/best").status_code == 200
    assert client.post(f"/v1/jobs/{job}:resume").json()["state"] == "queued"


def test_each_file_has_its_size_its_hash_and_its_address_all_are_one_archive(client, pruned, store):
    listed = client.get(f"{pruned}/artifacts").json()
    archived = client.get(listed["archive"])
    folder = f"pruned-{pruned.rpartition('/')[2][:8]}"
    with tarfile.open(fileobj=io.BytesIO(archived.content)) as archive:
        found = {each.name: archive.extractfile(each).read() for each in archive}

    assert listed["bytes"] == sum(map(len, FILES.values()))
    for file in listed["files"]:
        answer = client.get(file["href"])
        assert answer.content == FILES[file["name"]]
        assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
        assert file["sha256"] == answer.headers["etag"].strip('"')
    assert found == {f"{folder}/{name}": content for name, content in FILES.items()}
    assert int(archived.headers["content-length"]) == len(archived.content)
    assert archived.headers["content-disposition"] == f'attachment; filename="{folder}.tar"'
    shutil.rmtree(store)
    assert client.get(listed["archive"]).status_code == 503


def test_a_range_is_a_part_of_the_file(client, pruned, refusal):
    path = f"{pruned}/artifacts/model.safetensors"
    parts = {
        "bytes=0-9": (0, 10), "bytes=10000-": (10_000, 10_240),
        "bytes=10000-99999": (10_000, 10_240), "bytes=-40": (10_200, 10_240),
    }  # fmt: skip
    for wanted, (first, end) in parts.items():
        answer = client.get(path, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (206, WEIGHTS[first:end])
        assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/10240"
    for wanted in ("bytes=9-2", "bytes=0-1,5-6", "lines=1-2", "bytes=-"):
        answer = client.get(path, headers={"Range": wanted})
        assert (answer.status_code, answer.content) == (200, WEIGHTS)

    beyond = client.get(path, headers={"Range": "bytes=10240-"})
    refusal(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == "bytes */10240"


def test_conditions(client, pruned, store, refusal):
    """What is there is not sent again, what is gone is told; another ETag gives all of the file."""
    path = f"{pruned}/artifacts/model.safetensors"
    etag = client.get(path).headers["etag"]
    old = client.get(path, headers={"Range": "bytes=5-", "If-Range": '"old"'})
    same = client.get(path, headers={"Range": "bytes=5-", "If-Range": etag})
    there = client.get(path, headers={"If-None-Match": etag})
    shutil.rmtree(store)

    assert (old.status_code, old.content) == (200, WEIGHTS)
    assert (same.status_code, same.content) == (206, WEIGHTS[5:])
    assert (there.status_code, there.content) == (304, b"")
    refusal(client.get(f"{pruned}/artifacts/..%2f..%2fsecret"), 404, "no_such_artifact")
    assert len(client.get(f"{pruned}/artifacts").json()["files"]) == 2
    told = refusal(client.get(path), 503, "artifact_store_unavailable")["detail"]
    assert "PHO_ARTIFACTS" in told


def test_files_are_deleted_with_their_job_which_stays_as_long_as_they_cannot_be(
    client, pruned, store, refusal, monkeypatch
):
    with monkeypatch.context() as broken:
        broken.setattr("shutil.rmtree", _refuse)
        refusal(client.delete(pruned), 503, "artifact_store_unavailable")
    assert client.get(pruned).status_code == 200
    assert client.delete(pruned).status_code == 204

    assert list((store / "pruned").iterdir()) == []


def _refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_an_extension_deletes(client, pruned, store, refusal):
    client.post(f"{pruned}:extend", json={"trials": 5})

    assert list((store / "pruned").iterdir()) == []
    refusal(client.get(f"{pruned}/artifacts"), 409, "not_pruned")


def test_files_that_are_too_old_are_deleted_which_is_said_and_can_be_made_again(
    client, pruned, store, hand, prune, refusal
):
    service = client.app.state.service  # type: ignore[attr-defined]
    sweep(service)
    assert client.get(pruned).json()["pruned"] == "done"
    with hand.store.database.transaction() as connection:
        older = "UPDATE pho.stages SET finished_at = finished_at - make_interval(days => 11)"
        connection.execute(text(older))
    sweep(service)

    assert list((store / "pruned").iterdir()) == []
    told = refusal(client.get(f"{pruned}/artifacts"), 409, "pruned_model_removed")
    assert "UTC" in told["detail"]
    assert client.post(f"{pruned}:prune").json()["pruned"] == "waiting"
    prune(pruned.rpartition("/")[2])
    assert client.get(f"{pruned}/artifacts/model.safetensors").content == WEIGHTS


@pytest.fixture
def pho(client):
    opened = Client("http://127.0.0.1:8000")
    opened._http = TestClient(client.app, "http://127.0.0.1:8000/v1")
    return opened


def test_pull(pho, pruned, tmp_path, monkeypatch):
    """A download that is cut in the middle goes on from there, and ends with the same bytes."""
    began = []

    def cut(content, first, end):
        began.append(first)
        with content:
            content.seek(first)
            yield content.read(min(4_000, end - first))

    monkeypatch.setattr("pho_service.api.artifacts._read", cut)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    out = pho.pull(pruned.rpartition("/")[2], tmp_path / "out")

    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.*")} == FILES
    assert began == [0, 4_000, 8_000, 0]
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"]


def test_a_client_that_gave_up_keeps_what_it_has_and_asks_for_the_rest_later(
    pho, pruned, tmp_path, monkeypatch
):
    job, out = pruned.rpartition("/")[2], tmp_path / "out"
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with monkeypatch.context() as broken:
        broken.setattr(
            "pho_service.api.artifacts._read",
            lambda content, *_: content.close() or iter([WEIGHTS[:1]]),
        )
        with pytest.raises(ServiceUnavailable, match="cut after 6 of 10240 bytes"):
            pho.pull(job, out)
    (place,) = (tmp_path / ".out.pull").iterdir()
    place.write_bytes(WEIGHTS[:7_000])
    asked = []
    read = artifacts._read
    monkeypatch.setattr(
        "pho_service.api.artifacts._read",
        lambda content, first, end: asked.append(first) or read(content, first, end),
    )
    pho.pull(job, out)

    assert asked == [7_000, 0]
    assert (out / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_file_is_not_kept(pho, pruned, store, tmp_path):
    with pytest.raises(OutputError, match="is in use"):
        pho.pull(pruned.rpartition("/")[2], store)  # nothing is overwritten
    (path,) = store.rglob("model.safetensors")
    path.write_bytes(WEIGHTS[::-1])
    with pytest.raises(ServiceError, match=r"model\.safetensors .* its SHA-256 is"):
        pho.pull(pruned.rpartition("/")[2], tmp_path / "out")

    assert not (tmp_path / "out").exists()


NAMES = ("../x", "/etc/x", "a/../../x", "a\\x", "", ".bashrc", "a/.git/x", "a\0b", "a\x1b[31m",
         "a\nb")  # fmt: skip


def test_a_service_cannot_make_the_client_write_elsewhere_nor_more_than_the_disk_has_room_for(
    tmp_path,
):
    like = {"name": "x", "bytes": 1, "sha256": "0" * 64, "href": ""}
    odd_ones = [{"name": name} for name in NAMES]
    odd_ones += [{"sha256": sha256} for sha256 in ("../canary", "0" * 63, "A" * 64, "")]
    for odd in [*odd_ones, {"bytes": -1}]:
        with pytest.raises(ServiceError, match=r"Refused are .*\. Nothing was downloaded"):
            pull([Artifact(**{**like, **odd})], tmp_path / "out", Mock(), Mock())

    assert [*tmp_path.iterdir()] == []
    large = Artifact(**{**like, "bytes": 10**18})
    with pytest.raises(OutputError, match=r"out has room for .* and 10{18} are to be downloaded"):
        pull([large], tmp_path / "out", Mock(side_effect=AssertionError), Mock())


def test_no_more_than_was_announced_is_written(tmp_path):
    sent = 0

    @contextmanager
    def endless(*_):
        def chunks():
            nonlocal sent
            while sent < 1000:
                sent += 1
                yield b"12345"

        yield False, chunks()

    file = Artifact(name="x", bytes=5, sha256="0" * 64, href="")
    with pytest.raises(ServiceError, match="is not what the service says it is"):
        pull([file], tmp_path / "out", endless, Mock())

    assert sent == 2


def test_a_link_in_the_store_is_not_followed(client, pruned, store, tmp_path):
    """Nor one in the place of the folder of a job, or of a configuration."""
    (path,) = store.rglob("model.safetensors")
    for place in (path, path.parent, path.parent.parent):
        kept, secret = place.with_name("kept"), tmp_path / "secret" / place.name
        place.rename(kept)
        secret.parent.mkdir(exist_ok=True)
        shutil.copytree(kept, secret) if kept.is_dir() else shutil.copy(kept, secret)
        place.symlink_to(secret)
        answer = client.get(f"{pruned}/artifacts/model.safetensors")
        place.unlink()
        kept.rename(place)

        assert answer.status_code == 503
        assert answer.json()["detail"].startswith("model.safetensors cannot be read")
    assert client.get(f"{pruned}/artifacts/model.safetensors").status_code == 200


def test_pages_lead_to_the_files(client, submit, hand, prune):
    job = submit()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    button = f'action="/jobs/{job}/prune"'
    before = client.get(f"/jobs/{job}").text
    form = {"view": ""}
    answer = client.post(f"/jobs/{job}/prune", data=form, headers={"Sec-Fetch-Site": "same-origin"})
    prune(job)
    after, files = client.get(f"/jobs/{job}").text, client.get(f"/jobs/{job}/files").text

    assert button in before
    assert answer.status_code == 200
    assert button not in after
    assert f'href="/jobs/{job}/files"' in after
    assert f"pho pull {job[:8]} --out" in files
    assert all(f"/v1/jobs/{job}/artifacts/{name}" in files for name in FILES)
    assert client.get(f"/jobs/{uuid.uuid4()}/files").status_code == 404
