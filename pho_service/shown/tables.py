"""
The tables and sentences of a result, for every face.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Literal

from pho_service.library import MeasuredBy
from pho_service.shown.parts import Table
from pho_service.shown.report import Report, ReportTrial, StageTime, gain_over
from pho_service.spec.configuration import (
    Configuration,
    Confirmation,
    Continuation,
    Perplexities,
    Rating,
    compared,
)
from pho_service.spec.document import listed, number, percent, seconds
from pho_service.spec.recovery import Recovered
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
_ERROR = " ± is a standard error, of paired differences on the text."
MOST = 20  # measured trials that are shown
BEST = 5  # rated trials that are shown where nothing was measured


def configuration_rows(found: Configuration) -> list[tuple[str, str]]:
    """What was found and how it was chosen, as names and values."""
    c, how = found.coefficients, found.confirmation
    shares = [("row", c.row), ("column", c.column), ("neighbourhood", c.neighbourhood)]
    exponents = [("activation", c.activation_exponent), ("gradient", c.gradient_exponent)]
    rows = [
        ("method", f"{found.method}, pattern {found.pattern}, scope {found.scope}"),
        ("coefficients", listed([*shares, ("kernel", c.kernel_size)])),
        ("exponents", listed(exponents)),
        *([] if c.normalisation == "mean" else [("normalised", c.normalisation)]),
        ("steps", str(found.steps)),
    ]
    if "value" in found.objective:
        value = number(found.objective["value"])
        rows.append(("objective", f"{found.objective.get('name', 'objective')} {value}"))
    for name, value in found.objective.get("relative_to_ria", {}).items():
        rows.append(("", f"{number(value)} of RIA's on {name}"))
    if how is not None:
        rows.append(("perplexity", f"{number(how.perplexity)} on {text_of(how)}"))
        if how.before_reconstruction is not None:
            before = how.beside("before_reconstruction")
            rows.append(("", f"before the reconstruction of its blocks {before}"))
        if found.beside_the_next:
            rows.append(("", found.beside_the_next))
        if how.divergence_tokens is not None:
            rows.append(("", f"the best of {len(found.finalists)} finalists, baselines included"))
    return rows


def text_of(how: Confirmation | Mapping[str, Any]) -> str:
    """What perplexities were measured on, without the folder that it lay in."""
    known = how if isinstance(how, Mapping) else vars(how)
    name = name_of(known["text"])
    return f"{known['tokens']} tokens of {name}, in windows of {known['context_length']}"


def name_of(text: Mapping[str, Any]) -> str:
    """The name of a text, without the folder that it lay in."""
    source = str(text.get("source", "a text"))
    return PurePath(source).name if source.startswith(("/", ".", "~")) else source


def verdict_table(good: Perplexities) -> Table:
    """The dense model, the result, Wanda and RIA."""
    rows = []
    for name, perplexity in (
        ("dense", good.dense), ("pruned", good.pruned), ("Wanda", good.wanda), ("RIA", good.ria),
    ):  # fmt: skip
        gain = rise = None
        if name != "dense" and perplexity is not None:
            rise = perplexity / good.dense - 1
            gain = None if name == "RIA" else gain_over("perplexity", good.ria, perplexity)
        share, of = None if gain is None else gain.share, name.lower()
        against = percent(rise, signed=True, error=good.error("dense", of))
        saved = percent(share, error=good.error("ria", of))
        rows.append((name, number(perplexity) or "none", against, saved))
    return Table(
        ("model", "perplexity", "against dense", "below RIA"),
        rows,
        title="Perplexity: lower is better",
        notes=(
            "Wanda and RIA have the same pattern, and the activation norms of the dense model. "
            "Below RIA is the share of its perplexity that is saved."
            + (_ERROR if good.errors else ""),
        ),
        marked=1,
    ).without_empty()


def continuations_table(found: Sequence[Continuation]) -> Table:
    return Table(
        ("prompt", "dense", "pruned", "recovered"),
        [  # small models write little else than ends of lines
            tuple(
                re.sub(r"\n(\s*\n)+", "\n\n", text)
                for text in (each.prompt, each.dense, each.pruned, each.recovered or "")
            )
            for each in found
        ],
        title="How the dense and the pruned model go on",
        notes=(
            "Each next token is the likeliest. Prompts are from the text of the confirmation."
            if found
            else "Nothing was written: that takes a text to confirm on, a tokenizer, and a model "
            "that is not read block by block.",
        ),
        numbers=False,
        texts=True,
    ).columns_but([] if any(each.recovered is not None for each in found) else ["recovered"])


def recovered_table(recovered: Recovered) -> Table:
    """The dense model, the pruned one, and what it was after its recovery."""
    found, errors = recovered.perplexities, recovered.errors

    def against(name: str, other: str) -> str:
        if not {name, other} <= found.keys():
            return ""
        return compared(found[name], found[other], errors.get(f"{name}/{other}"))

    return Table(
        ("model", "perplexity", "against dense", "against pruned"),
        [
            (
                name,
                number(found[name]),
                "" if name == "dense" else against(name, "dense"),
                against(name, "pruned") if name == "recovered" else "",
            )
            for name in ("dense", "pruned", "recovered")
            if name in found
        ],
        title="Perplexity: lower is better",
        notes=(_ERROR.strip(),) if errors else (),
        marked=2,
    ).without_empty()


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
    found = report.configuration
    behind = {} if found is None else _behind(found.finalists)
    alone = ", of the masks alone" if found is not None and found.steps.needs_text else ""
    return Table(
        (
            "candidate", "perplexity", "above the lowest", GAINS["perplexity"], "divergence",
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
        title="Finalists and baselines",
        notes=(
            f"Objective: {report.objective}"
            + (", higher is better. " if report.maximised else ", lower is better. ")
            + f"Divergence: from the dense model, in nats a token{alone}. Gains are over RIA: in "
            "perplexity, the share of its perplexity that is saved; by divergence, the same as the "
            "divergence tells; in the proxy, the share of its objective.",
        ),
        marked=0,
    ).without_empty()  # fmt: skip


def _behind(finalists: Sequence[Rating]) -> dict[int, str]:
    """How far finalists are behind the best of them, by trial: ``+1.2 ± 0.4%``."""
    known = [(c.trial, c.perplexity, c.error) for c in finalists if c.perplexity is not None]
    return {trial: compared(mine, known[0][1], error) for trial, mine, error in known[1:]}


def result_in_words(point: Mapping[str, Any]) -> str:
    """What a result is: found by the search, or a baseline that no candidate was better than."""
    # With the search's steps it is not the published method that stands beside it.
    method = point.get("method")
    if method in (None, "crepe"):
        return "" if method is None else "found"
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
    return range_of((each.rise for each in points), partial(percent, signed=True))


def range_of(values: Iterable[float | None], said: Callable[[float], str] = number) -> str:
    """The lowest and the highest value in words, or the only one."""
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys([said(min(known)), said(max(known))])) if known else ""


def _beside(point: Mapping[str, Any], method: str) -> str:
    """The perplexity of a published method, and how far the point's result is from it."""
    mine, other = point["perplexity"], point[method]
    if not mine or not other:
        return number(other)
    return f"{number(other)} ({compared(mine, other, (point.get('errors') or {}).get(method))})"


def points_table(
    points: Sequence[Mapping[str, Any]], measured: Confirmation | None = None
) -> Table:
    """A row for each sparsity of a curve or a target, with what is measured of it."""
    on = "" if measured is None else f"Perplexities are of {text_of(measured)}. "
    chosen = [each.get("configuration") or each for each in points]
    dense = next((each["dense"] for each in points if each.get("dense")), None)
    return Table(
        (
            "pattern", "perplexity", "against dense", "Wanda", "RIA", "result", "scope", "state",
            "within", "proxy", "trials", "seconds",
        ),
        [
            (
                each["pattern"],
                number(each["perplexity"]),
                percent(each["rise"], signed=True, error=each.get("rise_error")),
                _beside(each, "wanda"),
                _beside(each, "ria"),
                result_in_words({**each, "method": found.get("method")}),
                found["scope"],
                each.get("state"),
                {True: "yes", False: "no"}.get(each.get("within")),  # type: ignore[arg-type]
                number(each["proxy"]),
                each["trials"],
                seconds(each["seconds"]),
            )
            for each, found in zip(points, chosen, strict=True)
        ],
        title="Perplexity at each sparsity"
        + (f"; the dense model has {number(dense)}" if dense else ""),
        notes=(
            f"{on}Seconds are of search, confirmation, Wanda and RIA, without the calibration."
            " What was found was chosen on the text that it is measured on. In brackets: the "
            "result against Wanda and RIA."
            + (_ERROR if any(each.get("rise_error") for each in points) else ""),
        ),
    ).without_empty()  # fmt: skip


def scores_table(scores: Sequence[TaskScore]) -> Table:
    """What one model scored in zero-shot tasks."""
    mean = mean_accuracy(scores)
    return Table(
        ("task", "metric", "score", "examples", "shots", "version"),
        [
            *((s.task, s.metric, s.shown, s.examples, s.shots, s.version) for s in scores),
            *([("mean", "acc", f"{mean * 100:.2f}", None, None, None)] if mean is not None else []),
        ],
        notes=("Accuracies in percent, ± standard error.",),
    )


def tasks_table(scores: TaskScores) -> Table:
    """What a model scored in zero-shot tasks before and after it was pruned."""
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
    """What a configuration was worth on other models; None where that was not measured."""
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
            "Regret: the share of the own best's gain over RIA that the transferred configuration "
            "loses; empty where there is no own best that gains.",
        )
        if any(row[-1] for row in table)
        else (),
    ).without_empty()  # fmt: skip


def _rise(values: Mapping[str, float | None], target: Mapping[str, Any]) -> str:
    """The rise of what was transferred over the dense model, with its standard error."""
    mine, dense = values.get("transferred"), values.get("dense")
    error = _error(target, "transferred")
    return percent(mine / dense - 1, signed=True, error=error) if mine and dense else ""


def _saved_error(values: Mapping[str, float | None], target: Mapping[str, Any]) -> float | None:
    """The standard error of the share of RIA's perplexity that is saved."""
    mine, ria = values.get("transferred"), values.get("ria")
    error = _error(target, "transferred/ria")
    return error * mine / ria if error and mine and ria else None


def _error(target: Mapping[str, Any], name: str) -> float | None:
    errors = target.get("errors")  # of files that others may have written
    error = errors.get(name) if isinstance(errors, dict) else None
    return error if isinstance(error, float) else None


def failed_transfers(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each model that nothing could be measured on, or where it does not hold."""
    said = [target.get("warnings") for target in targets]  # of files that others may have written
    return [str(warning) for each in said if isinstance(each, list) for warning in each]


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
        mine = [stage for stage in report.stages if stage.kind == kind]
        known = [stage.seconds for stage in mine if stage.seconds is not None]
        per = ""
        if known and kind == "search" and report.trials:
            count = len(report.trials) + report.left_out
            per = f"{seconds(1000 * spent[kind] / count)} ms a trial"
        elif len(known) > 1:
            per = f"{seconds(spent[kind] / len(known))} s each"
        rows.append(
            (
                kind,
                f"{sum(stage.done for stage in mine)} of {len(mine)}",
                seconds(spent.get(kind)),
                seconds(max(known, default=None)),
                per,
                sum(stage.attempts for stage in mine),
            )
        )
    return Table(
        ("stage", "done", "seconds", "longest", "pace", "attempts"),
        rows,
        title="Stages",
        notes=("Seconds of all stages of a kind together; several workers do them side by side.",),
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
