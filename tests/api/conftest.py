"""
The front end in this process on a real database, and a hand that does what workers would.

The tests of a file share a database, which is emptied before each of them that asks for it.
"""

import threading
import uuid

import optuna
import pytest
from fastapi.testclient import TestClient
from optuna.trial import TrialState, create_trial
from sqlalchemy import select
from transformers import LlamaConfig

from pho_service.api.app import create_app
from pho_service.host.access import Access
from pho_service.host.settings import read_settings
from pho_service.spec.configuration import Configuration
from storage.claims import JobResult, LibraryAddition
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import KeyStore
from storage.records import JobState, NewStage, StageKind
from storage.studies import open_storage, open_study, study_name
from storage.tables import stages

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}
NOBODY = "00000000-0000-0000-0000-000000000000"
CONFIGURATION = Configuration.model_validate(
    {
        "method": "crepe", "pattern": "0.5", "scope": "layer",
        "coefficients": {
            "row": 0.1 + 0.2, "column": 1e-17, "neighbourhood": 0.25, "kernel_size": 5,
            "activation_exponent": 0.5,
        },
        "objective": {"name": "activation-reconstruction/blend", "value": 0.0123456789012345678},
        "confirmation": {
            "perplexity": 17.25, "tokens": 496, "context_length": 32,
            "text": {"name": "Überprüfung \u2713.txt", "z": 1, "a": 2**53 + 1},
        },
        "search": {"trials": 40, "seed": 2**32 - 1},
    }
)  # fmt: skip


@pytest.fixture
def database(emptied_database):
    return emptied_database


@pytest.fixture
def database_url(database, url_of_file):
    del database  # which is empty now
    return url_of_file


@pytest.fixture
def settings(tmp_path):
    """Models and texts lie below the test's folder."""
    return read_settings(
        model_roots=(tmp_path,), text_roots=(tmp_path,), artifacts=str(tmp_path / "artifacts")
    )


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine's database may take seconds to answer a probe."""
    monkeypatch.setattr("pho_service.api.service.ANSWER_S", 30.0)
    monkeypatch.setattr("pho_service.api.service.LOCAL_START_S", 3600.0)


@pytest.fixture
def client_of(database_url, settings):
    """Make a client of a front end of its own, with some settings changed."""
    opened = []

    def make(*, keys_needed=False, **changes):
        app = create_app(
            Database(database_url, pool=8),
            settings.model_copy(update=changes),
            keys_needed=keys_needed,
        )
        client = TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client_of_file(url_of_file):
    """A client of a front end for the tests of a file, which may ask as often as they like."""
    unlimited = read_settings(max_requests_per_minute=0, max_wrong_keys_per_minute=0)
    app = create_app(Database(url_of_file, pool=8), unlimited)
    with TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(client_of_file, database_url, settings, monkeypatch):
    del database_url  # of a database that is empty now
    service = client_of_file.app.state.service  # type: ignore[attr-defined]  # FastAPI's
    monkeypatch.setattr(service, "settings", settings)
    monkeypatch.setattr(service, "access", Access.of(settings))
    client_of_file.cookies.clear()
    return client_of_file


@pytest.fixture(scope="session")
def write_small(write_header):
    """Write the folder of a model that reads 128 tokens, of which only the headers are there."""
    config = LlamaConfig(
        dtype="float32", hidden_size=64, intermediate_size=192, num_hidden_layers=1,
        num_attention_heads=4, vocab_size=512, max_position_embeddings=128,
    )  # fmt: skip
    return lambda folder: write_header(folder, config)


@pytest.fixture(scope="session")
def operations():
    database = Database("postgresql://localhost/pho")  # which is never asked
    documented = create_app(database, read_settings()).openapi()["paths"]
    database.close()
    names = {
        "text_id": "x",
        "job_id": "{}",
        "configuration_id": NOBODY,
        "worker_id": NOBODY,
        "name": "x",
    }
    found = [
        (method.upper(), path.format(**names))
        for path, operation in documented.items()
        for method in operation
        if path not in ("/healthz", "/readyz")
    ]
    others = ("/docs", "/openapi.json", "/dashboard", "/api/studies", "/static/bundle.js", "/nope")
    return [*found, *(("GET", path) for path in others), ("POST", "/api/studies")]


@pytest.fixture
def submit(client):
    """Submit a small document with some values changed; gives the whole job."""

    def ask(*, headers=None, **changes):
        answer = client.post("/v1/jobs", json={**DOCUMENT, **changes}, headers=headers)
        assert answer.status_code == 202, answer.text
        job = client.get(answer.json()["links"]["job"], headers=headers).json()
        assert isinstance(job, dict)
        return job

    return ask


@pytest.fixture
def keys(database):
    return KeyStore(database)


@pytest.fixture
def bearer_of(keys):
    """Make a key; gives the header that a program sends it in."""

    def make(name, *, sees_all=False):
        return {"Authorization": f"Bearer {keys.create(name, sees_all=sees_all)[1]}"}

    return make


class Hand:
    """Does to jobs what workers do, as far as a test wants."""

    def __init__(self, store):
        self.store = store
        self.worker_id = uuid.uuid4()

    def take(self, job_id, kind, number=0):
        """Claim a stage as the queue would give it out."""
        query = select(stages.c.id, stages.c.queue_id).where(
            stages.c.job_id == uuid.UUID(job_id), stages.c.kind == kind, stages.c.number == number
        )
        with self.store.database.transaction() as connection:
            row = connection.execute(query).one()
        claim = self.store.claim(row.id, row.queue_id, self.worker_id)
        assert claim is not None
        return claim

    def calibrate(self, job_id):
        claim = self.take(job_id, StageKind.CALIBRATE)
        islands = [
            NewStage(kind=StageKind.SEARCH, number=i) for i in range(claim.job.spec["islands"])
        ]
        self.store.complete(claim, {"provenance": {}}, then=islands)

    def search(self, job_id):
        for island in range(self.store.get(uuid.UUID(job_id)).spec["islands"]):
            claim = self.take(job_id, StageKind.SEARCH, island)
            self.store.complete(claim, {}, then=[NewStage(kind=StageKind.CONFIRM)])

    def confirm(self, job_id, *trials):
        measured = [NewStage(kind=StageKind.PERPLEXITY, number=n) for n in trials]
        self.store.complete(
            self.take(job_id, StageKind.CONFIRM),
            {"finalists": [*trials]},
            then=measured or [NewStage(kind=StageKind.FINISH)],
        )

    def measure(self, job_id, trial, perplexity, seconds):
        self.store.complete(
            self.take(job_id, StageKind.PERPLEXITY, trial),
            {"perplexity": perplexity, "seconds": seconds},
            then=[NewStage(kind=StageKind.FINISH)],
        )

    def to_confirm(self, job_id, *trials):
        """All up to the perplexities of some trials that a job has not done yet."""
        kinds = {s.kind for s in self.store.get(uuid.UUID(job_id)).stages}
        if StageKind.SEARCH not in kinds:
            self.calibrate(job_id)
        if StageKind.CONFIRM not in kinds:
            self.search(job_id)
        if StageKind.FINISH not in kinds:
            self.confirm(job_id, *trials)

    def succeed(self, job_id, *warnings, layers=None, perplexities=None, then=()):
        """All that is left of a job without perplexities, up to the stages ``then``."""
        self.to_confirm(job_id)
        best = CONFIGURATION.model_dump(mode="json")
        if perplexities is not None:
            best["perplexities"] = perplexities
        self.finish(job_id, best, *warnings, layers=layers, then=then)

    def finish(self, job_id, best, *warnings, layers=None, then=()):
        """Choose the best, which ends a job that has no more stages ``then``."""
        result = {} if layers is None else {"layers": {"org/name": layers}}
        claim = self.take(job_id, StageKind.FINISH)
        job_result = JobResult(best=best, warnings=warnings)
        self.store.complete(claim, result, job_result=job_result, then=then, ended=not then)

    def fail(self, job_id, **error):
        error = {"type": "ModelError", "message": "org/name is not there.", **error}
        self.store.fail(self.take(job_id, StageKind.CALIBRATE), error, retry=False)

    def bring(self, job_id, state):
        """A new job to any state."""
        if state in (JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING):
            self.take(job_id, StageKind.CALIBRATE)
        if state in (JobState.PAUSING, JobState.PAUSED):
            self.store.ask(uuid.UUID(job_id), "pause")
        if state in (JobState.CANCELLING, JobState.CANCELLED):
            self.store.ask(uuid.UUID(job_id), "cancel")
        if state is JobState.SUCCEEDED:
            self.succeed(job_id)
        if state is JobState.FAILED:
            self.fail(job_id)
        assert self.store.get(uuid.UUID(job_id)).state is state

    def record(self, job, count, *, island=0, failed=-1):
        """Put trials into a job's study; number ``failed`` failed, number n has the value n/10."""
        coefficients = CONFIGURATION.coefficients.to_dict()
        with open_storage(self.store.database.studies_url) as storage:
            study = open_study(storage, study_name(job["name"], island), direction="minimize")
            study.add_trials(
                [
                    create_trial(
                        state=TrialState.FAIL if n == failed else TrialState.COMPLETE,
                        value=None if n == failed else n / 10,
                        user_attrs={
                            "method": "crepe" if n else "wanda", "scope": "layer",
                            "coefficients": coefficients, "seconds": 0.5,
                            **({"failure": "NaN in layer 3"} if n == failed else {}),
                        },
                    )
                    for n in range(count)
                ]
            )  # fmt: skip

    def studies(self):
        with open_storage(self.store.database.studies_url) as storage:
            return sorted(optuna.get_all_study_names(storage))


@pytest.fixture
def hand(database):
    return Hand(JobStore(database))


@pytest.fixture
def configuration():
    return CONFIGURATION


@pytest.fixture
def point(configuration):
    """What a worker stores of a point; with ``study``, as of a target's answer."""

    def of(pattern, perplexity, study="study"):
        document = configuration.model_dump(mode="json")
        confirmation = {**document["confirmation"], "text": {"source": "book.txt"}}
        return {
            "pattern": pattern, "scope": "row" if ":" in pattern else "layer",
            "sparsity": 0.5 if ":" in pattern else float(pattern), "perplexity": perplexity,
            "rise": perplexity / 20 - 1, "dense": 20.0, "wanda": 30.0, "ria": None, "proxy": 0.01,
            "trials": 40, "seconds": 2.5, "study": study, "trial": 3, "warnings": [],
            "configuration": {
                **document, "pattern": pattern, "scope": "row" if ":" in pattern else "layer",
                "confirmation": confirmation, "search": {**document["search"], "study": study},
                "continuations": [{"prompt": "If", "dense": "so", "pruned": f"so at {pattern}"}],
            },
        }  # fmt: skip

    return of


@pytest.fixture
def begin(submit, hand):
    """Submit a job, and calibrate it; gives its id."""

    def of(about, **asked):
        job = submit(pattern=None, **asked)["id"]
        claim = hand.take(job, StageKind.CALIBRATE)
        stages = [
            NewStage(kind=StageKind.POINT, number=i, params={"pattern": each})
            for i, each in enumerate(about)
        ]
        provenance = {"model": {"name": "org/name"}}
        hand.store.complete(claim, {"provenance": provenance, "seconds": 1.0}, then=stages)
        return job

    return of


@pytest.fixture
def measure(hand, point):

    def of(job, number, perplexity):
        claim = hand.take(job, StageKind.POINT, number)
        result = point(claim.stage.about, perplexity, f"study {number}")
        finish = [NewStage(kind=StageKind.FINISH)]
        found = result["configuration"]
        hand.store.complete(claim, result, then=finish, library=[LibraryAddition(found)])
        return result

    return of


@pytest.fixture
def refusal():
    """Check that an answer is a problem with this status and code; gives the document."""

    def check(answer, status, code=None):
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert isinstance(problem, dict)
        assert problem["status"] == status
        assert problem["title"]
        assert problem["detail"]
        assert code is None or problem["code"] == code
        return problem

    return check


class AtOnce:
    """How many threads are inside of it, and how many were at most."""

    def __init__(self):
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __enter__(self):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_):
        with self._lock:
            self.now -= 1


@pytest.fixture
def at_once():
    return AtOnce()
