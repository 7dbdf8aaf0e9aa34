"""The pages for people in a real browser, where there is one: with the keyboard, on a phone."""

import json
import re
import socket
import threading
import time
import uuid
from hashlib import sha256

import optuna
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from optuna.distributions import CategoricalDistribution, FloatDistribution
from playwright.sync_api import expect

from pho_service.api import job_list
from pho_service.api.app import create_app
from pho_service.host.settings import read_settings
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import KeyStore
from storage.records import JobState, StageKind
from storage.studies import open_storage

WIDTH, HEIGHT = 390, 800  # of a phone
MOST_TABS = 60


@pytest.fixture(scope="module")
def url(url_of_file, tmp_path_factory, write_small):
    folder = tmp_path_factory.mktemp("models")
    write_small(folder / "small")
    settings = read_settings(model_roots=(folder,), text_roots=())
    app = create_app(Database(url_of_file, pool=4), settings)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def page(browser, url, database):
    """The list of jobs as a browser shows it; afterwards, nothing must have been complained of."""
    del database  # which is empty now
    said = []
    with browser.new_context(base_url=url) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto("/")
        yield page
    # Chromium's console has a line for each answer of 4xx, which is how a form says no.
    # A job that was deleted is not found any more.
    assert [
        line for line in said if not re.search("422 \\(Unproc|404 \\(Not F|401 \\(Unauth", line)
    ] == []


@pytest.fixture
def store(database):
    return JobStore(database)


def go(page, name, kind="link"):
    """Press Tab until something has the focus; a person would see that it has."""
    wanted = page.get_by_role(kind, name=name, exact=True)  # type: ignore[arg-type]
    expect(wanted).to_be_visible()
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        if wanted.evaluate("element => element === document.activeElement"):
            assert wanted.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
            return
    raise AssertionError(f"Tab does not lead to the {kind} {name!r}")


def write(page, label, text):
    """Tab to a field, and type over what is in it."""
    go(page, label, "combobox" if label in ("Model (needed)", "Pattern") else "textbox")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type(text)


def test_keys_alone_submit_a_job_whose_plan_follows_them(page, store):
    go(page, "Submit one")
    page.keyboard.press("Enter")
    write(page, "Model (needed)", "small")
    write(page, "Pattern", "2:4")
    page.keyboard.press("Escape")  # closes the suggestions
    for fold in ("More", "Trials, seed"):
        page.locator("summary", has_text=fold).press("Enter")
    write(page, "Trials", "60")
    expect(page.locator("#plan")).to_contain_text("search, 60 trials")
    same = "pho submit small --pattern 2:4 --context-length 128 --trials 60"
    expect(page.locator("#commands")).to_contain_text(same)
    expect(page.get_by_label("Context length")).to_have_attribute("placeholder", "128")
    go(page, "Check and plan", "button")
    page.keyboard.press("Enter")
    expect(page.locator("#plan")).to_contain_text("It fits.")
    page.keyboard.press("Shift+Tab")  # to the other button
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/*")
    (job,) = store.page()

    assert (job.spec["pattern"], job.spec["trials"]) == ("2:4", 60)
    assert page.url.endswith(f"/jobs/{job.id}")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"small 2:4 row {str(job.id)[:8]}")
    go(page, "All jobs")
    page.keyboard.press("Enter")
    expect(page.locator(f"#job-{job.id}")).to_contain_text("queued")


def test_a_text_that_is_uploaded_in_the_form_is_named_by_the_job(page, store):
    text = json.dumps({"text": "lorem ipsum dolor sit amet " * 2000})
    page.goto("/new")
    page.get_by_label("Model (needed)").fill("small")
    page.get_by_label("Pattern", exact=True).fill("0.5")
    place = page.locator("[data-upload]").first
    chosen = place.get_by_label("Or upload a file")
    chosen.set_input_files({"name": "x.parquet", "mimeType": "", "buffer": b"no table"})
    expect(place.get_by_role("status")).to_contain_text("it is not a parquet file")
    chosen.set_input_files({"name": "my <b>.jsonl", "mimeType": "", "buffer": text.encode()})
    expect(place.get_by_role("status")).to_have_text("my <b>.jsonl is uploaded.")
    expect(page.locator("#commands")).to_contain_text("sha256:")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**/jobs/*")
    (job,) = store.page()

    content = sha256(text.encode()).hexdigest()
    assert job.spec["calibration"]["text"] == f"sha256:{content}.jsonl"


def test_a_job_page_follows_a_job(page, store, job_of):
    job = job_of(page)
    page.goto(f"/jobs/{job.id}")
    page.evaluate("window.kept = true")
    state = page.locator("#head .state")
    expect(state).to_have_text("queued")
    store.ask(job.id, "pause")
    expect(state).to_have_text("paused")
    expect(page.locator("#happened")).to_contain_text("paused")
    kept = page.evaluate("window.kept")

    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("queued")
    store.ask(job.id, "pause")  # a page that has seen a cancelled job looks no more
    with store.deleting(job.id):
        pass
    expect(page.get_by_role("main")).to_contain_text("No job has this id")
    assert kept


def test_a_folded_section_and_the_focus_on_it_survive_a_refresh(page, store, job_of):
    job = job_of(page)
    page.goto(f"/jobs/{job.id}")
    fold = page.locator("#happened > summary")
    fold.press("Enter")
    store.ask(job.id, "pause")

    expect(page.locator("#happened")).to_contain_text("paused")
    expect(page.locator("#happened")).not_to_have_attribute("open", "")
    expect(fold).to_be_focused()


def test_keys_open_and_close_the_menu_of_a_job(page, job_of):
    job = job_of(page)
    page.goto(f"/jobs/{job.id}")
    compare = page.get_by_role("link", name="Compare")
    expect(compare).to_be_hidden()
    page.locator("#menu > summary").press("Enter")
    expect(compare).to_be_visible()
    page.keyboard.press("Escape")

    expect(compare).to_be_hidden()
    expect(page.locator("#menu > summary")).to_be_focused()


def test_a_mark_of_a_chart_tells_its_trial_to_keys_and_to_a_pointer(page, hand, job_of):
    job = job_of(page, minutes=None)
    hand.calibrate(str(job.id))
    hand.record({"name": job.name}, 8)
    page.goto(f"/jobs/{job.id}")
    tip = page.locator("#tip")
    go(page, "Points of Objective by trial: arrow keys move from one to the next", "group")
    expect(tip).to_contain_text("found, trial 1: 0.1000")
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("found, trial 2: 0.2000")
    trial = re.compile(r"/dashboard/studies/\d+/trials\?numbers=2$")
    expect(tip.get_by_role("link")).to_have_attribute("href", trial)
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.locator("#history .dot").last.hover()

    expect(tip).to_contain_text("found, trial 7: ")


def test_what_is_wrong_has_the_focus_and_leads_to_its_field(page, store):
    page.goto("/new")
    write(page, "Model (needed)", "org/kept")
    write(page, "Pattern", "3:2")
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    expect(alert).to_be_focused()
    expect(alert).to_contain_text("The job was not submitted")
    go(page, "Pattern")
    page.keyboard.press("Enter")
    field = page.get_by_role("combobox", name="Pattern")
    expect(field).to_be_focused()
    expect(field).to_have_accessible_description(re.compile("Pattern '3:2' keeps N=3 of M=2"))
    expect(page.get_by_label("Model (needed)")).to_have_value("org/kept")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("0.5")
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/*")

    assert [job.spec["pattern"] for job in store.page()] == ["0.5"]


def test_keys_alone_cancel_and_delete(page, url, store, job_of):
    job = job_of(page, name="mine")
    page.goto("/")
    go(page, f"Choose {job.name}", "checkbox")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator(f"#job-{job.id}")).to_contain_text("cancelled")
    state = store.get(job.id).state
    page.get_by_role("checkbox", name=f"Choose {job.name}").check()
    go(page, "Delete", "button")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Delete 1 job?")
    go(page, "Delete", "button")
    page.keyboard.press("Enter")
    expect(page.get_by_text("There is no job yet.")).to_be_visible()

    assert state is JobState.CANCELLED
    assert store.page() == []
    assert page.url == f"{url}/"


@pytest.fixture
def job_of(store):
    """Submit a job by the API, with some values changed; gives it as it is stored."""

    def submit(page, **changes):
        document = {"model": "org/name", "pattern": "0.5", **changes}
        answer = page.request.post("/v1/jobs", data=document)
        return store.get(uuid.UUID(answer.json()["id"]))

    return submit


def test_the_first_tab_shows_a_way_past_the_links(page, job_of):
    job_of(page)
    page.goto("/")
    page.keyboard.press("Tab")
    skip = page.locator(":focus")
    expect(skip).to_have_text("Skip to the content")
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")

    assert page.locator(":focus").evaluate("element => element.closest('main') !== null")


def test_refresh(page, store, job_of, monkeypatch):
    """The list follows its jobs; what is chosen stays, the focus too, and leads to comparisons."""
    monkeypatch.setattr(job_list, "LIVE_S", 0.2)
    first = job_of(page)
    page.goto("/?sort=created")
    page.evaluate("window.kept = true")
    box = page.get_by_role("checkbox", name=f"Choose {first.name}")
    box.check()
    second = job_of(page, name="second")
    expect(page.locator(f"#job-{second.id}")).to_contain_text("queued")
    page.get_by_role("link", name=f"second {str(second.id)[:8]}").focus()
    store.ask(first.id, "pause")
    store.ask(second.id, "cancel")
    expect(page.locator(f"#job-{first.id}")).to_contain_text("paused")
    expect(page.locator(f"#job-{second.id}")).to_contain_text("cancelled")
    expect(page.locator("#facets")).to_contain_text("paused 1")

    expect(box).to_be_checked()
    expect(page.get_by_role("link", name=f"second {str(second.id)[:8]}")).to_be_focused()
    assert page.evaluate("window.kept")
    page.get_by_role("checkbox", name="Choose all on this page").check()
    assert page.locator("[data-rows] :checked").count() == 2

    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("2 jobs side by side")
    expect(page.get_by_role("row", name="State paused cancelled")).to_be_visible()
    page.get_by_role("link", name=f"second {str(second.id)[:8]}").first.click()
    page.get_by_role("link", name="Report").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(second.name)
    page.get_by_role("link", name="Back to the job").click()
    expect(page.locator("#head .state")).to_have_text("cancelled")


def test_a_link_opens_after_the_login(page, url, store, job_of):
    job = job_of(page)
    keys = KeyStore(store.database)
    key, secret = keys.create("mine", sees_all=True)
    page.goto(f"/jobs/{job.id}")
    expect(page.get_by_role("textbox", name="Key")).to_be_focused()
    page.keyboard.type(secret)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{url}/jobs/{job.id}")
    expect(page.get_by_role("heading", level=1)).to_contain_text(str(job.id)[:8])
    keys.revoke(key.prefix)
    expect(page.get_by_role("alert")).to_contain_text("Your login has expired")
    page.get_by_role("link", name="Load it again").click()

    expect(page.get_by_role("status")).to_contain_text(f"you are back at /jobs/{job.id}")


def test_on_a_phone_no_page_is_wider(page, store, job_of):
    job = job_of(page, name="w" * 100, model=f"org/{'m' * 90}")
    store.enter_worker(uuid.uuid4(), name="h" * 60, device="cuda:0", kinds=[*StageKind])
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    beyond, grounds = {}, []
    several = job_of(page, pattern=None, patterns=["0.3", "0.5", "0.7", "2:4"])
    pages = ("/", "/new", f"/jobs/{job.id}", f"/jobs/{job.id}/delete", f"/jobs/{several.id}")
    for path in (*pages, f"/compare?job={job.id}&job={several.id}", "/docs", "/new?"):
        page.goto(path)
        if path == "/new?":
            page.get_by_label("Model (needed)").fill("../" + "x" * 300)
            page.get_by_role("button", name="Submit").press("Enter")
            expect(page.get_by_role("alert")).to_be_focused()
        beyond[path] = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert set(beyond.values()) == {0}
    assert grounds == ["rgb(243, 244, 246)", "rgb(17, 24, 39)"]


@pytest.mark.thorough
def test_the_dashboard_pleases_axe_core_and_fits_a_phone(browser, url, database):
    with open_storage(database.studies_url) as storage:
        study = optuna.create_study(storage=storage, study_name="s" * 60)
        for value in (0.25, 0.5, 0.75):
            study.add_trial(
                optuna.create_trial(
                    value=value,
                    params={"row": value, "method": "crepe"},
                    distributions={
                        "row": FloatDistribution(0, 1), "method": CategoricalDistribution(["crepe"])
                    },
                    user_attrs={"steps": "x" * 300},
                )
            )  # fmt: skip
        number = study._study_id
    found = {}
    page = browser.new_page(base_url=url, viewport={"width": WIDTH, "height": HEIGHT})
    for path, shown in {
        f"studies/{number}/analytics": "Slice", f"studies/{number}/trials": "Trial 0 (trial_id=",
        f"studies/{number}/smartSelection": "Param row", "compare-studies": "min",
    }.items():  # fmt: skip
        page.goto(f"/dashboard/{path}")
        expect(page.get_by_text(shown).first).to_be_visible()
        bad = Axe().run(page).response["violations"]
        found[path] = [rule["id"] for rule in bad if rule["impact"] in ("serious", "critical")]
        if page.evaluate("document.documentElement.scrollWidth") > WIDTH:
            found[path].append("wider than the window")
    page.close()

    assert {path: each for path, each in found.items() if each} == {}


def test_the_apis_description_asks_no_other_machine_for_anything(page, url):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    go(page, "API")
    page.keyboard.press("Enter")

    expect(page.get_by_text("/v1/jobs/{job_id}:cancel")).to_be_visible()
    assert [each for each in asked if not each.startswith((url, "data:"))] == []
