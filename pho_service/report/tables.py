"""
The tables of a report: rows of text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pho_service.library.entries import MeasuredBy
from pho_service.report.data import Report, ReportTrial, StageTime, gain_over
from pho_service.spec.configuration import Configuration

MEASURES: tuple[Literal["perplexity", "proxy"], ...] = ("perplexity", "proxy")
METHODS = ("wanda", "ria", "transferred", "own")
# Headings of the gains over RIA; they are of different things, so each has a column of its own.
GAINS: dict[MeasuredBy, str] = {
    "perplexity": "gain in perplexity",
    "divergence": "gain by divergence",
    "proxy": "gain in the proxy",
}
_KEYS = {"perplexity": "perplexities", "proxy": "proxies"}
MOST = 20  # measured trials that are shown
BEST = 5  # rated trials that are shown where nothing was measured


@dataclass(frozen=True, kw_only=True)
class Table:
    """
    A table of the page.

    Attributes:
        caption: What it shows.
        columns: Their headings; the first column has those of the rows.
        rows: Cells of text, row by row.
        marked: The row to look at first; None where there is none.
        note: A sentence below it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    note: str = ""

    def without_empty(self) -> Self:
        """Without the columns in which nothing stands."""
        full = [i for i, _ in enumerate(self.columns) if any(row[i] for row in self.rows)]
        return replace(
            self,
            columns=[self.columns[i] for i in full],
            rows=[[row[i] for i in full] for row in self.rows],
        )


def coefficients_table(configuration: Configuration) -> Table:
    """The configuration itself."""
    c = configuration.coefficients
    return Table(
        caption="The configuration",
        columns=("part", "value"),
        rows=[
            ("method", configuration.method),
            ("row, column, neighbourhood", f"{c.row:.4f}, {c.column:.4f}, {c.neighbourhood:.4f}"),
            ("kernel size", str(c.kernel_size)),
            ("activation exponent", f"{c.activation_exponent:.4f}"),
            ("gradient exponent", f"{c.gradient_exponent:.4f}"),
            ("normalisation", c.normalisation),
            ("steps", str(configuration.steps)),
        ],
    )


def verdict_table(report: Report) -> Table | None:
    """The dense model, the result, Wanda and RIA; None where that was not measured."""
    good = report.perplexities
    if good is None:
        return None
    rows = []
    for name, perplexity in (
        ("dense", good.dense),
        ("pruned", good.pruned),
        ("Wanda", good.wanda),
        ("RIA", good.ria),
    ):
        dense = name == "dense"
        gain = None if dense else gain_over("perplexity", good.ria, perplexity)
        rise = "" if dense or perplexity is None else f"{perplexity / good.dense - 1:+.1%}"
        share = "" if gain is None or name == "RIA" else f"{gain.share:.1%}"
        rows.append((name, _number(perplexity) or "none", rise, share))
    return Table(
        caption="Perplexity: lower is better",
        columns=("model", "perplexity", "above dense", GAINS["perplexity"]),
        rows=rows,
        marked=1,
        note="Wanda and RIA are as published, in the same pattern. The gain is the share of RIA's "
        "perplexity that is saved.",
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
    return Table(
        caption="Finalists and baselines",
        columns=(
            "candidate",
            "perplexity",
            GAINS["perplexity"],
            "divergence",
            GAINS["divergence"],
            "objective",
            GAINS["proxy"],
            "trial",
        ),
        rows=[
            (
                _candidate(trial) + (f" ({mark})" if trial == winner else ""),
                _number(trial.perplexity),
                _gain(report, trial, "perplexity"),
                _number(trial.divergence),
                _gain(report, trial, "divergence"),
                _number(trial.value) or "failed",
                _gain(report, trial, "proxy"),
                str(trial.number),
            )
            for trial in rows
        ],
        marked=0,
        note=f"Objective: {report.objective}"
        + (", higher is better. " if report.maximised else ", lower is better. ")
        + "Divergence: from the dense model, in nats a token. Gains are over RIA: in perplexity, "
        "the share of its perplexity that is saved; by divergence, the same as the divergence "
        "tells; in the proxy, the share of its objective.",
    ).without_empty()


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
                *(_number(values.get(method)) for method in shown),
                "" if gain is None else f"{gain.share:.1%}",
                f"{regret:.0%}" if isinstance(regret, (int, float)) else "",
            )
        )
    return Table(
        caption=f"On other models, by {what}",
        columns=(
            "model",
            *({"own": "own best"}.get(method, method) for method in shown),
            GAINS[what],
            f"regret in {what}",
        ),
        rows=table,
        note="Regret: the share of the own best's gain over RIA that the transferred configuration "
        "loses; empty where there is no own best that gains."
        if any(row[-1] for row in table)
        else "",
    ).without_empty()


def failed_transfers(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each model that nothing could be measured on, or where it does not hold."""
    said = [target.get("warnings") for target in targets]  # of files that others may have written
    return [str(warning) for each in said if isinstance(each, list) for warning in each]


def seconds_by_stage(stages: Sequence[StageTime]) -> dict[str, float]:
    """Work on all stages of a kind together, where it is known."""
    seconds: dict[str, float] = {}
    for stage in stages:
        if stage.seconds is not None:
            seconds[stage.kind] = seconds.get(stage.kind, 0.0) + stage.seconds
    return seconds


def timings_table(report: Report) -> Table:
    """Return the table of what each kind of stage took."""
    rows = []
    seconds = seconds_by_stage(report.stages)
    for kind in dict.fromkeys(stage.kind for stage in report.stages):
        mine = [stage for stage in report.stages if stage.kind == kind]
        known = [stage.seconds for stage in mine if stage.seconds is not None]
        per = ""
        if known and kind == "search" and report.trials:
            count = len(report.trials) + report.left_out
            per = f"{1000 * seconds[kind] / count:.3g} ms a trial"
        elif len(known) > 1:
            per = f"{seconds[kind] / len(known):.3g} s each"
        rows.append(
            (
                kind,
                f"{sum(stage.done for stage in mine)} of {len(mine)}",
                f"{seconds[kind]:.3g}" if known else "",
                f"{max(known):.3g}" if known else "",
                per,
                str(sum(stage.attempts for stage in mine)),
            )
        )
    return Table(
        caption="Stages",
        columns=("stage", "done", "seconds", "longest", "pace", "attempts"),
        rows=rows,
        note="Seconds of all stages of a kind together; several workers do them side by side.",
    ).without_empty()


def pairs_table(caption: str, heading: str, values: Mapping[str, str]) -> Table:
    """Names and values."""
    return Table(caption=caption, columns=(heading, "value"), rows=[*values.items()])


def _candidate(trial: ReportTrial) -> str:
    return trial.method if trial.is_baseline else "found"


def _gain(report: Report, trial: ReportTrial, by: MeasuredBy) -> str:
    gain = report.gain(trial, by)
    if gain is not None and gain.value == 0 and trial == report.ria:
        return "reference"
    return "" if gain is None else f"{gain.share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _names(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of models, without their folders where the names still differ."""
    whole = [str(target.get("target", "")) for target in targets]
    last = [Path(name).name or "unknown" for name in whole]
    return last if len({*last}) == len(last) else whole
