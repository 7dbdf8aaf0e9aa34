"""
The login of browsers: a key is typed once, and a cookie stands for it until the login expires.

The cookie holds an opaque token, not the key: see :mod:`storage.sessions`. Who may send the forms,
and how many keys may be tried, is checked by :mod:`pho_service.api.guard`.
"""

import re
from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from pho_service.api.guard import SESSION
from pho_service.api.pages import draw
from pho_service.api.service import Caller, Service, ServiceParam
from pho_service.api.typed import Typed
from storage.keys import key_digest

router = APIRouter(include_in_schema=False)

# A path of ours: after the first slash comes neither another one nor what browsers take for one.
_LOCAL = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]*)?")
_LONGEST = 2000  # of a path


@router.api_route("/login", methods=["GET", "HEAD"])
async def show(request: Request, next: str = "/") -> Response:  # noqa: A002 - as in the address
    """Show the form, or lead on who is logged in."""
    if request.state.caller is not None:
        return RedirectResponse(local(next), HTTPStatus.SEE_OTHER)
    return _form(local(next), expired=SESSION in request.cookies)


@router.post("/login")
async def log_in(request: Request, typed: Typed, service: ServiceParam) -> Response:
    """Give a browser a login, and lead it to the page that it first asked for."""
    to = local(typed.get("next", ""))
    secret = typed.get("key", "").strip()
    if not secret:
        return _form(to, wrong="Type a key.", status=HTTPStatus.UNPROCESSABLE_ENTITY)
    caller = await request.state.admit(secret)
    if not isinstance(caller, Caller) or caller.key_id is None:
        told = (
            "This key is not known, has expired, or was revoked. Check that all of it was pasted."
        )
        return _form(to, wrong=told, status=HTTPStatus.FORBIDDEN)
    hours = service.settings.login_hours
    token = await run_in_threadpool(service.sessions.begin, caller.key_id, hours=hours)
    answer = RedirectResponse(to, HTTPStatus.SEE_OTHER)
    answer.set_cookie(
        SESSION,
        token,
        max_age=round(hours * 3600),
        httponly=True,
        samesite="lax",  # a link in a message shall open after it
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/logout")
def log_out(request: Request, service: ServiceParam) -> Response:
    """End a browser's login, here and for whoever has a copy of its cookie."""
    _end(request, service)
    answer = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
    answer.delete_cookie(SESSION, httponly=True, samesite="lax")
    return answer


def _end(request: Request, service: Service) -> None:
    token = request.cookies.get(SESSION)
    if token is not None:
        service.sessions.end(key_digest(token))


def _form(
    to: str, *, expired: bool = False, wrong: str | None = None, status: int = HTTPStatus.OK
) -> Response:
    return draw("login.html", status=status, next=to, expired=expired, wrong=wrong)


def local(path: str) -> str:
    """A path of this service to lead to, or that of the front page if it is not one."""
    if len(path) > _LONGEST or not _LOCAL.fullmatch(path):
        return "/"
    return "/" if path.partition("?")[0] in ("/login", "/logout") else path
