"""
Jobs side by side: what was asked differently, what each found, and their searches on one scale.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response

from pho_service.api.job_view import JobHead
from pho_service.api.pages import draw
from pho_service.api.problems import wrong_parameter
from pho_service.api.report import rated_values
from pho_service.api.service import CallerParam, ServiceParam
from pho_service.shown.charts import searches_chart
from pho_service.spec.numbers import number, percent

router = APIRouter(include_in_schema=False)

FEWEST, MOST = 2, 8  # jobs on a page
_HIDDEN = "configuration"  # it would fill the page


@dataclass(frozen=True, kw_only=True)
class Line:
    """A setting or a figure of all jobs, as text; empty where a job has none."""

    name: str
    values: Sequence[str]

    @property
    def differs(self) -> bool:
        """Tell whether they differ."""
        return len({*self.values}) > 1


@router.api_route("/compare", methods=["GET", "HEAD"])
def compare(
    service: ServiceParam, caller: CallerParam, job: Annotated[Sequence[UUID], Query()] = ()
) -> Response:
    """Show jobs side by side."""
    chosen = list(dict.fromkeys(job))
    if not FEWEST <= len(chosen) <= MOST:
        raise wrong_parameter(
            "job", f"names {len(chosen)} jobs, but {FEWEST} to {MOST} are shown side by side"
        )
    found = [service.jobs.get(each, visible_to=caller.visible_to) for each in chosen]
    now = datetime.now(UTC)
    heads = [JobHead.of(each, now) for each in found]
    return draw(
        "compare.html",
        caller=caller,
        heads=heads,
        figures=_figures(heads),
        settings=_settings([each.spec for each in found]),
        chart=searches_chart([(each.name, *rated_values(service, each)) for each in found]),
    )


def _figures(heads: Sequence[JobHead]) -> list[Line]:
    """What the jobs have found."""
    measured = [None if each.job.best is None else each.job.best.perplexities for each in heads]
    rows = [("State", [str(each.job.state) for each in heads])]
    for title, name in (
        ("Perplexity, pruned", "pruned"), ("Dense", "dense"), ("Wanda", "wanda"), ("RIA", "ria"),
    ):  # fmt: skip
        rows.append((title, [number(getattr(each, name, None)) for each in measured]))
    rows.append(
        ("Above dense", [percent(None if e is None else e.rise, signed=True) for e in measured])
    )
    rows.append(("Objective", [number(each.job.progress.best_value) for each in heads]))
    rows.append(("Trials", [f"{e.job.progress.trials_done}" for e in heads]))
    rows.append(("Time", [each.time for each in heads]))
    return [Line(name=name, values=values) for name, values in rows if any(values)]


def _settings(specs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Every field that a job has, those that differ first."""
    flat = [_flat(spec) for spec in specs]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [Line(name=name, values=[each.get(name, "") for each in flat]) for name in names]
    return sorted(rows, key=lambda row: not row.differs)


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """The leaves of a document by their paths; what is not given is left out."""
    found: dict[str, str] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value and name != _HIDDEN:
            found |= _flat(value, f"{above}{name}.")
        elif value is not None and name != _HIDDEN:
            found[f"{above}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found
