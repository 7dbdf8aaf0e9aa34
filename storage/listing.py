"""
The list of jobs: which of them, in what order, and how many there are of each kind.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, Text, case, cast, func, or_, select

from storage.records import JobState
from storage.tables import jobs

Sort = Literal[
    "created", "-created", "name", "-name", "model", "-model", "pattern", "-pattern",
    "state", "-state", "perplexity", "-perplexity", "rise", "-rise", "gain", "-gain",
]  # fmt: skip
SORTS: tuple[Sort, ...] = get_args(Sort)
NEWEST: Sort = "-created"
TARGET = "target"  # stands for the pattern of a job that looks for one

_RANKS = {state.value: rank for rank, state in enumerate(JobState)}
_VALUES: dict[str, ColumnElement[Any]] = {
    "created": jobs.c.number,
    "name": func.lower(jobs.c.name),
    "model": func.lower(jobs.c.models[1]),
    "pattern": jobs.c.patterns[1],
    "state": case(_RANKS, value=cast(jobs.c.state, Text)),
    "perplexity": jobs.c.perplexity,
    "rise": jobs.c.rise,
    "gain": jobs.c.gain,
}


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs are listed: those for which everything holds that is given."""

    # The key that submitted them; None sees the jobs of all keys.
    visible_to: uuid.UUID | None = None
    states: Sequence[JobState] = ()  # They are in one of these
    models: Sequence[str] = ()  # They are for one of these models, among others or alone
    # They have one of these patterns, or :data:`TARGET` and look for one.
    patterns: Sequence[str] = ()
    labels: Sequence[str] = ()  # They have all of these: NAME=VALUE, or NAME with any value
    name: str | None = None  # It is in their name, in capitals or not, or their id begins with it
    id_begins: str | None = None  # Their id begins so, in lower case and without hyphens

    def conditions(self) -> list[ColumnElement[bool]]:
        conditions: list[ColumnElement[bool]] = []
        if self.states:
            conditions.append(jobs.c.state.in_([*self.states]))
        if self.models:
            conditions.append(jobs.c.models.overlap(_storable(self.models)))
        if self.patterns:
            conditions.append(jobs.c.patterns.overlap(_storable(self.patterns)))
        if self.labels:
            conditions.append(jobs.c.labels.contains(_storable(self.labels)))
        digits = func.replace(cast(jobs.c.id, Text), "-", "")
        if self.name:
            (name,) = _storable([self.name])
            first_digits = name.replace("-", "").lower()
            in_name = jobs.c.name.icontains(name, autoescape=True)
            in_id = digits.startswith(first_digits, autoescape=True)
            conditions.append(or_(in_name, in_id) if first_digits else in_name)
        if self.id_begins is not None:
            conditions.append(digits.startswith(self.id_begins, autoescape=True))
        return conditions


EVERYTHING = JobFilter()


@dataclass(frozen=True, kw_only=True)
class Facets:
    """How many jobs have each state, model and pattern, each counted without its own filter."""

    states: Mapping[JobState, int]  # All that occur
    models: Sequence[tuple[str, int]]  # Those that are filtered by first, then the most frequent
    patterns: Sequence[tuple[str, int]]  # The same


def ordered(sort: Sort) -> list[ColumnElement[Any]]:
    """The order of a list in SQL. Jobs without the value come last, and equal ones newest first."""
    value = _VALUES[sort.removeprefix("-")]
    first = value.desc() if sort.startswith("-") else value.asc()
    return [first.nulls_last(), jobs.c.number.desc()]


def read_facets(connection: Connection, job_filter: JobFilter, *, limit: int) -> Facets:
    """Count the jobs of a list."""

    def count(value: Any, without: JobFilter, chosen: Sequence[str] = ()) -> list[tuple[Any, int]]:
        query = select(value.label("value")).where(*without.conditions())
        if job_filter.visible_to is not None:
            query = query.where(jobs.c.owner_id == job_filter.visible_to)
        values = query.subquery().c.value
        number = func.count()
        chosen_first = values.in_(_storable(chosen)).desc()
        counts = select(values, number).group_by(values)
        counts = counts.order_by(chosen_first, number.desc(), values).limit(limit)
        return [(row[0], row[1]) for row in connection.execute(counts)]

    return Facets(
        states=dict(count(jobs.c.state, replace(job_filter, states=()))),
        models=count(func.unnest(jobs.c.models), replace(job_filter, models=()), job_filter.models),
        patterns=count(
            func.unnest(jobs.c.patterns), replace(job_filter, patterns=()), job_filter.patterns
        ),
    )


def columns_of(spec: Mapping[str, Any]) -> dict[str, list[str]]:
    models = spec.get("models") or [spec.get("model"), *(spec.get("more_models") or ())]
    request = spec.get("configuration") or spec
    pattern = TARGET if request.get("target") else request.get("pattern")
    patterns = request.get("patterns") or [pattern]
    return {
        "models": _storable([str(model) for model in models if model]),
        "patterns": _storable([str(pattern) for pattern in patterns if pattern]),
        "labels": [
            label
            for name, value in (spec.get("labels") or {}).items()
            for label in (name, f"{name}={value}")
        ],
    }


def best_columns(best: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What a job is listed by once it has a configuration."""
    best = best or {}
    measured = best.get("report") or best.get("perplexities") or {}
    pruned = measured.get("pruned") or (best.get("confirmation") or {}).get("perplexity")
    dense, ria = measured.get("dense"), measured.get("ria")
    return {
        "perplexity": pruned,
        "rise": pruned / dense - 1 if pruned and dense else None,
        "gain": 1 - pruned / ria if pruned and ria else None,
    }


def _storable(texts: Sequence[str]) -> list[str]:
    """Texts as PostgreSQL takes them: it knows no U+0000."""
    return [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in texts]
