"""The pages for people: what they show, what their forms do, and whom they obey."""

import base64
import html
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from fastapi.testclient import TestClient

from pho_service.api import job_list
from pho_service.shown import parts
from pho_service.shown.parts import policy_hash
from storage.claims import Found
from storage.keys import KeyStore
from storage.records import JobState, StageKind

Submit = Callable[..., dict[str, Any]]

NOBODY = "00000000-0000-0000-0000-000000000000"
SCRIPTS = Path(job_list.__file__).with_name("templates")
STYLE = Path(parts.__file__).with_name("parts.css")
TYPED = {"model": "org/name", "pattern": "0.5"}


class Page(HTMLParser):
    """
    A page taken apart.

    Attributes:
        tags: Every element in order: its name, its attributes, and its text.
        text: All of it, in one line.
    """

    def __init__(self, answer: Any) -> None:
        super().__init__()
        assert answer.headers["content-type"] == "text/html; charset=utf-8", answer.text
        self.tags: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(answer.text)
        self.close()
        self.text = _line(self.tags[0][2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.tags.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in ("meta", "input", "link", "br", "col"):
            self._open.append(len(self.tags) - 1)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, which must be the last that was begun."""
        assert self.tags[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        """Note a text in all that it stands in, style sheets left out."""
        if self._open and self.tags[self._open[-1]][0] not in ("style", "script"):
            for number in self._open:
                self.tags[number][2].append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes, _ in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        """The text of every element of a kind."""
        return [_line(text) for name, _, text in self.tags if name == tag]

    def at(self, element: str) -> tuple[dict[str, str], str]:
        """The attributes and the text of the element with an id."""
        ((attributes, text),) = [(a, _line(t)) for _, a, t in self.tags if a.get("id") == element]
        return attributes, text

    @property
    def links(self) -> dict[str, str]:
        """Where links lead, by their text."""
        return {_line(t): a["href"] for name, a, t in self.tags if name == "a"}


def _line(texts: list[str]) -> str:
    return " ".join("".join(texts).split())


def basic(secret: str) -> dict[str, str]:
    """As browsers send a key, by themselves."""
    return {"Authorization": f"Basic {base64.b64encode(f'me:{secret}'.encode()).decode()}"}


def listed(page: Page) -> list[str]:
    """The ids of the jobs that a page lists, in their order."""
    return [tr["id"].removeprefix("job-") for tr in page.of("tr") if "id" in tr]


def row(page: Page, job: dict[str, Any]) -> str:
    """The text of a job in the list, with spaces between its cells."""
    begin = next(i for i, (_, a, _) in enumerate(page.tags) if a.get("id") == f"job-{job['id']}")
    cells = itertools.takewhile(lambda tag: tag[0] not in ("tr", "h2"), page.tags[begin + 1 :])
    return " ".join(text for n, _, t in cells if n in ("td", "th") and (text := _line(t)))


def many(client: TestClient, verb: str, jobs: list[str], **typed: str) -> Any:
    """Ask something of several jobs as the list's form does; the answer is not followed."""
    body = urlencode([("verb", verb), *typed.items(), *(("job", job) for job in jobs)])
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    return client.post("/jobs", content=body, headers=kind, follow_redirects=False)


def send(client: TestClient, path: str = "/new", *, headers: Any = None, **typed: str) -> Any:
    """Send a form as a browser does; the answer is not followed."""
    fields = {**TYPED, **typed} if path == "/new" else {"view": "", **typed}
    return client.post(path, data=fields, headers=headers, follow_redirects=False)


# ------------------------------------------------------------------------------ list


def test_nothing_yet(client: TestClient) -> None:
    """Without jobs and workers, the page says how to get them, and does not load itself again."""
    page = Page(client.get("/"))

    assert "There is no job yet. Submit one, or use pho submit." in page.text
    assert "No worker reports. Start one with pho worker" in page.text
    assert page.links["Submit one"] == "/new"
    assert not [m for m in page.of("meta") if m.get("http-equiv") == "refresh"]
    assert client.head("/").status_code == client.head("/new").status_code == 200


def test_policy(shared_client: TestClient) -> None:
    """At most our own script could run, nothing is kept or framed, forms lead here alone."""
    for path, script in (("/", "live.js"), ("/new", "form.js"), ("/jobs/nothing", None)):
        answer = shared_client.get(path)
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


def test_states(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job has a row in each state, which leads to its page, and a box to choose it by."""
    made = {state: submit(name=f"mine {state}", preset="best") for state in JobState}
    for state, job in made.items():
        hand.bring(job["id"], state)
    page = Page(client.get("/"))

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
    assert "org/name is not there." in row(page, made[JobState.FAILED])


def test_what_was_asked(client: TestClient, submit: Submit, hand: Any) -> None:
    """Several models, several patterns, targets and transfers are told from simple searches."""
    more = submit(more_models=["org/other"], pattern="2:4")
    several = submit(pattern=None, patterns=["0.3", "2:4"])
    target = submit(pattern=None, target={"perplexity_rise": 0.05})
    source = submit()
    hand.succeed(source["id"])
    transfer = client.post(f"/v1/jobs/{source['id']}:transfer", json={"models": ["a", "b"]}).json()
    page = Page(client.get("/"))

    assert "org/name +1 2:4 best" in row(page, more)
    assert "org/name 0.3, 2:4 best" in row(page, several)
    assert "org/name within 5 % of dense best" in row(page, target)
    assert "a +1 0.5 transfer queued" in row(page, transfer)


def test_progress(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job that works has its stage, a bar that says the same in words, and a drawing."""
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


def test_stages(client: TestClient, submit: Submit, hand: Any) -> None:
    """Each stage shows what it counts: steps of a calibration, perplexities."""
    calibrated, measured = submit(), submit()
    claim = hand.take(calibrated["id"], StageKind.CALIBRATE)
    hand.store.watch(claim, {"title": "Calibrating the dense model", "done": 3, "steps": 16})
    hand.calibrate(measured["id"])
    hand.search(measured["id"])
    hand.confirm(measured["id"], 1, 2, 3)
    hand.measure(measured["id"], 2, 20.0, 4.0)
    hand.take(measured["id"], StageKind.PERPLEXITY, 3)
    page = Page(client.get("/"))

    assert "running, calibrate 3 of 16" in row(page, calibrated)
    assert "running, perplexity 1 of 3" in row(page, measured)


def test_result(client: TestClient, submit: Submit, hand: Any, configuration: Any) -> None:
    """What was found stands beside the dense model, with how far it is above it and below RIA."""
    job = submit()
    hand.calibrate(job["id"])
    hand.search(job["id"])
    hand.confirm(job["id"])
    found = {"dense": 13.8, "pruned": 17.25, "wanda": 30.0, "ria": 23.0}
    best = {**configuration.model_dump(mode="json"), "perplexities": found}
    hand.store.complete(
        hand.take(job["id"], StageKind.FINISH), {}, found=Found(best=best, warnings=[]), ended=True
    )
    page = Page(client.get("/"))

    assert "succeeded 17.25 13.80 +25.0% 25.0%" in row(page, job)
    assert not page.of("progress")


def test_hostile(client: TestClient, submit: Submit, hand: Any) -> None:
    """Whatever users have named or models have said is text."""
    hostile = "<img src=x onerror=alert(1)>\"'"
    job = submit(name=hostile)
    hand.fail(job["id"], message=hostile)
    hand.store.enter_worker(hand.worker_id, name=hostile, device=hostile, kinds=[*StageKind])
    answer = client.get("/", params={"name": hostile, "pattern": hostile, "model": hostile})
    Page(answer)  # its elements are closed

    assert html.unescape(answer.text).count(hostile) >= 8
    assert "<img" not in answer.text


def test_pages(client: TestClient, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_filter(client: TestClient, submit: Submit, hand: Any) -> None:
    """A link for each state leaves the jobs in it, says that it is the one, and how many."""
    jobs = {}
    for state in (JobState.QUEUED, JobState.PAUSING, JobState.FAILED):
        jobs[state] = submit()["id"]
        hand.bring(jobs[state], state)
    front_page = Page(client.get("/"))
    found = {}
    for name in ("all", "queued", "running", "failed", "cancelled"):
        page = Page(client.get(front_page.links[name]))
        found[name] = listed(page)
        (here,) = [a for a in page.of("a") if a.get("aria-current") == "true"]
        assert page.links[name] == here["href"]

    assert found == {
        "all": [*jobs.values()][::-1], "queued": [jobs[JobState.QUEUED]],
        "running": [jobs[JobState.PAUSING]], "failed": [jobs[JobState.FAILED]], "cancelled": [],
    }  # fmt: skip
    assert "State all 3 queued 1 running 1 paused 0 succeeded 0 failed 1" in front_page.text
    assert "No job has state cancelled. Remove state cancelled" in page.text
    assert page.links["Remove state cancelled"] == "/"


def test_facets(client: TestClient, submit: Submit) -> None:
    """Models and patterns are links with how often they occur; a second press takes one back."""
    first = submit(model="org/a", pattern="0.5")
    second = submit(model="org/a", pattern="2:4", name="Ünï")
    third = submit(model="org/b", pattern="2:4")
    page = Page(client.get("/"))
    of_a = Page(client.get(page.links["org/a"]))
    both = Page(client.get(of_a.links["2:4"]))
    searched = Page(client.get("/", params={"name": "ünï", "sort": "name"}))
    nothing = Page(client.get("/", params={"name": "x", "model": "org/a", "state": "paused"}))

    assert "Model org/a 2 org/b 1 Pattern 2:4 2 0.5 1" in page.text
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


def test_sort(client: TestClient, submit: Submit) -> None:
    """A column is sorted by a press on its head, the other way round by the next, and says so."""
    jobs = [submit(name=letter)["id"] for letter in "bca"]
    page = Page(client.get("/"))
    up = Page(client.get(page.links["Job"]))
    down = Page(client.get(up.links["Job"]))

    def order(of: Page) -> dict[str, str]:
        return {_line(t): a["aria-sort"] for n, a, t in of.tags if n == "th" and "aria-sort" in a}

    assert order(page) == {"Submitted": "descending"}
    assert (order(up), order(down)) == ({"Job": "ascending"}, {"Job": "descending"})
    assert listed(up) == [jobs[2], jobs[0], jobs[1]]
    assert listed(down) == listed(up)[::-1]
    assert up.at("sort")[1].startswith("newest first oldest first name")
    assert [o["value"] for o in up.of("option") if "selected" in o] == ["name"]
    assert all(th["scope"] in ("col", "row") for th in page.of("th"))


def test_refresh(client: TestClient, submit: Submit, hand: Any) -> None:
    """The list keeps itself up to date; a link stops that, here and further on."""
    job = submit()["id"]
    on = Page(client.get("/"))
    off = Page(client.get(on.links["Stop refreshing"]))
    again = Page(client.get(off.links["Go on refreshing"]))
    hand.bring(job, JobState.PAUSED)
    rest = Page(client.get("/"))

    def refreshes(page: Page) -> tuple[bool, str | None]:
        without_scripts = any(m.get("http-equiv") == "refresh" for m in page.of("meta"))
        return without_scripts, page.at("now")[0].get("data-moves")

    assert [refreshes(page) for page in (on, off, again, rest)] == [
        (True, "3"), (False, None), (True, "3"), (False, "15"),
    ]  # fmt: skip
    assert off.links["failed"] == "/?state=failed&refresh=off"
    assert {i["value"] for i in off.of("input") if i.get("name") == "view"} == {"?refresh=off"}


def test_workers(client: TestClient, submit: Submit, hand: Any) -> None:
    """Workers are listed with what they do; without any, jobs that wait say so."""
    job = submit()
    before = Page(client.get("/"))
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cuda:0", kinds=[*StageKind])
    idle = Page(client.get("/"))
    hand.take(job["id"], StageKind.CALIBRATE)
    busy = Page(client.get("/"))

    assert "No worker reports, so jobs wait: start one with pho worker." in before.text
    assert "so jobs wait" not in idle.text
    assert re.search(r"host:7 cuda:0 nothing \d s ago", _spaced(idle))
    assert f"calibrate of {job['name']}" in _spaced(busy)


def _spaced(page: Page) -> str:
    """The cells of the table, with spaces between."""
    return " ".join(t for n, _, texts in page.tags if n in ("td", "th") for t in [_line(texts)])


# ------------------------------------------------------------------------ several at once


def test_bulk(client: TestClient, submit: Submit) -> None:
    """A button asks something of all jobs that are chosen, and leads back to the same list."""
    jobs = [submit()["id"] for _ in range(3)]
    answer = many(client, "pause", jobs[:2], view="?state=queued&sort=name")
    again = many(client, "resume", jobs[:1])

    assert answer.status_code == again.status_code == 303
    assert answer.headers["location"] == "/?state=queued&sort=name"
    assert [client.get(f"/v1/jobs/{job}").json()["state"] for job in jobs] == [
        "queued", "paused", "queued",
    ]  # fmt: skip


def test_bulk_in_part(client: TestClient, submit: Submit, hand: Any) -> None:
    """What cannot be asked of some jobs is said of each by its name; the others are done."""
    done, queued = submit(name="done"), submit()
    hand.bring(done["id"], JobState.SUCCEEDED)
    answer = many(client, "cancel", [done["id"], NOBODY, queued["id"]])
    page = Page(answer)

    assert answer.status_code == 409
    assert "1 of 3 jobs were cancelled." in page.text
    assert f"{done['name']}: a job that is succeeded cannot be cancelled." in page.text
    assert f"{NOBODY}: this job no longer exists." in page.text
    assert client.get(f"/v1/jobs/{queued['id']}").json()["state"] == "cancelled"


def test_bulk_deletion(client: TestClient, submit: Submit, hand: Any) -> None:
    """Jobs are deleted after a page that asks once more, and says which of them stay."""
    over, paused, queued = submit(name="over"), submit(name="rests"), submit(name="waits")
    hand.record(over, 2)
    hand.bring(over["id"], JobState.FAILED)
    hand.bring(paused["id"], JobState.PAUSED)
    asked = Page(many(client, "delete", [over["id"], paused["id"], queued["id"]], view="?name=a"))
    before = len(hand.store.page())
    fields = [(i["name"], i["value"]) for i in asked.of("input")]
    body = urlencode(fields)
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/jobs", content=body, headers=kind, follow_redirects=False)

    assert asked.texts("h1") == ["Delete 2 jobs?"]
    assert f"{over['name']}, failed {paused['name']}, paused" in asked.text
    assert f"Cancel them first: {queued['name']}, queued" in asked.text
    assert asked.links["Keep them"] == "/?name=a"
    assert before == 3
    assert answer.headers["location"] == "/?name=a"
    assert [str(job.id) for job in hand.store.page()] == [queued["id"]]
    assert hand.studies() == []


@pytest.mark.parametrize(
    ("verb", "chosen", "status", "told"),
    [
        ("pause", [], 422, "No job is chosen. Tick the box"),
        ("delete", [], 422, "No job is chosen."),
        ("delete", [NOBODY], 200, "None of the chosen jobs exists any longer."),
        ("explode", [NOBODY], 422, "verb='explode' must be one of pause, resume, cancel, delete."),
        ("pause", ["x"], 422, "job='x' is not a job's id."),
        ("pause", [f"{n:032x}" for n in range(201)], 422, "201 jobs are chosen, but 200 are"),
    ],
)
def test_what_is_no_choice_of_jobs_changes_nothing_and_a_page_says_why(
    shared_client: TestClient, verb: str, chosen: list[str], status: int, told: str
) -> None:
    answer = many(shared_client, verb, chosen)

    assert answer.status_code == status
    assert told in Page(answer).text


def test_chosen_before(client: TestClient, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ------------------------------------------------------------------------- whose jobs


def test_no_key(client: TestClient, keys: KeyStore) -> None:
    """Once there is a key, a browser is asked for it, and a page says what is missing."""
    keys.create("first", sees_all=False)
    for method, path in (
        ("GET", "/"), ("GET", "/new"), ("POST", "/new"), ("POST", "/new/check"),
        ("POST", f"/jobs/{NOBODY}/cancel"),
    ):  # fmt: skip
        answer = client.request(method, path)

        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Basic realm="PHO"'
        assert "pho keys create" in Page(answer).text


def test_own_jobs(client: TestClient, keys: KeyStore, hand: Any) -> None:
    """A key sees its own jobs, changes no other, and is not led into the dashboard."""
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


def test_study(client: TestClient, submit: Submit, hand: Any, keys: KeyStore) -> None:
    """Who sees all jobs gets a link to each study that has begun."""
    begun, waiting = submit(), submit()
    hand.record(begun, 2)
    admin = basic(keys.create("admin", sees_all=True)[1])
    page = Page(client.get(f"/jobs/{begun['id']}", headers=admin))
    other = Page(client.get(f"/jobs/{waiting['id']}", headers=admin))
    number = page.links["Study in the dashboard"].removeprefix("/dashboard/studies/")
    study = client.get(f"/api/studies/{number}", headers=admin).json()

    assert study["name"] == begun["name"]
    assert "Study in the dashboard" not in other.links


def test_studies(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job of several islands has a link to the study of each that has begun."""
    job = submit(islands=3)
    hand.record(job, 1)
    hand.record(job, 1, island=2)
    page = Page(client.get(f"/jobs/{job['id']}"))
    numbers = {
        label: href.removeprefix("/dashboard/studies/")
        for label, href in page.links.items()
        if href.startswith("/dashboard/studies/")
    }
    names = {
        label: client.get(f"/api/studies/{number}").json()["name"]
        for label, number in numbers.items()
    }

    assert names == {
        "Study in the dashboard": job["name"],
        "Study, island 2 in the dashboard": f"{job['name']} island 2",
    }


# ---------------------------------------------------------------------------- buttons


@pytest.mark.parametrize(
    ("state", "verb", "then"),
    [
        (JobState.QUEUED, "cancel", JobState.CANCELLED),
        (JobState.RUNNING, "pause", JobState.PAUSING),
        (JobState.FAILED, "resume", JobState.QUEUED),
    ],
)
def test_buttons(
    client: TestClient, submit: Submit, hand: Any, state: JobState, verb: str, then: JobState
) -> None:
    """A button does what it says, and leads back to the job in the same list."""
    job = submit()["id"]
    hand.bring(job, state)
    answer = send(client, f"/jobs/{job}/{verb}", view="?state=queued&refresh=off")

    assert answer.status_code == 303
    assert answer.headers["location"] == f"/?state=queued&refresh=off#job-{job}"
    assert client.get(f"/v1/jobs/{job}").json()["state"] == then


def test_too_late(client: TestClient, submit: Submit, hand: Any) -> None:
    """What cannot be done any more is said above the list, which has the focus there."""
    job = submit()["id"]
    hand.bring(job, JobState.SUCCEEDED)
    late = send(client, f"/jobs/{job}/cancel")
    gone = send(client, f"/jobs/{NOBODY}/cancel")
    (alert,) = [a for a in Page(late).of("div") if a.get("role") == "alert"]

    assert (late.status_code, gone.status_code) == (409, 404)
    assert "A job that is succeeded cannot be cancelled." in Page(late).text
    assert "This job no longer exists." in Page(gone).text
    assert (alert["autofocus"], alert["tabindex"]) == ("", "-1")
    assert job in listed(Page(late))


def test_deletion(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job is deleted with its study after a page that asks once more."""
    job = submit(name="mine")
    hand.record(job, 2)
    hand.bring(job["id"], JobState.CANCELLED)
    asked = Page(client.get(f"/jobs/{job['id']}/delete?state=cancelled"))
    before = hand.studies()
    (form,) = asked.of("form")
    answer = send(client, form["action"], view=asked.of("input")[0]["value"])

    assert f"Delete {job['name']}?" in asked.text
    assert asked.links["Keep it"] == f"/?state=cancelled#job-{job['id']}"
    assert before == [job["name"]]
    assert answer.headers["location"] == "/?state=cancelled"
    assert hand.studies() == [page.name for page in hand.store.page()] == []


def test_no_deletion(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job that works is not deleted, and both pages say what to do first."""
    job = submit()["id"]
    hand.bring(job, JobState.RUNNING)
    asked = Page(client.get(f"/jobs/{job}/delete"))
    answer = send(client, f"/jobs/{job}/delete")

    assert "Cancel it first." in asked.text
    assert not asked.of("form")
    assert answer.status_code == 409
    assert "A job that is running cannot be deleted. Cancel it first." in Page(answer).text


# ----------------------------------------------------------------------- other sites


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


@pytest.mark.parametrize("keyed", [False, True])
def test_foreign_form(client: TestClient, keys: KeyStore, hand: Any, keyed: bool) -> None:
    """A form of another page changes nothing, even if the browser sends the key by itself."""
    mine = basic(keys.create("k", sees_all=True)[1]) if keyed else {}
    job = send(client, headers=mine).headers["location"].removeprefix("/jobs/")
    before = hand.store.page()
    for headers in FOREIGN:
        for path in ("/new", "/new/check", f"/jobs/{job}/cancel", f"/jobs/{job}/delete"):
            answer = send(client, path, headers={**mine, **headers})

            assert answer.status_code == 403, headers
            assert "A page of another site has sent this." in Page(answer).text
    assert hand.store.page() == before


def test_foreign_form_to_the_api(client: TestClient, keys: KeyStore, hand: Any) -> None:
    secret = keys.create("k", sees_all=True)[1]
    job = send(client, headers=basic(secret)).headers["location"].removeprefix("/jobs/")
    foreign = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    url = f"/v1/jobs/{job}:cancel"
    refused = client.post(url, headers={**basic(secret), **foreign})
    state = hand.store.page()[0].state
    taken = client.post(url, headers={"Authorization": f"Bearer {secret}", **foreign})

    assert (refused.status_code, refused.json()["code"]) == (403, "other_site")
    assert state is JobState.QUEUED
    assert taken.status_code == 202


def test_own_form(client: TestClient, keys: KeyStore) -> None:
    """Our own forms are taken, behind a proxy too, and so is a program that is no browser."""
    mine = basic(keys.create("k", sees_all=False)[1])
    for headers in (
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "https://127.0.0.1:8000"},
    ):
        assert send(client, headers={**mine, **headers}).status_code == 303, headers


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "/?state=odd", 422, "state: must be one of queued,"),
        ("GET", "/?sort=odd", 422, "sort: must be one of created, -created, name,"),
        ("GET", "/?page_token=odd", 422, "page_token: is not one of our tokens"),
        ("GET", f"/jobs/{NOBODY}/delete", 404, "No job has this id."),
        ("GET", "/jobs/nonsense", 404, "No job has the id nonsense"),
        ("POST", f"/jobs/{NOBODY}/explode", 422, "verb: Input should be"),
        ("POST", "/new", 415, "This takes a form"),
        ("POST", "/", 405, "Method Not Allowed"),
    ],
)
def test_every_error_of_a_page_is_a_page(
    shared_client: TestClient, method: str, path: str, status: int, told: str
) -> None:
    body = b"" if "explode" in path else b"{}"
    kind = "application/x-www-form-urlencoded" if "explode" in path else "application/json"
    answer = shared_client.request(method, path, content=body, headers={"Content-Type": kind})

    assert answer.status_code == status
    assert told in Page(answer).text


@pytest.mark.parametrize("body", [b"model=%ff&pattern=\xff", b"&".join([b"a=1"] * 300)])
def test_a_body_that_is_no_form_of_ours_is_refused(shared_client: TestClient, body: bytes) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = shared_client.post("/new", content=body, headers=kind)

    assert answer.status_code == 422
    assert "The form cannot be read." in Page(answer).text


def test_a_form_that_is_too_large_is_not_read_declared_or_not(client_of: Any) -> None:
    client = client_of(max_body_bytes=1024)
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    chunks = (b"more=" + b"x" * 1000 for _ in range(2))
    answers = [send(client, more="x" * 2000), client.post("/new", content=chunks, headers=kind)]

    for answer in answers:
        assert answer.status_code == 413
        assert "larger than 1024 bytes" in Page(answer).text


def test_crash(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours is a page too, without the reason."""
    monkeypatch.setattr(job_list, "rows", None)
    send(client)
    answer = client.get("/")

    assert answer.status_code == 500
    assert "The server failed; its log says why." in Page(answer).text


def test_the_apis_description_has_no_page(shared_client: TestClient) -> None:
    paths = shared_client.get("/openapi.json").json()["paths"]

    assert {path.split("/")[1] for path in paths} == {"v1", "healthz", "readyz", "metrics"}


# ----------------------------------------------------------------- what all can work with


@pytest.fixture
def pages(client: TestClient, submit: Submit, hand: Any) -> list[Page]:
    """One of each kind, the list with jobs in all states."""
    for state in JobState:
        job = submit()["id"]
        hand.bring(job, state)
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cpu", kinds=[*StageKind])
    wrong = send(client, model="", more="{", trials="x", **{"calibration/samples": "0"})
    found = [client.get(path) for path in ("/", "/new", f"/jobs/{job}/delete", "/jobs/x")]
    return [Page(answer) for answer in (*found, wrong, send(client, f"/jobs/{NOBODY}/cancel"))]


def test_structure(pages: list[Page]) -> None:
    """Each page has a language, a title, one heading, a way past the navigation, and unique ids."""
    for page in pages:
        ids = [a["id"] for _, a, _ in page.tags if "id" in a]

        assert page.of("html")[0]["lang"] == "en"
        assert re.fullmatch(r"\w.+ . PHO", page.texts("title")[0])
        assert len(page.of("h1")) == len(page.of("main")) == 1
        assert page.of("a")[0] == {"class": "skip", "href": "#main"}
        assert len(ids) == len({*ids})
        assert {a["href"][1:] for a in page.of("a") if a["href"].startswith("#")} <= {*ids}
        assert not [a for _, a, _ in page.tags if int(a.get("tabindex", 0)) > 0]


def test_names(pages: list[Page]) -> None:
    """Each field has a label and a hint, each link and button a name that tells it from others."""
    for page in pages:
        ids = {a["id"] for _, a, _ in page.tags if "id" in a}
        fields = [a for kind in ("input", "select", "textarea") for a in page.of(kind)]
        labels = {label["for"] for label in page.of("label")}
        buttons = page.texts("button")

        assert {f["id"] for f in fields if f.get("type") != "hidden"} == labels
        assert {i for f in fields for i in f.get("aria-describedby", "").split()} <= ids
        assert len(buttons) == len({*buttons})
        assert all(page.texts("a"))
        assert all(bar["aria-label"] for bar in page.of("progress"))


def test_contrast() -> None:
    """In light and dark, texts stand out 4.5 times from what they stand on, edges 3 times."""
    css = STYLE.read_text()
    blocks = re.findall(r":root {(.*?)}", css, re.DOTALL)
    schemes = [dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in blocks]
    grounds = ("page", "sheet", "marked")
    pairs = [
        (text, ground, 4.5) for text in ("text", "quiet", "link", "wrong") for ground in grounds
    ]
    pairs += [
        ("text", "wrong-sheet", 4.5),
        ("link", "wrong-sheet", 4.5),
        ("on-button", "button", 4.5),
    ]
    pairs += [(edge, ground, 3.0) for edge in ("edge", "good") for ground in grounds]

    assert len(schemes) == 2
    for colours in schemes:
        for text, ground, least in pairs:
            assert contrast(colours[text], colours[ground]) >= least, (text, ground)


def contrast(first: str, second: str) -> float:
    """As WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_view_cannot_lead_away(client: TestClient, submit: Submit) -> None:
    """Whatever a form says of where to go back to, it is our list."""
    job = submit()["id"]
    for view in ("//evil.example", "?\r\nX: y", "?state=queued&next=//evil.example"):
        answer = send(client, f"/jobs/{job}/pause", view=view)

        assert re.fullmatch(rf"/(\?state=queued)?#job-{job}", answer.headers["location"]), quote(
            view
        )
