"""
Pages for people: how they are put together, what a browser may do with them, and their errors.
"""

import json
import re
from functools import cache
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import Depends
from jinja2 import Environment
from markupsafe import Markup
from starlette.datastructures import URL, Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pho_service.shown.parts import policy_hash, template_environment

_PATHS = re.compile(r"/|/new(/check)?|/compare|/login|/logout|/jobs|/jobs/.*")
_SAFE = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}  # fmt: skip
_FRAMES = "frame-ancestors 'none'"
_SAME_FOR_ALL = ("/static/", "/favicon.ico")  # may be kept
_KEPT = ("www-authenticate", "retry-after", "allow")  # of a problem's headers


def is_page(path: str) -> bool:
    """Whether what is at a path is for people: its errors are pages, too."""
    return _PATHS.fullmatch(path) is not None


def draw(
    template: str,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    script: str | None = None,
    **values: Any,
) -> Response:
    html = _environment().get_template(template).render(
        style=ours("style.css"), script=None if script is None else ours(script), **values
    )  # fmt: skip
    return Response(
        html.encode("utf-8", "replace"),  # JSON can hold half characters, a page cannot
        status_code=status,
        media_type="text/html; charset=utf-8",
        headers={
            "Content-Security-Policy": content_security_policy(script),
            "Cache-Control": "no-store",
            "Referrer-Policy": "same-origin",  # with none at all, forms would name no origin
            "X-Content-Type-Options": "nosniff",
            **(headers or {}),
        },
    )


@cache
def content_security_policy(script: str | None = None) -> str:
    """What a browser lets a page do: look as it does, and send its forms here."""
    runs = ""
    if script is not None:
        runs = f"script-src {policy_hash(ours(script))}; connect-src 'self'; "
    return (
        f"default-src 'none'; style-src {policy_hash(ours('style.css'))}; {runs}img-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )


@cache
def ours(name: str) -> Markup:
    """A style or a script of ours, as it stands in a page."""
    return Markup(_environment().get_template(name).render())  # noqa: S704 - ours


@cache
def _environment() -> Environment:
    return template_environment("pho_service.api", "templates")


def icon(_request: Request) -> Response:
    """The picture beside a page's title, which browsers ask for by themselves, with no key."""
    return Response(
        str(ours("mark.svg")),
        media_type="image/svg+xml",
        headers={"Cache-Control": "max-age=86400"},
    )


def as_page(answer: JSONResponse, scope: Scope) -> Response:
    """A problem as a page, for the request that it is the answer to."""
    return _trouble(bytes(answer.body), answer.status_code, answer.headers, scope)


def _trouble(body: bytes, status: int, headers: Headers, scope: Scope) -> Response:
    kept = {name: headers[name] for name in _KEPT if name in headers}
    url = URL(scope=scope)
    return draw(
        "trouble.html",
        status=status,
        headers=kept,
        problem=json.loads(body),
        refresh_s=int(kept.get("retry-after", 0)) if scope["method"] == "GET" else 0,
        address=f"{url.path}?{url.query}" if url.query else url.path,
    )


class SafeHeaders:
    """
    Says to browsers, with every answer that does not say it itself: believe the type that it has,
    show it in nobody else's page, and keep no copy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE.items():
                    headers.setdefault(name, value)
                policy = headers.setdefault("Content-Security-Policy", _FRAMES)
                if "frame-ancestors" not in policy:
                    headers["Content-Security-Policy"] = f"{policy}; {_FRAMES}"
                if not scope["path"].startswith(_SAME_FOR_ALL):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, safely)


class Pages:
    """Gives a page instead of a problem to those who asked for a page."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_page(scope["path"]):
            await self.app(scope, receive, send)
            return
        problem: Message | None = None
        body = b""

        async def unless_problem(message: Message) -> None:
            nonlocal problem, body
            if message["type"] == "http.response.start":
                headers = Headers(raw=message["headers"])
                if headers.get("content-type") == "application/problem+json":
                    problem = message
            if problem is None:
                await send(message)
                return
            body += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body"):
                headers = Headers(raw=problem["headers"])
                page = _trouble(body, problem["status"], headers, scope)
                await page(scope, receive, send)

        await self.app(scope, receive, unless_problem)


# Values that a browser sends with a form.
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
