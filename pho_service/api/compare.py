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

from pho_service.api.cards import Card, card
from pho_service.api.chart import Chart, Search, draw_searches
from pho_service.api.pages import draw
from pho_service.api.problems import wrong_parameter
from pho_service.api.service import CallerParam, Service, ServiceParam
from storage import records as stored

router = APIRouter(include_in_schema=False)

FEWEST, MOST = 2, 8  # jobs on a page
_HIDDEN = "configuration"  # it would fill the page


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    A setting or a figure of all jobs.

    Attributes:
        name: What it is.
        values: One of each job, as text; empty where a job has none.
    """

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
    cards = [card(each, {}, now) for each in found]
    return draw(
        "compare.html",
        caller=caller,
        cards=cards,
        figures=_figures(cards),
        settings=_settings([each.spec for each in found]),
        chart=_chart(service, found),
    )


def _figures(cards: Sequence[Card]) -> list[Row]:
    """What the jobs have found."""
    measured = [None if each.job.best is None else each.job.best.perplexities for each in cards]
    rows = [("State", [str(each.job.state) for each in cards])]
    for title, name in (
        ("Perplexity, pruned", "pruned"), ("Dense", "dense"), ("Wanda", "wanda"), ("RIA", "ria"),
    ):  # fmt: skip
        rows.append((title, [_number(getattr(each, name, None)) for each in measured]))
    rows.append(("Above dense", ["" if e is None else f"{100 * e.rise:+.1f} %" for e in measured]))
    rows.append(("Objective", [_number(each.job.progress.best_value) for each in cards]))
    rows.append(("Trials", [f"{e.job.progress.trials_done}" for e in cards]))
    rows.append(("Time", [each.time for each in cards]))
    return [Row(name=name, values=values) for name, values in rows if any(values)]


def _settings(specs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every field that a job has, those that differ first."""
    flat = [_flat(spec) for spec in specs]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [Row(name=name, values=[each.get(name, "") for each in flat]) for name in names]
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


def _chart(service: Service, found: Sequence[stored.Job]) -> Chart | None:
    with service.database.transaction() as connection:
        searches = [Search.read(connection, job) for job in found]
    return draw_searches(searches)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
