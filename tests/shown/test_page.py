"""The page: what stands where, what is said to be missing, and that nothing gets in or out."""

import base64
import hashlib
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from pho_service.shown.page import render
from pho_service.shown.report import LayerCell, ReportTrial
from pho_service.shown.tables import samples_tables
from pho_service.spec.configuration import Continuation, Rating
from pho_service.spec.perplexity import Perplexities, ReportedPerplexities
from pho_service.spec.recovery import Recovered

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></style></pre>{{ 7 * 7 }}"
TRANSFER = {
    "target": "org/other", "regret": 0.1,
    "perplexities": {"dense": 10.0, "wanda": 24.0, "ria": 25.0, "transferred": 20.5, "own": 20.0},
    "proxies": {"wanda": 0.4, "ria": 0.5, "transferred": 0.3, "own": None},
}  # fmt: skip
SEARCH = [
    "result", "writing", "search", "finalists", "layers", "importances", "transfer", "settings",
    "happened",
]  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "sections"),
    [
        ("search", SEARCH),
        ("study", SEARCH),
        ("transfer", ["result", "transfer", "settings", "happened"]),
    ],
)
def test_each_kind_of_job_has_its_sections(page_of, subject, sections):
    page, linked = page_of(subject=subject), page_of(subject=subject, job_page="/jobs/1")
    links = [f"#{name}" for name in sections]

    assert [section["id"] for section in page.of("section")] == sections
    assert [link["href"] for link in page.of("a")] == links
    assert {link["href"] for link in linked.of("a")} == {"/jobs/1", *links}


def test_the_chosen_one_comes_first_then_what_was_measured_then_baselines(page_of):
    page = page_of()

    assert page.tables["Finalists and baselines"] == [
        ["candidate", "perplexity", "gain in perplexity", "divergence", "gain by divergence",
         "objective", "gain in the proxy", "trial"],
        ["found (chosen)", "20.00", "20.0%", "0.5000", "39.3%", "0.5000", "50.0%", "4"],
        ["found", "22.00", "12.0%", "0.6250", "31.3%", "0.4000", "60.0%", "5"],
        ["ria-layer", "25.00", "reference", "1.000", "reference", "1.000", "reference", "2"],
        ["wanda", "", "", "0.7500", "22.1%", "0.8000", "20.0%", "0"],
        ["found", "", "", "0.7500", "22.1%", "0.6000", "40.0%", "6"],
        ["ria-row", "", "", "0.8750", "11.8%", "0.9000", "10.0%", "1"],
    ]  # fmt: skip
    assert "Perplexity 20.00 on 496 tokens of c.txt, in windows of 32." in page.text["result"]
    assert "The best lies on the border." in page.text["result"]
    coefficients = "row 0.2500, column 0.5000, neighbourhood 0.2500, kernel 5"
    assert ["coefficients", coefficients] in page.tables["The configuration"]


def test_the_page_begins_with_how_good_the_result_is(page_of, report_of):
    good = Perplexities(dense=16.0, pruned=20.0, wanda=28.0, ria=40.0)
    found = report_of().configuration.model_copy(update={"perplexities": good})
    page = page_of(configuration=found)

    assert next(iter(page.tables.values())) == [
        ["model", "perplexity", "against dense", "below RIA"],
        ["dense", "16.00", "", ""], ["pruned", "20.00", "+25.0%", "50.0%"],
        ["Wanda", "28.00", "+75.0%", "30.0%"], ["RIA", "40.00", "+150.0%", ""],
    ]  # fmt: skip
    assert page.text["result"].split()[:16] == [
        "Result", "perplexity20.00lower", "is", "better", "above", "dense25.0%", "below",
        "Wanda28.6%the", "better", "baseline", "dense", "16.00", "Wanda", "28.00", "pruned",
        "20.00",
    ]  # fmt: skip
    assert [svg["aria-label"] for svg in page.of("svg") if "gauge" in svg.get("class", "")] == [
        "Perplexity 20.00: 25.0% above dense (16.00), 28.6% below Wanda (28.00), 50.0% below RIA "
        "(40.00); chosen on this text."
    ]
    assert "50 % of the weights are removed" in page.text["result"]
    assert "pho pull 1 --prune --out pruned" in page.text["result"]


def test_a_report_on_a_text_that_nothing_was_chosen_on_is_what_the_page_begins_with(
    page_of, report_of
):
    good = Perplexities(dense=16.0, pruned=20.0, wanda=28.0, ria=40.0)
    report = ReportedPerplexities(
        dense=15.0, pruned=30.0, ria=60.0, ria_scope="row", tokens=62, context_length=32,
        text={"source": "/of/somebody/r.txt"},
    )  # fmt: skip
    update = {"perplexities": good, "report": report}
    found = report_of().configuration.model_copy(update=update)
    page = page_of(configuration=found)

    assert [row[:2] for row in next(iter(page.tables.values()))[1:]] == [
        ["dense", "15.00"], ["pruned", "30.00"], ["Wanda", "none"], ["ria-row", "60.00"],
    ]  # fmt: skip
    assert "perplexity30.00" in page.text["result"]
    assert "below ria-row50.0%" in page.text["result"]
    assert "62 tokens of r.txt" in page.text["result"]
    assert "nothing was chosen on this text" in page.text["result"]
    assert "Chosen with a perplexity of 20.00 on 496 tokens of c.txt" in page.text["result"]


@pytest.mark.parametrize(("dense", "shown"), [(16.0, "18.00"), (17.0, "20.00")])
def test_a_recovered_model_is_what_the_page_begins_with_if_it_has_the_same_windows(
    page_of, report_of, dense, shown
):
    good = Perplexities(dense=16.0, pruned=20.0, wanda=28.0, errors={"dense": 0.5})
    recovered = Recovered(
        train="kept", before=0.5, after=0.25, kept=True, tokens=512, windows=4, held_out=1,
        context_length=32, rate=0.1, seed=0, teacher={"name": "m"}, text={"source": "c.txt"},
        perplexities={"dense": dense, "pruned": 20.0, "recovered": 18.0},
        errors={"recovered/dense": 0.01}, seconds=6.0,
    )  # fmt: skip
    found = report_of().configuration.model_copy(update={"perplexities": good})
    page = page_of(configuration=found, recovery=recovered)

    assert f"perplexity{shown}" in page.text["result"]
    assert ("recovered; 20.00 when pruned" in page.text["result"]) == (shown == "18.00")
    assert ("± 1.1%" in page.text["result"]) == (shown == "18.00")
    assert "18.00" in page.text["recovery"]


def test_a_model_that_was_cut_for_a_speed_has_a_section_that_says_what_it_came_to(page_of):
    said = "In torch it writes 1.25 times as fast as the dense model here."

    assert said in page_of(speed=said).text["speed"]
    assert "speed" not in page_of().text


def test_where_nothing_was_measured_the_proxy_counts(page_of, report_of):
    trials = [replace(t, perplexity=None, divergence=None) for t in report_of().trials]
    found = report_of().configuration.model_copy(update={"finalists": [], "confirmation": None})
    page = page_of(trials=trials, configuration=found)

    assert page.tables["Finalists and baselines"][:3] == [
        ["candidate", "objective", "gain in the proxy", "trial"],
        ["found (chosen)", "0.4000", "60.0%", "5"],
        ["found", "0.5000", "50.0%", "4"],
    ]
    assert "the proxy cannot be compared" in page.text["finalists"]
    page = page_of(objective="gini", maximised=True, trials=trials, configuration=found)
    assert page.tables["Finalists and baselines"][1:3] == [
        ["ria-layer (chosen)", "1.000", "2"], ["found", "0.6000", "6"],  # no gain over RIA
    ]  # fmt: skip
    assert "The best value, 1.000, is that of trial 2" in page.text["search"]


def test_while_nothing_is_chosen_the_best_so_far_is_marked(page_of):
    page = page_of(configuration=None, state="running")

    assert page.tables["Finalists and baselines"][1][:2] == ["found (best so far)", "20.00"]
    assert "Search, running." in page.text[None]
    assert "best objective so far0.4000" in page.text["result"]
    assert "below RIA's objective60.0%" in page.text["result"]


def test_the_history_has_every_rated_trial_and_the_best_so_far(page_of):
    page = page_of()

    assert page.figures["history"] == {
        "found": [
            "found, trial 4: 0.5000, perplexity 20.00", "found, trial 5: 0.4000, perplexity 22.00",
            "found, trial 6: 0.6000",
        ],
        "baseline": [
            "wanda, trial 0: 0.8000", "ria-row, trial 1: 0.9000",
            "ria-layer, trial 2: 1.000, perplexity 25.00",
        ],
    }  # fmt: skip
    assert page.drawn["history"] == {"found": 3, "baseline": 3, "best so far": 1}
    assert "1 of 7 trials failed" in page.text["search"]
    assert "0.4000, is that of trial 5" in page.text["search"]


def test_of_many_trials_some_are_drawn_in_a_small_page(page_of, report_of):
    trials = [ReportTrial(number=n, method="crepe", value=1 + 1 / (n + 1)) for n in range(9999)]
    page = page_of(trials=trials, left_out=123)
    found = page.figures["history"]["found"]
    (cell, *_) = report_of().layers["org/name"]
    cells = [
        replace(cell, block=f"model.layers.{block}", kind=f"mlp.{kind}_proj", sparsity=kind / 10)
        for block in range(80)
        for kind in range(7)
    ]
    large = render(report_of(trials=trials, layers={"org/name": cells}))

    assert 250 < len(found) <= 500
    assert found[-1].startswith("found, trial 9998:")
    assert "123 more trials are not shown here" in page.text["search"]
    assert len(large.encode()) < 500_000


def test_importances_are_bars_with_too_few_candidates_there_are_none(page_of):
    page, few = page_of(), page_of(importance={})

    assert page.drawn["importance"] == {"row share": 1, "kernel size": 1}
    assert [line for line in page.text["importances"].split("\n") if "75%" in line]
    assert "importance" not in few.figures
    assert "that takes 50 rated candidates, and there are 3" in few.text["importances"]


def test_what_was_measured_is_drawn_against_its_proxy_if_there_is_one(page_of):
    found = [
        "found, trial 4: proxy 0.5000, perplexity 20.00",
        "found, trial 5: proxy 0.4000, perplexity 22.00",
    ]

    page = page_of(objective="perplexity")

    assert page_of().figures["confirmed"] == {
        "found": found,
        "baseline": ["ria-layer, trial 2: proxy 1.000, perplexity 25.00"],
        "chosen": found[:1],
    }
    assert "confirmed" not in page.figures
    assert "The search minimised perplexity itself" in page.text["finalists"]


def test_two_points_are_not_a_chart(page_of, report_of):
    trials = [t for t in report_of().trials if t.number in (2, 4)]
    page = page_of(trials=trials)

    assert {"history", "confirmed"}.isdisjoint(page.figures)
    assert "Too few trials to draw: 2 rated." in page.text["search"]


def test_what_is_measured_before_a_reconstruction_is_not_called_what_the_result_is(
    page_of, report_of
):
    found = report_of().configuration
    how = found.confirmation.model_copy(update={"before_reconstruction": 21.0})
    page = page_of(configuration=found.model_copy(update={"confirmation": how}))
    (columns, *_) = page.tables["Finalists and baselines, before reconstruction"]

    assert "gain before reconstruction" in columns
    assert "gain in perplexity" not in columns
    assert "Before reconstruction: 21.00 (-4.8%)." in page.text["result"]


def test_of_several_patterns_each_prompt_stands_once():
    written = {
        name: [Continuation(prompt="If", dense="so", pruned=f"then at {name}")]
        for name in ("0.3", "2:4")
    }
    (table,) = samples_tables(written)

    assert table.title == "… If …"
    assert table.rows == [("dense", "so"), ("0.3", "then at 0.3"), ("2:4", "then at 2:4")]


def test_errors_and_sparsities_are_maps_of_kinds_over_blocks(page_of):
    page = page_of()
    first, up = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"

    assert len(page.figures["errors-0"]["cells"]) == 6
    assert f"{first}: 0.1000" in page.figures["errors-0"]["cells"]
    assert f"{up}: 60.0%" in page.figures["sparsities-0"]["cells"]
    assert "The largest is 0.1000, of model.layers.0.self_attn.q_proj" in page.text["layers"]
    assert "Each layer gets its own sparsity, estimated from the same rows" in page.text["layers"]


def test_each_model_has_maps_unless_all_lose_the_same(page_of, report_of):
    cells = report_of().layers["org/name"]
    same = [replace(cell, sparsity=0.5) for cell in cells]
    found = report_of().configuration.model_copy(update={"scope": "layer"})
    page = page_of(layers={"org/name": cells, "org/other": cells})
    equal = page_of(layers={"org/name": same}, configuration=found)

    assert {"errors-0", "errors-1", "sparsities-0", "sparsities-1"} <= set(page.figures)
    assert "Error by layer on org/other" in page.text["layers"]
    assert "sparsities-0" not in equal.figures
    assert "Each layer has exactly the sparsity of the pattern." in equal.text["layers"]


def test_what_was_measured_on_other_models_is_a_table_and_bars(page_of):
    page = page_of(transfers=[TRANSFER, {"target": "b", "warnings": ["b: no weights"]}])

    assert page.tables["On other models, by perplexity"] == [
        ["model", "dense", "wanda", "ria", "transferred", "own best", "against dense",
         "gain in perplexity", "regret in perplexity"],
        ["other", "10.00", "24.00", "25.00", "20.50", "20.00", "+105.0%", "18.0%", "10.0%"],
    ]  # fmt: skip
    assert page.tables["On other models, by proxy"][1] == [
        "other", "0.4000", "0.5000", "0.3000", "40.0%",
    ]  # fmt: skip
    assert [*page.drawn["transfer-proxy"]] == ["wanda", "ria", "transferred"]
    assert "b: no weights" in page.text["transfer"]
    odd = {**TRANSFER, "perplexities": {"ria": -1.0, "transferred": 0.0}, "proxies": {}}
    page = page_of(transfers=[{**odd, "regret": "much", "warnings": 5}])  # cannot be shown
    assert page.tables["On other models, by perplexity"] == [["model", "ria"], ["other", "-1.000"]]
    page = page_of(transfers=[TRANSFER, {**TRANSFER, "target": "team/other"}])
    names = [row[0] for row in page.tables["On other models, by perplexity"][1:]]
    assert names == ["org/other", "team/other"]  # they differ in the folder alone


def test_what_was_asked_commands_documents_versions_and_events_are_there(page_of):
    page = page_of()

    assert page.tables["The job"] == [["part", "value"], ["model", "org/name"], ["seed", "7"]]
    assert page.tables["Versions"] == [["package", "value"], ["optuna", "5.0.0"]]
    assert page.tables["Stages"] == [
        ["stage", "done", "seconds", "longest", "pace", "attempts"],
        ["calibrate", "1 of 1", "12.0", "12.0", "", "1"],
        ["search", "1 of 1", "0.7", "0.7", "100.0 ms a trial", "2"],
        ["perplexity", "1 of 2", "3.0", "3.0", "", "1"],  # stages of a kind are one row
    ]
    assert "2026-01-02\n03:03:00succeeded" in page.text["happened"]
    for text in ("pho submit --job job.json", '"pattern": "0.5"', '"format": "pho-configuration"'):
        assert text in page.text["settings"]


@pytest.mark.parametrize(
    ("subject", "missing"),
    [
        (
            "search",
            {
                "settings": "The request is not known",
                "result": "No trial has been rated yet",
                "search": "No trial has been rated yet",
                "finalists": "No perplexity was measured",
                "layers": "a job stores them when it succeeds",
                "transfer": "There is no configuration to measure on other models",
            },
        ),
        ("transfer", {"transfer": "Nothing is measured yet"}),
        (
            "study",
            {
                "result": "Without its configuration (pho report --config)",
                "layers": "A study does not store errors",
                "transfer": "pho transfer does that",
                "happened": "The time of each stage is not known",
            },
        ),
    ],
)
def test_missing(page_of, empty, subject, missing):
    """What is not known is said in each section, and there is no empty chart or table."""
    page = page_of(**empty, subject=subject)

    assert {name: text for name, text in missing.items() if text not in page.text[name]} == {}
    assert page.figures == page.tables == {}
    assert "pho transfer-job does that" in page_of(transfers=[]).text["transfer"]


def test_why_a_job_failed_stands_at_the_top(page_of, empty):
    page = page_of(**{**empty, "state": "failed"}, error="The job failed in search: NaN in 4.q")

    assert "Search, failed." in page.text[None]
    assert "The job failed in search: NaN in 4.q" in page.text[None]


@pytest.mark.parametrize("subject", ["search", "transfer", "study"])
def test_whatever_a_name_holds_is_text(page_of, report_of, subject):
    plain = page_of(subject=subject)
    (cell, *cells) = report_of().layers["org/name"]
    found = report_of().configuration
    page = page_of(
        subject=subject,
        title=HOSTILE,
        state=HOSTILE,
        asked={"model": HOSTILE, HOSTILE: "7"},
        warnings=[HOSTILE],
        objective=HOSTILE,
        configuration=found.model_copy(
            update={
                "confirmation": found.confirmation.model_copy(update={"text": {"source": HOSTILE}}),
                "model": {"name": HOSTILE},
                "finalists": [Rating(method=HOSTILE, trial=4)],
            }
        ),
        trials=[*report_of().trials, ReportTrial(number=9, method=HOSTILE, value=1.0)],
        importance={HOSTILE: 1.0},
        layers={HOSTILE: [LayerCell(**{**vars(cell), "kind": HOSTILE, "block": HOSTILE}), *cells]},
        transfers=[{**TRANSFER, "target": HOSTILE, "warnings": [HOSTILE]}],
        document={"model": HOSTILE},
        commands=[HOSTILE],
        prune_commands=[HOSTILE],
        happened=[(report_of().made_at, HOSTILE)],
        versions={HOSTILE: HOSTILE},
    )

    assert page.scripts == plain.scripts == []
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert HOSTILE in page.text["settings"]


def test_nothing_outside_of_the_page_is_named_or_may_be(page_of):
    page = page_of()
    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    named = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    (policy,) = (m["content"] for m in page.of("meta") if "http-equiv" in m)

    assert all(value.startswith("#") for value in named)
    assert not re.search(r"url\(|@import|//", "".join(page.styles))
    assert policy.startswith("default-src 'none';")
    assert f"style-src 'sha256-{digest}';" in policy
    assert not re.search(r"https?:|\*|connect-src|script-src", policy)
    assert not any("style" in found for _, found in page.tags)


def test_tables_charts_and_headings_are_accessible(page_of):
    page = page_of()
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    charts = [found for found in page.of("svg") if found.get("role") == "img"]

    assert page.of("html") == [{"lang": "en"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(found["scope"] in ("col", "row") for found in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert len(charts) == len(page.figures)
    assert all(len(found["aria-label"]) > 20 for found in charts)
