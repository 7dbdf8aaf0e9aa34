"""The verbs of the service: against a front end that listens, and against none."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

from pho_service.cli import main
from pho_service.client import Client
from pho_service.spec.configuration import Configuration, write_configuration
from pho_service.spec.job import JobSpec
from storage.claims import Found
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import KeyStore
from storage.records import Claim, NewStage, StageKind
from storage.tables import stages

Pho = Callable[..., Result]

SPEC = {"model": "org/name", "pattern": "0.5"}
CONFIGURATION = Configuration.model_validate(
    {
        "method": "crepe",
        "pattern": "0.5",
        "scope": "layer",
        "coefficients": {
            "row": 0.1 + 0.2, "column": 1.0, "neighbourhood": 0.5, "kernel_size": 5,
            "activation_exponent": 0.5,
        },
        "objective": {"name": "activation-reconstruction/blend", "value": 0.0123},
        "confirmation": {"perplexity": 17.25, "tokens": 9, "context_length": 8, "text": {"ü": 1}},
    }
)  # fmt: skip


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """To see what the verbs have done."""
    with Client(url) as opened:
        yield opened


@pytest.fixture
def store(database: Database) -> JobStore:
    """For what workers do."""
    return JobStore(database)


def take(store: JobStore, job_id: uuid.UUID, kind: StageKind) -> Claim:
    """Claim a stage as the queue would give it out."""
    query = select(stages.c.id, stages.c.queue_id).where(
        stages.c.job_id == job_id, stages.c.kind == kind
    )
    with store.database.transaction() as connection:
        row = connection.execute(query).one()
    claim = store.claim(row.id, row.queue_id, uuid.uuid4())
    assert claim is not None
    return claim


def succeed(store: JobStore, job_id: uuid.UUID) -> None:
    """Do a job as far as a client can see."""
    finish = [NewStage(kind=StageKind.FINISH)]
    store.complete(take(store, job_id, StageKind.CALIBRATE), {}, then=finish)
    store.complete(
        take(store, job_id, StageKind.FINISH),
        {},
        found=Found(
            best=CONFIGURATION.model_dump(mode="json"), warnings=["the best lies on the border"]
        ),
        ended=True,
    )


def fail(store: JobStore, job_id: uuid.UUID) -> None:
    """The same, to no good end."""
    error = {"type": "NumericalError", "message": "NaN in 4.q", "layer": "4.q"}
    store.fail(take(store, job_id, StageKind.CALIBRATE), error, retry=False)


# -------------------------------------------------------------------------- submit


def test_submit(remote: Pho, client: Client) -> None:
    """A submit prints the job's id on stdout, and how to follow it on stderr."""
    result = remote("submit", "org/name", "--pattern", "0.5")
    (job,) = client.jobs()

    assert result.exit_code == 0
    assert result.stdout == f"{job.id}\n"
    assert f"pho watch {job.id}" in result.stderr
    assert job.spec == JobSpec.model_validate(SPEC).model_dump(mode="json")


def test_every_option(remote: Pho, client: Client, texts: dict[str, Path]) -> None:
    """Each option stands in the document where it belongs."""
    calibration, confirmation = str(texts["calibration"]), str(texts["confirmation"])
    result = remote(
        "submit", "org/name", "--pattern", "2:4", "--scope", "row", "--name", "mine",
        "--text", calibration, "--samples", 6, "--context-length", 32,
        "--confirm-text", confirmation, "--finalists", 3, "--validate", 9,
        "--objective", "perplexity", "--weighting", "fisher", "--sampler", "tpe",
        "--space", "row_share=0.25:0.75", "--space", "activation_exponent=1",
        "--space", "kernel_sizes=9,3", "--trials", 50, "--islands", 2, "--seed", 7,
        "--priority", -5, "--timeout", 60.5,
    )  # fmt: skip
    expected = JobSpec.model_validate(
        {
            "model": "org/name", "pattern": "2:4", "scope": "row", "name": "mine",
            "calibration": {"text": calibration, "samples": 6, "context_length": 32},
            "confirm": {"text": confirmation, "candidates": 3},
            "validation": {"candidates": 9},
            "objective": {"name": "perplexity", "weighting": "fisher"}, "sampler": "tpe",
            "search_space": {
                "row_share": [0.25, 0.75], "activation_exponent": [1.0, 1.0],
                "kernel_sizes": [3, 9],
            },
            "trials": 50, "islands": 2, "seed": 7, "priority": -5, "timeout_s": 60.5,
        }
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    (job,) = client.jobs()
    assert job.spec == expected.model_dump(mode="json")


def test_the_same_idempotency_key_twice_prints_the_same_id(remote: Pho) -> None:
    words = ("submit", "org/name", "--pattern", "0.5", "--idempotency-key", "one")

    assert remote(*words).stdout == remote(*words).stdout
    other = remote(*words, "--seed", 1)
    assert (other.exit_code, other.stdout) == (1, "")
    assert "another document" in other.stderr


def test_with_json_stdout_is_the_job(remote: Pho, client: Client) -> None:
    printed = json.loads(remote("submit", "org/name", "--pattern", "0.5", "--json").stdout)
    (job,) = client.jobs()

    assert printed == job.model_dump(mode="json")


def test_a_document_comes_from_a_file_options_change_it(remote: Pho, client: Client) -> None:
    document = {**SPEC, "trials": 40, "confirm": {"candidates": 3}, "search_space": {
        "row_share": [0.5, 0.5]}}  # fmt: skip
    Path("job.json").write_text(json.dumps(document))
    remote("submit", "--job", "job.json")
    remote("submit", "org/other", "--job", "job.json", "--trials", 50, "--finalists", 4,
           "--space", "gradient_exponent=0")  # fmt: skip
    changed, plain = client.jobs()

    assert plain.spec == JobSpec.model_validate(document).model_dump(mode="json")
    assert (changed.spec["model"], changed.spec["trials"]) == ("org/other", 50)
    assert changed.spec["confirm"]["candidates"] == 4
    assert changed.spec["search_space"]["row_share"] == [0.5, 0.5]
    assert changed.spec["search_space"]["gradient_exponent"] == [0.0, 0.0]


def test_stdin(url: str, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document comes from stdin, too."""
    monkeypatch.setenv("PHO_API_URL", url)
    result = CliRunner().invoke(main, ["submit", "--job", "-"], input=json.dumps(SPEC))

    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{next(client.jobs()).id}\n"


NO_DOCUMENTS = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 5000,
    b'{"model": "org/name", "pattern": "0.5", "timeout_s": NaN}',
    b'{"model": "org/name", "pattern": "0.5", "timeout_s": 1e999}',
    b'{"model": "org/name", "pattern": "0.5", "name": "\\ud800"}',
]  # fmt: skip


def test_bad_file(remote: Pho, client: Client) -> None:
    """A file that is no document is refused in one line, and nothing is submitted."""
    for content in NO_DOCUMENTS:
        Path("job.json").write_bytes(content)
        result = remote("submit", "--job", "job.json")

        assert result.exit_code in (1, 2)
        assert result.stdout == ""
        assert result.stderr.startswith("pho: ")
        assert len(result.stderr.splitlines()) == 1
    assert [*client.jobs()] == []


def test_a_file_that_is_not_there_is_bad_usage_and_named(remote: Pho) -> None:
    for path in ("nowhere.json", "."):
        result = remote("submit", "--job", path)

        assert result.exit_code == 2
        assert path in result.stderr


BAD_SUBMITS = [
    ((), "no model is given. Give MODEL"),
    (("org/name",), "no pattern is given. Give --pattern"),
    (("org/name", "--pattern", "half"), "--pattern half: pattern 'half' is neither"),
    (("org/name", "--pattern", "0.5", "--timeout", "nan"), ""),
    (("../x", "--pattern", "0.5"), "/model: model '../x' does not lie below"),
    (("org/name", "--pattern", "0.5", "--name", "\udcff"), ""),  # bytes that are no UTF-8
    (("org/name", "--pattern", "0.5", "--idempotency-key", "ü"), ""),
    (("org/name", "--pattern", "0.5", "--idempotency-key", "a b"), "Idempotency-Key"),
]


def test_bad_submit(remote: Pho, client: Client) -> None:
    """What is wrong with a job is told, with its place, and nothing is submitted."""
    for words, says in BAD_SUBMITS:
        result = remote("submit", *words)

        assert result.exit_code in (1, 2)
        assert result.stdout == ""
        assert says.lower() in result.stderr.lower()
    assert [*client.jobs()] == []


# -------------------------------------------------------------------------- show, jobs


def test_show(remote: Pho, client: Client, store: JobStore) -> None:
    """A job is shown with its progress, and with its winner once it has one."""
    job = client.submit({**SPEC, "trials": 40})
    before = remote("show", job.id).stdout
    succeed(store, job.id)
    after = remote("show", job.id).stdout

    assert f"job          {job.id}\n" in before
    assert f"name         {job.name}\n" in before
    assert "state        queued, stage none yet\n" in before
    assert "best so far  none yet\n" in before
    assert "search       0 of 40 trials\n" in before
    assert "state        succeeded, stage finish\n" in after
    assert "best         crepe, objective 0.01230, perplexity 17.25\n" in after
    assert f"pho best {job.id}" in after
    assert "note         the best lies on the border\n" in after


def test_show_time_left(remote: Pho, client: Client, store: JobStore) -> None:
    """While it searches, the time left is shown."""
    job = client.submit({**SPEC, "trials": 40}).id
    search = [NewStage(kind=StageKind.SEARCH)]
    store.complete(take(store, job, StageKind.CALIBRATE), {}, then=search)
    claim = take(store, job, StageKind.SEARCH)
    store.progress(claim, done=10, elapsed_s=20.0, best_value=0.125)
    shown = remote("show", job).stdout

    assert "state        running, stage search, 60 s left\n" in shown
    assert "best so far  0.1250\n" in shown
    assert "search       10 of 40 trials\n" in shown


def test_show_shards(remote: Pho, client: Client, store: JobStore) -> None:
    """Of a calibration that is shared out, the shards that are done are shown."""
    job = client.submit({**SPEC, "trials": 40}).id
    parts = [
        NewStage(kind=StageKind.CALIBRATE, number=10 + i, params={"part_of": 0}) for i in range(3)
    ]
    store.complete(take(store, job, StageKind.CALIBRATE), {}, then=parts)
    part = store.get(job).shards[0]
    with store.database.transaction() as connection:
        query = select(stages.c.queue_id).where(stages.c.id == part.id)
        entry = connection.execute(query).scalar_one()
    claim = store.claim(part.id, entry, uuid.uuid4())
    assert claim is not None
    store.complete(claim, {})

    assert "calibrate    1 of 3 parts\nsearch       0 of 40" in remote("show", job).stdout
    parts = client.job(job).progress.of("calibrate")
    assert (parts.done, parts.total) == (1, 3)


def test_show_failure(remote: Pho, client: Client, store: JobStore) -> None:
    """Why a job failed is shown; to show it is no failure."""
    job = client.submit(SPEC).id
    fail(store, job)
    result = remote("show", job)

    assert result.exit_code == 0
    assert "error        NumericalError in calibrate at 4.q: NaN in 4.q\n" in result.stdout


def test_show_json(remote: Pho, client: Client) -> None:
    """With --json, stdout is the job."""
    job = client.submit(SPEC)

    assert json.loads(remote("show", job.id, "--json").stdout) == job.model_dump(mode="json")


def test_jobs(remote: Pho, client: Client, store: JobStore) -> None:
    """Jobs are listed newest first, as many as asked for, in the states asked for."""
    jobs = [client.submit({**SPEC, "name": f"number {i}"}) for i in range(3)]
    succeed(store, jobs[1].id)
    table = remote("jobs").stdout

    places = [table.index(f"{job.id}") for job in jobs]
    assert places == sorted(places, reverse=True)
    assert "17.25" in table
    assert listed(remote("jobs", "--json")) == [job.id for job in jobs[::-1]]
    assert listed(remote("jobs", "--json", "--limit", 2)) == [jobs[2].id, jobs[1].id]
    assert listed(remote("jobs", "--json", "--limit", 0)) == []
    states = ("--state", "succeeded", "--state", "failed")
    assert listed(remote("jobs", "--json", *states)) == [jobs[1].id]


def test_filtered_jobs(remote: Pho, client: Client) -> None:
    """Jobs are listed by model, pattern and name, any of several, in the order asked for."""
    small, large, half = (
        client.submit({"model": f"org/{model}", "pattern": pattern, "name": name}).id
        for model, pattern, name in (
            ("small", "2:4", "b"), ("large", "2:4", "a"), ("large", "0.5", "c"),
        )
    )  # fmt: skip

    assert listed(remote("jobs", "--json", "--model", "org/large")) == [half, large]
    assert listed(remote("jobs", "--json", "--model", "org/large", "--pattern", "2:4")) == [large]
    both = ("--pattern", "2:4", "--pattern", "0.5")
    assert listed(remote("jobs", "--json", *both, "--sort", "name")) == [large, small, half]
    assert listed(remote("jobs", "--json", *both, "--sort=-name")) == [half, small, large]
    assert listed(remote("jobs", "--json", "--name", str(small)[:8])) == [small]
    assert listed(remote("jobs", "--json", "--name", "nowhere")) == []


def listed(result: Result) -> list[uuid.UUID]:
    """The ids on stdout."""
    return [uuid.UUID(job["id"]) for job in json.loads(result.stdout)]


def test_a_state_or_a_number_that_does_not_exist_is_told(remote: Pho) -> None:
    for words, says in (
        (("--state", "done"), "queued"),
        (("--sort", "luck"), "perplexity"),
        (("--limit", "-1"), "limit"),
        (("--limit", "x"), "limit"),
    ):
        result = remote("jobs", *words)

        assert result.exit_code in (1, 2)
        assert says in result.stderr


def test_workers_are_listed_with_device_and_stage(remote: Pho, store: JobStore) -> None:
    store.enter_worker(uuid.uuid4(), name="host:7", device="cuda:1", kinds=[StageKind.SEARCH])
    (printed,) = json.loads(remote("workers", "--json").stdout)
    table = remote("workers").stdout

    assert (printed["name"], printed["stages"]) == ("host:7", ["search"])
    assert "host:7" in table
    assert "cuda:1" in table


# ---------------------------------------------------------------------------- best


def test_best(remote: Pho, client: Client, store: JobStore) -> None:
    """The best goes to stdout or into a file: the bytes that `pho search` would write."""
    job = client.submit(SPEC).id
    succeed(store, job)
    write_configuration(CONFIGURATION, Path("expected.json"))
    printed = remote("best", job)
    written = remote("best", job, "--out", "config.json")

    assert printed.stdout_bytes == Path("expected.json").read_bytes()
    assert written.stdout == ""
    assert Path("config.json").read_bytes() == Path("expected.json").read_bytes()


def test_without_one_the_verb_fails_and_no_file_is_made(remote: Pho, client: Client) -> None:
    job = client.submit(SPEC).id
    result = remote("best", job, "--out", "config.json")

    assert result.exit_code == 1
    assert "is queued and has no configuration yet" in result.stderr
    assert not Path("config.json").exists()


def test_a_folder_that_is_not_there_is_told(remote: Pho, client: Client, store: JobStore) -> None:
    job = client.submit(SPEC).id
    succeed(store, job)
    result = remote("best", job, "--out", "no/config.json")

    assert result.exit_code == 1
    assert "does not exist" in result.stderr


# --------------------------------------------------------------------- watch, and verbs


def test_watch(remote: Pho, client: Client, store: JobStore) -> None:
    """Watching ends with the job, with its winner and exit code 0."""
    job = client.submit(SPEC)
    succeed(store, job.id)
    result = remote("watch", job.id)

    assert result.exit_code == 0
    assert f"{job.name}: succeeded\n" in result.stdout
    assert "perplexity 17.25" in result.stdout


def test_watch_a_failure(remote: Pho, client: Client, store: JobStore) -> None:
    """A job that fails or is cancelled is exit code 1, with the reason."""
    failed, cancelled = client.submit(SPEC).id, client.submit(SPEC).id
    fail(store, failed)
    client.cancel(cancelled)
    of_failed, of_cancelled = remote("watch", failed, "--json"), remote("watch", cancelled)

    assert (of_failed.exit_code, of_cancelled.exit_code) == (1, 1)
    assert json.loads(of_failed.stdout)["error"]["message"] == "NaN in 4.q"
    assert f"job {failed} failed: NaN in 4.q" in of_failed.stderr
    assert f"job {cancelled} cancelled" in of_cancelled.stderr


def test_submit_and_watch(remote: Pho, client: Client, store: JobStore) -> None:
    """A submit that waits ends as watching does."""

    def work() -> None:
        while not (jobs := [*client.jobs()]):
            time.sleep(0.05)
        succeed(store, jobs[0].id)

    worker = threading.Thread(target=work)
    worker.start()
    result = remote("submit", "org/name", "--pattern", "0.5", "--watch", "--json")
    worker.join()

    assert result.exit_code == 0
    assert json.loads(result.stdout)["state"] == "succeeded"


def test_verbs(remote: Pho, client: Client) -> None:
    """Each verb says what the job is then; what cannot be is exit code 1 with the state."""
    job = client.submit({**SPEC, "trials": 40}).id
    said = [
        (result.exit_code, result.stdout, result.stderr)
        for result in (
            remote("pause", job),
            remote("resume", job),
            remote("extend", job, "--trials", 10),
            remote("cancel", job),
        )
    ]
    refused = remote("resume", job)
    deleted = remote("delete", job)

    assert said == [
        (0, "", "job is paused\n"), (0, "", "job is queued\n"),
        (0, "", "job is queued, with 50 trials\n"), (0, "", "job is cancelled\n"),
    ]  # fmt: skip
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "cancelled" in refused.stderr
    assert (deleted.exit_code, deleted.stderr) == (0, "deleted\n")
    assert [*client.jobs()] == []


def test_no_such_job(remote: Pho, client: Client) -> None:
    """A job that is not there, or no id at all, is exit code 1 with a sentence."""
    job = client.submit(SPEC).id
    verbs = [[v] for v in ("show", "watch", "best", "cancel", "pause", "resume", "delete")]
    for verb in (*verbs, ["extend", "--trials", "1"]):
        for job_id in (str(uuid.uuid4()), "x", "", "../workers", f"{job}/trials", "a b", "\udcff"):
            result = remote(*verb, "--", job_id)

            assert result.exit_code in (1, 2)
            assert result.stdout == ""
            assert result.stderr.strip()
    assert client.job(job).state == "queued"


# ------------------------------------------------------------------- which service, and none


@pytest.mark.parametrize(
    "verb",
    [("jobs",), ("workers",), ("show", str(uuid.UUID(int=0))), ("submit", "m", "--pattern", "0.5")],
)
def test_not_running(pho: Pho, verb: tuple[str, ...]) -> None:
    """If no service runs, that is exit code 1 with the way out."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = pho(*verb, "--url", url)

    assert (result.exit_code, result.stdout) == (1, "")
    assert url in result.stderr
    assert "pho serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_watch_not_running(pho: Pho, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching waits for a service that went away, but not for ever."""
    monkeypatch.setattr("pho_service.client._OUTAGE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = pho("watch", str(uuid.uuid4()), "--url", url)

    assert result.exit_code == 1
    assert "pho serve" in result.stderr


def test_url_first(remote: Pho, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """An address that is given goes before that of the environment."""
    monkeypatch.setenv("PHO_API_URL", "http://127.0.0.1:1")

    assert remote("jobs", "--url", url).exit_code == 0
    assert remote("jobs").exit_code == 1


@pytest.mark.parametrize("url", ["nope", "http://[", "http://h:99999", "ftp://h", "http://\x00"])
def test_an_address_that_is_none_is_told_in_one_line(pho: Pho, url: str) -> None:
    result = pho("jobs", "--url", url)

    assert isinstance(result.exception, SystemExit)
    assert result.exit_code in (1, 2)
    assert len(result.stderr.splitlines()) == 1


def test_key(remote: Pho, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key comes from the environment; without one, the way to it is told."""
    _, secret = KeyStore(database).create("k", sees_all=False)
    without = remote("jobs")
    monkeypatch.setenv("PHO_API_KEY", "pho_wrong")
    wrong = remote("jobs")
    monkeypatch.setenv("PHO_API_KEY", secret)

    assert remote("jobs").exit_code == 0
    assert (without.exit_code, wrong.exit_code) == (1, 1)
    assert "pho keys create" in without.stderr
    assert "pho_wrong" not in wrong.stderr


# --------------------------------------------------------------------------- pho keys


@pytest.fixture
def keys(pho: Pho, database_url: str) -> Pho:
    """`pho keys` on the test's database."""

    def run(verb: str, *words: object) -> Result:
        result = pho("keys", verb, "--database-url", database_url, "--", *words)
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    return run


def test_create_a_key(keys: Pho, database: Database) -> None:
    """A new key is the only thing on stdout, works, and is shown this once."""
    created = keys("create", "laptop")
    secret = created.stdout.strip()
    found = KeyStore(database).find(secret)

    assert found is not None
    assert (found.name, found.sees_all) == ("laptop", False)
    assert secret not in created.stderr
    assert secret not in keys("list").output


def test_key_for_all_jobs(pho: Pho, database: Database, database_url: str) -> None:
    """With --all-jobs, it sees those of all keys."""
    pho("keys", "create", "admin", "--all-jobs", "--database-url", database_url)

    assert [key.sees_all for key in KeyStore(database).all()] == [True]


def test_list_keys(pho: Pho, keys: Pho, database_url: str) -> None:
    """Keys are listed by how they begin, also those that were revoked."""
    prefixes = [keys("create", name).stdout[:10] for name in ("a", "b")]
    revoked = keys("revoke", prefixes[0])
    printed = json.loads(pho("keys", "list", "--json", "--database-url", database_url).stdout)
    table = keys("list").stdout

    assert revoked.exit_code == 0
    assert [(k["prefix"], k["name"], bool(k["revoked_at"])) for k in printed] == [
        (prefixes[0], "a", True), (prefixes[1], "b", False),
    ]  # fmt: skip
    assert all(prefix in table for prefix in prefixes)


def test_keys_that_expire(pho: Pho, keys: Pho, database: Database, database_url: str) -> None:
    """A key that expires says when, in the list, too; rotated, it is another that lasts as long."""
    of = ("--database-url", database_url)
    made = pho("keys", "create", "short", "--expires", "30d", *of)
    (key,) = KeyStore(database).all()
    rotated = keys("rotate", key.prefix)
    old, new = json.loads(pho("keys", "list", "--json", *of).stdout)

    assert key.expires_at == key.created_at + timedelta(days=30)
    assert f"expires at {old['expires_at']} UTC" in made.stderr
    assert KeyStore(database).find(made.stdout.strip()) is None
    found = KeyStore(database).find(rotated.stdout.strip())
    assert found is not None
    assert found.expires_at == found.created_at + timedelta(days=30)
    assert (new["prefix"], new["name"], new["revoked_at"]) == (found.prefix, "short", None)
    assert old["revoked_at"] is not None


@pytest.mark.parametrize("span", ["", "30", "0d", "-1d", "1.5d", "30 d", "36501d", "never", "٣d"])
def test_odd_spans(pho: Pho, database: Database, database_url: str, span: str) -> None:
    """A span that is none is bad usage, with an example of one; no key is made."""
    result = pho("keys", "create", "x", f"--expires={span}", "--database-url", database_url)

    assert result.exit_code == 2
    assert "12h, 30d or 52w" in result.stderr
    assert KeyStore(database).all() == []


def test_jobs_without_a_key(keys: Pho, store: JobStore) -> None:
    """Who makes a key is told of jobs that it does not see, and how to give them to it."""
    first = NewStage(kind=StageKind.CALIBRATE)
    store.submit(SPEC, name="n", first=first, trials=1, max_attempts=1)
    made = keys("create", "mine")
    prefix = made.stdout[:10]
    taken = keys("take-over", prefix)
    keys("revoke", prefix)

    assert f"`pho keys take-over {prefix}` gives them to it" in " ".join(made.stderr.split())
    assert "key 'mine' has got, with what they have found: 1." in taken.stderr
    assert "take-over" not in keys("create", "other").stderr
    assert keys("take-over", prefix).exit_code == 2


def test_revoke_nothing(keys: Pho, database: Database) -> None:
    """A key that does not exist is bad usage; nothing is revoked."""
    prefix = keys("create", "a").stdout[:10]
    for wrong in ("pho_", "", prefix[:-1], "pho_nothing", str(uuid.uuid4()), "\udcff", "%"):
        result = keys("revoke", wrong)

        assert result.exit_code == 2
        assert "pho keys list" in result.stderr
    assert [key.revoked_at for key in KeyStore(database).all()] == [None]


# -------------------------------------------------------------------- pho serve, pho worker


@pytest.fixture
def serve(pho: Pho, database_url: str) -> Iterator[Pho]:
    """`pho serve` in this process, which must refuse to start; signals are as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words: object) -> Result:
        result = pho("serve", "--workers", 0, "--database-url", database_url, *words)
        assert isinstance(result.exception, SystemExit), result.exception
        return result

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_port_that_is_taken_is_bad_usage_and_named_with_the_way_out(serve: Pho) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = serve("--port", port)

    assert (result.exit_code, result.stdout) == (2, "")
    assert f"127.0.0.1 port {port}: Address already in use" in result.stderr
    assert "Give another --port" in result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])  # noqa: S104 - must be refused
def test_others_without_keys(serve: Pho, database: Database, host: str) -> None:
    """Where others can come in, nothing is served before there is a key that is not revoked."""
    first = serve("--host", host, "--port", 0)
    store = KeyStore(database)
    store.revoke(store.create("old", sees_all=True)[0].prefix)
    second = serve("--host", host, "--port", 0)

    for result in (first, second):
        assert result.exit_code == 2
        assert "pho keys create" in result.stderr


def test_who_was_refused_leaves_no_connection_open(serve: Pho, database: Database) -> None:
    refused = serve("--host", "::", "--port", 0)
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + 60.0
    left = 1
    while left and time.monotonic() < deadline:  # the server takes its time to notice
        with database.transaction() as connection:
            left = connection.exec_driver_sql(query).scalar_one()

    assert refused.exit_code == 2
    assert left == 0


def test_a_host_that_is_none_of_this_machines_is_bad_usage(serve: Pho) -> None:
    for host in ("no.such.host.invalid", "192.0.2.1", "127.0.0.1:80", "a b", "x" * 300):
        result = serve("--host", host, "--port", 0)

        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PHO_PORT", "many"), ("PHO_PORT", "70000"), ("PHO_WORKERS", "-1"), ("PHO_WORKERS", "257"),
        ("PHO_HEARTBEAT_S", "0"), ("PHO_HEARTBEAT_S", "nan"), ("PHO_HEARTBEAT_S", "inf"),
        ("PHO_STALLED_AFTER_S", "soon"), ("PHO_STALLED_AFTER_S", "inf"),
        ("PHO_STOP_AFTER_S", "-1"), ("PHO_RETRY_AFTER_S", "-1"), ("PHO_RETRY_AFTER_S", "inf"),
        ("PHO_MAX_UNFINISHED_JOBS", "0"), ("PHO_MAX_BODY_BYTES", "10"),
    ],
)  # fmt: skip
def test_bad_setting(pho: Pho, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    """A setting that breaks its rule is bad usage, and named."""
    monkeypatch.setenv(variable, value)
    result = pho("keys", "list", "--database-url", "postgresql://127.0.0.1:1/x")

    assert result.exit_code == 2
    assert f"{variable}={value!r}" in result.stderr


def test_stalled_before_a_heartbeat(pho: Pho, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may workers count as dead before they can report."""
    monkeypatch.setenv("PHO_HEARTBEAT_S", "60")
    result = pho("keys", "list", "--database-url", "postgresql://127.0.0.1:1/x")

    assert result.exit_code == 2
    assert "PHO_STALLED_AFTER_S" in result.stderr


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "postgresql://"),
        ("mysql://u:secret@h/x", "postgresql://"),
        ("sqlite:///x.db", "postgresql://"),
        ("postgresql://u:secret@127.0.0.1:1/x", "127.0.0.1"),
        ("postgresql://u:secret@127.0.0.1:port/x", ""),
        ("postgresql://u:secret@[/x", ""),
        ("", ""),
    ],
)
def test_bad_database(pho: Pho, url: str, says: str) -> None:
    """A database that cannot be is told in a few words, without its password."""
    for verb in (
        ("keys", "list"),
        ("serve", "--workers", 0, "--port", 0, "--data-dir", "/dev/null"),
    ):
        result = pho(*verb, "--database-url", url)

        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code in (1, 2)
        assert says in result.stderr
        assert "secret" not in result.output


def test_a_data_folder_that_cannot_be_is_told(pho: Pho) -> None:
    Path("file").write_text("mine")
    for folder in ("file", "file/below", "/proc/x"):
        result = pho("keys", "list", "--data-dir", folder)

        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        assert folder in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ("--stages", "dance", "--database-url", "postgresql://h/x"),
            2,
            "calibrate, point, search",
        ),
    ],
)
def test_worker(tmp_path: Path, words: tuple[str, ...], code: int, says: str) -> None:
    """A worker that is told nonsense says so, and ends."""
    command = [sys.executable, "-c", "from pho_service.cli import main; main()", "worker", *words]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )

    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
