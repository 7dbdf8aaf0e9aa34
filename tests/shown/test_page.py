"""The page: what stands where, what is said to be missing, and that nothing gets in or out."""

import base64
import hashlib
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from pho_service.shown.page import render
from pho_service.shown.report import LayerCell, ReportTrial
from pho_service.spec.configuration import Perplexities, Rating

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)></style></pre>{{ 7 * 7 }}"
SEARCH = [
    "result", "search", "finalists", "layers", "importances", "transfer", "settings", "happened",
]  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "sections"),
    [
        ("search", SEARCH),
        ("study", SEARCH),
        ("transfer", ["result", "transfer", "settings", "happened"]),
    ],
)
def test_sections(page_of: Any, subject: str, sections: list[str]) -> None:
    """Each kind of job has its sections, and each of them is reached from the top."""
    page = page_of(subject=subject)

    assert [section["id"] for section in page.of("section")] == sections
    assert [link["href"] for link in page.of("a")] == [f"#{name}" for name in sections]


def test_what_was_asked_is_a_table_of_what_the_collector_says(page_of: Any) -> None:
    assert page_of().tables["The job"] == [["part", "value"], ["model", "org/name"], ["seed", "7"]]


def test_results(page_of: Any) -> None:
    """The chosen one comes first, then what was measured, then baselines; no column mixes gains."""
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
    assert "Confirmed by perplexity, 20.00 on 496 tokens of c.txt" in page.text["result"]
    assert "The best lies on the border." in page.text["result"]
    coefficients = "row 0.2500, column 0.5000, neighbourhood 0.2500, kernel 5"
    assert ["coefficients", coefficients] in page.tables["The configuration"]


def test_how_good(page_of: Any, report_of: Any) -> None:
    """The page begins with dense, pruned, Wanda and RIA; gains are over RIA as published then."""
    good = Perplexities(dense=16.0, pruned=20.0, wanda=28.0, ria=40.0)
    found = report_of().configuration.model_copy(update={"perplexities": good})
    page = page_of(configuration=found)

    assert next(iter(page.tables.values())) == [
        ["model", "perplexity", "above dense", "gain in perplexity"],
        ["dense", "16.00", "", ""], ["pruned", "20.00", "+25.0%", "50.0%"],
        ["Wanda", "28.00", "+75.0%", "30.0%"], ["RIA", "40.00", "+150.0%", ""],
    ]  # fmt: skip
    assert "The result is 50.0% below RIA's perplexity." in page.text["result"]
    assert "50 % of the weights are removed" in page.text["result"]
    assert "pho pull 1 --prune --out pruned" in page.text["result"]


@pytest.mark.parametrize("back", [None, "/jobs/1"])
def test_way_back(page_of: Any, back: str | None) -> None:
    """There is a link to the job's page where that is known, and else none."""
    links = [link["href"] for link in page_of(job_page=back).of("a")]

    assert [link for link in links if not link.startswith("#")] == ([back] if back else [])


def test_only_the_proxy(page_of: Any, report_of: Any) -> None:
    """Where nothing was measured the best by the proxy follow, with gains in it alone."""
    trials = [replace(t, perplexity=None, divergence=None) for t in report_of().trials]
    found = report_of().configuration.model_copy(update={"candidates": [], "confirmation": None})
    page = page_of(trials=trials, configuration=found)

    assert page.tables["Finalists and baselines"][:3] == [
        ["candidate", "objective", "gain in the proxy", "trial"],
        ["found (chosen)", "0.4000", "60.0%", "5"],
        ["found", "0.5000", "50.0%", "4"],
    ]
    assert "the proxy cannot be compared" in page.text["finalists"]


def test_maximised(page_of: Any, report_of: Any) -> None:
    """An objective that is maximised has no gain over RIA's, and its best rises."""
    trials = [replace(t, perplexity=None, divergence=None) for t in report_of().trials]
    found = report_of().configuration.model_copy(update={"candidates": []})
    page = page_of(objective="gini", maximised=True, trials=trials, configuration=found)
    rows = page.tables["Finalists and baselines"]

    assert rows[1] == ["ria-layer (chosen)", "1.000", "2"]
    assert rows[2] == ["found", "0.6000", "6"]
    assert "The best value, 1.000, is that of trial 2" in page.text["search"]


def test_not_chosen_yet(page_of: Any) -> None:
    """While nothing is chosen, the best so far by perplexity is marked as that."""
    page = page_of(configuration=None, state="running")

    assert page.tables["Finalists and baselines"][1][:2] == ["found (best so far)", "20.00"]
    assert "There is no configuration yet." in page.text["result"]
    assert "Search, running." in page.text[None]


def test_history(page_of: Any) -> None:
    """The history has every rated trial and the best so far; failed ones are counted."""
    page = page_of()

    assert page.figures["history"] == {
        "found": ["found, trial 4: 0.5000", "found, trial 5: 0.4000", "found, trial 6: 0.6000"],
        "baseline": [
            "wanda, trial 0: 0.8000",
            "ria-row, trial 1: 0.9000",
            "ria-layer, trial 2: 1.000",
        ],
    }
    assert page.drawn["history"] == {"found": 3, "baseline": 3, "best so far": 1}
    assert "1 of 7 trials failed" in page.text["search"]
    assert "0.4000, is that of trial 5" in page.text["search"]


def test_long_history(page_of: Any) -> None:
    """Of many trials some are drawn, the last of them too; what was not read is said."""
    trials = [ReportTrial(number=n, method="crepe", value=1 + 1 / (n + 1)) for n in range(9999)]
    page = page_of(trials=trials, left_out=123)
    found = page.figures["history"]["found"]

    assert 250 < len(found) <= 500
    assert found[-1].startswith("found, trial 9998:")
    assert "123 more trials are left out" in page.text["search"]


def test_importances_are_bars_the_largest_on_top(page_of: Any) -> None:
    page = page_of()

    assert page.drawn["importance"] == {"row share": 1, "kernel size": 1}
    assert [line for line in page.text["importances"].split("\n") if "75%" in line]


def test_with_too_few_candidates_no_importance_is_told_and_why(page_of: Any) -> None:
    page = page_of(importance={})

    assert "importance" not in page.figures
    assert "3 rated candidates are too few, 50 are needed" in page.text["importances"]


def test_confirmed(page_of: Any) -> None:
    """What has a perplexity is drawn against its proxy, what was chosen marked."""
    found = [
        "found, trial 4: proxy 0.5000, perplexity 20.00",
        "found, trial 5: proxy 0.4000, perplexity 22.00",
    ]

    assert page_of().figures["confirmed"] == {
        "found": found,
        "baseline": ["ria-layer, trial 2: proxy 1.000, perplexity 25.00"],
        "chosen": found[:1],
    }


def test_a_search_by_perplexity_has_no_proxy_to_compare_with(page_of: Any) -> None:
    page = page_of(objective="perplexity")

    assert "confirmed" not in page.figures
    assert "The search was by perplexity itself" in page.text["finalists"]


def test_layers(page_of: Any) -> None:
    """Errors and sparsities are maps of kinds over blocks; estimates are said to be some."""
    page = page_of()
    first, up = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"

    assert len(page.figures["errors-0"]["cells"]) == 6
    assert f"{first}: 0.1000" in page.figures["errors-0"]["cells"]
    assert f"{up}: 60.0%" in page.figures["sparsities-0"]["cells"]
    assert "The largest is 0.1000, of model.layers.0.self_attn.q_proj" in page.text["layers"]
    assert "So are sparsities" in page.text["layers"]


def test_layers_of_equal_sparsity(page_of: Any, report_of: Any) -> None:
    """Where all linears lose the same, a sentence says so in the place of a map."""
    cells = [replace(cell, sparsity=0.5) for cell in report_of().layers["org/name"]]
    found = report_of().configuration.model_copy(update={"scope": "layer"})
    page = page_of(layers={"org/name": cells}, configuration=found)

    assert "sparsities-0" not in page.figures
    assert "Every linear has the sparsity of the pattern, exactly." in page.text["layers"]


def test_layers_of_several_models(page_of: Any, report_of: Any) -> None:
    """Each model of a joint search has its maps, with its name."""
    cells = report_of().layers["org/name"]
    page = page_of(layers={"org/name": cells, "org/other": cells})

    assert {"errors-0", "errors-1", "sparsities-0", "sparsities-1"} <= set(page.figures)
    assert "Error of each linear on org/other" in page.text["layers"]


def test_transfers(page_of: Any) -> None:
    """What was measured on other models is a table and bars, for perplexity and proxy."""
    page = page_of(transfers=[*page_transfers(), {"target": "b", "warnings": ["b: no weights"]}])

    assert page.tables["On other models, by perplexity"] == [
        [
            "model",
            "dense",
            "wanda",
            "ria",
            "transferred",
            "own best",
            "gain in perplexity",
            "regret in perplexity",
        ],
        ["other", "10.00", "24.00", "25.00", "20.50", "20.00", "18.0%", "10.0%"],
    ]
    assert page.tables["On other models, by proxy"][1] == [
        "other", "0.4000", "0.5000", "0.3000", "40.0%",
    ]  # fmt: skip
    assert [*page.drawn["transfer-proxy"]] == ["wanda", "ria", "transferred"]
    assert "b: no weights" in page.text["transfer"]


def test_odd_transfers(page_of: Any) -> None:
    """A transfer of others may hold anything beside the numbers: what cannot be shown is not."""
    (one,) = page_transfers()
    odd = {**one, "perplexities": {"ria": -1.0, "transferred": 0.0}, "proxies": {}}
    page = page_of(transfers=[{**odd, "regret": "much", "warnings": 5}])

    assert page.tables["On other models, by perplexity"] == [["model", "ria"], ["other", "-1.000"]]


def test_models_whose_names_differ_in_the_folder_alone_are_told_apart(page_of: Any) -> None:
    (one,) = page_transfers()
    page = page_of(transfers=[one, {**one, "target": "team/other"}])

    assert [row[0] for row in page.tables["On other models, by perplexity"][1:]] == [
        "org/other", "team/other",
    ]  # fmt: skip


def page_transfers() -> list[dict[str, Any]]:
    """The transfer of the report."""
    values = {"dense": 10.0, "wanda": 24.0, "ria": 25.0, "transferred": 20.5, "own": 20.0}
    proxies = {"wanda": 0.4, "ria": 0.5, "transferred": 0.3, "own": None}
    return [{"target": "org/other", "perplexities": values, "proxies": proxies, "regret": 0.1}]


def test_timings(page_of: Any) -> None:
    """Stages of a kind are one row: how many are done, their seconds, and their pace."""
    assert page_of().tables["Stages"] == [
        ["stage", "done", "seconds", "longest", "pace", "attempts"],
        ["calibrate", "1 of 1", "12.0", "12.0", "", "1"],
        ["search", "1 of 1", "0.7", "0.7", "100.0 ms a trial", "2"],
        ["perplexity", "1 of 2", "3.0", "3.0", "", "1"],
    ]


def test_command_document_configuration_and_versions_are_there(page_of: Any) -> None:
    page = page_of()

    assert page.tables["Versions"] == [["package", "value"], ["optuna", "5.0.0"]]
    for text in ("pho submit --job job.json", '"pattern": "0.5"', '"format": "pho-configuration"'):
        assert text in page.text["settings"]


def test_what_happened_to_a_job_stands_at_the_end_with_its_time(page_of: Any) -> None:
    assert "2026-01-02 03:03:00succeeded" in page_of().text["happened"]


@pytest.mark.parametrize(
    ("subject", "missing"),
    [
        (
            "search",
            {
                "settings": "What was asked is not known",
                "result": "There is no configuration yet",
                "search": "No trial is rated yet",
                "finalists": "No perplexity is known",
                "layers": "they are stored when a job ends well",
                "transfer": "There is no configuration yet that could be measured",
            },
        ),
        ("transfer", {"transfer": "Nothing is measured yet"}),
        (
            "study",
            {
                "result": "Without its configuration (--config)",
                "layers": "A study does not keep the errors",
                "transfer": "`pho transfer` measures it",
                "happened": "The time of each stage is not known",
            },
        ),
    ],
)
def test_missing(page_of: Any, empty: Any, subject: str, missing: dict[str, str]) -> None:
    """What is not known is said in each section, and there is no empty chart or table."""
    page = page_of(**empty, subject=subject)

    assert {name: text for name, text in missing.items() if text not in page.text[name]} == {}
    assert page.figures == {}
    assert page.tables == {}


def test_not_transferred(page_of: Any) -> None:
    """Of a configuration that was measured nowhere else, the page says how to do that."""
    assert "`pho transfer-job` does it" in page_of(transfers=[]).text["transfer"]


def test_why_a_job_failed_stands_at_the_top(page_of: Any, empty: Any) -> None:
    page = page_of(**{**empty, "state": "failed"}, error="The job failed in search: NaN in 4.q")

    assert "Search, failed." in page.text[None]
    assert "The job failed in search: NaN in 4.q" in page.text[None]


@pytest.mark.parametrize("subject", ["search", "transfer", "study"])
def test_hostile_names(page_of: Any, report_of: Any, subject: str) -> None:
    """Whatever a name holds is text: no element, no script, no tag in a chart comes of it."""
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
                "candidates": [Rating(method=HOSTILE, trial=4)],
            }
        ),
        trials=[*report_of().trials, ReportTrial(number=9, method=HOSTILE, value=1.0)],
        importance={HOSTILE: 1.0},
        layers={HOSTILE: [LayerCell(**{**vars(cell), "kind": HOSTILE, "block": HOSTILE}), *cells]},
        transfers=[{**page_transfers()[0], "target": HOSTILE, "warnings": [HOSTILE]}],
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


def test_nothing_is_fetched(page_of: Any) -> None:
    """No element and no style names anything outside of the page, and its policy forbids it."""
    page = page_of()
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
    assert not re.search(r"https?:|\*|connect-src", policy)


def test_a_browser_applies_the_pages_own_style_no_other_and_runs_no_script(page_of: Any) -> None:
    page = page_of()
    (style,) = page.styles
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (m["content"] for m in page.of("meta") if "http-equiv" in m)

    assert f"style-src 'sha256-{digest}';" in policy
    assert "script-src" not in policy
    assert not any("style" in found for _, found in page.tags)


def test_small(report_of: Any) -> None:
    """The page of 10,000 trials and a model of 80 blocks stays well under 2 MB."""
    (cell, *_) = report_of().layers["org/name"]
    cells = [
        replace(cell, block=f"model.layers.{block}", kind=f"mlp.{kind}_proj", sparsity=kind / 10)
        for block in range(80)
        for kind in range(7)
    ]
    trials = [ReportTrial(number=n, method="crepe", value=1 + 1 / (n + 1)) for n in range(10_000)]
    html = render(report_of(trials=trials, layers={"org/name": cells}))

    assert len(html.encode()) < 500_000


def test_accessible(page_of: Any) -> None:
    """Tables have captions and headings, charts a text, and headings leave out no level."""
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
