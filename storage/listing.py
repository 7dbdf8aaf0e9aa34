"""
The list of jobs: which of them, in what order, and how many there are of each kind.

What jobs are listed by stands in columns of its own beside their documents: see :func:`columns_of`
and :func:`found_columns`.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, Text, case, cast, func, or_, select

from storage.states import JobState
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
    """
    Which jobs are listed: those for which everything holds that is given.

    Attributes:
        visible_to: The key that submitted them; None sees the jobs of all keys.
        states: They are in one of these.
        models: They are for one of these models, among others or alone.
        patterns: They have one of these patterns, or :data:`TARGET` and look for one.
        name: It is in their name, in capitals or not, or their id begins with it.
        id_begins: Their id begins so, in lower case and without hyphens.
    """

    visible_to: uuid.UUID | None = None
    states: Sequence[JobState] = ()
    models: Sequence[str] = ()
    patterns: Sequence[str] = ()
    name: str | None = None
    id_begins: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """The same in SQL, but for ``visible_to``."""
        found: list[ColumnElement[bool]] = []
        if self.states:
            found.append(jobs.c.state.in_([*self.states]))
        if self.models:
            found.append(jobs.c.models.overlap(_storable(self.models)))
        if self.patterns:
            found.append(jobs.c.patterns.overlap(_storable(self.patterns)))
        digits = func.replace(cast(jobs.c.id, Text), "-", "")
        if self.name:
            (name,) = _storable([self.name])
            begins = name.replace("-", "").lower()
            named = jobs.c.name.icontains(name, autoescape=True)
            found.append(
                or_(named, digits.startswith(begins, autoescape=True)) if begins else named
            )
        if self.id_begins is not None:
            found.append(digits.startswith(self.id_begins, autoescape=True))
        return found


EVERYTHING = JobFilter()


@dataclass(frozen=True, kw_only=True)
class Facets:
    """
    How many jobs there are of each state, model and pattern; each counted as if it alone were not
    filtered by.

    Attributes:
        states: All that occur.
        models: Those that are filtered by first, then the most frequent.
        patterns: The same.
    """

    states: Mapping[JobState, int]
    models: Sequence[tuple[str, int]]
    patterns: Sequence[tuple[str, int]]


def ordered(sort: Sort) -> list[ColumnElement[Any]]:
    """
    The order of a list in SQL. Jobs without the value come last, and equal ones newest first.

    Args:
        sort: What it is sorted by; with a hyphen before it, the highest first.
    """
    value = _VALUES[sort.removeprefix("-")]
    first = value.desc() if sort.startswith("-") else value.asc()
    return [first.nulls_last(), jobs.c.number.desc()]


def read_facets(connection: Connection, which: JobFilter, *, limit: int) -> Facets:
    """
    Count the jobs of a list.

    Args:
        connection: In a transaction.
        which: The list.
        limit: At most so many models, and so many patterns.
    """

    def count(value: Any, without: JobFilter, chosen: Sequence[str] = ()) -> list[tuple[Any, int]]:
        query = select(value.label("value")).where(*without.conditions())
        if which.visible_to is not None:
            query = query.where(jobs.c.owner_id == which.visible_to)
        each = query.subquery().c.value
        number = func.count()
        first = each.in_(_storable(chosen)).desc()
        counts = select(each, number).group_by(each).order_by(first, number.desc(), each)
        return [(row[0], row[1]) for row in connection.execute(counts.limit(limit))]

    return Facets(
        states=dict(count(jobs.c.state, replace(which, states=()))),
        models=count(func.unnest(jobs.c.models), replace(which, models=()), which.models),
        patterns=count(func.unnest(jobs.c.patterns), replace(which, patterns=()), which.patterns),
    )


def columns_of(spec: Mapping[str, Any]) -> dict[str, list[str]]:
    """
    What a job is listed by from the beginning.

    Args:
        spec: The document of a search, or of a transfer.

    Returns:
        Values of the columns ``models`` and ``patterns``.
    """
    models = spec.get("models") or [spec.get("model"), *(spec.get("more_models") or ())]
    asked = spec.get("configuration") or spec
    patterns = asked.get("patterns") or [TARGET if asked.get("target") else asked.get("pattern")]
    return {
        "models": _storable([str(model) for model in models if model]),
        "patterns": _storable([str(pattern) for pattern in patterns if pattern]),
    }


def found_columns(best: Mapping[str, Any] | None) -> dict[str, float | None]:
    """
    What a job is listed by once it has a configuration.

    Args:
        best: The configuration.

    Returns:
        Values of the columns ``perplexity``, ``rise`` (its share above the dense model's) and
        ``gain`` (its share below RIA's).
    """
    best = best or {}
    measured = best.get("perplexities") or {}
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
