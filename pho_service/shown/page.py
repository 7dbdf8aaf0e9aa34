"""
A report as a page in one file that asks the network for nothing, studies included.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from pho_service.library import measured_gain
from pho_service.shown import charts, tables, words
from pho_service.shown.parts import Chart, Figure, Hero, Section, Table, page, pairs_table
from pho_service.shown.report import Report, ReportTrial
from pho_service.spec.configuration import Configuration, Continuation
from pho_service.spec.document import number, percent, seconds
from pho_service.spec.perplexity import REPORT_TEXT, Perplexities
from pho_service.spec.recovery import Recovered
from pho_service.spec.tasks import TaskScores
from pho_service.tuning.result import chosen_in
from storage.studies import quiet_optuna, record_of

ENOUGH = 50  # candidates for importances: optuna wants five in the best tenth


def trials_of(islands: Sequence[Sequence[FrozenTrial]], count: int) -> list[ReportTrial]:
    """The trials of so many islands by number; baselines, which all share, only once."""
    rated = [
        ReportTrial(
            number=trial.number * count + island,
            method=str(trial.user_attrs.get("method", "crepe")),
            value=trial.value if trial.state is TrialState.COMPLETE else None,
            params=trial.params,
        )
        for island, trials in enumerate(islands)
        for trial in trials
        if trial.state.is_finished()
        and (island == 0 or trial.user_attrs.get("method", "crepe") == "crepe")
    ]
    return sorted(rated, key=lambda trial: trial.number)


@dataclass(frozen=True, kw_only=True)
class MeasuredTrials:
    """Measurements of trials, by their numbers."""

    perplexities: Mapping[int, float] = field(default_factory=dict)
    divergences: Mapping[int, float] = field(default_factory=dict)


def with_measurements(
    trials: Sequence[ReportTrial],
    measured: MeasuredTrials,
    configuration: Configuration | None,
) -> list[ReportTrial]:
    """Trials with what was measured of them; what a configuration says goes before."""
    perplexities, divergences = {**measured.perplexities}, {**measured.divergences}
    if configuration is not None:
        for rating in (*configuration.baselines, *configuration.finalists):
            if rating.perplexity is not None:
                perplexities[rating.trial] = rating.perplexity
            if rating.divergence is not None:
                divergences[rating.trial] = rating.divergence
    return [
        replace(
            trial,
            perplexity=perplexities.get(trial.number),
            divergence=divergences.get(trial.number),
        )
        for trial in trials
    ]


def study_report(study: optuna.Study, configuration: Configuration | None) -> Report:
    """All that a study of a search says, and what was found if it is known."""
    record, recorded = record_of(study), study.get_trials(deepcopy=False)
    maximised = study.direction is optuna.study.StudyDirection.MAXIMIZE
    times = [trial.datetime_complete for trial in recorded if trial.datetime_complete]
    measured = measured_in(study) if configuration is None else MeasuredTrials()
    return Report(
        title=study.study_name,
        subject="study",
        asked=words.study_in_words(record),
        configuration=configuration,
        objective=str(record.get("objective", "objective")),
        maximised=maximised,
        trials=with_measurements(trials_of([recorded], 1), measured, configuration),
        chosen=chosen_in(study),
        importance=importances([recorded], maximised=maximised),
        recorded=(min(times), max(times)) if times else None,
        versions=record.get("calibration", {}).get("versions", {})
        if configuration is None
        else configuration.versions,
    )


def measured_in(study: optuna.Study) -> MeasuredTrials:
    """The perplexities and divergences that a study keeps, by number of the trial."""
    # Nothing where they are of several texts: which of them a search chose by is not known.
    measures: dict[str, dict[int, float]] = {"perplexity": {}, "divergence": {}}
    for measure, values in measures.items():
        texts = set()
        for key, measurement in record_of(study).items():
            name, _, number = key.partition(":")
            if name == measure and number.isdecimal():
                values[int(number)] = float(measurement[measure])
                texts.add(measurement.get("text_sha256"))
        if len(texts) > 1:
            values.clear()
    return MeasuredTrials(perplexities=measures["perplexity"], divergences=measures["divergence"])


def importances(islands: Sequence[Sequence[FrozenTrial]], *, maximised: bool) -> dict[str, float]:
    """How much each parameter of a search mattered for the best tenth of its candidates."""
    # By PED-ANOVA, Optuna's own choice, which takes a third of a second for 10,000 trials. Gives
    # shares that add up to 1, the largest first; of what was searched alone. Empty where there are
    # fewer than :data:`ENOUGH` candidates, or nothing mattered.
    # It loads scikit-learn, which takes longer than all that the API needs to start.
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    candidates = [
        create_trial(value=trial.value, params=trial.params, distributions=trial.distributions)
        for trials in islands
        for trial in trials
        if trial.state is TrialState.COMPLETE and trial.user_attrs.get("method") == "crepe"
    ]
    if len(candidates) < ENOUGH:
        return {}
    searched = [
        name
        for name in candidates[0].params
        if name != "method" and len({trial.params.get(name) for trial in candidates}) > 1
    ]
    if not searched:
        return {}
    with quiet_optuna():
        study = optuna.create_study(direction="maximize" if maximised else "minimize")
    study.add_trials(candidates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        shares = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(), params=searched
        )
    return {name: float(share) for name, share in shares.items()}


_CAPTIONS = {"search": "The job", "transfer": "The job", "study": "The study"}


def render(report: Report) -> str:
    """The whole page of a report as HTML."""
    subject = f"{report.subject}, {report.state}" if report.state else "study of a search"
    lead = f"{subject.capitalize()}. Report of {report.made_at:%Y-%m-%d %H:%M %Z}."
    return page(report.title, sections(report), lead=lead, error=report.error, back=report.job_page)


def curve_page(document: Mapping[str, Any]) -> str:
    """The curve of `pho curve`, its JSON values given, as one page of HTML."""
    name = PurePath(str(document["model"].get("name", "the model"))).name
    parts = [curve_section(document), *_writing_at_each(document)]
    return page(f"{name}: perplexity against sparsity", parts)


_OF_THE_SEARCH = ("result", "scope", "state", "proxy", "trials", "seconds")
_OF_THE_RESULT = ("perplexity", "against dense", "Wanda", "RIA", "within")


def curve_section(
    document: Mapping[str, Any] | None, points: Sequence[Mapping[str, Any]] | None = None
) -> Section:
    """The chart and the table of a curve: its document, and all points where some are not there."""
    rows = points or (document["points"] if document is not None else [])
    table = tables.points_table(rows)
    shown = [  # as one table they would be wider than a page
        replace(table.columns_but(_OF_THE_SEARCH), notes=()),
        replace(table.columns_but(_OF_THE_RESULT), title="Search at each sparsity"),
    ]
    if document is None:
        texts, drawn = ["Nothing is measured yet."], None
    else:
        is_report = document["points"][0].get("measured_on") == REPORT_TEXT
        text = document["report" if is_report else "confirmation"]
        choice = "Nothing was" if is_report else "Results were"
        texts = [f"Perplexities are of {tables.text_of(text)}. {choice} chosen on this text."]
        drawn = charts.curve_chart(document["points"], document["dense"])
        spent = document["calibration"]["seconds"]
        if spent is not None:
            took = f"took {seconds(spent)} s" if spent >= 1 else "took under a second"
            texts.append(f"The calibration {took}, once for all points.")
    return Section(
        id="curve",
        title="Perplexity against sparsity",
        hero=_points_hero(rows),
        texts=texts,
        tables=shown if rows else [],
        charts=[] if drawn is None else [drawn],
    )


def sections(report: Report) -> list[Section]:
    """All sections of a report, in their order."""
    curve = [] if report.points is None else [curve_section(report.curve, report.points)]
    if report.points is not None and report.configuration is None:
        results = replace(curve[0], texts=[*curve[0].texts, *report.warnings])
        return [results, *_writing_at_each(report.curve), _settings(report), _happened(report)]
    parts = [_result(report), *(replace(part, hero=None) for part in curve)]
    parts += [] if report.recovery is None else [_recovery(report.recovery)]
    if report.speed is not None:
        parts.append(Section(id="speed", title="Speed", texts=[report.speed]))
    if report.subject != "transfer":
        parts += (
            [] if report.configuration is None else [_writing({"pruned": report.continuations})]
        )
        scores = None if report.configuration is None else report.configuration.tasks
        parts += [] if scores is None else [_tasks(scores, report.recovery)]
        if report.is_cut:
            return [*parts, _finalists(report), _settings(report), _happened(report)]
        parts += [_search(report), _finalists(report), _layers(report), _importances(report)]
    return [*parts, _transfers(report), _settings(report), _happened(report)]


def _result(report: Report) -> Section:
    config, texts = report.configuration, []
    good = None if config is None else config.headline
    if report.subject == "transfer":
        texts.append(
            "A transfer searches nothing: it measures the configuration of another job on other "
            "models. The report of that job says how it was found."
        )
    elif config is not None:
        texts += _how_good(report)
    elif report.subject == "study":
        texts.append(
            "Without its configuration (`pho report --config`) the chosen candidate is not known: "
            "the first row of the finalists is the best trial of the study."
        )
    elif report.state in ("failed", "cancelled"):
        texts.append("The job ended without a configuration.")
    elif not report.rated:
        texts.append("No trial has been rated yet.")
    if report.subject != "transfer":
        texts += report.warnings
    return Section(
        id="result",
        title="Result",
        hero=_hero(report),
        texts=texts,
        tables=[] if good is None else [tables.verdict_table(good)],
        commands=report.prune_commands if config is not None else (),
    )


def _hero(report: Report) -> Hero | None:
    """The result in three figures; before there is one, the best objective so far."""
    best = report.winner
    good = None if report.configuration is None else report.configuration.headline
    if good is not None:
        return _measured_hero(good, report.recovery)
    if report.configuration is None:
        best = next(iter(report.rated), None)
    if report.subject == "transfer" or best is None or best.value is None:
        return None
    name = "best objective so far" if report.configuration is None else "objective"
    figures = [Figure(value=number(best.value), name=name, note=report.objective)]
    gain = report.gain(best, "proxy")
    if gain is not None and gain.share:
        side = "below" if gain.share > 0 else "above"
        figures.append(Figure(value=percent(abs(gain.share)), name=f"{side} RIA's objective"))
    return Hero(figures=figures)


def _measured_hero(pruned: Perplexities, recovery: Recovered | None) -> Hero:
    """A perplexity, its rise over the dense model, and how far it is below the better baseline."""
    good = pruned if recovery is None else recovery.headline(pruned)
    before = f"recovered; {number(pruned.pruned)} when pruned" if good != pruned else ""
    note = before or "lower is better"
    figures = [Figure(value=number(good.pruned), name="perplexity", note=note)]
    better = good.better_baseline
    for reference in filter(None, ("dense", better)):
        ratio = good.ratio(reference)
        assert ratio is not None
        title = good.titles.get(reference, reference)
        notes = [
            f"± {percent(ratio.rise_error)}" if ratio.rise_error else "",
            "the better baseline" if reference == better and good.wanda and good.ria else "",
            "a statistical tie" if ratio.is_tie else "",
            f"dense {number(good.dense)}" if better is None else "",  # which has no bar
        ]
        side = "above" if ratio.rise > 0 else "below"
        figures.append(
            Figure(
                value=percent(abs(ratio.rise)),
                name=f"{side} {title}" if ratio.rise else f"the same as {title}",
                note=", ".join(filter(None, notes)),
            )
        )
    if better is None:
        return Hero(figures=figures)
    marks = [
        ("dense", "dense", good.dense),
        ("ria", good.titles[better], getattr(good, better)),
        ("found", "recovered" if before else "pruned", good.pruned),
    ]
    values = [value for *_, value in marks]
    width = (max(values) - min(values)) or 1.0
    places = [
        (look, f"{name} {number(value)}", round(100 * (value - min(values)) / width, 1))
        for look, name, value in marks
    ]
    return Hero(figures=figures, text=good.sentence, places=places)


def _points_hero(points: Sequence[Mapping[str, Any]]) -> Hero | None:
    """The perplexity at each sparsity, and its rise over the dense model."""
    measured = [point for point in points if point["perplexity"]]
    figures = [
        Figure(
            value=number(point["perplexity"]),
            name=f"at {point['pattern']}",
            note=f"{percent(point['rise'], signed=True, error=point.get('rise_error'))} over dense",
        )
        for point in measured
    ]
    return Hero(figures=figures) if figures else None


def _how_good(report: Report) -> list[str]:
    """Sentences on the result of a search: its gain, its sparsity, and how it was measured."""
    config = report.configuration
    assert config is not None
    how, good = config.confirmation, config.headline
    gain = measured_gain(config) if good is None else None
    scope = f", scope {config.scope}" if config.cut is None else ""
    parts = [f"Pattern {words.pattern_in_words(config.pattern)}{scope}."]
    if how is not None:
        measured = "Measured" if good is not None else f"Perplexity {number(how.perplexity)}"
        if config.report is not None:
            parts.append(f"{measured} on {tables.text_of(config.report)}; {config.report.choice}.")
            measured = f"Chosen with a perplexity of {number(how.perplexity)}"
        choice = f", {good.choice}" if good is not None and config.report is None else ""
        parts.append(f"{measured} on {tables.text_of(how)}{choice}.")
        if config.is_reconstructed:
            parts.append(f"Before reconstruction: {how.beside('before_reconstruction')}.")
    elif report.subject == "search":
        parts.append("No perplexity was measured: this is the best candidate by the proxy.")
    return [
        *([] if gain is None else [f"The result is {gain}."]),
        " ".join(parts),
        *filter(None, [config.search.get("goal", {}).get("says")]),
        *([] if config.cut is None else [f"What stays: {config.cut}."]),
    ]


def _writing(written: Mapping[str, Sequence[Continuation]]) -> Section:
    """The texts that models wrote, once for each prompt."""
    shown = tables.samples_tables(written)
    texts = [tables.SAMPLES if shown else tables.NO_SAMPLES]
    return Section(id="writing", title="Sample output", texts=texts, tables=shown)


def _writing_at_each(curve: Mapping[str, Any] | None) -> list[Section]:
    """The texts written at each point of a curve, the highest sparsity last."""
    if curve is None:
        return []
    configs = [Configuration.model_validate(point["configuration"]) for point in curve["points"]]
    return [_writing({config.pattern: config.continuations for config in configs})]


def _recovery(recovered: Recovered) -> Section:
    """The gain of the pruned model by training towards the dense one."""
    sentence = str(recovered)
    table = [tables.recovered_table(recovered)] if recovered.perplexities else []
    texts = [
        f"{sentence[0].upper()}{sentence[1:]}. The text was {tables.name_of(recovered.text)}.",
        "The tables of the result and of the search describe the pruned model before its recovery.",
    ]
    return Section(id="recovery", title="Recovery", texts=texts, tables=table)


def _tasks(scores: TaskScores, recovery: Recovered | None) -> Section:
    last_model = "pruned" if recovery is None else "recovered"
    examples = "all examples" if scores.limit is None else f"the first {scores.limit} of each task"
    harness = ", ".join(f"{name} {version}" for name, version in scores.versions.items())
    return Section(
        id="tasks",
        title="Zero-shot tasks",
        texts=[
            f"The dense and the {last_model} model on {examples}, "
            f"{'with' if scores.bos else 'without'} BOS. Measured by {harness}."
        ],
        tables=[tables.tasks_table(scores)],
    )


def _search(report: Report) -> Section:
    history = charts.history_chart(report)
    failed = sum(trial.value is None for trial in report.trials)
    texts = []
    if history is None:
        count = len(report.rated)
        texts.append(
            f"Too few trials to draw: {count} rated." if count else "No trial has been rated yet."
        )
    if failed:
        texts.append(f"{failed} of {len(report.trials)} trials failed and are not drawn.")
    if report.left_out:
        texts.append(
            f"{report.left_out} more trials are not shown here, as this page reads only so many. "
            "The result takes them into account."
        )
    drawn = [] if history is None else [history]
    return Section(id="search", title="Search", texts=texts, charts=drawn)


def _importances(report: Report) -> Section:
    chart = charts.importance_chart(report)
    candidates = sum(not trial.is_baseline for trial in report.rated)
    texts = []
    if chart is None and candidates < ENOUGH:
        texts.append(
            f"The importance of each coefficient is not known: that takes {ENOUGH} rated "
            f"candidates, and there are {candidates}."
        )
    elif chart is None:
        texts.append(
            "The importance of each coefficient is not known: the candidates do not differ, or "
            "their differences did not change the objective."
        )
    drawn = [] if chart is None else [chart]
    return Section(id="importances", title="Importances", texts=texts, charts=drawn)


def _finalists(report: Report) -> Section:
    chart, results = charts.confirmed_chart(report), tables.results_table(report)
    texts = []
    if results is None:
        texts.append("No trial has been rated yet.")
    if report.objective == "perplexity":
        texts.append("The search minimised perplexity itself, so there is no proxy to compare.")
    elif not report.measured:
        texts.append("No perplexity was measured, so the proxy cannot be compared with it.")
    config = report.configuration
    ways = [] if config is None else config.search.get("goal", {}).get("ways", [])
    return Section(
        id="finalists",
        title="Finalists",
        texts=texts,
        tables=[*([tables.ways_table(ways)] if ways else []), *filter(None, [results])],
        charts=[] if chart is None else [chart],
    )


def _layers(report: Report) -> Section:
    if not report.layers:
        missing = {
            True: "A study does not store errors and sparsities of layers; a job of the service "
            "does.",
            False: "Errors and sparsities of layers are not known: a job stores them when it "
            "succeeds.",
        }[report.subject == "study"]
        return Section(id="layers", title="Layers", texts=[missing])
    estimated, steps = False, "none"
    if report.configuration is not None:
        candidate_steps = report.configuration.steps
        estimated = report.configuration.scope == "global" or not candidate_steps.allocation.is_even
        steps = ", ".join(candidate_steps.beside_mask)
    texts = [
        "Errors are estimated from the rows of each layer that the calibration sampled. "
        + (
            "Each layer gets its own sparsity, estimated from the same rows; overall it matches "
            "the pattern."
            if estimated
            else "Each layer has exactly the sparsity of the pattern."
        )
    ]
    if steps:
        texts[0] += f" These are estimates for the masks alone, before {steps}."
    shown = []
    for place, (model, cells) in enumerate(report.layers.items()):
        if cells:
            shown += charts.layer_charts(place, model, cells, several=len(report.layers) > 1)
    return Section(id="layers", title="Layers", texts=texts, charts=shown)


def transfer_section(transfers: Sequence[Mapping[str, Any]]) -> Section:
    """A configuration on other models: the targets of a transfer's file."""
    filled: list[Table] = []
    drawn: list[Chart] = []
    for measure in tables.MEASURES:
        table = tables.transfer_table(transfers, measure)
        chart = charts.transfer_chart(tables.transfer_rows(transfers, measure), measure)
        filled += [] if table is None else [table]
        drawn += [] if chart is None else [chart]
    return Section(
        id="transfer",
        title="On other models",
        texts=tables.failed_transfers(transfers),
        tables=filled,
        charts=drawn,
    )


def _transfers(report: Report) -> Section:
    section = transfer_section(report.transfers)
    if report.transfers:
        return section
    missing = {
        "search": "There is no configuration to measure on other models."
        if report.configuration is None
        else "This configuration was not measured on other models: `pho transfer-job` does that.",
        "transfer": "Nothing is measured yet.",
        "study": "Not measured on other models: `pho transfer` does that, and "
        "`pho report --config` shows its transfer.json.",
    }[report.subject]
    return replace(section, texts=[missing])


def _settings(report: Report) -> Section:
    """The request and the configuration in full, and how to do it again."""
    config = report.configuration
    shown = []
    if report.asked:
        caption = _CAPTIONS[report.subject]
        shown.append(pairs_table(caption, "part", [*report.asked.items()]))
    if config is not None:
        shown.append(pairs_table("The configuration", "part", tables.configuration_rows(config)))
    if report.versions:
        shown.append(pairs_table("Versions", "package", [*report.versions.items()]))
    blocks = [("To run the same again", "\n".join(report.commands))] if report.commands else []
    if report.document is not None:
        blocks.append(("Document", json.dumps(report.document, indent=2, ensure_ascii=False)))
    if config is not None:
        document = config.model_dump(mode="json")
        blocks.append(("config.json", json.dumps(document, indent=2, ensure_ascii=False)))
    texts = [] if report.asked else ["The request is not known."]
    texts.append(
        "The same document and seeds give the same configuration on the same kind of machine, "
        "with the same versions and number of threads."
    )
    return Section(id="settings", title="Settings", texts=texts, tables=shown, blocks=blocks)


def _happened(report: Report) -> Section:
    section = Section(id="happened", title="What happened", events=report.happened)
    if report.stages:
        return replace(section, tables=[tables.timings_table(report)])
    texts = ["The time of each stage is not known." if report.subject == "study"
             else "No stage has begun."]  # fmt: skip
    if report.recorded is not None:
        first, last = report.recorded
        spent = (last - first).total_seconds()
        count = max(1, len(report.trials) + report.left_out)
        texts.append(
            f"Its trials were recorded from {first:%Y-%m-%d %H:%M:%S} to {last:%H:%M:%S} on "
            f"{last:%Y-%m-%d}: {seconds(spent)} s, {seconds(1000 * spent / count)} ms per "
            "trial, breaks included."
        )
    return replace(section, texts=texts)
