"""A job that cuts blocks, as JSON, on its page, in the list, and in its report."""

import re
from dataclasses import replace

import optuna
import pytest

from pho_service.pipeline.curve import CurvePoint
from pho_service.spec.configuration import Configuration, Confirmation, Rating
from pho_service.spec.perplexity import Perplexities
from pho_service.spec.structure import ESTIMATE, Cut, Structure
from storage.records import NewStage, StageKind
from storage.studies import open_storage, open_study, study_name

CUT = {"pattern": "structured:20%", "trials": 200, "preset": "best"}
BEST = Configuration(
    method="structured",
    cut=Cut(
        structure=Structure(neurons=1152), layers=30, neurons=1536, query_heads=9, removed=0.1875
    ),
    pattern="structured:20%",
    scope="layer",
    perplexities=Perplexities(dense=13.69, pruned=15.9),
    objective={"name": ESTIMATE, "direction": "minimize", "value": 0.125},
    confirmation=Confirmation(
        perplexity=15.9, tokens=4088, context_length=512, text={"source": "book.txt"}
    ),
    finalists=[
        Rating(method="1,152 neurons", trial=1, proxy=0.125, perplexity=15.9),
        Rating(method="1,280 neurons, 6 query heads", trial=0, proxy=0.5, perplexity=21.3),
    ],
    search={"sampler": "every split", "trials": 2, "study": "study"},
    model={"name": "org/name"},
)


@pytest.fixture
def succeeded(submit, hand):
    """A job that ends with a configuration; its finalists are the trials of its study."""

    def of(best):
        job = submit(**{**CUT, "pattern": best.pattern})
        with open_storage(hand.store.database.studies_url) as storage:
            study = open_study(storage, study_name(job["name"], 0), direction="minimize")
            for rating in reversed(best.finalists):
                attributes = {"method": rating.method, "scope": "layer", "coefficients": {}}
                trial = optuna.trial.create_trial(value=rating.proxy, user_attrs=attributes)
                study.add_trial(trial)
        hand.to_confirm(job["id"])
        hand.finish(job["id"], best.model_dump(mode="json"))
        return job

    return of


@pytest.fixture
def job(succeeded):
    """A job that has succeeded, with two trials in its study."""
    return succeeded(BEST)


def visible(text):
    return re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]+>", " ", text, flags=re.DOTALL))


def test_its_json_has_the_cut_and_no_coefficients(client, job):
    shown = client.get(f"/v1/jobs/{job['id']}").json()
    best = client.get(f"/v1/jobs/{job['id']}/best").json()
    trials = client.get(f"/v1/jobs/{job['id']}/trials").json()["trials"]

    assert job["name"].startswith("name structured:20% ")
    assert shown["best"]["perplexities"]["pruned"] == 15.9
    assert best["cut"]["structure"]["neurons"] == 1152
    assert "coefficients" not in best
    assert [trial["method"] for trial in trials] == [
        "1,280 neurons, 6 query heads", "1,152 neurons",
    ]  # fmt: skip
    assert client.get("/v1/configurations").json()["configurations"] == []


def test_its_page_says_what_stays_and_nothing_of_coefficients(client, job):
    page = visible(client.get(f"/jobs/{job['id']}").text)
    report = visible(client.get(f"/v1/jobs/{job['id']}/report").text)

    for text in (page, report):
        assert "1,152 neurons, of 30 blocks with 1,536 neurons" in text
        assert "Splits of the share" in text
        assert "1,280 neurons, 6 query heads" in text
        assert all(figure in text for figure in ("15.90", "above dense", "16.1%", "dense 13.69"))
        for absent in ("RIA", "Wanda", "coefficient", "Importances", "other models", "Extend"):
            assert absent not in text.partition("Document")[0]


def test_the_page_of_a_cut_for_bytes_says_what_each_share_costs_and_why_nothing_is_cut(
    client, succeeded
):
    ways = [{"share": 0.0, "cut": 0.0, "bits": 0.053, "nats": 0.053},
            {"share": 0.05, "cut": 0.083, "bits": 0.002, "nats": 0.085}]  # fmt: skip
    says = "In 95 MB the whole model loses least: nothing is cut."
    best = BEST.model_copy(
        update={
            "pattern": "bytes:95MB",
            "cut": replace(BEST.cut, structure=Structure(), removed=0.0),
            "perplexities": Perplexities(dense=13.69, pruned=13.69),
            "search": {**BEST.search, "goal": {"share": 0.0, "says": says, "ways": ways}},
        }
    )
    job = succeeded(best)

    for path in (f"/jobs/{job['id']}", f"/v1/jobs/{job['id']}/report"):
        text = visible(client.get(path).text)
        assert f"{says} What stays: everything" in text
        assert "the same as dense 0.0%" in text
        assert "Estimated cost of so many bytes" in text
        assert "5.0%" in text.partition("Estimated cost of so many bytes")[2]


def test_it_is_listed_by_its_pattern(client, job):
    rows = client.get("/v1/jobs", params={"pattern": "structured:20%"}).json()["jobs"]
    page = visible(client.get("/?pattern=structured:20%25").text)

    assert [row["id"] for row in rows] == [job["id"]]
    assert "structured:20%" in page
    assert "15.90" in page


def test_what_is_of_coefficients_is_refused_with_a_way_out(client, job, refusal):
    there = f"/v1/jobs/{job['id']}"
    for answer in (
        client.post(f"{there}:extend", json={"trials": 10}),
        client.post(f"{there}:transfer", json={"models": ["org/other"]}),
    ):
        problem = refusal(answer, 409, "a_cut")
        assert "Submit a job for another model or another share" in problem["detail"]
    imported = refusal(client.post("/v1/configurations", json=BEST.model_dump(mode="json")), 422)
    assert "of the blocks of its own model" in str(imported)


def test_what_a_cut_does_not_have_is_named(client, refusal):
    document = {"model": "org/name", "pattern": "structured:20%"}
    for field, value in (("sampler", "random"), ("scope", "row"), ("islands", 2)):
        answer = client.post("/v1/jobs", json={**document, field: value})
        assert field in str(refusal(answer, 422)["errors"])


@pytest.mark.parametrize(
    ("pattern", "pointer"),
    [({"pattern": "smaller:60%"}, "/pattern"),
     ({"pattern": None, "patterns": ["smaller:10%", "smaller:60%"]}, "/patterns")],
)  # fmt: skip
def test_a_share_of_the_file_that_half_of_the_blocks_does_not_have_is_refused(
    client, tmp_path, write_small, refusal, pattern, pointer
):
    write_small(tmp_path / "example" / "small-llama")
    answer = client.post("/v1/jobs", json={"model": "example/small-llama", **pattern})
    (error,) = refusal(answer, 422)["errors"]

    assert error["pointer"] == pointer
    assert "smaller:60% is more than 22%" in error["detail"]
    assert "half of what its blocks have of it" in error["detail"]


@pytest.mark.parametrize(
    ("asked", "pointer", "said"),
    [
        ({"pattern": "bytes:1kB"}, "/pattern", "with half of its blocks cut: 3.4375 bits"),
        ({"pattern": "0.5", "prune": True, "gguf": ["q8_0", "1kB"]}, "/gguf", "file: 3.4375 bits"),
    ],
)  # fmt: skip
def test_bytes_that_no_file_of_the_model_can_have_are_refused(
    client, tmp_path, write_small, refusal, asked, pointer, said
):
    write_small(tmp_path / "example" / "small-llama")
    document = {"model": "example/small-llama", **asked}
    (error,) = refusal(client.post("/v1/jobs", json=document), 422)["errors"]
    enough = client.post(
        "/v1/jobs", json={"model": "example/small-llama", "pattern": "bytes:1MB", "prune": True}
    )

    assert error["pointer"] == pointer
    assert "0.001 MB are too few for small-llama, which has at least" in error["detail"]
    assert said in error["detail"]
    assert enough.status_code == 202
    assert refusal(client.post("/v1/plan", json=document), 422)["errors"] == [error]


def test_all_its_stages_are_to_come(client, submit):
    job = submit(**CUT)
    page = visible(client.get(f"/jobs/{job['id']}").text)
    search = [p for p in job["progress"]["pieces"] if p["stage"] == StageKind.SEARCH]

    assert search == []  # how many splits there are, nobody knows before the model is read
    assert "200 trials" not in page
    assert "of 200" not in page


CUTS = ["structured:10%", "structured:20%"]


def test_a_curve_of_cuts_has_a_point_for_each_share_and_no_word_of_scores(client, begin, hand):
    job = begin(CUTS, patterns=CUTS)
    for number, pattern in enumerate(CUTS):
        point = CurvePoint(
            pattern=pattern, scope="layer", sparsity=0.1 + number / 10, perplexity=21.0 + number,
            rise=0.1, dense=20.0, wanda=None, ria=None, proxy=0.1, trials=2, seconds=1.0, study="s",
            trial=0, configuration=BEST.model_copy(update={"pattern": pattern}), warnings=[],
        )  # fmt: skip
        hand.store.complete(
            hand.take(job, StageKind.POINT, number), point.to_dict(),
            then=[NewStage(kind=StageKind.FINISH)],
        )  # fmt: skip
    shown = client.get(f"/v1/jobs/{job}").json()
    page = visible(client.get(f"/jobs/{job}").text).partition("Document")[0]

    assert [point["pattern"] for point in shown["points"]] == CUTS
    assert "search" not in [piece["stage"] for piece in shown["progress"]["pieces"]]
    assert "Patterns structured:10%, structured:20%" in page
    assert "22.00" in page
    for absent in ("Preset", "Scope", "RIA", "Extend"):
        assert absent not in page


def test_a_target_of_cuts_is_named_as_one_and_tries_no_more_than_half_of_the_blocks(client, submit):
    job = submit(pattern=None, target={"perplexity_rise": 0.1, "structured": True})
    listed = visible(client.get("/").text)

    assert job["spec"]["target"]["highest"] == 0.5
    assert job["spec"]["confirm"]["finalists"] == 2
    assert "within 10 % of dense by cuts" in listed
