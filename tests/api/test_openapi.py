"""What the OpenAPI document promises, and whether the front end keeps it."""

import json
import re
from collections import defaultdict
from itertools import cycle

import hypothesis
import pytest
import schemathesis
from schemathesis.engine import from_schema
from schemathesis.engine.events import NonFatalError, ScenarioFinished

from storage.records import JobState

# `make fuzz-api` takes more, and others each time.
LONG = hypothesis.settings.get_current_profile_name() == "fuzz"
FEW, MORE, MOST = 3, 6, 200  # examples of each operation and phase that makes them up
LONGER = ("examples", "coverage", "stateful")
PHASES = ("fuzzing", *LONGER)
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "response_headers_conformance", "negative_data_rejection",
    "use_after_free", "ensure_resource_availability", "unsupported_method", "problems",
    "positive_data_acceptance", "ignored_auth", "missing_required_header",
)  # fmt: skip


# What they ask for together is no matter of their form: as many trials as a job may have, say.
FREE = (
    "POST /v1/jobs", "POST /v1/plan", "POST /v1/jobs/{job_id}:transfer",
    "POST /v1/jobs/{job_id}:extend", "POST /v1/jobs/{job_id}:fork", "POST /v1/texts",
)  # fmt: skip
LOOKS = 3  # after which a stream of events ends here: by itself it ends with its job

REACHED = {
    "examples": {("POST /v1/jobs", 202)},
    "coverage": {("POST /v1/jobs", 202), ("POST /v1/jobs", 422)},
    "fuzzing": {("POST /v1/jobs", 422), ("GET /v1/jobs/{job_id}/best", 200)},
    "stateful": {("POST /v1/jobs", 202)},
}


@schemathesis.check
def problems(_context, response, _case):
    if response.status_code >= 400:
        (content_type,) = response.headers["content-type"]
        assert content_type == "application/problem+json"
        assert response.json()["status"] == response.status_code


@pytest.fixture
def headers(keys):
    """A key is needed, for the host's name is not this machine's."""
    return {"Authorization": f"Bearer {keys.create('tester', sees_all=True)[1]}"}


async def looked_enough(request):
    looks = request.scope["looks"] = request.scope.get("looks", 0) + 1
    return bool(looks > LOOKS)


class WithJobs:
    """The front end, but whoever guesses the id of a job finds one: nobody guesses right."""

    def __init__(self, app, jobs):
        self._app = app
        self._jobs = jobs
        self._next = defaultdict(lambda: cycle(jobs))  # each operation meets each of them

    async def __call__(self, scope, receive, send):
        found = _JOB.fullmatch(scope.get("path", ""))
        if found is not None and self._jobs and found[1] not in self._jobs:
            scope = {**scope, "path": f"/v1/jobs/{next(self._next[found[2]])}{found[2]}"}
        await self._app(scope, receive, send)


_JOB = re.compile(r"/v1/jobs/([0-9a-fA-F-]{4,36})(.*)")  # the beginning of an id is one, too


@pytest.fixture
def jobs(client, headers, hand):
    """One in each state; first the one with a result, which most operations are about."""
    ids = []
    for state in sorted(JobState, key=lambda state: state is not JobState.SUCCEEDED):
        document = {"model": "org/name", "pattern": "0.5", "minutes": None}
        job = client.post("/v1/jobs", json=document, headers=headers).json()
        hand.record(job, 3, failed=1)
        hand.bring(job["id"], state)
        ids.append(job["id"])
    return ids


@pytest.mark.parametrize(
    "phase", ["fuzzing", *(pytest.param(p, marks=pytest.mark.thorough) for p in LONGER)]
)
def test_each_operation_answers_as_documented_and_refuses_what_does_not_fit_the_document(
    client, headers, jobs, phase, monkeypatch, request
):
    examples = MORE if request.config.getoption("--thorough") else FEW
    monkeypatch.setattr("pho_service.api.jobs.EVENTS_EVERY_S", 0)
    monkeypatch.setattr("starlette.requests.Request.is_disconnected", looked_enough)
    config = schemathesis.Config.from_dict(
        {
            "seed": None if LONG else 2,
            "headers": headers,
            "generation": {
                "mode": "positive" if phase == "stateful" else "all",
                "max-examples": MOST if LONG else examples,
                "deterministic": not LONG,
                "allow-x00": False,
                "database": "none",
            },
            "phases": {name: {"enabled": name == phase} for name in PHASES},
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
            "operations": [
                {
                    "include-name": name,
                    # A plan's document is a job's, and has some thousand corners.
                    "enabled": (phase, name) != ("coverage", "POST /v1/plan"),
                    "checks": {"positive_data_acceptance": {"enabled": False}},
                }
                for name in FREE
            ],
        }
    )
    document = client.get("/openapi.json", headers=headers).json()
    spec = document["components"]["schemas"]["JobSpec"]["properties"]
    if phase == "stateful":  # nothing but jobs that are taken: 2.0 is an integer to JSON Schema
        spec.clear()
        spec.update(model={"enum": ["org/name"]}, pattern={"enum": ["0.5"]})
    else:  # by itself, no tool comes upon a pattern
        spec["model"]["examples"], spec["pattern"]["examples"] = ["org/name"], ["0.5", "2:4"]
    if phase == "coverage" and not LONG:  # parts of a job have some thousand corners
        for name in [name for name, of in spec.items() if "$ref" in json.dumps(of)]:
            del spec[name]
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.app = WithJobs(client.app, [] if phase == "stateful" else jobs)

    failures, answers = [], set()
    for event in from_schema(schema).execute():
        if isinstance(event, NonFatalError):
            failures.append(f"{event.label}: {event.value!r}")
        if isinstance(event, ScenarioFinished):
            answers |= {
                (event.recorder.cases[case_id].value.operation.label, call.response.status_code)
                for case_id, call in event.recorder.interactions.items()
                if call.response is not None
            }
            failures += [
                f"{event.recorder.label}: {found.failure}\n{found.code_sample}"
                for nodes in event.recorder.checks.values()
                for node in nodes
                if (found := node.failure_info) is not None
            ]

    assert not failures, "\n\n".join(failures)
    assert REACHED[phase] <= answers  # or the test has seen too little
    if phase != "examples":
        assert {status for label, status in answers if "job_id" in label} - {404, 405, 422}
