"""The verbs of the service: against a front end that listens, and against none."""

import json
import signal
import socket
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from pretended_user import FOUND, SPEC, Service, succeed, take

from pho_service.api.answers import Point
from pho_service.cli import main
from pho_service.cli.remote import good
from pho_service.client import Client
from pho_service.host.settings import read_settings
from pho_service.spec.configuration import write_configuration
from pho_service.spec.job import JobSpec
from storage.jobs import JobStore, NewJob
from storage.keys import KeyStore
from storage.records import NewStage, StageKind


@pytest.fixture(scope="module")
def service(url_of_file, tmp_path_factory):
    roots = (tmp_path_factory.mktemp("roots"),)
    limits = {"max_requests_per_minute": 0, "workers": 0, "max_upload_bytes": 4096}
    limits |= {"model_roots": roots, "text_roots": roots, "artifacts": str(roots[0] / "store")}
    running = Service(url_of_file, read_settings(**limits))
    yield running
    running.stop()


@pytest.fixture
def database(emptied_database):
    return emptied_database


@pytest.fixture
def database_url(database, url_of_file):
    del database  # which is empty now
    return url_of_file


@pytest.fixture
def url(service, database):
    """Of the front end of this file, whose database is empty now."""
    del database
    return service.url


@pytest.fixture
def client(url):
    """To see what the verbs have done."""
    with Client(url) as opened:
        yield opened


def fail(store, job_id):
    """The same, to no good end."""
    error = {"type": "NumericalError", "message": "NaN in 4.q", "layer": "4.q"}
    store.fail(take(store, job_id, StageKind.CALIBRATE), error, retry=False)


def listed(result):
    """The ids on stdout."""
    return [uuid.UUID(job["id"]) for job in json.loads(result.stdout)]


def test_a_submit_prints_the_jobs_id_or_the_answer_of_the_service_on_stdout(remote, client):
    words = ("submit", "org/name", "--pattern", "0.5", "--minutes", "none")
    words += ("--idempotency-key", "one")
    result, again, other = remote(*words), remote(*words), remote(*words, "--seed", 1)
    (job,) = client.jobs()
    printed = json.loads(remote(*words, "--json").stdout)

    assert result.exit_code == 0
    assert result.stdout == again.stdout == f"{job.id}\n"
    assert f"pho watch {job.short}" in result.stderr
    assert job.spec == JobSpec.model_validate(SPEC).model_dump(mode="json")
    assert (printed["id"], printed["links"]["job"]) == (str(job.id), f"/v1/jobs/{job.id}")
    assert (other.exit_code, other.stdout) == (1, "")
    assert "another document" in other.stderr


def test_a_document_comes_from_a_file_or_stdin_options_change_it(remote, client):
    document = {**SPEC, "trials": 40, "confirm": {"finalists": 3}, "search_space": {
        "row_share": [0.5, 0.5]}}  # fmt: skip
    Path("job.json").write_text(json.dumps(document))
    remote("submit", "--job", "job.json")
    remote("submit", "org/other", "--job", "job.json", "--trials", 50, "--finalists", 4,
           "--space", "gradient_exponent=0")  # fmt: skip
    piped = CliRunner().invoke(main, ["submit", "--job", "-"], input=json.dumps(SPEC))
    last, changed, plain = client.jobs()

    assert plain.spec == JobSpec.model_validate(document).model_dump(mode="json")
    assert (changed.spec["model"], changed.spec["trials"]) == ("org/other", 50)
    assert changed.spec["confirm"]["finalists"] == 4
    assert changed.spec["search_space"]["row_share"] == [0.5, 0.5]
    assert changed.spec["search_space"]["gradient_exponent"] == [0.0, 0.0]
    assert piped.stdout == f"{last.id}\n", piped.stderr


NO_DOCUMENTS = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 5000,
    b'{"model": "org/name", "pattern": "0.5", "timeout_s": NaN}',
    b'{"model": "org/name", "pattern": "0.5", "timeout_s": 1e999}',
    b'{"model": "org/name", "pattern": "0.5", "name": "\\ud800"}',
]  # fmt: skip
BAD_SUBMITS = [
    ((), "no model is given. Give MODEL"),
    (("org/name",), "no pattern is given. Give --pattern"),
    (("org/name", "--pattern", "half"), "--pattern half: pattern 'half' is neither"),
    (("../x", "--pattern", "0.5"), "/model: model '../x' does not lie below"),
    (("org/name", "--pattern", "0.5", "--name", "\udcff"), ""),  # bytes that are no UTF-8
    (("org/name", "--pattern", "0.5", "--idempotency-key", "a b"), "Idempotency-Key"),
    (("--job", "nowhere.json"), "nowhere.json"),
    (("--job", "."), "."),
]


def test_what_is_wrong_with_a_job_is_told_with_its_place(remote, client):
    for words, says in BAD_SUBMITS:
        result = remote("submit", *words)

        assert (result.exit_code in (1, 2), result.stdout) == (True, "")
        assert (result.exit_code == 2) or "--job" not in words
        assert says.lower() in result.stderr.lower()
    for content in NO_DOCUMENTS:
        Path("job.json").write_bytes(content)
        result = remote("submit", "--job", "job.json")

        assert (result.exit_code in (1, 2), result.stdout) == (True, "")
        assert result.stderr.startswith("pho: ")
        assert len(result.stderr.splitlines()) == 1
    assert [*client.jobs()] == []


@pytest.mark.usefixtures("remote")  # whose service the verbs ask
def test_a_shell_completes_the_ids_of_jobs_and_the_names_of_methods(client):
    job, other = (str(client.submit(SPEC).id) for _ in range(2))

    def completed(*words):
        shell = ShellComplete(main, {}, "pho", "_PHO_COMPLETE")
        return [item.value for item in shell.get_completions([*words[:-1]], words[-1])]

    assert completed("watch", job[:8]) == [job]
    assert {job, other} <= {*completed("show", "")}
    assert "wanda-permuted" in completed("prune", "--method", "wanda")


def test_a_job_is_shown_with_its_progress(remote, client, store):
    job, running, failed = (client.submit({**SPEC, "trials": 40}) for _ in range(3))
    store.enter_worker(uuid.uuid4(), name="host:7", device="cpu", kinds=[])
    before = remote("show", job.id).stdout
    parts = [
        NewStage(kind=StageKind.CALIBRATE, number=10 + i, params={"part_of": 0}) for i in range(3)
    ]
    store.complete(take(store, job.id, StageKind.CALIBRATE), {}, then=parts)
    store.complete(take(store, job.id, StageKind.CALIBRATE, 10), {})
    in_parts, shards = remote("show", job.id).stdout, client.job(job.id).progress.of("calibrate")
    search = [NewStage(kind=StageKind.SEARCH)]
    store.complete(take(store, running.id, StageKind.CALIBRATE), {}, then=search)
    claim = take(store, running.id, StageKind.SEARCH)
    store.progress(claim, done=10, elapsed_s=20.0, best_value=0.125)
    during = remote("show", running.id).stdout
    fail(store, failed.id)

    assert f"job          {job.id}\n" in before
    assert f"name         {job.name}\n" in before
    assert "state        queued, stage none yet\n" in before
    assert "best so far  none yet\n" in before
    assert "search       0 of 40 trials\n" in before
    assert "calibrate    1 of 3 parts\nsearch       0 of 40" in in_parts
    assert (shards.done, shards.total) == (1, 3)
    assert "state        running, stage search, 60 s left\n" in during
    assert "best so far  0.1250\n" in during
    assert "search       10 of 40 trials\n" in during
    said = "error        NumericalError in calibrate at 4.q: NaN in 4.q\n"
    assert said in remote("show", failed.id).stdout


def test_jobs_are_listed_newest_first_and_what_they_found_is_shown(remote, client, store):
    jobs = [client.submit({**SPEC, "name": f"number {i}"}) for i in range(3)]
    succeed(store, jobs[1].id, FOUND)
    table, shown = remote("jobs").stdout, remote("show", jobs[1].id).stdout

    places = [table.index(f"{job.id}") for job in jobs]
    assert places == sorted(places, reverse=True)
    assert "17.25" in table
    assert "number 0 " in table
    assert jobs[0].id.hex[:12] not in table
    assert listed(remote("jobs", "--json")) == [job.id for job in jobs[::-1]]
    assert listed(remote("jobs", "--json", "--limit", 2)) == [jobs[2].id, jobs[1].id]
    states = ("--state", "succeeded", "--state", "failed")
    assert listed(remote("jobs", "--json", *states)) == [jobs[1].id]
    assert "state        succeeded, stage finish\n" in shown
    assert "chosen       crepe, objective 0.01230, perplexity 17.25\n" in shown
    assert f"pho best {str(jobs[1].id)[:8]} --out" in shown
    assert "note         the best lies on the border\n" in shown
    as_json = json.loads(remote("show", jobs[1].id, "--json").stdout)
    assert as_json == client.job(jobs[1].id).model_dump(mode="json")


def test_jobs_are_listed_by_model_pattern_and_name(remote, client):
    large, half = (
        client.submit({"model": f"org/{name}", "pattern": pattern, "name": name}).id
        for name, pattern in (("large", "2:4"), ("half", "0.5"))
    )
    both = ("--pattern", "2:4", "--pattern", "0.5", "--sort=-name")

    assert listed(remote("jobs", "--json", "--model", "org/large", "--pattern", "2:4")) == [large]
    assert listed(remote("jobs", "--json", *both)) == [large, half]
    assert listed(remote("jobs", "--json", "--name", str(half)[:8])) == [half]
    for words, says in (
        (("--state", "done"), "queued"),
        (("--sort", "luck"), "perplexity"),
        (("--limit", "-1"), "limit"),
        (("--limit", "x"), "limit"),
    ):
        result = remote("jobs", *words)

        assert result.exit_code in (1, 2)
        assert says in result.stderr


def test_of_several_patterns_the_list_has_the_lowest_and_the_highest(client):
    job = client.job(client.submit(SPEC).id)
    known = {
        "scope": "layer", "state": "done", "trials_done": 8, "dense": 20.0, "wanda": 30.0,
        "measured_on": "report text",
    }  # fmt: skip
    points = [
        Point(pattern=f"{s}", sparsity=s, perplexity=p, rise=p / 20 - 1, ria=p + 2, **known)
        for s, p in ((0.3, 22.0), (0.5, 26.0))
    ]

    assert good(job.model_copy(update={"points": points})) == [
        "20.00", "22.00 to 26.00", "report text", "+10.0% to +30.0%", "30.00", "24.00 to 28.00",
    ]  # fmt: skip


def test_workers_are_listed_and_drained_by_name(remote, store, client):
    worker = uuid.uuid4()
    store.enter_worker(worker, name="host:7", device="cuda:1", kinds=[StageKind.SEARCH])
    (printed,) = json.loads(remote("workers", "--json").stdout)
    table = remote("workers").stdout
    wrong = remote("workers", "drain", "host:8")
    told = remote("workers", "drain", "host:7")
    (drained,) = client.workers()
    by_id = json.loads(remote("workers", "drain", worker, "--now", "--json").stdout)

    assert (printed["name"], printed["stages"]) == ("host:7", ["search"])
    assert "host:7" in table
    assert "cuda:1" in table
    assert (wrong.exit_code, "no workers" in wrong.stderr) == (2, True)
    assert told.stderr == "host:7 has no stage, takes no more, and ends.\n"
    assert drained.drain == "finish"
    assert "no: ends" in remote("workers").stdout
    assert by_id["drain"] == "now"


def test_best_gives_the_bytes_of_pho_search_or_fails_and_makes_no_file(remote, client, store):
    job = client.submit(SPEC).id
    too_early = remote("best", job, "--out", "config.json")
    made = Path("config.json").exists()
    succeed(store, job, FOUND)
    write_configuration(FOUND, Path("expected.json"))
    printed = remote("best", job)
    written = remote("best", job, "--out", "config.json")

    assert (too_early.exit_code, made) == (1, False)
    assert "is queued and has no configuration yet" in too_early.stderr
    assert printed.stdout_bytes == Path("expected.json").read_bytes()
    assert written.stdout == ""
    assert Path("config.json").read_bytes() == Path("expected.json").read_bytes()


def test_watching_ends_with_the_job_a_failure_is_exit_code_1(remote, client, store):
    job, failed, cancelled = (client.submit(SPEC) for _ in range(3))
    succeed(store, job.id, FOUND)
    fail(store, failed.id)
    client.cancel(cancelled.id)
    result, of_cancelled = remote("watch", job.id), remote("watch", cancelled.id)
    of_failed, told = remote("watch", failed.id, "--json"), remote("watch", failed.id)

    assert (result.exit_code, of_failed.exit_code, of_cancelled.exit_code) == (0, 1, 1)
    assert f" {str(job.id)[:8]}: succeeded\n" in result.stdout
    assert (told.stdout + told.stderr).count("NaN in 4.q") == 1
    assert f"job {failed.id} failed." in told.stderr
    assert "perplexity 17.25" in result.stdout
    assert json.loads(of_failed.stdout)["error"]["message"] == "NaN in 4.q"
    assert f"job {failed.id} failed: NaN in 4.q" in of_failed.stderr
    assert f"job {cancelled.id} cancelled" in of_cancelled.stderr


def test_a_text_that_the_service_does_not_see_is_uploaded_once_and_named_by_its_content(
    remote, client
):
    Path("own.jsonl").write_text('{"text": "a few words"}\n')
    Path("other.txt").write_text("other words")
    words = ("submit", "org/name", "--pattern", "0.5", "--text", "own.jsonl", "--text", "other.txt")
    results = [remote(*words), remote(*words, "--confirm-text", "other.txt")]
    uploaded = {text.name: text.id for text in client.texts()}
    last, first = client.jobs()

    assert [result.exit_code for result in results] == [0, 0], results[0].stderr
    assert sorted(uploaded) == ["other.txt", "own.jsonl"]
    for job in (first, last):
        assert job.spec["calibration"]["text"] == uploaded["own.jsonl"]
        assert job.spec["calibration"]["more_texts"] == [uploaded["other.txt"]]
    assert last.spec["confirm"]["text"] == uploaded["other.txt"]
    for job in (first, last):
        client.cancel(job.id)
    client.delete_text(uploaded["other.txt"])
    assert [text.name for text in client.texts()] == ["own.jsonl"]


def test_a_text_that_the_service_sees_is_not_uploaded_unless_it_is_on_another_machine(
    remote, client, service, monkeypatch
):
    seen = service._settings.text_roots[0] / "seen.txt"
    seen.write_text("words")
    words = ("submit", "org/name", "--pattern", "0.5", "--text", seen)
    remote(*words)
    before = [*client.texts()]
    monkeypatch.setattr("pho_service.client._THIS_MACHINE", ())
    remote(*words)
    away, here = client.jobs()

    assert before == []
    assert here.spec["calibration"]["text"] == str(seen)
    assert away.spec["calibration"]["text"] == next(client.texts()).id


def test_a_text_that_is_too_large_or_refused_is_said_and_no_job_is_made(remote, client):
    Path("bad.txt").write_bytes(b"caf\xc3")
    Path("large.txt").write_bytes(b"x" * 5000)
    words = ("submit", "org/name", "--pattern", "0.5", "--text")
    refused, large = remote(*words, "bad.txt"), remote(*words, "large.txt")

    assert (refused.exit_code, "it is not UTF-8 text" in refused.stderr) == (1, True)
    assert (large.exit_code, "large.txt has 5000 bytes, and the" in large.stderr) == (2, True)
    assert [*client.jobs()] == [*client.texts()] == []


def test_a_label_is_given_listed_and_searched_for(remote, client):
    words = ("submit", "org/name", "--pattern", "0.5", "--label")
    remote(*words, "team=1"), remote(*words, "team=b")
    listed = remote("jobs", "--label", "team=1")

    assert {job.labels["team"] for job in client.jobs(labels=["team"])} == {"1", "b"}
    assert listed.stdout.count("team=") == 1
    assert "team=1" in listed.stdout


def test_without_a_worker_submit_show_and_watch_say_so(remote, client):
    submitted = remote("submit", "org/name", "--pattern", "0.5")
    (job,) = client.jobs()
    shown = remote("show", job.id)
    threading.Timer(0.5, client.cancel, [job.id]).start()
    watched = remote("watch", job.id)

    for text in (submitted.stderr, shown.stdout, watched.stderr):
        assert "No worker is connected: the job waits until one is." in text
    assert " left" not in shown.stdout


def test_a_submit_that_waits_watches(remote, client, store):
    def work():
        while not (jobs := [*client.jobs()]):
            time.sleep(0.05)
        succeed(store, jobs[0].id, FOUND)

    worker = threading.Thread(target=work)
    worker.start()
    words = ("--pattern", "0.5", "--minutes", "none", "--watch", "--json")
    result = remote("submit", "org/name", *words)
    worker.join()

    assert result.exit_code == 0
    assert json.loads(result.stdout)["state"] == "succeeded"


def test_each_verb_says_what_the_job_is_then(remote, client):
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


def test_a_job_that_is_not_there_or_no_id_at_all(remote, client):
    job = client.submit(SPEC).id
    verbs = [[v] for v in ("show", "watch", "best", "cancel", "pause", "resume", "delete")]
    for verb, job_id in (
        *((verb, uuid.uuid4()) for verb in (*verbs, ["extend", "--trials", "1"])),
        *((["cancel"], odd) for odd in ("x", "", "../workers", f"{job}/trials", "a b", "\udcff")),
    ):
        result = remote(*verb, "--", job_id)

        assert (result.exit_code in (1, 2), result.stdout) == (True, "")
        assert result.stderr.strip()
    assert client.job(job).state == "queued"


def test_a_given_address_wins_if_no_service_runs_there_the_way_out_is_told(remote):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = remote("jobs", "--url", nowhere)

    assert remote("jobs").exit_code == 0
    assert (result.exit_code, result.stdout) == (1, "")
    assert nowhere in result.stderr
    assert "pho serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def keys(pho, database_url):
    """`pho keys` on the test's database."""

    def run(verb, *words):
        result = pho("keys", verb, "--database-url", database_url, "--", *words)
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    return run


def test_keys_are_made_shown_once_listed_and_revoked(keys, pho, database, database_url):
    of = ("--database-url", database_url)
    created = keys("create", "laptop")
    secret = created.stdout.strip()
    pho("keys", "create", "admin", "--all-jobs", *of)
    pho("keys", "create", "prometheus", "--scrape-only", *of)
    both = pho("keys", "create", "x", "--scrape-only", "--all-jobs", *of)
    mine, admin, scraper = KeyStore(database).all()
    opened = KeyStore(database).find(secret)
    revoked = keys("revoke", mine.prefix)
    printed = json.loads(pho("keys", "list", "--json", *of).stdout)
    table = keys("list").output

    assert opened == mine
    assert (mine.name, mine.sees_all, admin.sees_all) == ("laptop", False, True)
    assert (scraper.scrape_only, scraper.sees_all, printed[2]["sees"]) == (True, False, "/metrics")
    assert secret not in created.stderr + table
    assert (both.exit_code, revoked.exit_code) == (2, 0)
    assert "give one of the two" in both.stderr
    assert [(key["prefix"], bool(key["revoked_at"])) for key in printed] == [
        (mine.prefix, True), (admin.prefix, False), (scraper.prefix, False),
    ]  # fmt: skip
    assert all(key.prefix in table for key in (mine, admin, scraper))


def test_keys_that_expire(pho, keys, database, database_url):
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


def test_a_key_with_a_quota(pho, keys, database, database_url):
    """A quota is given with the key or later, and the list says what is used of it."""
    of = ("--database-url", database_url)
    pho("keys", "create", "free", *of)
    made = pho("keys", "create", "team", "--quota", "200M/7d", *of)
    _, key = KeyStore(database).all()
    first = NewStage(kind=StageKind.CALIBRATE)
    new = NewJob(spec={}, name="n", stages=[first], trials=1, max_attempts=1, tokens=1_234_567)
    JobStore(database).submit(new, owner_id=key.id)
    table = keys("list").stdout
    free, row = json.loads(pho("keys", "list", "--json", *of).stdout)
    later = pho("keys", "quota", *of, key.prefix, "5k/12h")
    none = pho("keys", "quota", *of, key.prefix, "none")

    assert made.stdout.startswith(key.prefix)
    assert "200,000,000 tokens in 7 days" in table
    assert "1,234,567" in table
    shown = ("quota", "quota_hours", "used")
    assert [row[name] for name in shown] == [200_000_000, 168.0, 1_234_567]
    assert [free[name] for name in shown] == [None, None, None]
    assert "Key 'team': 5,000 tokens in 12 hours." in later.stderr
    assert "Key 'team': no quota." in none.stderr
    assert "quota" not in keys("list").stdout


def test_a_quota_a_span_or_a_key_that_is_none_is_bad_usage(pho, keys, database, database_url):
    quotas = ("", "5", "0/7d", "5/7", "5G/7d", "-5/7d", "5M7d", "1e6/7d", "40h/7d")
    spans = ("", "30", "0d", "-1d", "1.5d", "30 d", "36501d", "never", "٣d")
    for option in [f"--quota={each}" for each in quotas] + [f"--expires={each}" for each in spans]:
        made = pho("keys", "create", "x", option, "--database-url", database_url)

        assert made.exit_code == 2, option
        rules = ("12h, 30d or 52w", *(["200M/7d"] if "quota" in option else []))
        assert any(rule in made.stderr for rule in rules)
    assert KeyStore(database).all() == []
    prefix = keys("create", "a").stdout[:10]
    for wrong in ("pho_", prefix[:-1], "\udcff"):
        result = keys("revoke", wrong)

        assert result.exit_code == 2
        assert "pho keys list" in result.stderr
    assert [key.revoked_at for key in KeyStore(database).all()] == [None]


def test_who_makes_a_key_is_told_of_jobs_that_it_does_not_see(keys, store):
    first = NewStage(kind=StageKind.CALIBRATE)
    store.submit(NewJob(spec=SPEC, name="n", stages=[first], trials=1, max_attempts=1))
    made = keys("create", "mine")
    prefix = made.stdout[:10]
    taken = keys("take-over", prefix)
    keys("revoke", prefix)

    assert f"`pho keys take-over {prefix}` gives them to it" in " ".join(made.stderr.split())
    assert "key 'mine' has got, with what they have found: 1." in taken.stderr
    assert "take-over" not in keys("create", "other").stderr
    assert keys("take-over", prefix).exit_code == 2


@pytest.fixture
def serve(pho, database_url):
    """`pho serve` in this process, which must refuse to start; signals are as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words):
        result = pho("serve", "--workers", 0, "--database-url", database_url, *words)
        assert isinstance(result.exception, SystemExit), result.exception
        return result

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_where_it_cannot_listen_is_bad_usage_and_named_with_the_way_out(serve):
    for host in ("no.such.host.invalid", "127.0.0.1:80", "x" * 300):
        result = serve("--host", host, "--port", 0)

        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = serve("--port", port)

    assert (result.exit_code, result.stdout) == (2, "")
    assert f"127.0.0.1 port {port}: Address already in use" in result.stderr
    assert "Give another --port" in result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", ""])  # noqa: S104 - must be refused
def test_others_without_keys(serve, database, host):
    """Where others can come in, nothing is served before there is a key that opens jobs."""
    first = serve("--host", host, "--port", 0)
    store = KeyStore(database)
    store.revoke(store.create("old", sees_all=True)[0].prefix)
    store.create("prometheus", sees_all=False, scrape_only=True)
    second = serve("--host", "::", "--port", 0)

    for result in (first, second):
        assert result.exit_code == 2
        assert "pho keys create" in result.stderr


BAD_SETTINGS = [
    ("PHO_PORT", "many"), ("PHO_PORT", "70000"), ("PHO_WORKERS", "-1"), ("PHO_WORKERS", "257"),
    ("PHO_HEARTBEAT_S", "0"), ("PHO_HEARTBEAT_S", "nan"), ("PHO_HEARTBEAT_S", "inf"),
    ("PHO_STALLED_AFTER_S", "soon"), ("PHO_STALLED_AFTER_S", "inf"),
    ("PHO_STOP_AFTER_S", "-1"), ("PHO_RETRY_AFTER_S", "-1"), ("PHO_RETRY_AFTER_S", "inf"),
    ("PHO_MAX_UNFINISHED_JOBS", "0"), ("PHO_MAX_BODY_BYTES", "10"),
]  # fmt: skip


def test_a_setting_that_breaks_its_rule_is_bad_usage_and_named(pho, monkeypatch):
    rules = [(variable, value, f"{variable}={value!r}") for variable, value in BAD_SETTINGS]
    for variable, value, says in [*rules, ("PHO_HEARTBEAT_S", "60", "PHO_STALLED_AFTER_S")]:
        with monkeypatch.context() as patched:
            patched.setenv(variable, value)
            result = pho("keys", "list", "--database-url", "postgresql://127.0.0.1:1/x")

        assert result.exit_code == 2
        assert says in result.stderr


def test_a_bad_database_is_told_without_its_password_so_is_a_data_folder_that_cannot_be(pho):
    serve = ("serve", "--workers", 0, "--port", 0, "--data-dir", "/dev/null")
    for verb in (("keys", "list"), serve):
        for url, says in (
            ("nonsense", "postgresql://"),
            ("postgresql://u:secret@127.0.0.1:1/x", "127.0.0.1"),
            ("postgresql://u:secret@127.0.0.1:port/x", ""),
            ("postgresql://u:secret@[/x", ""),
            ("", ""),
        ):
            result = pho(*verb, "--database-url", url)

            assert isinstance(result.exception, SystemExit), result.exception
            assert result.exit_code in (1, 2)
            assert says in result.stderr
            assert "secret" not in result.output
    result = pho("keys", "list", "--data-dir", "/proc/x")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert "/proc/x" in result.stderr
