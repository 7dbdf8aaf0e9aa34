"""
The page: sections of sentences, tables and charts, in one file that asks the network for nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import PurePath
from typing import Any

from jinja2 import Template
from markupsafe import Markup

from pho_service.report import charts, tables
from pho_service.report.charts import Chart
from pho_service.report.curve import curve_section
from pho_service.report.data import Report
from pho_service.report.html import policy_hash, template_environment
from pho_service.report.section import Section
from pho_service.report.study import ENOUGH
from pho_service.report.tables import Table

# Draws each figure from the JSON beside it. Its hash is in the policy, so no other script runs.
DRAW = """
for (const place of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displayModeBar: false});
}
"""

_CAPTIONS = {"search": "The job", "transfer": "The job", "study": "The study"}


def render(report: Report) -> str:
    """The whole page of a report as HTML."""
    what = f"{report.subject}, {report.state}" if report.state else "study of a search"
    lead = f"{what.capitalize()}. Report of {report.made_at:%Y-%m-%d %H:%M %Z}."
    return page(report.title, _sections(report), lead=lead, error=report.error)


def page(
    title: str, sections: Sequence[Section], *, lead: str = "", error: str | None = None
) -> str:
    """
    Sections as one page of HTML.

    Args:
        title: A heading; in the browser's tab, too.
        sections: In their order.
        lead: A sentence below the heading.
        error: Why there is no more.
    """
    return _template().render(
        title=title,
        lead=lead,
        error=error,
        sections=sections,
        policy=content_security_policy(),
        plotly=Markup(_plotly()),  # noqa: S704 - a library's own file
        draw=Markup(DRAW),  # noqa: S704 - ours
    )


@cache
def content_security_policy() -> str:
    """What a browser lets the page do: run its two scripts, and nothing that needs a network."""
    hashes = " ".join(policy_hash(script) for script in (_plotly(), DRAW))
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@cache
def _template() -> Template:
    return template_environment("pho_service.report", ".").get_template("page.html")


def curve_page(document: Mapping[str, Any]) -> str:
    """The curve of `pho curve`, its JSON values given, as one page of HTML."""
    name = PurePath(str(document["model"].get("name", "the model"))).name
    return page(f"{name}: perplexity against sparsity", [curve_section(document)])


def _sections(report: Report) -> list[Section]:
    asked = Section(
        id="asked",
        title="What was asked",
        texts=[] if report.asked else ["Nothing is known of what was asked."],
        tables=[tables.pairs_table(_CAPTIONS[report.subject], "part", report.asked)]
        if report.asked
        else [],
    )
    curve = [] if report.curve is None else [curve_section(report.curve)]
    if report.several and report.configuration is None:
        missing = Section(
            id="curve", title="Perplexity against sparsity", texts=["Nothing is measured yet."]
        )
        return [asked, *(curve or [missing]), _timings(report), _reproduction(report)]
    parts = [asked, *curve, _result(report)]
    if report.subject != "transfer":
        parts += [_history(report), _confirmed(report), _layers(report)]
    return [*parts, _transfers(report), _timings(report), _reproduction(report)]


def _result(report: Report) -> Section:
    texts = list(report.warnings) if report.subject != "transfer" else []
    found = []
    if report.configuration is not None:
        found.append(tables.coefficients_table(report.configuration))
    if report.subject == "transfer":
        texts.append(
            "A transfer searches nothing: it measures this configuration on other models. How it "
            "was found is in the report of the job that found it."
        )
        return Section(id="result", title="The configuration", texts=texts, tables=found)
    if report.configuration is None:
        texts.append(
            "There is no configuration yet."
            if report.subject == "search"
            else "Without its configuration (--config) it is not known what was chosen: the first "
            "row is the best of what the study holds."
        )
    if report.configuration is not None and report.configuration.confirmation is not None:
        how = report.configuration.confirmation
        before = how.before_reconstruction
        rebuilt = "" if before is None else f" Before its blocks were reconstructed: {before:.5g}."
        texts.insert(
            0,
            f"Confirmed by perplexity, {how.perplexity:.5g} on {how.tokens} tokens of "
            f"{_file(str(how.text.get('source', 'a text')))}, in windows of {how.context_length}."
            f"{rebuilt}",
        )
    if report.perplexities is not None:
        texts.insert(0, f"Perplexity: {report.perplexities}.")
    results = tables.results_table(report)
    if results is None:
        texts.append("No trial has a value yet: there are neither results nor baselines.")
    return Section(
        id="result",
        title="Result and baselines",
        texts=texts,
        tables=[*([] if results is None else [results]), *found],
    )


def _file(source: str) -> str:
    """A text without its folder; a data set as it is."""
    path = PurePath(source)
    return path.name if path.is_absolute() else source


def _history(report: Report) -> Section:
    history, importance = charts.history_chart(report), charts.importance_chart(report)
    texts = []
    failed = sum(trial.value is None for trial in report.trials)
    candidates = sum(not trial.is_baseline for trial in report.rated)
    if history is None:
        texts.append("No trial is rated yet.")
    if failed:
        texts.append(f"{failed} of {len(report.trials)} trials failed and are not drawn.")
    if report.left_out:
        texts.append(
            f"{report.left_out} more trials are left out here, for they are too many to read; the "
            "result counts them."
        )
    if importance is None and candidates < ENOUGH:
        texts.append(
            f"The importance of the coefficients is not told: {candidates} rated candidates are "
            f"too few, {ENOUGH} are needed."
        )
    elif importance is None:
        texts.append(
            "The importance of the coefficients is not told: the candidates do not differ in what "
            "was searched, or it made no difference."
        )
    return Section(
        id="history",
        title="The search",
        texts=texts,
        charts=[chart for chart in (history, importance) if chart is not None],
        tables=[] if importance is None else [tables.importance_table(report)],
    )


def _confirmed(report: Report) -> Section:
    chart = charts.confirmed_chart(report)
    texts = []
    if report.objective == "perplexity":
        texts.append("The search was by perplexity itself: there is no proxy to compare with it.")
    elif chart is None:
        texts.append("No perplexity is known, so the proxy cannot be compared with it.")
    return Section(
        id="confirmed",
        title="Proxy against perplexity of the confirmed candidates",
        texts=texts,
        charts=[] if chart is None else [chart],
    )


def _layers(report: Report) -> Section:
    if not report.layers:
        missing = {
            True: "A study does not keep the errors and sparsities of layers; a job of the service "
            "does.",
            False: "Errors and sparsities of layers are not known: they are stored when a job ends "
            "well, and older versions of PHO did not store them.",
        }[report.subject == "study"]
        return Section(id="layers", title="Layers", texts=[missing])
    estimated, steps = False, "none"
    if report.configuration is not None:
        asked = report.configuration.steps
        estimated = report.configuration.scope == "global" or not asked.allocation.is_even
        steps = ", ".join(asked.beside_mask)
    texts = [
        "Errors are estimated from the rows of each linear that the calibration sampled.",
        "So are sparsities, for in this scope or allocation each linear gets its own; all together "
        "have the pattern's."
        if estimated
        else "Every linear has the sparsity of the pattern, exactly.",
    ]
    if steps:
        texts.append(f"Both are as they are before the later steps ({steps}).")
    shown = []
    for number, (model, cells) in enumerate(report.layers.items()):
        if cells:
            shown += charts.layer_charts(number, model, cells, several=len(report.layers) > 1)
    return Section(id="layers", title="Layers", texts=texts, charts=shown)


def transfer_section(transfers: Sequence[Mapping[str, Any]]) -> Section:
    """What a configuration was worth on other models: the targets of a transfer's file."""
    found: list[Table] = []
    drawn: list[Chart] = []
    for what in tables.MEASURES:
        table = tables.transfer_table(transfers, what)
        chart = charts.transfer_chart(tables.transfer_rows(transfers, what), what)
        found += [] if table is None else [table]
        drawn += [] if chart is None else [chart]
    return Section(
        id="transfer",
        title="On other models",
        texts=tables.failed_transfers(transfers),
        tables=found,
        charts=drawn,
    )


def _transfers(report: Report) -> Section:
    section = transfer_section(report.transfers)
    if report.transfers:
        return section
    missing = {
        "search": "There is no configuration yet that could be measured on other models."
        if report.configuration is None
        else "This configuration was not measured on other models: `pho transfer-job` does it.",
        "transfer": "Nothing is measured yet.",
        "study": "Nothing is known of other models: `pho transfer` measures it, and its "
        "transfer.json can be given as --config.",
    }[report.subject]
    return replace(section, texts=[missing])


def _timings(report: Report) -> Section:
    if report.stages:
        chart = charts.timings_chart(tables.seconds_by_stage(report.stages))
        return Section(
            id="timings",
            title="Timings",
            tables=[tables.timings_table(report)],
            charts=[] if chart is None else [chart],
        )
    texts = ["A study does not say what stages took."]
    if report.recorded is not None:
        first, last = report.recorded
        seconds = (last - first).total_seconds()
        count = max(1, len(report.trials) + report.left_out)
        texts.append(
            f"Its trials were written down from {first:%Y-%m-%d %H:%M:%S} to {last:%H:%M:%S} on "
            f"{last:%Y-%m-%d}: {seconds:.3g} s, {1000 * seconds / count:.3g} ms a trial, breaks "
            "included."
        )
    return Section(id="timings", title="Timings", texts=texts)


def _reproduction(report: Report) -> Section:
    blocks = [("Command", "\n".join(report.commands))] if report.commands else []
    if report.document is not None:
        blocks.append(("Document", json.dumps(report.document, indent=2, ensure_ascii=False)))
    if report.configuration is not None:
        found = report.configuration.model_dump(mode="json")
        blocks.append(("config.json", json.dumps(found, indent=2, ensure_ascii=False)))
    return Section(
        id="reproduce",
        title="How to reproduce",
        texts=[
            "The same document and seeds on the same kind of machine, with the same versions and "
            "number of threads, give the same configuration."
        ],
        tables=[tables.pairs_table("Versions", "package", report.versions)]
        if report.versions
        else [],
        blocks=blocks,
    )
