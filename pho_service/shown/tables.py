"""
The tables and sentences of a result, for every face.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

from pho_service.library import MeasuredBy, gain_over
from pho_service.shown.parts import Table
from pho_service.shown.report import Report, ReportTrial, StageTime
from pho_service.spec.configuration import (
    Configuration,
    Confirmation,
    Continuation,
    Rating,
)
from pho_service.spec.document import listed, number, percent, seconds
from pho_service.spec.perplexity import REPORT_TEXT, Perplexities, Ratio, ReportedPerplexities
from pho_service.spec.recovery import Recovered
from pho_service.spec.structure import is_structured
from pho_service.spec.tasks import TaskScore, TaskScores, mean_accuracy

MEASURES: tuple[Literal["perplexity", "proxy"], ...] = ("perplexity", "proxy")
METHODS = ("wanda", "ria", "transferred", "own")
# Headings of the gains over RIA; they are of different things, so each has a column of its own.
GAINS: dict[MeasuredBy, str] = {
    "perplexity": "gain in perplexity",
    "divergence": "gain by divergence",
    "proxy": "gain in the proxy",
}
_KEYS = {"perplexity": "perplexities", "proxy": "proxies"}
_ERROR = " ± is the standard error of paired differences on this text."
SAMPLES = "Greedy decoding; prompts from the text that perplexities are measured on."
NO_SAMPLES = (
    "No sample output: that takes a confirmation text, a tokenizer, and a model that is not "
    "streamed block by block."
)
MOST = 20  # measured trials that are shown
BEST = 5  # rated trials that are shown where nothing was measured


def configuration_rows(config: Configuration) -> list[tuple[str, str]]:
    """A configuration and how it was chosen, as names and values."""
    c, how = config.coefficients, config.confirmation
    if c is None:
        rows = [("method", f"pattern {config.pattern}"), ("cut", str(config.cut))]
        if says := config.search.get("goal", {}).get("says"):
            rows.append(("", says))
    else:
        shares = [("row", c.row), ("column", c.column), ("neighbourhood", c.neighbourhood)]
        exponents = [("activation", c.activation_exponent), ("gradient", c.gradient_exponent)]
        rows = [
            ("method", f"{config.method}, pattern {config.pattern}, scope {config.scope}"),
            ("coefficients", listed([*shares, ("kernel", c.kernel_size)])),
            ("exponents", listed(exponents)),
            *([] if c.normalisation == "mean" else [("normalised", c.normalisation)]),
            ("steps", str(config.steps)),
        ]
    if "value" in config.objective:
        value = number(config.objective["value"])
        rows.append(("objective", f"{config.objective.get('name', 'objective')} {value}"))
    for name, value in config.objective.get("relative_to_ria", {}).items():
        rows.append(("", f"{number(value)} of RIA's on {name}"))
    if how is not None:
        rows.append(("perplexity", f"{number(how.perplexity)} on {text_of(how)}, which chose it"))
        if how.before_reconstruction is not None:
            before = how.beside("before_reconstruction")
            rows.append(("", f"{before} before reconstruction"))
        if config.beside_the_next:
            rows.append(("", config.beside_the_next))
        if how.divergence_tokens is not None:
            rows.append(("", f"best of {len(config.finalists)} finalists, baselines included"))
    if (good := config.report) is not None:
        rows.append(("report", f"{number(good.pruned)} on {text_of(good)}; {good.choice}"))
    return rows


def text_of(how: Confirmation | ReportedPerplexities | Mapping[str, Any]) -> str:
    """The text that perplexities were measured on, without the folder that it lay in."""
    facts = how if isinstance(how, Mapping) else vars(how)
    name = name_of(facts["text"])
    return f"{facts['tokens']} tokens of {name}, in windows of {facts['context_length']}"


def name_of(text: Mapping[str, Any]) -> str:
    """The name of a text, without the folder that it lay in."""
    source = str(text.get("source", "a text"))
    return PurePath(source).name if source.startswith(("/", ".", "~")) else source


def verdict_table(perplexities: Perplexities) -> Table:
    """The dense model, the result, Wanda and RIA."""
    rows = [("dense", number(perplexities.dense), "", "")]
    names = {"pruned": "pruned"}
    if perplexities.wanda or perplexities.ria:  # a cut has neither
        names |= perplexities.titles
    for name, title in names.items():
        over_dense = perplexities.ratio("dense", name)
        over_ria = None if name == "ria" else perplexities.ratio("ria", name)
        saved = "" if over_ria is None else over_ria.saved
        value = number(getattr(perplexities, name)) or "none"
        rows.append((title, value, str(over_dense or ""), saved))
    return Table(
        ("model", "perplexity", "against dense", "below RIA"),
        rows,
        title="Perplexity: lower is better",
        notes=(
            _chosen_on(perplexities)
            + (
                "Wanda and RIA prune to the same pattern, with activation norms of the dense "
                "model. Below RIA: reduction relative to RIA's perplexity."
            )
            * (len(names) > 1)
            + (_ERROR if perplexities.errors else ""),
        ),
        marked=1,
    ).without_empty()


def _chosen_on(perplexities: Perplexities) -> str:
    where = ""
    if isinstance(perplexities, ReportedPerplexities):
        where = f": {text_of(perplexities)}"
    return f"{perplexities.choice.capitalize()}{where}. "


def continuations_table(
    continuations: Sequence[Continuation], *, before: tuple[str, str] = ("dense", "pruned")
) -> Table:
    return Table(
        ("prompt", *before, "recovered"),
        [  # small models write little else than ends of lines
            tuple(
                re.sub(r"\n(\s*\n)+", "\n\n", text)
                for text in (c.prompt, c.dense, c.pruned, c.recovered or "")
            )
            for c in continuations
        ],
        title=f"Sample output, {before[0]} and {before[1]}",
        notes=(SAMPLES if continuations else NO_SAMPLES,),
        numbers=False,
        texts=True,
    ).columns_but([] if any(c.recovered is not None for c in continuations) else ["recovered"])


def samples_tables(written: Mapping[str, Sequence[Continuation]]) -> list[Table]:
    """A table for each prompt: what the dense model writes, and each pruned one, by its name."""
    samples: dict[str, dict[str, str]] = {}
    for name, continuations in written.items():
        for each in continuations:
            texts = samples.setdefault(each.prompt, {"dense": each.dense})
            texts[name] = each.pruned
            if each.recovered is not None:
                texts["recovered"] = each.recovered
    return [
        Table(
            ("model", "text"),
            [(name, re.sub(r"\n\s*\n", "\n", text)) for name, text in texts.items()],
            title=f"… {' '.join(prompt.split())} …",
            numbers=False,
            texts=True,
        )
        for prompt, texts in samples.items()
    ]


def recovered_table(recovered: Recovered) -> Table:
    """The dense model, the pruned one, and what it was after its recovery."""
    values, errors = recovered.perplexities, recovered.errors
    names = dict(zip(("dense", "pruned"), recovered.models_before, strict=True))

    def against(name: str, base: str) -> str:
        if not {name, base} <= values.keys():
            return ""
        return str(Ratio(values[name], values[base], errors.get(f"{name}/{base}")))

    return Table(
        ("model", "perplexity", *(f"against {name}" for name in names.values())),
        [
            (
                names.get(name, name),
                number(values[name]),
                "" if name == "dense" else against(name, "dense"),
                against(name, "pruned") if name == "recovered" else "",
            )
            for name in ("dense", "pruned", "recovered")
            if name in values
        ],
        title="Perplexity: lower is better",
        notes=(_not_trained_on(recovered.measured) + (_ERROR if errors else ""),),
        marked=2,
    ).without_empty()


def _not_trained_on(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return ""
    count = text["windows"]
    return f"On {count} window{'s' * (count != 1)} of {name_of(text)} that it was not trained on."


def results_table(report: Report) -> Table | None:
    """The result, what else was measured or is best, and baselines; None without trials."""
    winner = report.winner
    if winner is None:
        return None
    compared = [trial for trial in report.trials if trial.divergence is not None]
    shown = [winner, *report.measured[:MOST]]
    shown += sorted(compared, key=lambda trial: trial.divergence or 0.0)[:MOST]
    if not report.measured:
        shown += [trial for trial in report.rated if not trial.is_baseline][:BEST]
    shown += [trial for trial in report.trials if trial.is_baseline]
    rows = [*{trial.number: trial for trial in shown}.values()]
    mark = "chosen" if report.configuration is not None else "best so far"
    config = report.configuration
    behind = {} if config is None else _behind(config.finalists)
    if report.is_cut:
        return _cuts_table(report, rows, mark, behind)
    alone = ", masks only" if config is not None and config.steps.needs_text else ""
    rebuilt = config is not None and config.is_reconstructed
    trained = config is not None and config.is_measured_as_trained
    gain = "gain before reconstruction" if rebuilt else GAINS["perplexity"]
    return Table(
        (
            "candidate", "perplexity", "above the lowest", gain, "divergence",
            GAINS["divergence"], "objective", GAINS["proxy"], "trial",
        ),
        [
            (
                (trial.method if trial.is_baseline else "found")
                + (f" ({mark})" if trial == winner else ""),
                number(trial.perplexity),
                behind.get(trial.number, ""),
                _gain(report, trial, "perplexity"),
                number(trial.divergence),
                _gain(report, trial, "divergence"),
                number(trial.value) or "failed",
                _gain(report, trial, "proxy"),
                trial.number,
            )
            for trial in rows
        ],
        title="Finalists and baselines" + (", before reconstruction" if rebuilt else ""),
        notes=(
            f"Objective: {report.objective}"
            + (", higher is better. " if report.maximised else ", lower is better. ")
            + f"KL divergence from the dense model, nats per token{alone}. "
            "Gain: reduction relative to RIA, in perplexity, as estimated from divergence, or in "
            "the proxy."
            + (" Only the chosen finalist is reconstructed." if rebuilt else "")
            + (" The chosen finalist is measured as reconstructed." if trained else ""),
        ),
        marked=0,
    ).without_empty()  # fmt: skip


def _cuts_table(
    report: Report, rows: Sequence[ReportTrial], mark: str, behind: Mapping[int, str]
) -> Table:
    """Every split of a share, those that were cut first."""
    return Table(
        ("what stays", "perplexity", "above the lowest", "estimate", "trial"),
        [
            (
                trial.method + (f" ({mark})" if trial == report.winner else ""),
                number(trial.perplexity), behind.get(trial.number, ""), number(trial.value),
                trial.number,
            )
            for trial in sorted(rows, key=lambda t: (t.perplexity or math.inf, t.value or 0.0))
        ],
        title="Splits of the share",
        notes=(
            "Estimate: expected rise of the loss in nats per token, each cut taken alone. The "
            "splits with the lowest estimates were cut and measured.",
        ),
        marked=0,
    ).without_empty()  # fmt: skip


def ways_table(ways: Sequence[Mapping[str, Any]]) -> Table:
    """What each way costs, as its JSON values say it, by what is cut; the first is the best."""
    by_share = sorted(ways, key=lambda way: way["share"])
    return Table(
        ("cut of the blocks", "the cut, nats", "bits, nats", "together"),
        [
            (percent(way["share"]) if way["share"] else "nothing",
             *(number(way[name]) for name in ("cut", "bits", "nats")))
            for way in by_share
        ],
        title="Estimated cost of so many bytes",
        marked=by_share.index(ways[0]),
    )  # fmt: skip


def _behind(finalists: Sequence[Rating]) -> dict[int, str]:
    """How far finalists are behind the best of them, by trial: ``+1.2 ± 0.4%``."""
    measured = [(c.trial, c.perplexity, c.error) for c in finalists if c.perplexity is not None]
    return {trial: str(Ratio(value, measured[0][1], error)) for trial, value, error in measured[1:]}


def result_in_words(point: Mapping[str, Any]) -> str:
    """Say whether the search found a result, or a baseline is that no candidate was better than."""
    # With the search's steps it is not the published method that stands beside it.
    method = point.get("method")
    if method in (None, "crepe", "structured"):
        return {None: "", "crepe": "found"}.get(method, "cut")
    published = point.get(str(method).partition("-")[0])
    if published is not None and published != point.get("perplexity"):
        return f"{method}, with the search's steps"
    return f"{method}, a baseline"


def rise_of(point: Any) -> str:
    """The rise of a point over the dense model, with its standard error: ``+5.1 ± 0.4%``."""
    return percent(point.rise, signed=True, error=point.rise_error)


def rises_of(points: Sequence[Any]) -> str:
    """The rise of a point, or the lowest and the highest of several."""
    if len(points) == 1:
        return rise_of(points[0])
    return range_of((point.rise for point in points), partial(percent, signed=True))


def range_of(values: Iterable[float | None], in_words: Callable[[float], str] = number) -> str:
    """The lowest and the highest value in words, or the only one."""
    measured = [value for value in values if value is not None]
    return (
        " to ".join(dict.fromkeys([in_words(min(measured)), in_words(max(measured))]))
        if measured
        else ""
    )


def _beside(point: Mapping[str, Any], method: str) -> str:
    """The perplexity of a published method, and how far the point's result is from it."""
    result, published = point["perplexity"], point[method]
    if not result or not published:
        return number(published)
    error = (point.get("errors") or {}).get(method)
    return f"{number(published)} ({Ratio(result, published, error)})"


def points_table(points: Sequence[Mapping[str, Any]], best: Configuration | None = None) -> Table:
    """A row for each sparsity of a curve or a target, with what is measured of it."""
    is_report = any(point.get("measured_on") == REPORT_TEXT for point in points)
    measured = None if best is None else best.report if is_report else best.confirmation
    text_note = "" if measured is None else f"Perplexities are of {text_of(measured)}. "
    choice = "Nothing was" if is_report else "Results were"
    chosen = [point.get("configuration") or point for point in points]
    dense = next((point["dense"] for point in points if point.get("dense")), None)
    brackets = "In brackets: the result relative to that baseline. "
    covered = "search, confirmation, Wanda and RIA"
    if any(is_structured(point["pattern"]) for point in points):
        brackets, covered = "", "search and confirmation"  # nothing published is cut beside
    return Table(
        (
            "pattern", "perplexity", "against dense", "Wanda", "RIA", "result", "scope", "state",
            "within", "proxy", "trials", "seconds",
        ),
        [
            (
                point["pattern"],
                number(point["perplexity"]),
                percent(point["rise"], signed=True, error=point.get("rise_error")),
                _beside(point, "wanda"),
                _beside(point, "ria"),
                result_in_words({**point, "method": each.get("method")}),
                None if is_structured(point["pattern"]) else each["scope"],
                point.get("state"),
                {True: "yes", False: "no"}.get(point.get("within")),  # type: ignore[arg-type]
                number(point["proxy"]),
                point["trials"],
                seconds(point["seconds"]),
            )
            for point, each in zip(points, chosen, strict=True)
        ],
        title="Perplexity at each sparsity"
        + (f"; the dense model has {number(dense)}" if dense else ""),
        notes=(
            f"{text_note}{brackets}{choice} chosen on the text that they are measured on. "
            f"Seconds cover {covered}, not the calibration."
            + (_ERROR if any(point.get("rise_error") for point in points) else ""),
        ),
    ).without_empty()  # fmt: skip


def scores_table(scores: Sequence[TaskScore]) -> Table:
    """The scores of one model in zero-shot tasks."""
    mean = mean_accuracy(scores)
    return Table(
        ("task", "metric", "score", "examples", "shots", "version"),
        [
            *((s.task, s.metric, s.shown, s.examples, s.shots, s.version) for s in scores),
            *([("mean", "acc", f"{mean * 100:.2f}", None, None, None)] if mean is not None else []),
        ],
        notes=("Accuracy in percent, ± standard error.",),
    )


def tasks_table(scores: TaskScores) -> Table:
    """The scores of a model in zero-shot tasks before and after it was pruned."""
    return Table(scores.columns, scores.rows(), title="Zero-shot tasks", notes=(scores.note,))


def transfer_rows(
    targets: Sequence[Mapping[str, Any]], what: Literal["perplexity", "proxy"]
) -> list[tuple[str, Mapping[str, float | None]]]:
    """The name of each model that this was measured on, and what was."""
    key = _KEYS[what]
    return [
        (name, target[key])
        for name, target in zip(_names(targets), targets, strict=True)
        if target.get(key)
    ]


def transfer_table(
    targets: Sequence[Mapping[str, Any]], what: Literal["perplexity", "proxy"]
) -> Table | None:
    """The gains of a configuration on other models; None where that was not measured."""
    measured = [target for target in targets if target.get(_KEYS[what])]
    if not measured:
        return None
    rows = transfer_rows(targets, what)
    methods = ("dense", *METHODS) if what == "perplexity" else METHODS
    shown = [method for method in methods if any(values.get(method) for _, values in rows)]
    table = []
    for (name, values), target in zip(rows, measured, strict=True):
        gain = gain_over(what, values.get("ria"), values.get("transferred"))
        regret = target.get("regret" if what == "perplexity" else "proxy_regret")
        table.append(
            (
                name,
                *(number(values.get(method)) for method in shown),
                _rise(values, target) if what == "perplexity" else "",
                percent(
                    None if gain is None else gain.share,
                    error=_saved_error(values, target) if what == "perplexity" else None,
                ),
                percent(regret) if isinstance(regret, (int, float)) else "",
            )
        )
    return Table(
        (
            "model", *({"own": "own best"}.get(method, method) for method in shown),
            "against dense", GAINS[what],
            f"regret in {what}",
        ),
        table,
        title=f"On other models, by {what}",
        notes=(
            "Regret: share of the gain over RIA that a search on that model finds and the "
            "transferred configuration does not; empty where no such search found a gain.",
        )
        if any(row[-1] for row in table)
        else (),
    ).without_empty()  # fmt: skip


def _rise(values: Mapping[str, float | None], target: Mapping[str, Any]) -> str:
    """The rise of what was transferred over the dense model, with its standard error."""
    moved, dense = values.get("transferred"), values.get("dense")
    error = _error(target, "transferred")
    return percent(moved / dense - 1, signed=True, error=error) if moved and dense else ""


def _saved_error(values: Mapping[str, float | None], target: Mapping[str, Any]) -> float | None:
    """The standard error of the share of RIA's perplexity that is saved."""
    moved, ria = values.get("transferred"), values.get("ria")
    error = _error(target, "transferred/ria")
    return error * moved / ria if error and moved and ria else None


def _error(target: Mapping[str, Any], name: str) -> float | None:
    errors = target.get("errors")  # of files that others may have written
    error = errors.get(name) if isinstance(errors, dict) else None
    return error if isinstance(error, float) else None


def failed_transfers(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each model that nothing could be measured on, or where it does not hold."""
    lists = [target.get("warnings") for target in targets]  # of files that others may have written
    return [
        str(warning) for warnings in lists if isinstance(warnings, list) for warning in warnings
    ]


def seconds_by_stage(stages: Sequence[StageTime]) -> dict[str, float]:
    """Work on all stages of a kind together, where it is known."""
    spent: dict[str, float] = {}
    for stage in stages:
        if stage.seconds is not None:
            spent[stage.kind] = spent.get(stage.kind, 0.0) + stage.seconds
    return spent


def timings_table(report: Report) -> Table:
    """Return what each kind of stage took."""
    rows = []
    spent = seconds_by_stage(report.stages)
    for kind in dict.fromkeys(stage.kind for stage in report.stages):
        stages = [stage for stage in report.stages if stage.kind == kind]
        times = [stage.seconds for stage in stages if stage.seconds is not None]
        per = ""
        if times and kind == "search" and report.trials:
            count = len(report.trials) + report.left_out
            per = f"{seconds(1000 * spent[kind] / count)} ms a trial"
        elif len(times) > 1:
            per = f"{seconds(spent[kind] / len(times))} s each"
        rows.append(
            (
                kind,
                f"{sum(stage.done for stage in stages)} of {len(stages)}",
                seconds(spent.get(kind)),
                seconds(max(times, default=None)),
                per,
                sum(stage.attempts for stage in stages),
            )
        )
    return Table(
        ("stage", "done", "seconds", "longest", "pace", "attempts"),
        rows,
        title="Stages",
        notes=("Seconds add up all stages of a kind; workers may do them in parallel.",),
    ).without_empty()


def _gain(report: Report, trial: ReportTrial, by: MeasuredBy) -> str:
    gain = report.gain(trial, by)
    if gain is not None and gain.value == 0 and trial == report.ria:
        return "reference"
    return percent(None if gain is None else gain.share)


def _names(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of models, without their folders where the names still differ."""
    whole = [str(target.get("target", "")) for target in targets]
    last = [Path(name).name or "unknown" for name in whole]
    return last if len({*last}) == len(last) else whole
