"""The pages for people: what they show, what their forms do, and whom they obey."""

import base64
import html
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import pytest

from pho_service.api import job_list
from pho_service.shown import parts
from pho_service.shown.parts import policy_hash
from storage.records import JobState, StageKind

NOBODY = "00000000-0000-0000-0000-000000000000"
SCRIPTS = Path(job_list.__file__).with_name("templates")
STYLE = Path(parts.__file__).with_name("parts.css")
TYPED = {"model": "org/name", "pattern": "0.5"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Page(HTMLParser):
    """A page taken apart: elements with attributes and texts, and all of its text in a line."""

    def __init__(self, answer):
        super().__init__()
        assert answer.headers["content-type"] == "text/html; charset=utf-8", answer.text
        self.tags = []
        self._open = []
        self.feed(answer.text)
        self.close()
        self.text = _line(self.tags[0][2])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in ("meta", "input", "link", "br", "col"):
            self._open.append(len(self.tags) - 1)

    def handle_endtag(self, tag):
        assert self.tags[self._open.pop()][0] == tag

    def handle_data(self, data):
        if self._open and self.tags[self._open[-1]][0] not in ("style", "script"):
            for number in self._open:
                self.tags[number][2].append(data)

    def of(self, tag):
        return [attributes for name, attributes, _ in self.tags if name == tag]

    def texts(self, tag):
        return [_line(text) for name, _, text in self.tags if name == tag]

    def at(self, element):
        ((attributes, text),) = [(a, _line(t)) for _, a, t in self.tags if a.get("id") == element]
        return attributes, text

    @property
    def links(self):
        return {_line(t): a["href"] for name, a, t in self.tags if name == "a"}


def _line(texts):
    return " ".join("".join(texts).split())


def basic(secret):
    return {"Authorization": f"Basic {base64.b64encode(f'me:{secret}'.encode()).decode()}"}


def listed(page):
    return [tr["id"].removeprefix("job-") for tr in page.of("tr") if "id" in tr]


def row(page, job):
    """The text of a job in the list, with spaces between its cells."""
    begin = next(i for i, (_, a, _) in enumerate(page.tags) if a.get("id") == f"job-{job['id']}")
    cells = itertools.takewhile(lambda tag: tag[0] not in ("tr", "h2"), page.tags[begin + 1 :])
    return " ".join(text for n, _, t in cells if n in ("td", "th") and (text := _line(t)))


def many(client, verb, jobs, **typed):
    """Ask something of several jobs as the list's form does; the answer is not followed."""
    body = urlencode([("verb", verb), *typed.items(), *(("job", job) for job in jobs)])
    return client.post("/jobs", content=body, headers=FORM, follow_redirects=False)


def send(client, path="/new", *, headers=None, **typed):
    """Send a form as a browser does; the answer is not followed."""
    fields = {**TYPED, **typed} if path == "/new" else {"view": "", **typed}
    return client.post(path, data=fields, headers=headers, follow_redirects=False)


def test_without_jobs_and_workers_the_list_says_how_to_get_them(client):
    page = Page(client.get("/"))

    assert "There is no job yet. Submit one, or use pho submit." in page.text
    assert "No worker is connected. Start one with pho worker" in page.text
    assert page.links["Submit one"] == "/new"
    assert not [m for m in page.of("meta") if m.get("http-equiv") == "refresh"]
    assert client.head("/").status_code == client.head("/new").status_code == 200


def test_no_script_but_ours_could_run_and_forms_lead_here_alone(client):
    for path, script in (("/", "live.js"), ("/new", "form.js"), ("/jobs/nothing", None)):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        runs = ""
        if script is not None:
            ours = (SCRIPTS / script).read_text().removesuffix("\n")
            runs = f"script-src {policy_hash(ours)}; connect-src 'self'; "

        assert answer.text.count("<script") == bool(runs)
        assert "'; " + runs + "img-src" in policy
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "form-action 'self'; frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store"


def test_a_job_has_a_row_and_a_page_in_each_state(client, submit, hand):
    made = {state: submit(name=f"mine {state}", preset="best") for state in JobState}
    for state, job in made.items():
        hand.bring(job["id"], state)
    page = Page(client.get("/"))
    buttons = page.texts("button")

    assert len(buttons) == len({*buttons})
    assert listed(page) == [job["id"] for job in made.values()][::-1]
    for state, job in made.items():
        text = row(page, job)
        begins = f"mine {state} {job['id'][:8]}"
        assert page.links[begins] == f"/jobs/{job['id']}"
        assert f"{begins} org/name 0.5 best {state}" in text
        assert ("running, calibrate" in text) == (state is JobState.RUNNING)
        (box,) = [i for i in page.of("input") if i.get("value") == job["id"]]
        assert (box["type"], box["name"], box["form"]) == ("checkbox", "job", "chosen")
        assert f"Choose {job['name']}" in page.texts("label")
        answer = client.get(f"/jobs/{job['id']}")
        moves = not state.is_over and state is not JobState.PAUSED
        assert Page(answer).at("head")[1].startswith(f"mine {state} {job['id'][:8]} {state}")
        assert (" data-moves" in answer.text) == (not state.is_over)
        assert ('<noscript><meta http-equiv="refresh"' in answer.text) == moves
    assert "org/name is not there." in row(page, made[JobState.FAILED])


def test_a_job_that_works_is_drawn_with_a_bar(client, submit, hand):
    job = submit(trials=40, name="mine")
    hand.calibrate(job["id"])
    claim = hand.take(job["id"], StageKind.SEARCH)
    hand.store.progress(claim, done=10, elapsed_s=50.0, best_value=0.125)
    hand.record(job, 10, failed=3)
    page = Page(client.get("/"))
    (bar,) = page.of("progress")
    (line,) = page.of("polyline")
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]

    assert "running, search 10 of 40" in row(page, job)
    assert (bar["value"], bar["max"]) == ("10", "40")
    assert points[0] == (0.0, 0.0)  # the values rise: the first stays the best
    assert points[-1][0] == pytest.approx(80 * 9 / 39, abs=0.01)
    assert {y for _, y in points} == {0.0}


def test_a_row_tells_what_was_asked_its_stage_and_what_was_found_beside_the_dense_model_and_ria(
    client, submit, hand
):
    calibrated, measured, over = submit(), submit(), submit()
    more = submit(more_models=["org/other"], pattern="2:4")
    claim = hand.take(calibrated["id"], StageKind.CALIBRATE)
    hand.store.watch(claim, {"title": "Calibrating the dense model", "done": 3, "steps": 16})
    hand.to_confirm(measured["id"], 1, 2, 3)
    hand.measure(measured["id"], 2, 20.0, 4.0)
    hand.take(measured["id"], StageKind.PERPLEXITY, 3)
    found = {"dense": 13.8, "pruned": 17.25, "wanda": 30.0, "ria": 23.0}
    hand.succeed(over["id"], perplexities=found)
    transfer = client.post(f"/v1/jobs/{over['id']}:transfer", json={"models": ["a", "b"]}).json()
    page = Page(client.get("/"))

    assert "running, calibrate 3 of 16" in row(page, calibrated)
    assert "org/name +1 2:4 best" in row(page, more)
    assert "running, perplexity 1 of 3" in row(page, measured)
    assert "a +1 0.5 transfer queued" in row(page, transfer)
    assert "succeeded 17.25 chosen on this text 13.80 +25.0% 25.0%" in row(page, over)
    assert len(page.of("progress")) == 2


def test_what_users_have_named_is_text(client, submit, hand):
    hostile = "<img src=x onerror=alert(1)>\"'"
    job = submit(name=hostile)
    hand.fail(job["id"], message=hostile)
    hand.store.enter_worker(hand.worker_id, name=hostile, device=hostile, kinds=[*StageKind])
    answer = client.get("/", params={"name": hostile, "pattern": hostile, "model": hostile})
    Page(answer)  # its elements are closed

    assert html.unescape(answer.text).count(hostile) >= 8
    assert "<img" not in answer.text


def test_pages(client, submit, monkeypatch):
    """Pages give every job once, newest first or sorted, keep the filters, and lead back."""
    monkeypatch.setattr(job_list, "PAGE_SIZE", 2)
    jobs = [submit(name=f"job {letter}")["id"] for letter in "bdaec"]
    submit(name="other")
    found = {}
    for query, older, newest in (
        ("?name=job", "Older jobs", "Newest jobs"),
        ("?name=job&sort=name", "Next page", "First page"),
    ):
        seen, path, pages = [], f"/{query}", 0
        while path:
            page = Page(client.get(path))
            pages += 1
            seen += listed(page)
            assert "5 jobs with name or id job." in page.text
            path = page.links.get(older, "")
        found[query] = seen
        assert pages == 3
        assert page.links[newest] == f"/{query}"

    assert found["?name=job"] == jobs[::-1]
    assert found["?name=job&sort=name"] == [jobs["bdaec".index(letter)] for letter in "abcde"]


def test_links_with_counts_filter_the_list(client, submit, hand):
    first = submit(model="org/a", pattern="0.5")
    second = submit(model="org/a", pattern="2:4", name="Ünï")
    third = submit(model="org/b", pattern="2:4")
    hand.bring(third["id"], JobState.PAUSING)
    page = Page(client.get("/"))
    running = Page(client.get(page.links["running"]))
    of_a = Page(client.get(page.links["org/a"]))
    both = Page(client.get(of_a.links["2:4"]))
    searched = Page(client.get("/", params={"name": "ünï", "sort": "name"}))
    nothing = Page(client.get("/", params={"name": "x", "model": "org/a", "state": "paused"}))
    (here,) = [a for a in running.of("a") if a.get("aria-current") == "true"]

    assert "State all 3 queued 2 running 1 paused 0 succeeded 0 failed 0" in page.text
    assert "Model org/a 2 org/b 1 Pattern 2:4 2 0.5 1" in page.text
    assert listed(running) == [third["id"]]
    assert running.links["running"] == here["href"]
    assert listed(of_a) == [second["id"], first["id"]]
    assert "Model org/a 2 org/b 1 Pattern 0.5 1 2:4 1" in of_a.text
    assert "1 job with model org/a and pattern 2:4." in both.text
    assert listed(both) == listed(searched) == [second["id"]]
    assert both.links["org/a"] == "/?pattern=2%3A4"
    assert both.links["Show all jobs"] == "/"
    assert searched.at("name")[0]["value"] == "ünï"
    assert listed(Page(client.get("/", params={"name": third["id"][:6]}))) == [third["id"]]
    assert "No job has state paused, model org/a and name or id x." in nothing.text
    assert "Model org/a 0 Name or id" in nothing.text
    assert nothing.links["Remove model org/a"] == "/?state=paused&name=x"
    assert nothing.links["Remove name or id x"] == "/?state=paused&model=org%2Fa"


def test_a_press_on_the_head_of_a_column_sorts_by_it(client, submit):
    jobs = [submit(name=letter)["id"] for letter in "bca"]
    page = Page(client.get("/"))
    up = Page(client.get(page.links["Job"]))
    down = Page(client.get(up.links["Job"]))

    def order(of):
        return {_line(t): a["aria-sort"] for n, a, t in of.tags if n == "th" and "aria-sort" in a}

    assert order(page) == {"Submitted": "descending"}
    assert (order(up), order(down)) == ({"Job": "ascending"}, {"Job": "descending"})
    assert listed(up) == [jobs[2], jobs[0], jobs[1]]
    assert listed(down) == listed(up)[::-1]
    assert up.at("sort")[1].startswith("newest first oldest first name")
    assert [o["value"] for o in up.of("option") if "selected" in o] == ["name"]
    assert all(th["scope"] in ("col", "row") for th in page.of("th"))


def test_the_list_refreshes_until_stopped(client, submit, hand):
    job = submit()["id"]
    on = Page(client.get("/"))
    off = Page(client.get(on.links["Stop refreshing"]))
    again = Page(client.get(off.links["Go on refreshing"]))
    hand.bring(job, JobState.PAUSED)
    rest = Page(client.get("/"))

    def refreshes(page):
        without_scripts = any(m.get("http-equiv") == "refresh" for m in page.of("meta"))
        return without_scripts, page.at("now")[0].get("data-moves")

    assert [refreshes(page) for page in (on, off, again, rest)] == [
        (True, "3"), (False, None), (True, "3"), (False, "15"),
    ]  # fmt: skip
    assert off.links["failed"] == "/?state=failed&refresh=off"
    assert {i["value"] for i in off.of("input") if i.get("name") == "view"} == {"?refresh=off"}


def test_a_list_shows_what_workers_do(client, submit, hand):
    job = submit()
    before = Page(client.get("/"))
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cuda:0", kinds=[*StageKind])
    idle = Page(client.get("/"))
    hand.take(job["id"], StageKind.CALIBRATE)
    busy = Page(client.get("/"))

    assert "No worker is connected, so jobs wait. Start one with pho worker." in before.text
    assert "so jobs wait" not in idle.text
    assert re.search(r"host:7 cuda:0 nothing \d s ago", _spaced(idle))
    assert f"calibrate of {job['name']}" in _spaced(busy)


def _spaced(page):
    return " ".join(t for n, _, texts in page.tags if n in ("td", "th") for t in [_line(texts)])


def test_a_button_asks_it_of_all_jobs_that_are_chosen_and_leads_to_our_list_whatever_is_said(
    client, submit
):
    jobs = [submit()["id"] for _ in range(3)]
    answer = many(client, "pause", jobs[:2], view="?state=queued&sort=name")
    again = many(client, "resume", jobs[:1])

    assert answer.status_code == again.status_code == 303
    assert answer.headers["location"] == "/?state=queued&sort=name"
    assert [client.get(f"/v1/jobs/{job}").json()["state"] for job in jobs] == [
        "queued", "paused", "queued",
    ]  # fmt: skip
    for view in ("//evil.example", "?\r\nX: y", "?state=queued&next=//evil.example"):
        answer = send(client, f"/jobs/{jobs[0]}/pause", view=view)
        location = answer.headers["location"]
        assert re.fullmatch(rf"/(\?state=queued)?#job-{jobs[0]}", location), view


def test_what_cannot_be_done_or_is_too_late_is_told_by_name(client, submit, hand):
    done, queued = submit(name="done"), submit()
    hand.bring(done["id"], JobState.SUCCEEDED)
    late = send(client, f"/jobs/{done['id']}/cancel")
    gone = send(client, f"/jobs/{NOBODY}/cancel")
    (alert,) = [a for a in Page(late).of("div") if a.get("role") == "alert"]
    answer = many(client, "cancel", [done["id"], NOBODY, queued["id"]])
    page = Page(answer)

    assert answer.status_code == 409
    assert "1 of 3 jobs were cancelled." in page.text
    assert f"{done['name']}: a job that is succeeded cannot be cancelled." in page.text
    assert f"{NOBODY}: this job no longer exists." in page.text
    assert client.get(f"/v1/jobs/{queued['id']}").json()["state"] == "cancelled"
    assert (late.status_code, gone.status_code) == (409, 404)
    assert "A job that is succeeded cannot be cancelled." in Page(late).text
    assert "This job no longer exists." in Page(gone).text
    assert (alert["autofocus"], alert["tabindex"]) == ("", "-1")
    assert done["id"] in listed(Page(late))


def test_many_are_deleted_if_asked_twice(client, submit, hand):
    over, paused, queued = submit(name="over"), submit(name="rests"), submit(name="waits")
    hand.record(over, 2)
    hand.bring(over["id"], JobState.FAILED)
    hand.bring(paused["id"], JobState.PAUSED)
    asked = Page(many(client, "delete", [over["id"], paused["id"], queued["id"]], view="?name=a"))
    before = len(hand.store.page())
    body = urlencode([(i["name"], i["value"]) for i in asked.of("input")])
    answer = client.post("/jobs", content=body, headers=FORM, follow_redirects=False)

    assert asked.texts("h1") == ["Delete 2 jobs?"]
    assert f"{over['name']}, failed {paused['name']}, paused" in asked.text
    assert f"Cancel them first: {queued['name']}, queued" in asked.text
    assert asked.links["Keep them"] == "/?name=a"
    assert before == 3
    assert answer.headers["location"] == "/?name=a"
    assert [str(job.id) for job in hand.store.page()] == [queued["id"]]
    assert hand.studies() == []


def test_what_is_no_choice_of_jobs_changes_nothing_and_a_page_says_why(client):
    for verb, chosen, status, told in (
        ("pause", [], 422, "No job is chosen. Tick the box"),
        ("delete", [], 422, "No job is chosen."),
        ("delete", [NOBODY], 200, "None of the chosen jobs still exists."),
        ("explode", [NOBODY], 422, "verb='explode' must be one of pause, resume, cancel, delete."),
        ("pause", ["x"], 422, "job='x' is not a job's id."),
        ("pause", [f"{n:032x}" for n in range(201)], 422, "201 jobs are chosen, but 200 are"),
    ):
        answer = many(client, verb, chosen)

        assert answer.status_code == status
        assert told in Page(answer).text


def test_chosen_before(client, submit, monkeypatch):
    """A job that is to be compared stays chosen, also where the list does not show it."""
    monkeypatch.setattr(job_list, "PAGE_SIZE", 1)
    older, newer = submit(), submit()
    here = Page(client.get(f"/?compare={newer['id']}"))
    elsewhere = Page(client.get(f"/?compare={older['id']}"))

    for page, job in ((here, newer), (elsewhere, older)):
        assert [i["value"] for i in page.of("input") if "checked" in i] == [job["id"]]
    assert elsewhere.at("chosen")[1].endswith(older["name"])
    assert client.get("/?compare=nonsense").status_code == 200
    assert client.get("/jobs?state=failed", follow_redirects=False).headers["location"] == (
        "/?state=failed"
    )


def test_a_key_sees_its_own_jobs_alone(client, keys, hand):
    mine, other = (basic(keys.create(name, sees_all=False)[1]) for name in ("mine", "other"))
    jobs = [send(client, headers=h).headers["location"][6:] for h in (mine, other)]
    for job in jobs:
        hand.record(client.get(f"/v1/jobs/{job}", headers=[mine, other][jobs.index(job)]).json(), 1)
    page = Page(client.get("/", headers=mine))
    changed = send(client, f"/jobs/{jobs[1]}/cancel", headers=mine)
    deletion = client.get(f"/jobs/{jobs[1]}/delete", headers=mine)

    assert listed(page) == [jobs[0]]
    assert not [href for href in page.links.values() if href.startswith("/dashboard")]
    assert (changed.status_code, deletion.status_code) == (404, 404)
    assert {job.state for job in hand.store.page()} == {JobState.QUEUED}


def test_a_deletion_is_asked_once_more(client, submit, hand):
    job, works = submit(name="mine"), submit()["id"]
    hand.bring(job["id"], JobState.CANCELLED)
    hand.bring(works, JobState.RUNNING)
    asked = Page(client.get(f"/jobs/{job['id']}/delete?state=cancelled"))
    (form,) = asked.of("form")
    answer = send(client, form["action"], view=asked.of("input")[0]["value"])
    first = Page(client.get(f"/jobs/{works}/delete"))
    refused = send(client, f"/jobs/{works}/delete")

    assert f"Delete {job['name']}?" in asked.text
    assert asked.links["Keep it"] == f"/?state=cancelled#job-{job['id']}"
    assert answer.headers["location"] == "/?state=cancelled"
    assert [str(each.id) for each in hand.store.page()] == [works]
    assert "cancel it first." in first.text
    assert not first.of("form")
    assert refused.status_code == 409
    assert "A job that is running cannot be deleted. Cancel it first." in Page(refused).text


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:3000"},
    {"Sec-Fetch-Site": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "http://localhost:8000"},
    {"Origin": "null"},
    {"Origin": ""},
]


@pytest.mark.parametrize("by", ["nothing", "password", "login"])
def test_foreign_form(client, keys, hand, by):
    """A form of another page changes nothing, also with the browser's key; a program does."""
    job = send(client).headers["location"].removeprefix("/jobs/")
    before, api = hand.store.page(), f"/v1/jobs/{job}:cancel"
    secret = "" if by == "nothing" else keys.create("k", sees_all=True)[1]
    mine = basic(secret) if by == "password" else {}
    if by == "login":
        client.post("/login", data={"key": secret})
    for headers in FOREIGN:
        for path in ("/new", "/new/check", f"/jobs/{job}/cancel", f"/jobs/{job}/delete", "/jobs"):
            answer = send(client, path, headers={**mine, **headers}, verb="cancel", job=job)

            assert answer.status_code == 403, headers
            assert "A page of another site has sent this." in Page(answer).text
        for path in ("/login", "/logout") if secret else ():
            answer = send(client, path, headers={**mine, **headers}, key=secret)

            assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
        if secret:
            assert client.post(api, headers={**mine, **headers}).json()["code"] == "other_site"
    assert hand.store.page() == before
    if secret:
        bearer = {"Authorization": f"Bearer {secret}"}
        assert client.post(api, headers={**bearer, **FOREIGN[0]}).status_code == 202


def test_our_own_forms_are_taken_and_programs_are(client, keys):
    mine = basic(keys.create("k", sees_all=False)[1])
    for headers in (
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "https://127.0.0.1:8000"},
    ):
        assert send(client, headers={**mine, **headers}).status_code == 303, headers


def test_every_error_of_a_page_is_a_page(client, client_of, monkeypatch):
    small = client_of(max_body_bytes=1024)
    large = [b"more=" + b"x" * 2000, (b"more=" + b"x" * 1000 for _ in range(2))]
    json, unread = {"Content-Type": "application/json"}, "The form cannot be read."
    for asked, method, path, kind, body, status, told in (
        (client, "GET", "/?state=odd", json, b"", 422, "state: must be one of queued,"),
        (client, "GET", "/?page_token=odd", json, b"", 422, "page_token: is not one of our tokens"),
        (client, "GET", f"/jobs/{NOBODY}/delete", json, b"", 404, "No job has this id."),
        (client, "POST", f"/jobs/{NOBODY}/explode", FORM, b"", 422, "verb: 'explode' should be"),
        (client, "POST", "/new", json, b"", 415, "This takes a form"),
        (client, "POST", "/", json, b"", 405, "Method Not Allowed"),
        (client, "POST", "/new", FORM, b"model=%ff&pattern=\xff", 422, unread),
        (client, "POST", "/new", FORM, b"&".join([b"a=1"] * 300), 422, unread),
        *((small, "POST", "/new", FORM, body, 413, "larger than 1024 bytes") for body in large),
    ):
        answer = asked.request(method, path, content=body, headers=kind)

        assert answer.status_code == status
        assert told in Page(answer).text
    monkeypatch.setattr(job_list, "rows", None)
    send(client)
    failed = client.get("/")
    assert failed.status_code == 500
    assert "The server failed; its log says why." in Page(failed).text


def test_texts_stand_out_4_5_times_from_what_they_stand_on_and_edges_3_times():
    css = STYLE.read_text()
    blocks = re.findall(r":root {(.*?)}", css, re.DOTALL)
    schemes = [dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in blocks]
    grounds = ("page", "sheet", "marked")
    pairs = [(text, ground) for text in ("text", "quiet", "link", "wrong") for ground in grounds]
    pairs += [("text", "wrong-sheet"), ("link", "wrong-sheet"), ("on-button", "button")]
    edges = [(edge, ground) for edge in ("edge", "good") for ground in grounds]

    assert len(schemes) == 2
    for colours in schemes:
        for ink, ground in pairs + edges:
            least = 4.5 if (ink, ground) in pairs else 3.0
            assert contrast(colours[ink], colours[ground]) >= least, (ink, ground)


def contrast(first, second):

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
