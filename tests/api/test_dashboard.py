"""optuna-dashboard below the same host, and the workers."""

import json
import re
import uuid

import pytest

from pho_service.shown.parts import policy_hash
from storage.records import JobState, StageKind


def test_the_pages_are_where_their_links_look_for_them(client):
    for path, content_type in (
        ("/dashboard", "text/html"), ("/dashboard/studies/1", "text/html"),
        ("/api/meta", "application/json"), ("/api/studies", "application/json"),
    ):  # fmt: skip
        answer = client.get(path)

        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(content_type)
        assert client.head(path).status_code == 200
    page = client.get("/dashboard/studies/1", headers={"If-Modified-Since": "now"})
    assert '<a id="pho" href="/">' in page.text  # it leads back, without buttons that are refused
    assert 'button[aria-label="delete study"]' in page.text
    assert page.text.rstrip().endswith("</html>")
    assert "last-modified" not in page.headers
    script = re.search(r"<script>(.*?)</script>", page.text, flags=re.DOTALL)
    assert script is not None
    assert policy_hash(script[1]) in page.headers["content-security-policy"]


@pytest.mark.parametrize("encoding", [None, "gzip", "gzip;q=0"])
def test_files_come_in_any_encoding_or_none(client_of, encoding):
    client = client_of()
    del client.headers["accept-encoding"]
    headers = {} if encoding is None else {"Accept-Encoding": encoding}
    answer = client.get("/static/bundle.js", headers=headers)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/javascript")
    assert len(answer.content) > 1_000_000


def test_studies_are_seen_to_begin_and_to_go(client, submit, hand):
    before = client.get("/api/studies").json()["study_summaries"]
    job = submit()
    hand.record(job, 5)
    during = client.get("/api/studies").json()["study_summaries"]
    trials = client.get(f"/api/studies/{during[0]['study_id']}").json()["trials"]
    hand.bring(job["id"], JobState.CANCELLED)
    client.delete(f"/v1/jobs/{job['id']}")
    after = client.get("/api/studies").json()["study_summaries"]

    assert [study["study_name"] for study in during] == [job["name"]]
    assert before == after == []
    assert len(trials) == 5


def test_only_for_reading(client, submit, hand, refusal):
    """Nobody can change a study through the dashboard, nor with a GET that claims to be more."""
    job = submit()
    hand.record(job, 2)
    (study,) = client.get("/api/studies").json()["study_summaries"]
    for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        client.get(f"/api/studies/{study['study_id']}", headers={header: "DELETE"})
    body = json.dumps({"study_name": "mine", "directions": ["minimize"], "body": "x"})
    headers = {"Content-Type": "application/json"}
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"):
        for path in ("/api/studies", "/api/studies/1", "/api/studies/1/note", "/dashboard",
                     "/api/studies/1/rename", "/static/bundle.js", "/artifacts/1/x",
                     "/api/studies?_method=DELETE"):  # fmt: skip
            answer = client.request(method, path, content=body, headers=headers)

            refusal(answer, 405, "read_only")
            assert answer.headers["allow"] == "GET, HEAD"
    assert hand.studies() == [job["name"]]
    # And no path leads out of the dashboard's own files.
    for path in (
        "/static/%2e%2e/%2e%2e/app.py", "/static/..%2f..%2fapp.py", "/static//etc/passwd",
        "/static/%00", "/artifacts/..%2f..%2f..%2fetc/passwd",
    ):  # fmt: skip
        assert client.get(f"http://127.0.0.1:8000{path}").status_code in (400, 403, 404)


def test_workers_are_listed_as_long_as_they_report(client_of, hand):
    client = client_of(stalled_after_s=5.0)
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cpu", kinds=[StageKind.SEARCH])
    gone = uuid.uuid4()
    hand.store.enter_worker(gone, name="gone", device="cuda:0", kinds=list(StageKind))
    with hand.store.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '6 s'"
            " WHERE id = (SELECT number FROM pho.workers WHERE id = %s)",
            (gone,),
        )
    (worker,) = client.get("/v1/workers").json()["workers"]

    assert (worker["id"], worker["name"]) == (str(hand.worker_id), "host:7")
    assert (worker["device"], worker["stages"]) == ("cpu", ["search"])
    assert worker["job_id"] is worker["stage"] is None
