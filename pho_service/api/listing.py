"""
Which jobs a list has, and in which order: what ``GET /v1/jobs`` and the page for people share.
"""

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Query

from pho_service.api.problems import wrong_parameter
from pho_service.api.schema import PAGE_TOKEN
from pho_service.api.service import Caller, CallerParam, Service
from storage import records as stored
from storage.listing import NEWEST, JobFilter, Sort
from storage.states import JobState

BEGINNING = "[0-9a-fA-F-]{4,36}"  # of an id that is looked for

PageSize = Annotated[int, Query(ge=1, le=200, description="At most so many.")]
PageToken = Annotated[
    str | None,
    Query(
        description="The next_page_token of the page before.",
        json_schema_extra={"pattern": PAGE_TOKEN},
    ),
]
Sorted = Annotated[
    Sort,
    Query(
        description="What the list is sorted by; with a hyphen before it, the highest or the "
        "newest first. `rise` is the share by which the perplexity is above the dense model's, "
        "`gain` the share by which it is below RIA's. Jobs without the value come last."
    ),
]


def which_jobs(
    caller: Caller,
    *,
    states: Sequence[JobState] = (),
    models: Sequence[str] = (),
    patterns: Sequence[str] = (),
    name: str | None = None,
    id_begins: str | None = None,
) -> JobFilter:
    """The jobs of a list that a caller may see."""
    return JobFilter(
        visible_to=caller.visible_to,
        states=states,
        models=models,
        patterns=patterns,
        name=(name or "").strip() or None,
        id_begins=None if id_begins is None else id_begins.replace("-", "").lower(),
    )


async def _asked(
    caller: CallerParam,
    state: Annotated[list[JobState] | None, Query(description="Only jobs in these states.")] = None,
    model: Annotated[
        list[str] | None,
        Query(description="Only jobs for one of these models, as their documents name them."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        Query(
            description="Only jobs that have one of these patterns, among others or alone; "
            "`target` has those that look for the highest sparsity."
        ),
    ] = None,
    name: Annotated[
        str | None,
        Query(
            description="Only jobs whose name contains this, in capitals or not, or whose id "
            "begins with it."
        ),
    ] = None,
    id_begins: Annotated[
        str | None,
        Query(
            alias="id",
            pattern=f"^{BEGINNING}$",
            description="Only jobs whose id begins with it; four digits or more, hyphens or not.",
        ),
    ] = None,
) -> JobFilter:
    return which_jobs(
        caller,
        states=state or (),
        models=model or (),
        patterns=pattern or (),
        name=name,
        id_begins=id_begins,
    )


Asked = Annotated[JobFilter, Depends(_asked)]


def page_of(
    service: Service, which: JobFilter, sort: Sort, size: int, token: str | None
) -> tuple[list[stored.Job], str | None]:
    """
    The jobs of a page, and the token of the next page if there is one.

    That of the newest first is a job's number, so that jobs which come or go meanwhile move no
    other; in other orders, whose values change while jobs run, it is how many were given before.
    """
    after = decode(token)
    if sort == NEWEST:
        found = service.jobs.page(which, before=after, limit=size + 1)
        last = str(found[size - 1].number) if len(found) > size else None
    else:
        skip = after or 0
        found = service.jobs.page(which, sort=sort, skip=skip, limit=size + 1)
        last = str(skip + size) if len(found) > size else None
    return found[:size], last


def decode(token: str | None) -> int | None:
    """
    What a page token stands for; None begins with the first page.

    Raises:
        RequestValidationError: It is not one of ours.
    """
    if token is not None and not re.fullmatch(PAGE_TOKEN, token):
        raise wrong_parameter(
            "page_token", "is not one of our tokens: leave it out to begin with the first page"
        )
    return None if token is None else int(token)
