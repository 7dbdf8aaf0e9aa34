"""The pages for people: what they show, what their forms do, and whom they obey."""

import base64
import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from pho_service.api import front
from pho_service.spec.job import JobSpec
from storage.keys import KeyStore
from storage.states import JobState, StageKind

Submit = Callable[..., dict[str, Any]]

NOBODY = "00000000-0000-0000-0000-000000000000"
STYLE = Path(front.__file__).parent / "templates" / "style.css"
TYPED = {"model": "org/name", "pattern": "0.5", "preset": "score", "calibration": "", "more": "",
         "trials": "200", "seed": "0"}  # fmt: skip


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
        if tag not in ("meta", "input", "link", "br"):
            self._open.append(len(self.tags) - 1)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element, which must be the last that was begun."""
        assert self.tags[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        """Note a text in all that it stands in, style sheets left out."""
        if self._open and self.tags[self._open[-1]][0] != "style":
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


def card(client: TestClient, job: dict[str, Any]) -> str:
    """The text of a job on the page."""
    return Page(client.get("/")).at(f"job-{job['id']}")[1]


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
    """No script is in the pages or could run, nothing is kept or framed, forms lead here alone."""
    for path in ("/", "/new", "/jobs/nothing"):
        answer = shared_client.get(path)
        policy = answer.headers["content-security-policy"]

        assert "<script" not in answer.text
        assert "script-src" not in policy
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "form-action 'self'; frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("state", "buttons"),
    [
        (JobState.QUEUED, ["Pause", "Cancel"]),
        (JobState.RUNNING, ["Pause", "Cancel"]),
        (JobState.PAUSING, ["Resume", "Cancel"]),
        (JobState.PAUSED, ["Resume", "Cancel", "Delete"]),
        (JobState.CANCELLING, []),
        (JobState.CANCELLED, ["Delete"]),
        (JobState.SUCCEEDED, ["Prune", "Delete"]),
        (JobState.FAILED, ["Resume", "Delete"]),
    ],
)
def test_states(
    client: TestClient, submit: Submit, hand: Any, state: JobState, buttons: list[str]
) -> None:
    """A job is shown in each state, with what can be asked of it there and nothing else."""
    job = submit(name="mine")
    hand.bring(job["id"], state)
    page = Page(client.get("/"))
    _, text = page.at(f"job-{job['id']}")
    above, *buttons_of = page.texts("button")
    offered = [*buttons_of, *(text for text in page.links if text.startswith("Delete"))]

    assert f"{job['name']} {state}" in text
    assert above == "Compare the chosen jobs"
    assert offered == [f"{button} {job['name']}" for button in buttons]


def test_what_was_asked(client: TestClient, submit: Submit) -> None:
    """A job has its models, its pattern and when it came, with links to all that is known."""
    job = submit(more_models=["org/other"], pattern="2:4", preset="best")
    page = Page(client.get("/"))
    text = page.at(f"job-{job['id']}")[1]
    hrefs = [*page.links.values()]

    assert "Models org/name, org/other Pattern 2:4 Preset best Submitted 20" in text
    assert "UTC Time not begun" in text
    assert f"/v1/jobs/{job['id']}" in hrefs
    assert f"/v1/jobs/{job['id']}/report" in hrefs
    assert f"/v1/jobs/{job['id']}/best" not in hrefs
    assert client.get(page.links[f"Report of {job['name']}"]).status_code == 200


def test_progress(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job that works has its stage, a bar that says the same in words, and the time left."""
    job = submit(trials=40)
    hand.calibrate(job["id"])
    claim = hand.take(job["id"], StageKind.SEARCH)
    hand.store.progress(claim, done=10, elapsed_s=50.0, best_value=0.125)
    page = Page(client.get("/"))
    text = page.at(f"job-{job['id']}")[1]
    (bar,) = page.of("progress")

    assert "running, search" in text
    assert (bar["value"], bar["max"]) == ("10", "40")
    assert "10 of 40 trials" in text
    assert "search: about 2 min left" in text
    assert "Best objective so far: 0.125." in text


def test_perplexities(client: TestClient, submit: Submit, hand: Any) -> None:
    """Once candidates are confirmed, that has a bar of its own."""
    job = submit()["id"]
    hand.calibrate(job)
    hand.search(job)
    hand.confirm(job, 1, 2, 3)
    hand.measure(job, 2, 20.0, 4.0)
    page = Page(client.get("/"))

    assert "1 of 3 perplexities" in page.text
    assert page.of("progress")[1]["max"] == "3"


def test_result(client: TestClient, submit: Submit, hand: Any, configuration: Any) -> None:
    """What was found is beside RIA, with a link to the configuration."""
    job = submit()
    hand.calibrate(job["id"])
    hand.search(job["id"])
    hand.confirm(job["id"])
    ria = {"method": "ria-layer", "trial": 1, "perplexity": 23.0, "proxy": None, "divergence": None}
    best = {**configuration.model_dump(mode="json"), "baselines": [ria]}
    finish = hand.take(job["id"], StageKind.FINISH)
    hand.store.succeed(finish, best=best, warnings=["On the border."], result={})
    page = Page(client.get("/"))
    text = page.at(f"job-{job['id']}")[1]

    assert "Best: crepe; perplexity 17.25; 25.0% below RIA's perplexity. On the border." in text
    assert page.links[f"Configuration of {job['name']}"] == f"/v1/jobs/{job['id']}/best"
    assert not page.of("progress")


def test_failed(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job that failed says where and why."""
    job = submit()
    hand.fail(job["id"])

    assert "The job failed in calibrate: org/name is not there. (ModelError)" in card(client, job)


def test_transfer(client: TestClient, submit: Submit, hand: Any) -> None:
    """A transfer is shown with what it has measured of each model, or why it could not."""
    job = submit()
    hand.succeed(job["id"])
    asked = {"models": ["org/a", "org/b", "org/c"]}
    transfer = client.post(f"/v1/jobs/{job['id']}:transfer", json=asked).json()
    results = [
        {"target": "org/a", "perplexities": {"ria": 20.0, "transferred": 15.0}, "proxies": {}},
        {"target": "org/b", "error": "The model org/b is not there."},
    ]
    for number, result in enumerate(results):
        claim = hand.take(transfer["id"], StageKind.TRANSFER, number)
        hand.store.complete(claim, result)
    page = Page(client.get("/"))
    text = page.at(f"job-{transfer['id']}")[1]

    assert f"Transfer of job {job['id']}" in text
    assert "2 of 3 models" in text
    assert "org/a: 25.0% below RIA's perplexity. org/b: The model org/b is not there." in text
    assert page.links[f"Measurements of {transfer['name']}"].endswith("/transfer")


def test_hostile(client: TestClient, submit: Submit, hand: Any) -> None:
    """Whatever users have named or models have said is text."""
    hostile = "<script>alert(1)</script><img src=x>\"'"
    job = submit(name=hostile)
    hand.fail(job["id"], message=hostile)
    hand.store.enter_worker(hand.worker_id, name=hostile, device=hostile, kinds=[*StageKind])
    answer = client.get("/")
    Page(answer)  # its elements are closed

    assert html.unescape(answer.text).count(hostile) >= 4
    assert "<script" not in answer.text
    assert "<img" not in answer.text


def test_pages(client: TestClient, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages give every job once, newest first, and lead back."""
    monkeypatch.setattr(front, "PAGE_SIZE", 2)
    jobs = [submit()["id"] for _ in range(5)]
    seen, path, pages = [], "/", 0
    while path:
        page = Page(client.get(path))
        pages += 1
        seen += [li["id"].removeprefix("job-") for li in page.of("li") if "id" in li]
        path = page.links.get("Older jobs", "")

    assert seen == jobs[::-1]
    assert pages == 3
    assert page.links["Newest jobs"] == "/"


def test_filter(client: TestClient, submit: Submit, hand: Any) -> None:
    """A link for each state leaves the jobs in it, and says that it is the one."""
    jobs = {}
    for state in (JobState.QUEUED, JobState.PAUSING, JobState.FAILED):
        jobs[state] = submit()["id"]
        hand.bring(jobs[state], state)
    found = {}
    for name in ("all", "queued", "running", "failed", "cancelled"):
        page = Page(client.get(Page(client.get("/")).links[name]))
        found[name] = [li["id"].removeprefix("job-") for li in page.of("li") if "id" in li]
        (here,) = [a for a in page.of("a") if a.get("aria-current") == "true"]
        assert page.links[name] == here["href"]

    assert found == {
        "all": [*jobs.values()][::-1], "queued": [jobs[JobState.QUEUED]],
        "running": [jobs[JobState.PAUSING]], "failed": [jobs[JobState.FAILED]], "cancelled": [],
    }  # fmt: skip
    assert "No job is cancelled." in page.text


def test_refresh(client: TestClient, submit: Submit, hand: Any) -> None:
    """The list loads itself again while a job may move; a link stops that, here and further on."""
    job = submit()["id"]
    on = Page(client.get("/"))
    off = Page(client.get(on.links["Stop refreshing"]))
    again = Page(client.get(off.links["Refresh every 10 s"]))
    hand.bring(job, JobState.PAUSED)
    rest = Page(client.get("/"))

    def refreshes(page: Page) -> bool:
        return any(m.get("http-equiv") == "refresh" for m in page.of("meta"))

    assert [refreshes(page) for page in (on, off, again, rest)] == [True, False, True, False]
    assert off.links["failed"] == "/?state=failed&refresh=off"
    assert {i["value"] for i in off.of("input") if i["name"] == "view"} == {"?refresh=off"}


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


# ------------------------------------------------------------------------- whose jobs


def test_no_key(client: TestClient, keys: KeyStore) -> None:
    """Once there is a key, a browser is asked for it, and a page says what is missing."""
    keys.create("first", sees_all=False)
    for method, path in (
        ("GET", "/"), ("GET", "/new"), ("POST", "/new"), ("POST", f"/jobs/{NOBODY}/cancel"),
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

    assert [li["id"] for li in page.of("li") if "id" in li] == [f"job-{jobs[0]}"]
    assert not [href for href in page.links.values() if href.startswith("/dashboard")]
    assert (changed.status_code, deletion.status_code) == (404, 404)
    assert {job.state for job in hand.store.page()} == {JobState.QUEUED}


def test_study(client: TestClient, submit: Submit, hand: Any, keys: KeyStore) -> None:
    """Who sees all jobs gets a link to each study that has begun."""
    begun, waiting = submit(), submit()
    hand.record(begun, 2)
    admin = basic(keys.create("admin", sees_all=True)[1])
    page = Page(client.get("/", headers=admin))
    number = page.links[f"Study of {begun['name']}"].removeprefix("/dashboard/studies/")
    study = client.get(f"/api/studies/{number}", headers=admin).json()

    assert study["name"] == begun["name"]
    assert f"Study of {waiting['name']}" not in page.links


def test_studies(client: TestClient, submit: Submit, hand: Any) -> None:
    """A job of several islands has a link to the study of each that has begun."""
    job = submit(islands=3)
    hand.record(job, 1)
    hand.record(job, 1, island=2)
    page = Page(client.get("/"))
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
        f"Study of {job['name']}": job["name"],
        f"Study, island 2 of {job['name']}": f"{job['name']} island 2",
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
    assert f"job-{job}" in [li.get("id") for li in Page(late).of("li")]


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


# ------------------------------------------------------------------------------- form


def test_submission(client: TestClient) -> None:
    """The form makes the job that POST /v1/jobs makes of the same values."""
    more = '{"scope": "global",\r\n"calibration": {"samples": 4}, "islands": 2}'
    answer = send(
        client, pattern=" 0.6 ", preset="crepe", calibration="org/texts", trials="50", more=more
    )
    job = client.get("/v1/jobs").json()["jobs"][0]
    document = {
        "model": "org/name", "pattern": "0.6", "preset": "crepe", "scope": "global", "islands": 2,
        "calibration": {"dataset": "org/texts", "samples": 4}, "trials": 50, "seed": 0,
    }  # fmt: skip

    assert answer.status_code == 303
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["spec"] == JobSpec.model_validate(document).settled().model_dump(mode="json")


def test_only_what_is_needed(client: TestClient) -> None:
    """Fields that are left empty have the defaults."""
    empty = dict.fromkeys(("preset", "calibration", "trials", "seed", "more"), "")

    assert send(client, **empty).status_code == 303
    spec = client.get("/v1/jobs").json()["jobs"][0]["spec"]
    assert (spec["trials"], spec["preset"], spec["calibration"]["dataset"]) == (
        200, "best", "allenai/c4",
    )  # fmt: skip


def test_text_file(client: TestClient, settings: Any) -> None:
    """A calibration text with the name of a text file is one, and must lie where texts do."""
    file = settings.text_roots[0] / "a.jsonl"
    file.write_text("")
    inside = send(client, calibration=str(file))
    outside = Page(send(client, calibration="/etc/passwd.txt"))
    spec = client.get("/v1/jobs").json()["jobs"][0]["spec"]

    assert inside.status_code == 303
    assert spec["calibration"]["text"] == str(file)
    assert "does not lie below" in outside.at("calibration-error")[1]


def test_sent_twice(client: TestClient) -> None:
    """However often a form is sent, it makes one job; of other values it asks once more."""
    token = Page(client.get("/new")).of("input")[0]["value"]
    first, second = (send(client, token=token).headers["location"] for _ in range(2))
    other = Page(send(client, token=token, trials="99"))
    fresh = other.of("input")[0]["value"]
    last = send(client, token=fresh, trials="99")

    assert first == second
    assert "This form has made a job already, of other values." in other.text
    assert fresh != token
    assert last.headers["location"] not in (first, second)
    assert len(client.get("/v1/jobs").json()["jobs"]) == 2


def test_foreign_token(client: TestClient) -> None:
    """A token that is none of ours is as good as none."""
    tokens = ["", "short", "x" * 300, "with space and more", "\x00" * 20]
    made = {send(client, token=token).headers["location"] for token in 2 * tokens}

    assert len(made) == len(client.get("/v1/jobs").json()["jobs"]) == 10


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("model", "", "Field required"),
        ("model", "/etc/model", "does not lie below"),
        ("model", "a\tb", "control characters"),
        ("pattern", "3:2", "pattern '3:2'"),
        ("preset", "worst", "Input should be 'score', 'crepe', 'crepe-plus', 'best' or"),
        ("calibration", "-not-a-hub-id-", "is neither a hub id"),
        ("trials", "many", "Input should be a valid integer"),
        ("trials", "0", "greater than or equal to 1"),
        ("trials", "9" * 40, "Input should be a valid integer"),
        ("seed", "-1", "greater than or equal to 0"),
        ("more", "{nonsense", "This is not JSON: Expecting property name"),
        ("more", "[1]", "This is no JSON object."),
        ("more", "[" * 20_000, "This cannot be read as JSON."),
        ("more", '{"scope": "nowhere"}', "/scope: Input should be 'row', 'layer' or 'global'"),
        ("more", '{"nonsense": 1}', "/nonsense: unknown field; known are model,"),
        ("more", '{"calibration": {"samples": 0}}', "/calibration/samples: Input should be"),
        ("more", '{"confirm": {"text": "/x.txt"}}', "/confirm/text: text '/x.txt' does not lie"),
        ("more", '{"trials": 7}', "/trials: is given above, too."),
        ("more", '{"timeout_s": NaN}', "/timeout_s: Input should be"),
    ],
)
def test_errors(shared_client: TestClient, field: str, value: str, told: str) -> None:
    """What is wrong is said beside its field and above the form; what was typed is kept."""
    answer = send(shared_client, **{"seed": "7", "model": "org/kept", field: value})
    page = Page(answer)
    attributes, text = page.at(field)
    kept = text if field == "more" else attributes.get("value")

    assert answer.status_code == 422
    assert told in page.at(f"{field}-error")[1]
    assert attributes["aria-invalid"] == "true"
    assert attributes["aria-describedby"] == f"{field}-hint {field}-error"
    assert f'<a href="#{field}">' in answer.text
    assert field == "preset" or kept == value
    assert page.at("seed")[0]["value"] == (value if field == "seed" else "7")
    assert page.texts("title")[0].startswith("Error: New job")
    assert len([a for _, a, _ in page.tags if "aria-invalid" in a]) == 1
    assert shared_client.get("/v1/jobs").json()["jobs"] == []


def test_given_twice(shared_client: TestClient) -> None:
    """A text that is given in two places is refused, for nobody knows which is meant."""
    page = Page(send(shared_client, calibration="a/b", more='{"calibration": {"text": "c.txt"}}'))

    assert "/calibration: is given above, too." in page.at("more-error")[1]


def test_hostile_form(shared_client: TestClient) -> None:
    """What was typed comes back as text, also the line break that it begins with."""
    typed = '\n"></textarea><script>alert(1)</script>\U0001f600'
    answer = send(shared_client, model=typed.strip(), more=typed)

    assert "<script" not in answer.text
    assert f">\n{typed}</textarea>" in html.unescape(answer.text)


def test_half_characters(shared_client: TestClient) -> None:
    """JSON can name what no page can show: it is refused all the same."""
    answer = send(shared_client, more='{"name": "\\ud800", "\\ud800": 1}')

    assert answer.status_code == 422
    assert Page(answer).of("div")


def test_quota(client_of: Any) -> None:
    """More unfinished jobs than allowed are refused above the form."""
    client = client_of(max_unfinished_jobs=1)
    send(client)
    answer = send(client)

    assert answer.status_code == 429
    assert "You have as many unfinished jobs as one key may have." in Page(answer).text


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
        for path in ("/new", f"/jobs/{job}/cancel", f"/jobs/{job}/delete"):
            answer = send(client, path, headers={**mine, **headers})

            assert answer.status_code == 403, headers
            assert "A page of another site has sent this." in Page(answer).text
    assert hand.store.page() == before


def test_foreign_form_to_the_api(client: TestClient, keys: KeyStore, hand: Any) -> None:
    """Nor do those of /v1 take the key that a browser sends by itself from another site's page."""
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
        ("GET", "/?page_token=odd", 422, "page_token: is not one of our tokens"),
        ("GET", f"/jobs/{NOBODY}/delete", 404, "No job has this id."),
        ("GET", "/jobs/nonsense", 404, "Nothing is at /jobs/nonsense."),
        ("POST", f"/jobs/{NOBODY}/explode", 422, "verb: Input should be"),
        ("POST", "/new", 415, "This takes a form"),
        ("POST", "/", 405, "Method Not Allowed"),
    ],
)
def test_other_errors(
    shared_client: TestClient, method: str, path: str, status: int, told: str
) -> None:
    """Every error of a page is a page."""
    body = b"" if "explode" in path else b"{}"
    kind = "application/x-www-form-urlencoded" if "explode" in path else "application/json"
    answer = shared_client.request(method, path, content=body, headers={"Content-Type": kind})

    assert answer.status_code == status
    assert told in Page(answer).text


@pytest.mark.parametrize("body", [b"model=%ff&pattern=\xff", b"&".join([b"a=1"] * 50)])
def test_unreadable_form(shared_client: TestClient, body: bytes) -> None:
    """A body that is no form of ours is refused."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = shared_client.post("/new", content=body, headers=kind)

    assert answer.status_code == 422
    assert "The form cannot be read." in Page(answer).text


def test_large_form(client_of: Any) -> None:
    """A form that is too large is not read, declared or not."""
    client = client_of(max_body_bytes=1024)
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    chunks = (b"more=" + b"x" * 1000 for _ in range(2))
    answers = [send(client, more="x" * 2000), client.post("/new", content=chunks, headers=kind)]

    for answer in answers:
        assert answer.status_code == 413
        assert "larger than 1024 bytes" in Page(answer).text


def test_crash(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours is a page too, without the reason."""
    monkeypatch.setattr(front, "card", None)
    send(client)
    answer = client.get("/")

    assert answer.status_code == 500
    assert "The server failed; its log says why." in Page(answer).text


def test_not_in_the_api(shared_client: TestClient) -> None:
    """The API's description has no page."""
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
    wrong = send(client, model="", more="{", trials="x")
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
