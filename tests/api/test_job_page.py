"""The page of a job: what it shows at each time, and what its forms do."""

import html
import logging
import re
import uuid
from types import SimpleNamespace

from pho_service.host.logs import about
from storage.records import REFERENCE_NUMBERS, StageKind
from workers.watch import MOST_LINES, StageLog

NOBODY = "00000000-0000-0000-0000-000000000000"


def source(client, job_id):
    answer = client.get(f"/jobs/{job_id}")
    assert answer.status_code == 200, answer.text[:500]
    return answer.text


def section(text, name):
    begins = re.search(rf'<(section|div|details)[^>]* id="{name}"', text)
    assert begins is not None, name
    rest, depth = text[begins.start() :], 0
    for tag in re.finditer(rf"<(/?){begins[1]}\b", rest):
        depth += -1 if tag[1] else 1
        if depth == 0:
            return words(rest[: tag.start()])
    raise AssertionError(f"{name} does not end")


def words(text):
    shown = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(shown).replace("\N{EN DASH}", "-").split())


def test_a_calibration_shows_what_it_is_at(client, hand, submit):
    job_id = submit()["id"]
    claim = hand.take(job_id, StageKind.CALIBRATE)
    before = client.get(f"/v1/jobs/{job_id}").json()["progress"]["step"]
    hand.store.watch(claim, {"title": "Calibrating the dense model", "done": 3, "steps": 16})
    text = source(client, job_id)
    during = client.get(f"/v1/jobs/{job_id}").json()["progress"]["step"]
    hand.store.complete(claim, {})

    assert before is None
    assert "Calibrate running 3 of 16 Calibrating the dense model, " in section(text, "stages")
    assert "No trial has been rated yet." in section(text, "result")
    assert during == {"title": "Calibrating the dense model", "done": 3, "steps": 16}
    assert client.get(f"/v1/jobs/{job_id}").json()["progress"]["step"] is None
    assert "Calibrate done " in section(source(client, job_id), "stages")


def test_a_search_is_drawn_as_it_goes(client, hand, submit):
    job = submit(trials=8)
    hand.calibrate(job["id"])
    empty = source(client, job["id"])
    hand.record(job, 8, failed=3)
    drawn = source(client, job["id"])
    hand.to_confirm(job["id"], 2, 5, REFERENCE_NUMBERS)  # which is not a trial
    hand.measure(job["id"], 5, 21.5, 1.0)
    finalists = section(source(client, job["id"]), "finalists")

    assert 'id="search"' not in empty
    assert "7 rated trials. The best value, 0, is that of trial" in section(drawn, "search")
    assert len(re.findall(r'class="dot"[^>]*><title>found, trial ', drawn)) == 6
    assert "found (best so far) 21.50 0.5000 5" in finalists


def test_the_result_is_beside_dense_and_baselines(client, hand, submit):
    job_id = submit()["id"]
    layers = [["model.layers.0", "mlp.up_proj", 0.1, 0.4567]]
    found = {"dense": 20.0, "pruned": 25.0, "wanda": 40.0}
    hand.succeed(job_id, "Take care.", layers=layers, perplexities=found)
    text = source(client, job_id)

    assert section(text, "result").startswith(
        "Result perplexity 25.00 lower is better above dense 25.0% below Wanda 37.5% "
        "dense 20.00 Wanda 40.00 pruned 25.00 "
    )
    assert (
        "All figures in a table Perplexity: lower is better model perplexity against dense "
        "dense 20.00 pruned 25.00 +25.0% Wanda 40.00 +100.0% RIA none"
    ) in section(text, "result")
    assert "Take care." in section(text, "result")
    assert "model.layers.0.mlp.up_proj: 0.1000" in section(text, "layers")
    assert f'href="/v1/jobs/{job_id}/best"' in text


def test_the_page_extends_a_search_and_says_why_it_failed(client, hand, submit):
    job_id = submit(trials=40)["id"]
    path = f"/jobs/{job_id}/extend"
    done = client.post(path, data={"trials": "20"}, follow_redirects=False)
    wrong = [client.post(path, data={"trials": typed}) for typed in ("", "many", "0", "99999999")]
    hand.fail(job_id)
    text = source(client, job_id)
    late = client.post(path, data={"trials": "20"})

    assert (done.status_code, done.headers["location"]) == (303, f"/jobs/{job_id}")
    assert hand.store.page()[0].trials == 60
    assert [answer.status_code for answer in wrong] == [422] * 4
    assert all('role="alert"' in answer.text for answer in wrong)
    assert late.status_code == 409
    assert "A job that is failed cannot be extended." in words(late.text)
    assert "Why it failed The job failed in calibrate: org/name is not there." in words(text)
    assert f'href="/new?job={job_id}"' in text
    assert "failed (ModelError)" in section(text, "happened")


def test_why_a_job_failed_stands_once_on_its_page_and_other_lines_of_its_log_stay(
    client, hand, submit
):
    job_id = submit()["id"]
    claim = hand.take(job_id, StageKind.CALIBRATE)
    lines = ["reading org/name", f"calibrate of job {job_id} failed: org/name is not there."]
    hand.store.log(claim, lines, worker="gpu-1:7")
    error = {"type": "ModelError", "message": "org/name is not there."}
    hand.store.fail(claim, error, retry=False)
    text = source(client, job_id)

    assert text.count("org/name is not there.") == 1
    assert "reading org/name" in text


def test_the_page_measures_on_other_models(client, hand, submit):
    job_id = submit()["id"]
    hand.succeed(job_id)
    path = f"/jobs/{job_id}/transfer"
    none = client.post(path, data={"models": " \n"})
    done = client.post(path, data={"models": "org/a\r\norg/b\r\n"}, follow_redirects=False)
    newest = hand.store.page()[0]

    assert none.status_code == 422
    assert done.headers["location"] == f"/jobs/{newest.id}"
    assert newest.spec["models"] == ["org/a", "org/b"]
    assert "Measure on other models waiting 0 of 2" in section(
        source(client, str(newest.id)), "stages"
    )
    assert client.get("/new", params={"job": str(newest.id)}).status_code == 409


def test_the_page_has_the_last_lines_of_logs(client, hand, submit):
    job_id = submit()["id"]
    claim = hand.take(job_id, StageKind.CALIBRATE)
    hand.store.log(claim, ["03:00:00 INFO begins <b>"], worker="host:1")
    hand.store.log(claim, ["03:00:09 INFO done"], worker="host:1")
    text = source(client, job_id)
    happened = hand.store.history(uuid.UUID(job_id), limit=50)
    hand.store.log(claim, [f"line {number}" for number in range(1000)], worker="host:1")
    last = section(source(client, job_id), "logs")

    assert section(text, "logs") == (
        "Logs Calibrate, host:1, 2 lines 03:00:00 INFO begins <b> 03:00:09 INFO done"
    )
    assert "begins &lt;b&gt;" in text
    assert {event.kind for event in happened} <= {"state", "stage"}
    assert len(hand.store.events(uuid.UUID(job_id))) == len(happened)
    assert last.startswith("Logs Calibrate, host:1, 300 lines line 700 ")
    assert "line 699 " not in last
    hand.store.ask(uuid.UUID(job_id), "cancel")
    hand.store.hand_back(claim)
    client.delete(f"/v1/jobs/{job_id}")
    hand.store.log(claim, ["03:00:00 INFO too late"], worker="host:1")
    assert hand.store.logs(uuid.UUID(job_id), limit=5) == []


def _hide(message):
    return message.replace("/x", "[x]")


def test_logging(client, hand, submit, caplog):
    """Lines about a stage are kept, without secrets and folders; of too many the first."""
    job_id = submit()["id"]
    claim = hand.take(job_id, StageKind.CALIBRATE)
    logger = logging.getLogger("pho_service.test")
    caplog.set_level(logging.INFO, "pho_service.test")
    with about(job=job_id), StageLog(hand.store, claim, "host:1", _hide) as log:
        logger.info("/x begins, password=secret", extra={"steps": 3, "model": "/srv/models/x"})
        log.store()
        with about(job=NOBODY):
            logger.info("of another job")
        for number in range(MOST_LINES + 10):
            logger.info("line %d of job %s", number, job_id)
    logger.info("afterwards")
    first, rest = (event.data["lines"] for event in hand.store.logs(uuid.UUID(job_id), limit=5))

    assert [line[9:] for line in first] == ["INFO [x] begins, password=*** steps=3"]
    assert [line[9:] for line in rest[:2]] == ["INFO line 0", "INFO line 1"]
    assert len(rest) == MOST_LINES
    assert rest[-1].endswith("The worker's own log has the rest.")
    assert "Calibrate, host:1, 201 lines" in section(source(client, job_id), "logs")


def test_a_short_id_leads_to_its_job_or_to_a_page_with_all_that_it_fits(
    client, submit, monkeypatch
):
    twins = [f"abcdef0{digit}-1111-4222-8333-444444444444" for digit in (1, 2)]
    ids = iter(map(uuid.UUID, twins))
    with monkeypatch.context() as patched:
        patched.setattr("storage.jobs.uuid", SimpleNamespace(uuid4=lambda: next(ids)))
        jobs = [submit(), submit()]
    alone = client.get("/jobs/ABCDEF01-11", follow_redirects=False)
    several = client.get("/jobs/abcdef")

    assert (alone.status_code, alone.headers["location"]) == (302, f"/jobs/{twins[0]}")
    assert several.status_code == 300
    for job in jobs:
        assert f'<a href="/jobs/{job["id"]}">{job["name"]}</a>' in several.text
    for unknown in ("0000-0000-0000", "what is this"):
        answer = client.get(f"/jobs/{unknown}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "nor one that begins so" in answer.text


def test_buttons_lead_back_to_the_page(client, hand, submit):
    job_id = submit()["id"]
    paused = client.post(f"/jobs/{job_id}/pause", data={"back": "job"}, follow_redirects=False)
    hand.store.ask(hand.store.page()[0].id, "cancel")
    refused = client.post(f"/jobs/{job_id}/resume", data={"back": "job"})

    assert paused.headers["location"] == f"/jobs/{job_id}"
    assert refused.status_code == 409
    assert section(refused.text, "head").endswith("cancelled")
    assert client.get(f"/jobs/{NOBODY}").status_code == 404


def test_jobs_are_compared_side_by_side(client, hand, submit):
    first, second = submit(trials=8, name="first"), submit(trials=8, name="second", seed=3)
    for job in (first, second):
        hand.calibrate(job["id"])
        hand.record(job, 8)
    hand.succeed(first["id"])
    chosen = {"job": [first["id"], second["id"]]}
    answer = client.get("/compare", params=chosen)
    marked = re.findall(r'<tr class="differs">(.*?)</tr>', answer.text, flags=re.DOTALL)

    assert answer.status_code == 200
    assert answer.text.count("<polyline") == 2
    assert "State succeeded running" in words(answer.text)
    assert [words(row) for row in marked] == ["name first second", "seed 0 3"]
    different = answer.text[answer.text.index("Settings that differ") :].partition("<details")[0]
    assert "seed 0 3" in words(different)
    assert "pattern 0.5 0.5" not in words(different)
    assert "pattern 0.5 0.5" in words(answer.text)
    assert f'value="{first["id"]}" form="chosen"' in client.get("/").text
    for count in (0, 1, 9):
        refused = client.get("/compare", params={"job": [str(uuid.uuid4()) for _ in range(count)]})
        assert refused.status_code == 422
        assert f"names {count} jobs, but 2 to 8 are shown side by side" in words(refused.text)
    assert client.get("/compare", params={"job": [NOBODY, str(uuid.uuid4())]}).status_code == 404
