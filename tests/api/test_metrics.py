"""What Prometheus reads, and what reads it: the dashboard and the alerts in docker/."""

import json
import re
import shlex
import shutil
import subprocess
import threading
import uuid
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from storage.database import Database
from storage.keys import NoSuchKey
from storage.records import DURATIONS_S, JobState, StageKind

MONITORING = Path(__file__).parents[2] / "docker" / "kubernetes" / "monitoring"


def samples(client, **headers):
    """All that is told, by name and the values of labels."""
    answer = client.get("/metrics", **headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def told(client, *names):
    return {key: value for key, value in samples(client).items() if value and key[0] in names}


def test_jobs_stages_and_workers_are_counted(client, submit, hand):
    nothing = samples(client)
    for state in (JobState.QUEUED, JobState.QUEUED, JobState.PAUSED, JobState.FAILED):
        hand.bring(submit()["id"], state)
    job = submit(islands=3)["id"]
    hand.calibrate(job)
    hand.take(job, StageKind.SEARCH, 1)
    gone = uuid.uuid4()
    for worker in (hand.worker_id, uuid.uuid4(), uuid.uuid4(), gone):
        hand.store.enter_worker(worker, name="w", device="cpu", kinds=list(StageKind))
    with hand.store.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '1 h'"
            " WHERE id = (SELECT number FROM pho.workers WHERE id = %s)",
            (gone,),
        )

    assert {("pho_jobs", state) for state in JobState} <= {*nothing}
    assert {("pho_stages", kind, "waiting") for kind in StageKind} <= {*nothing}
    assert told(client, "pho_jobs", "pho_stages", "pho_workers") == {
        ("pho_jobs", "queued"): 2, ("pho_jobs", "paused"): 1, ("pho_jobs", "failed"): 1,
        ("pho_jobs", "running"): 1, ("pho_stages", "calibrate", "waiting"): 2,
        ("pho_stages", "search", "waiting"): 2, ("pho_stages", "search", "running"): 1,
        ("pho_workers", "busy"): 1, ("pho_workers", "idle"): 2, ("pho_workers", "lost"): 1,
    }  # fmt: skip


def test_the_memory_of_gpus_is_told_of_workers_that_report_it(client, hand):
    for device, memory in (("cpu", None), ("cuda:0", (30, 80)), ("cuda:0", (50, 80))):
        worker = hand.worker_id if device == "cuda:0" else uuid.uuid4()
        hand.store.enter_worker(
            worker, name=f"host:{device}", device=device, kinds=[StageKind.SEARCH], memory=memory
        )

    assert told(client, "pho_gpu_memory_bytes") == {
        ("pho_gpu_memory_bytes", "cuda:0", "used", "host:cuda:0"): 50,
        ("pho_gpu_memory_bytes", "cuda:0", "free", "host:cuda:0"): 30,
    }


def test_attempts_are_counted_by_how_they_end_and_stay_when_their_job_is_deleted(
    client, submit, hand
):
    job = submit(islands=4)["id"]
    hand.calibrate(job)
    for number in range(4):
        hand.take(job, StageKind.SEARCH, number)
    lost = hand.take(job, StageKind.SEARCH, 0)  # once more: the worker that had it is dead
    hand.store.fail(lost, {"type": "E", "message": "m"}, retry=True)
    hand.store.hand_back(hand.take(job, StageKind.SEARCH, 1))
    late = hand.take(job, StageKind.SEARCH, 2)
    with hand.store.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE pho.stages SET begun_at = now() - interval '100 s', worked_s = 900"
            " WHERE id = %s", (late.stage.id,),
        )  # fmt: skip
    hand.store.complete(late, {})
    failed = hand.take(job, StageKind.SEARCH, 3)
    hand.store.fail(failed, {"type": "E", "message": "m"}, retry=False)
    names = ("pho_attempts_total", "pho_stage_seconds_count", "pho_stage_seconds_bucket")
    before = told(client, *names)
    client.delete(f"/v1/jobs/{job}")
    after = told(client, *names)
    buckets = [
        value for key, value in samples(client).items()
        if key[:2] == ("pho_stage_seconds_bucket", "search")
    ]  # fmt: skip
    seconds = samples(client)["pho_stage_seconds_sum", "search"]

    assert client.get(f"/v1/jobs/{job}").status_code == 404
    assert before == after
    assert {key[1:]: value for key, value in after.items() if key[0] == names[0]} == {
        ("calibrate", "done"): 1, ("search", "done"): 1, ("search", "failed"): 1,
        ("search", "retried"): 1, ("search", "lost"): 4, ("search", "handed_back"): 1,
    }  # fmt: skip
    assert buckets == [float(limit >= 1000) for limit in DURATIONS_S]
    assert 1000 <= seconds < 1060


def test_the_first_stage_that_waits_says_for_how_long(client, submit, hand):
    first, paused = submit()["id"], submit()["id"]
    submit()
    client.post(f"/v1/jobs/{paused}:pause")
    with hand.store.database.transaction() as connection:
        for job, seconds in ((first, 500), (paused, 5000)):
            connection.exec_driver_sql(
                "UPDATE procrastinate_events SET at = now() - make_interval(secs => %s)"
                " WHERE job_id = (SELECT queue_id FROM pho.stages WHERE job_id = %s)",
                (seconds, job),
            )
    waited = told(client, "pho_oldest_waiting_seconds")
    hand.take(first, StageKind.CALIBRATE)
    with hand.store.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE procrastinate_jobs SET status = 'doing'"
            " WHERE id = (SELECT queue_id FROM pho.stages WHERE job_id = %s)",
            (first,),
        )
    later = samples(client)["pho_oldest_waiting_seconds", "calibrate"]

    assert {*waited} == {("pho_oldest_waiting_seconds", "calibrate")}
    assert 500 <= waited["pho_oldest_waiting_seconds", "calibrate"] < 560
    assert later < 60


def test_requests_are_counted_by_route_and_never_by_path(client_of):
    client = client_of()
    for _ in range(3):
        client.get(f"/v1/jobs/{uuid.uuid4()}")
        client.get(f"/{uuid.uuid4()}")
        client.request(uuid.uuid4().hex.upper(), "/v1/jobs")
    client.get("/v1/jobs")
    found = told(client, "pho_http_requests_total", "pho_http_request_seconds_count")

    assert found == {
        ("pho_http_requests_total", "GET", "/v1/jobs/{job_id:job}", "4xx"): 3,
        ("pho_http_requests_total", "GET", "other", "4xx"): 3,
        ("pho_http_requests_total", "other", "/v1/jobs", "4xx"): 3,
        ("pho_http_requests_total", "GET", "/v1/jobs", "2xx"): 1,
        ("pho_http_request_seconds_count", "/v1/jobs/{job_id:job}"): 3,
        ("pho_http_request_seconds_count", "other"): 3,
        ("pho_http_request_seconds_count", "/v1/jobs"): 4,
    }


def test_who_waits_for_a_connection_is_counted(new_database):
    database = Database(new_database(), pool=1)
    with database.transaction():
        waiter = threading.Thread(target=database.check)
        waiter.start()
        while not database.waiting:
            pass
        pool = database.pool()
    waiter.join()

    assert pool == (1, 1)
    assert (database.pool(), database.waiting) == ((0, 1), 0)
    database.close()


def test_the_artifact_store_is_measured_by_what_is_in_it(client_of, settings):
    for name, size in (("bundles/a", 10), ("pruned/j/k/model", 200), ("store-id", 3)):
        file = Path(settings.artifacts) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * size)
    client = client_of()
    service = client.app.state.service
    service.stored = service.pruned.sizes()
    found = samples(client)
    stored = {key[1]: found[key] for key in found if key[0] == "pho_artifact_store_bytes"}

    assert stored == {"bundles": 10, "pruned": 200, "texts": 0, "other": 3}
    assert found[("pho_artifact_store_free_bytes",)] > 0


def test_a_key_that_scrapes_reads_the_metrics_and_nothing_else(client, keys, refusal, operations):
    key, secret = keys.create("prometheus", sees_all=False, scrape_only=True)
    headers = {"Authorization": f"Bearer {secret}"}
    for method, path in operations:
        if path != "/metrics":
            answer = client.request(method, path.format(uuid.uuid4()), headers=headers)
            if method != "HEAD":
                assert "--scrape-only" in refusal(answer, 403, "not_for_this_key")["detail"], path
    page = client.post("/login", data={"key": secret}, headers={"Sec-Fetch-Site": "same-origin"})
    with pytest.raises(NoSuchKey):
        keys.take_over(key.prefix)
    _, rotated = keys.rotate(key.prefix)

    assert (page.status_code, "set-cookie" in page.headers) == (403, False)
    assert "reads /metrics, and nothing else" in page.text
    assert client.get("/metrics", headers=headers).status_code == 401  # rotated
    headers = {"Authorization": f"Bearer {rotated}"}
    assert samples(client, headers=headers)
    assert client.get("/v1/jobs", headers=headers).status_code == 403


# What the files in docker/ ask for.
def expressions():
    """The expressions of the dashboard and of the alerts, by panel or alert."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: see extra dev")
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    return found | {rule["alert"]: rule["expr"] for rule in group["rules"]}


def test_the_dashboard_and_the_alerts_ask_for_metrics_of_the_service_with_labels_that_they_have(
    client, hand
):
    report = {"name": "w", "device": "cuda:0", "kinds": [StageKind.SEARCH], "memory": (1, 2)}
    hand.store.enter_worker(hand.worker_id, **report)
    service = client.app.state.service
    service.stored = service.pruned.sizes()  # which it measures itself a moment later
    labels = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for name, expression in expressions().items():
        selected = re.findall(r"\b((?:pho|process)_\w+)(?:\{([^}]*)\})?", expression)
        matched = {m: re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", given) for m, given in selected}

        assert selected or "up" in expression, name
        assert {*matched} <= {*labels}, name
        assert all({*used} <= labels[m] for m, used in matched.items()), name


def test_every_expression_is_promql_and_promtool_takes_the_alerts(tmp_path):
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed: see dev")
    for expression in expressions().values():
        parser.parse(expression.replace("$__rate_interval", "5m"))
    alerts = (MONITORING / "alerts.yaml").read_text()
    words = shlex.split(re.findall(r"^#   (sed .*) > rules.yaml$", alerts, re.MULTILINE)[0])
    rules = tmp_path / "rules.yaml"
    with rules.open("w") as out:
        subprocess.run(words, cwd=MONITORING, stdout=out, check=True)
    assert rules.read_text().startswith("groups:\n  - name: pho\n")
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    command = [promtool, "check", "rules", rules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
