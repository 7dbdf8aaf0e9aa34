"""
Values that a browser sends with a form.
"""

from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

_MOST_FIELDS = 250  # of a form: all jobs of a page, and what is asked of them


async def _pairs(request: Request) -> list[tuple[str, str]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(
            415, "This takes a form, as application/x-www-form-urlencoded. /v1/jobs takes JSON."
        )
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise HTTPException(422, "The form cannot be read. Go back, and send it again.") from error
    return [(name, value.replace("\r\n", "\n")) for name, value in pairs]


Pairs = Annotated[list[tuple[str, str]], Depends(_pairs)]  # all fields of a form, in their order


async def _typed(pairs: Pairs) -> dict[str, str]:
    return dict(pairs)


Typed = Annotated[dict[str, str], Depends(_typed)]  # the same, each once; the last counts
