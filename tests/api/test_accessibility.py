"""Every kind of page, by axe-core in a real browser, and by its weight."""

import uuid
from collections import Counter

import pytest
from axe_playwright_python.sync_playwright import Axe

from pho_service.api import jobs as listing
from pho_service.api.job_list import PAGE_SIZE
from storage.claims import LibraryAddition
from storage.records import JobState, StageKind

HEAVIEST = 300_000  # bytes of a page that is not a report
DARK = (  # what is looked at on a phone in the dark mode, too
    "list", "job best", "job failed", "form with a plan", "form with errors", "compare",
    "report of a search", "login", "job points", "API",
)  # fmt: skip
SHOWN = ("running", "failed", "best", "transfer", "points")  # each with a page of its own
# The reference has an entry of the same kind for each of two hundred fields.
SHORTEN = "[...document.querySelectorAll('details')].slice(20).forEach(each => each.remove())"
UNFOLD = "for (const each of document.querySelectorAll('details')) each.open = true"
FILE = {"name": "model.safetensors", "bytes": 10, "sha256": "0" * 64}
TRANSFER = {
    "target": "org/other", "key": "k", "model": {}, "proxies": {"ria": 0.5, "transferred": 0.25},
    "perplexities": {"ria": 25.0, "transferred": 20.0}, "own": None, "warnings": [],
}  # fmt: skip


@pytest.fixture
def jobs(client, submit, hand, begin, measure):
    """One in each state, and one of each kind, with all that a page can show of it."""
    found = {}
    for number in range(9):
        found[f"queued {number}"] = submit()["id"]
    for state in JobState:
        found[state] = submit(name=f"{state} one")["id"]
        hand.bring(found[state], state)
    running, best = submit(trials=8), submit(trials=8)
    hand.calibrate(running["id"])
    for job in (running, best):
        hand.record(job, 8, failed=3)
    claim = hand.take(running["id"], StageKind.SEARCH)
    hand.store.progress(claim, done=8, elapsed_s=50.0, best_value=0.125)
    hand.to_confirm(best["id"], 2)
    hand.measure(best["id"], 2, 21.5, 1.0)
    hand.store.log(claim, ["03:00:00 INFO begins"], worker="host:1")
    good = {"dense": 20.0, "pruned": 25.0, "wanda": 40.0}
    layers = [["model.layers.0", "mlp.up_proj", 0.1, 0.4567]]
    hand.succeed(best["id"], "Care.", layers=layers, perplexities=good)
    assert client.post(f"/v1/jobs/{best['id']}:prune").status_code == 202
    hand.store.complete(
        hand.take(best["id"], StageKind.PRUNE), {"key": "key", "files": [FILE]}, ended=True
    )
    moved = client.post(f"/v1/jobs/{best['id']}:transfer", json={"models": ["org/other"]}).json()
    claim = hand.take(moved["id"], StageKind.TRANSFER)
    addition = LibraryAddition(claim.job.spec["configuration"], TRANSFER)
    hand.store.complete(claim, TRANSFER, library=[addition], ended=True)
    points = begin(["0.3", "2:4"], patterns=["0.3", "2:4"])
    measure(points, 0, 22.0)
    measure(points, 1, 24.0)
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cpu", kinds=[*StageKind])
    return {
        **found, "running": running["id"], "best": best["id"], "transfer": moved["id"],
        "points": points,
    }  # fmt: skip


@pytest.fixture
def pages(client, jobs, tmp_path, keys, monkeypatch, write_small):
    write_small(tmp_path / "small")
    # Of more than 16 ids, two begin with the same digit.
    monkeypatch.setattr(listing, "BEGINNING", "[0-9a-f-]+")
    beginning = Counter(job[0] for job in {*jobs.values()}).most_common(1)[0][0]
    best, failed = jobs["best"], jobs["failed"]
    paths = {
        "list": "/",
        "nothing": "/?state=queued&name=nothing&model=org/name",
        **{f"job {name}": f"/jobs/{jobs[name]}" for name in SHOWN},
        "form": "/new",
        "compare": f"/compare?job={best}&job={jobs['running']}&job={jobs['points']}",
        "API": "/docs",
        "report of a search": f"/v1/jobs/{best}/report",
        "report of a transfer": f"/v1/jobs/{jobs['transfer']}/report",
        "report of a curve": f"/v1/jobs/{jobs['points']}/report",
        "report of a failure": f"/v1/jobs/{failed}/report",
        "files": f"/jobs/{best}/files",
        "several": f"/jobs/{beginning}",
        "delete": f"/jobs/{failed}/delete",
        "not found": f"/jobs/{uuid.UUID(int=0)}",
        "wrong query": "/?state=odd",
    }
    browser = {"Accept": "text/html"}
    answers = {name: client.get(path, headers=browser) for name, path in paths.items()}
    planned = {"model": "small", "pattern": "0.5", "verb": "check"}
    wrong = {"model": "", "pattern": "3:2", "trials": "x", "calibration/samples": "0"}
    chosen = {"verb": "delete", "job": [failed, jobs["succeeded"], jobs["running"]]}
    answers |= {
        "form with a plan": client.post("/new/check", data=planned),
        "form with errors": client.post("/new", data=wrong),
        "list with an error": client.post("/jobs", data={"verb": "pause"}),
        "delete several": client.post("/jobs", data=chosen),
    }
    keys.create("first", sees_all=True)
    answers |= {
        "login": client.get("/login"),
        "wrong key": client.post("/login", data={"key": "pho_x"}),
        "no key": client.post("/new", data=planned, headers=browser),
    }
    assert answers["several"].status_code == 300
    assert answers["form with a plan"].text.count("It fits.") == 1
    assert {answer.status_code for answer in answers.values()} <= {200, 300, 401, 403, 404, 422}
    return {name: answer.text for name, answer in answers.items()}


def axe_finds(browser, pages, *, scheme, width):
    size = {"width": width, "height": 900}
    with browser.new_context(color_scheme=scheme, viewport=size) as context:  # type: ignore[arg-type]
        page, found = context.new_page(), []
        for title, text in pages.items():
            page.set_content(text)
            if scheme == "dark":
                page.evaluate(SHORTEN)
            page.evaluate(UNFOLD)
            found += [
                f"{title}, {scheme}: {rule['id']}, {rule['impact']}: {node['html'][:200]}"
                for rule in Axe().run(page).response["violations"]
                for node in rule["nodes"]
            ]
    return found


def test_the_pages_please_axe_core_and_are_light(browser, pages):
    found = axe_finds(browser, pages, scheme="light", width=1280)
    found += axe_finds(browser, {name: pages[name] for name in DARK}, scheme="dark", width=420)
    heavy = [title for title, text in pages.items() if len(text.encode()) > HEAVIEST]

    assert found == []
    assert [title for title in heavy if not title.startswith("report")] == []


@pytest.mark.thorough
def test_a_list_that_is_full_of_long_names_is_not_heavy(client, submit):
    for number in range(PAGE_SIZE):
        submit(name=f"{number} {'n' * 90}", model=f"org/{number}{'m' * 90}")
    answer = client.get("/")

    assert answer.text.count('<tr id="job-') == PAGE_SIZE
    assert len(answer.content) < HEAVIEST
