"""What the last version stored is read, shown and gone on with: README.md says what it is."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from pho_service.api.app import create_app
from pho_service.cli import main
from pho_service.host.settings import read_settings
from storage.backup import restore
from storage.database import Database
from storage.studies import open_storage

HERE = Path(__file__).parent
DATA = HERE / "7e0434d"
STORED = json.loads((DATA / "stored.json").read_text())
JOBS: dict[str, dict[str, Any]] = STORED["jobs"]
INTERRUPTED = ("stopped", "unmeasured")
NUMBERS = ("optuna", "cmaes", "numpy", "scipy")  # whose versions decide on the numbers of a search
PATIENCE_S = 120.0

# The packages' versions are in results, and in the keys of bundles: those of then. What a preset
# means now is not asked: a stored job has what it meant then.
AS_THEN = f"""
import importlib.metadata, platform
now, then = importlib.metadata.version, {STORED["versions"]!r}
importlib.metadata.version = lambda name: then.get(name) or now(name)
platform.python_version = lambda: then["python"]
"""
NO_PRESETS = "from pho_service.spec.presets import Preset; Preset.of = None"
WORKER = f"{AS_THEN}\n{NO_PRESETS}\nfrom workers.__main__ import main; main(prog_name='pho worker')"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that wrote it."""
    for folder in (HERE, HERE.parents[1] / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    return import_module("write_stored")


@pytest.fixture
def folder(writer: Any, tmp_path: Path) -> Path:
    """A folder with the models and the texts of then."""
    writer.write_inputs(tmp_path)
    return tmp_path


@pytest.fixture
def same_numbers(writer: Any, folder: Path) -> bool:
    """Whether this machine and its packages compute what those of then did, to the last bit."""
    now = writer.versions()
    return writer.arithmetic(folder) == STORED["arithmetic"] and all(
        now[name] == STORED["versions"][name] for name in NUMBERS
    )


@pytest.fixture
def seen(same_numbers: bool, folder: Path) -> Callable[[str], Any]:
    """What is to be compared of a document: all of it, or without numbers if they are others."""

    def of(text: str) -> Any:
        text = text.replace(str(folder), STORED["folder"])  # texts of jobs are named in full
        return text if same_numbers else _kinds(json.loads(text))

    return of


def _kinds(value: Any) -> Any:
    """The keys of a document, and the types of its values; what is missing may be any."""
    if isinstance(value, dict):
        return {name: _kinds(each) for name, each in value.items()}
    return type(value).__name__


def searched(text: str) -> str:
    """A configuration without what its finalists decided."""
    found = json.loads(text)
    chosen = (
        "perplexities", "method", "coefficients", "confirmation", "candidates", "baselines",
        "border",
    )  # fmt: skip
    kept = {key: value for key, value in found.items() if key not in chosen}
    return json.dumps({**kept, "objective": found["objective"]["name"]})


def perplexity(text: str) -> float:
    """That a configuration was confirmed by."""
    return float(json.loads(text)["confirmation"]["perplexity"])


@pytest.fixture
def restored(empty_database: Database) -> Database:
    """A database with the backup, brought to this version."""
    restore(empty_database, DATA / "backup.dump")
    return empty_database


@pytest.fixture
def ask(restored: Database) -> Iterator[Callable[[str], Any]]:
    """What the service of this version answers on it."""
    with TestClient(create_app(restored, read_settings()), base_url="http://127.0.0.1") as http:

        def get(path: str) -> Any:
            answer = http.get(path)
            assert answer.is_success, answer.text
            return answer

        yield get


def test_jobs(ask: Any) -> None:
    """
    Each job is as it was: its state, trials, configuration to the byte, report and page; and what
    it found is in the library.
    """
    listed = {job["id"]: job for job in ask("/v1/jobs").json()["jobs"]}
    library = ask("/v1/configurations?limit=100").json()["configurations"]
    front = ask("/").text

    found = {job["id"] for name, job in JOBS.items() if name not in INTERRUPTED}
    assert {entry["job_id"] for entry in library} >= found
    assert ask(f"/v1/configurations/{library[0]['id']}").json()["coefficients"]
    assert {*listed} == {job["id"] for job in JOBS.values()}
    for name, before in JOBS.items():
        path = f"/v1/jobs/{before['id']}"
        job = listed[before["id"]]
        trials = [
            [t["value"] for t in ask(f"{path}/trials?island={i}&page_size=200").json()["trials"]]
            for i in range(len(before["trials"]))
        ]

        assert {key: job[key] for key in ("id", "name", "state", "warnings", "created_at")} == {
            key: before[key] for key in ("id", "name", "state", "warnings", "created_at")
        }
        assert trials == before["trials"]
        assert before["name"] in front
        assert before["name"] in ask(f"{path}/report").text
        if name == "transfer":
            text = json.dumps(ask(f"{path}/transfer").json(), indent=2) + "\n"
            assert text == (DATA / "transfer.json").read_text()
        elif name not in INTERRUPTED:
            assert ask(f"{path}/best").text == (DATA / f"{name}.json").read_text()


def test_interrupted(
    restored: Database, ask: Any, folder: Path, seen: Any, tmp_path: Path, same_numbers: bool
) -> None:
    """A worker ends what was begun, as well as the last version did."""
    bundles = folder / "data" / "artifacts" / "bundles"
    bundles.mkdir(parents=True)
    key = json.loads((DATA / "finished.json").read_text())["calibration"]["key"]
    shutil.copy(DATA / f"{key}.safetensors", bundles)
    url = restored.url.set(drivername="postgresql").render_as_string(hide_password=False)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PHO_DATABASE_URL": url,
        "PHO_DATA_DIR": str(folder / "data"),
        "PHO_MODEL_ROOTS": str(folder),
        "PHO_TEXT_ROOTS": str(folder),
        "PHO_HEARTBEAT_S": "0.3",
        "PHO_STALLED_AFTER_S": "1.5",
    }
    paths = {name: f"/v1/jobs/{JOBS[name]['id']}" for name in INTERRUPTED}
    deadline = time.monotonic() + PATIENCE_S
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stderr=output) as worker,
    ):
        try:
            while {ask(path).json()["state"] for path in paths.values()} != {"succeeded"}:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        finally:
            worker.terminate()

    for name, path in paths.items():
        (before,) = JOBS[name]["trials"]
        now = [t["value"] for t in ask(f"{path}/trials?page_size=200").json()["trials"]]

        assert 0 < len(before) <= len(now)
        assert now[: len(before)] == before
        found = ask(f"{path}/best").text
        expected = (DATA / f"{name}.json").read_text()
        if name == "stopped":  # in its search: its finalists race now
            assert perplexity(found) <= perplexity(expected) or not same_numbers
            found, expected = searched(found), searched(expected)
        assert seen(found) == seen(expected)
    assert len(JOBS["stopped"]["trials"][0]) < 80


@pytest.fixture
def pho(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run `pho` there, with the study and the configuration of then."""
    versions = STORED["versions"]
    monkeypatch.setattr("pho_service.host.versions.version", versions.__getitem__)
    monkeypatch.setattr("platform.python_version", lambda: versions["python"])
    monkeypatch.chdir(folder)
    (folder / "study.db").write_bytes(gzip.decompress((DATA / "study.db.gz").read_bytes()))
    shutil.copy(DATA / "config.json", folder)

    def run(*words: str) -> None:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output

    return run


def trials(study: optuna.Study) -> list[tuple[Any, ...]]:
    """Of a study, with what is noted of each."""
    return [(t.number, t.state, t.value, t.params, t.user_attrs) for t in study.get_trials()]


def test_search(writer: Any, pho: Any, folder: Path, seen: Any, same_numbers: bool) -> None:
    """`pho search` goes on with its study, and ends as well as the last version ended."""
    with open_storage("sqlite:///study.db") as storage:
        (summary,) = optuna.get_all_study_summaries(storage)
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        before = trials(study)
        pho("report", study.study_name, "--study", "sqlite:///study.db", "--config", "config.json")
        page = (folder / "report.html").read_text()
        pho(*writer.SEARCH.split(), *writer.LONGER.split())
        (one,) = optuna.get_all_study_summaries(storage)
        after = trials(study)

    assert "20 rated trials" in page
    assert one.study_name == summary.study_name
    assert (len(before), len(after)) == (20, 30)
    assert [values[:3] for values in after[:20]] == [values[:3] for values in before]
    found, expected = (path.read_text() for path in (folder / "longer.json", DATA / "longer.json"))
    assert seen(searched(found)) == seen(searched(expected))
    assert perplexity(found) <= perplexity(expected) or not same_numbers


def test_prune(writer: Any, pho: Any, folder: Path, seen: Any, same_numbers: bool) -> None:
    """`pho prune` makes the same of the configuration, and `--check` reads the files of then."""
    pho(*writer.PRUNE.split())
    recipe = folder / "pruned" / "pruning.json"
    made = recipe.read_text()
    shutil.copy(DATA / "pruning.json", recipe)
    shutil.copy(DATA / "masks.safetensors", folder / "pruned" / "pruning")

    assert seen(made) == seen((DATA / "pruning.json").read_text())
    if same_numbers:
        pho("prune", "tiny", "--check", "pruned")
