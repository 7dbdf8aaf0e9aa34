"""What users and workers do without processes of their own: verbs, a front end, a claimed stage."""

import json
import socket
import threading
import time
import uuid

import uvicorn
from sqlalchemy import select

from pho_service.api.app import create_app
from pho_service.spec.configuration import Configuration
from storage.claims import JobResult
from storage.database import Database
from storage.records import NewStage, StageKind
from storage.tables import stages

SPEC = {"model": "org/name", "pattern": "0.5", "minutes": None}
FOUND = Configuration.model_validate(
    {
        "method": "crepe",
        "pattern": "0.5",
        "scope": "layer",
        "coefficients": {
            "row": 0.1 + 0.2, "column": 1.0, "neighbourhood": 0.5, "kernel_size": 7,
            "activation_exponent": 0.5,
        },
        "objective": {"name": "activation-reconstruction/blend", "value": 0.0123},
        "confirmation": {"perplexity": 17.25, "tokens": 9, "context_length": 8, "text": {"ü": 1}},
        "model": {"name": "org/name", "family": "llama", "parameters": 1000},
    }
)  # fmt: skip


def answer(result):
    """The JSON on stdout of a verb that must succeed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def take(store, job_id, kind, number=0):
    """Claim a stage as the queue would give it out."""
    query = select(stages.c.id, stages.c.queue_id).where(
        stages.c.job_id == job_id, stages.c.kind == kind, stages.c.number == number
    )
    with store.database.transaction() as connection:
        row = connection.execute(query).one()
    claim = store.claim(row.id, row.queue_id, uuid.uuid4())
    assert claim is not None
    return claim


def succeed(store, job_id, found):
    finish = [NewStage(kind=StageKind.FINISH)]
    store.complete(take(store, job_id, StageKind.CALIBRATE), {}, then=finish)
    best = JobResult(best=found.model_dump(mode="json"), warnings=["the best lies on the border"])
    store.complete(take(store, job_id, StageKind.FINISH), {}, job_result=best, ended=True)


class Service:
    """A front end that listens on a free port, and on the same one each time."""

    def __init__(self, database_url, settings):
        self._database_url = database_url
        self._settings = settings
        self._port = 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    def start(self):
        """Listen, with a fresh application."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        app = create_app(Database(self._database_url, pool=8), self._settings)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}
        )
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self):
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
