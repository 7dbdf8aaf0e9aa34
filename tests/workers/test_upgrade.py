"""The database of an older version, as its service left it: tests/storage/data says how."""

import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.api.app import create_app
from pho_service.host.settings import read_settings
from storage.backup import restore
from storage.database import Database

HERE = Path(__file__).parent
DATA = HERE.parent / "storage" / "data"
OLDER = json.loads((DATA / "0002.json").read_text())
JOBS: dict[str, dict[str, Any]] = OLDER["jobs"]


@pytest.fixture
def upgraded(empty_database: Database) -> Database:
    """A database with what the older service had, brought to this version."""
    restore(empty_database, DATA / "0002.dump")
    return empty_database


@pytest.fixture
def ask(upgraded: Database) -> Iterator[Any]:
    """What the service of this version answers on it, to who has this key."""
    with TestClient(create_app(upgraded, read_settings())) as http:

        def get(path: str, key: str = "admin") -> Any:
            secret = OLDER["keys"][key]
            return http.get(f"/v1{path}", headers={"Authorization": f"Bearer {secret}"})

        yield get


def test_keys(ask: Any) -> None:
    """Keys open what they opened: their own jobs, all of them, or nothing."""
    own = {job["id"] for job in ask("/jobs", "laptop").json()["jobs"]}

    assert own == {job["id"] for name, job in JOBS.items() if name != "extended"}
    assert {job["id"] for job in ask("/jobs").json()["jobs"]} == {j["id"] for j in JOBS.values()}
    assert ask("/jobs", "lost").status_code == 401


@pytest.mark.parametrize("name", JOBS)
def test_jobs(ask: Any, name: str) -> None:
    """Each job is as it was, with its error, its trials, its configuration and a report."""
    before = JOBS[name]
    job = ask(f"/jobs/{before['id']}").json()
    trials = [
        [trial["value"] for trial in ask(f"/jobs/{before['id']}/trials?{at}").json()["trials"]]
        for at in (f"island={i}&page_size=200" for i in range(len(before["trials"])))
    ]
    best = ask(f"/jobs/{before['id']}/best")

    assert {key: job[key] for key in ("id", "name", "state")} == {
        key: before[key] for key in ("id", "name", "state")
    }
    assert (job["error"] or {}).get("message") == (before["error"] or {}).get("message")
    assert trials == [values[:200] for values in before["trials"]]
    assert (best.json() if best.is_success else None) == before["best"]
    assert ask(f"/jobs/{before['id']}/report").is_success


def test_library(ask: Any) -> None:
    """What was found before there was a library is in it, and is its owner's."""
    every = ask("/configurations?limit=100").json()["configurations"]
    own = ask("/configurations?limit=100", "laptop").json()["configurations"]
    found = {name: job["id"] for name, job in JOBS.items() if job["best"] is not None}

    assert {entry["job_id"] for entry in every} == {*found.values()}
    assert {entry["job_id"] for entry in own} == {found["plain"], found["islands"]}
    assert ask(f"/configurations/{every[0]['id']}").json()["coefficients"]


def test_paused(
    upgraded: Database, crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that were paused in a search, or before they began, are resumed and end."""
    monkeypatch.syspath_prepend(HERE.parents[1] / "benchmarks")
    import_module("local_service").write_tiny_model(tmp_path)
    url = upgraded.url.set(drivername="postgresql").render_as_string(hide_password=False)
    own = type(crew)(crew.warm_start, url, tmp_path, tmp_path / "crew")
    with closing(own):
        own.man(1)
        jobs = {
            name: own.store.ask(uuid.UUID(JOBS[name]["id"]), "resume")
            for name in ("paused", "waiting")
        }
        done = {name: own.succeeded(job) for name, job in jobs.items()}
        trials = {name: own.trials(job)[0] for name, job in done.items()}

    assert [number for number, *_ in trials["paused"]] == [*range(400)]
    before = JOBS["paused"]["trials"][0]
    assert 8 <= len(before) < 400
    assert [value for _, _, value, *_ in trials["paused"]][: len(before)] == before
    assert len(trials["waiting"]) == 12
    assert all(job.best["confirmation"]["perplexity"] > 0 for job in done.values())
    assert any("bundle that an older PHO had made was lost" in w for w in done["paused"].warnings)
