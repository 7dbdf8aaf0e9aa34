"""Jobs with several patterns: their points in every answer, and what must be named."""

import re
import uuid

from pho_service.shown.tables import result_in_words
from pho_service.tuning.search import add_point, pareto_study
from storage.records import JobState, NewStage, StageKind
from storage.rows import add_stages
from storage.studies import open_storage, open_study, pareto_study_name, study_name

PATTERNS = ["0.3", "2:4"]
TARGET = {"perplexity_rise": 0.1, "step": 0.2, "lowest": 0.3, "highest": 0.5}


def test_patterns(client, begin, measure, hand, refusal):
    """Each pattern is a point, waiting or measured; its configuration must be named."""
    job = begin(PATTERNS, patterns=["2:4", "0.3"])
    path = f"/v1/jobs/{job}"
    refusal(client.get(f"{path}/best"), 409, "no_configuration")
    first = measure(job, 0, 22.0)
    begun = client.get(path).json()
    second = measure(job, 1, 24.0)
    hand.finish(job, None, "w")
    over = client.get(path).json()

    assert [p["pattern"] for p in begun["points"]] == PATTERNS
    assert [p["state"] for p in begun["points"]] == ["done", "waiting"]
    assert [p["perplexity"] for p in begun["points"]] == [22.0, None]
    assert begun["progress"]["pieces"][1:] == [
        {"stage": "point", "unit": "patterns", "done": 1, "total": 2},
        {"stage": "search", "unit": "trials", "done": 0, "total": 400},
    ]
    assert (over["state"], over["best"], over["warnings"]) == ("succeeded", None, ["w"])
    assert round(over["points"][1]["rise"], 6) == 0.2
    assert client.get(f"{path}/best?pattern=0.30").json() == first["configuration"]
    assert client.get(f"{path}/best?pattern=2:4").json() == second["configuration"]
    told = refusal(client.get(f"{path}/best"), 409, "several_patterns")["detail"]
    assert "Found: 0.3, 2:4" in told
    refusal(client.get(f"{path}/best?pattern=0.4"), 409, "no_such_pattern")
    refusal(client.get(f"{path}/best?pattern=much"), 422)
    refusal(client.post(f"{path}:extend", json={"trials": 10}), 409, "several_patterns")
    refusal(client.post(f"{path}:transfer", json={"models": ["org/b"]}), 409, "several_patterns")
    assert client.get("/v1/configurations?limit=10").json()["considered"] == 2

    assert "<span>2:4, 0.3</span>" in client.get("/").text
    page = client.get(f"/jobs/{job}").text
    assert "<dt>Patterns</dt> <dd>2:4, 0.3</dd>" in page
    assert f"/v1/jobs/{job}/best?pattern=2:4" in page
    assert "Extend" not in page
    written = page[page.index('id="writing"') :]
    assert re.findall(r'<th scope="row">([^<]*)<', written) == ["dense", "0.3", "2:4"]
    assert page.count("so at 2:4") == 1
    form = client.get(f"/new?job={job}").text
    assert "&#34;patterns&#34;: [" in form
    report = client.get(f"{path}/report").text
    assert "Perplexity against sparsity" in report
    assert "+20.0%" in report
    assert "so at 2:4" in report


def test_the_list_and_the_comparison_have_each_pattern(client, begin, measure, submit, hand):
    job, one = begin(["0.3", "0.5", "2:4"], patterns=["0.3", "0.5", "2:4"]), submit()["id"]
    for number, perplexity in enumerate((22.0, 24.0, 26.0)):
        measure(job, number, perplexity)
    hand.succeed(one, perplexities={"dense": 20.0, "pruned": 23.0, "ria": 25.0})
    listed = client.get("/").text
    compared = client.get("/compare", params={"job": [job, one]}).text
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', compared)
    cells = {name: re.findall(r"<td>(.*?)</td>", values) for name, values in rows}

    assert "22.00 to 26.00</td>" in listed
    assert "+10.0% to +30.0%</td>" in listed
    assert f'aria-label="Perplexity by sparsity of {hand.store.get(uuid.UUID(job)).name}"' in listed
    assert 'scope="colgroup" colspan="3"' in compared
    assert cells["Pattern"] == ["0.3", "0.5", "2:4", "0.5"]
    assert cells["Perplexity, pruned"] == ["22.00", "24.00", "26.00", "23.00"]
    assert cells["Against dense"] == ["+10.0%", "+20.0%", "+30.0%", "+15.0%"]
    assert 'id="curves"' in compared


def test_a_point_that_a_baseline_wins_says_so(client, begin, hand, point):
    job = begin(["0.3", "0.5"], patterns=["0.3", "0.5"])
    for number, method in enumerate(("ria-row", "crepe")):
        claim = hand.take(job, StageKind.POINT, number)
        result = point(claim.stage.about, 22.0 + number)
        result["configuration"]["method"] = method
        hand.store.complete(claim, result, then=[])
    points = client.get(f"/v1/jobs/{job}").json()["points"]
    page = client.get(f"/jobs/{job}").text

    assert [each["method"] for each in points] == ["ria-row", "crepe"]
    assert "ria-row, a baseline</td>" in page
    assert ">found</td>" in page
    ria = {"perplexity": 25.0, "ria": 25.0, "wanda": 30.0}
    assert result_in_words({"method": "crepe"}) == "found"
    assert result_in_words({**ria, "method": "ria-row"}) == "ria-row, a baseline"
    assert result_in_words({**ria, "method": "wanda"}) == "wanda, with the search's steps"
    assert result_in_words({**ria, "method": "magnitude"}) == "magnitude, a baseline"
    assert result_in_words({"method": None}) == ""


def test_a_page_leads_to_all_studies_of_a_job(client, begin, hand):
    job, older = (client.get(f"/v1/jobs/{begin(PATTERNS, patterns=PATTERNS)}").json() for _ in "12")
    hand.record(older, 1)
    hand.record(job, 2)
    hand.record(job, 2, island=1)
    with open_storage(hand.store.database.studies_url) as storage:
        pareto = pareto_study(pareto_study_name(job["name"]), "minimize", "proxy", storage)
        for number, pattern in enumerate(PATTERNS):
            study = open_study(storage, study_name(job["name"], number), direction="minimize")
            add_point(pareto, study, 0.3, pattern)
    pages = {each["id"]: client.get(f"/jobs/{each['id']}").text for each in (job, older)}
    named = re.findall(
        r'"/dashboard/studies/(\d+)">(.*?)<span class="hidden"> in the dashboard', pages[job["id"]]
    )
    shown = {word: client.get(f"/api/studies/{number}").json() for number, word in named}
    for each in (job, older):
        hand.bring(each["id"], JobState.CANCELLED)
        assert client.delete(f"/v1/jobs/{each['id']}").status_code == 204

    assert {word: study["name"] for word, study in shown.items()} == {
        "Study of 0.3": job["name"],
        "Study of 2:4": f"{job['name']} island 1",
        "Pareto front": f"{job['name']} Pareto front",
    }
    assert shown["Pareto front"]["directions"] == ["maximize", "minimize"]
    assert len(shown["Pareto front"]["trials"]) == 4
    assert "Study of 0.3<" in pages[older["id"]]
    assert "Pareto front" not in pages[older["id"]]
    assert hand.studies() == []


def test_pruned(client, begin, measure, hand, refusal):
    """One pattern is pruned, the one that is named; another one takes its place."""
    job = begin(PATTERNS, patterns=PATTERNS)
    path = f"/v1/jobs/{job}"
    for number in (0, 1):
        measure(job, number, 22.0)
    hand.finish(job, None)
    refusal(client.post(f"{path}:prune"), 409, "several_patterns")
    refusal(client.post(f"{path}:prune?pattern=0.9"), 409, "no_such_pattern")
    asked = client.post(f"{path}:prune?pattern=2:4").json()
    same = client.post(f"{path}:prune?pattern=2:4").json()
    hand.store.complete(hand.take(job, StageKind.PRUNE), {"key": "key", "files": []}, ended=True)
    other = client.post(f"{path}:prune?pattern=0.3").json()

    assert (asked["pruned"], asked["pruned_pattern"], asked["state"]) == (
        "waiting",
        "2:4",
        "queued",
    )
    assert same == asked
    assert (other["pruned"], other["pruned_pattern"]) == ("waiting", "0.3")
    assert hand.take(job, StageKind.PRUNE).stage.about == "0.3"


def test_points_of_a_target_say_if_within_a_missed_one_says_why(client, begin, measure, hand):
    job = begin(["0.3"], target=TARGET)
    measure(job, 0, 21.0)
    outside = NewStage(kind=StageKind.POINT, number=1, params={"pattern": "0.5"})
    with hand.store.database.transaction() as connection:
        add_stages(connection, hand.store.get(uuid.UUID(job)), [outside])
    answer = hand.store.get(uuid.UUID(job)).of_kind(StageKind.POINT)[0].result["configuration"]
    measure(job, 1, 25.0)
    hand.finish(job, answer)
    found = client.get(f"/v1/jobs/{job}").json()

    assert [p["within"] for p in found["points"]] == [True, False]
    assert client.get(f"/v1/jobs/{job}/best").json() == answer
    assert client.get(f"/v1/jobs/{job}/report").status_code == 200
    assert client.delete(f"/v1/jobs/{job}").status_code == 204

    job = begin(["0.3"], target=TARGET)
    measure(job, 0, 30.0)
    error = {"type": "TargetMissed", "message": "no sparsity is within 10 % of dense"}
    hand.store.fail(hand.take(job, StageKind.FINISH), error, retry=False)
    found = client.get(f"/v1/jobs/{job}").json()

    assert (found["state"], found["best"]) == (JobState.FAILED, None)
    assert found["points"][0]["within"] is False
    assert "no sparsity is within" in client.get("/").text
