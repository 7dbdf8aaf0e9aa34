"""
What stands before every operation: keys, logins, and how much and how often somebody may ask.
"""

import base64
import binascii
import ipaddress
import math
import re
import time
from collections import Counter
from functools import partial
from http import HTTPStatus
from urllib.parse import quote, urlencode, urlsplit

from fastapi import APIRouter
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request, cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pho_service.api.pages import Typed, draw, is_page
from pho_service.api.problems import database_gone, problem
from pho_service.api.service import Caller, Service, ServiceParam
from storage.keys import key_digest
from storage.studies import StorageError

READY = "/readyz"
OPEN = ("/healthz", READY, "/favicon.ico")  # say nothing of jobs, and are asked for often
LOGIN = ("/login", "/logout")  # for those who have no key yet
METRICS = "/metrics"
SESSION = "pho_session"  # the cookie of a login

_SCRAPE_ONLY = (
    "This key reads /metrics, and nothing else: it was made by `pho keys create --scrape-only`. "
    "`pho keys create NAME` makes one for jobs."
)
_KNOWN = 100_000  # keys that are remembered
_KNOWN_S = 1.0  # before those that are right are asked for again


class Rate:
    """How often each of many may do something in a minute, as this process counts it."""

    # The minute slides: what was done in the last one counts less the longer ago it is.

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._item = RateLimitItemPerMinute(max(1, per_minute))
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count(self, who: str) -> bool:
        """Count one more; False if it is one too many, which is not counted."""
        return not self.per_minute or self._limiter.hit(self._item, who)

    def is_spent(self, who: str, besides: int = 0) -> bool:
        """Whether one more would be too many, with so many ``besides`` that are not counted yet."""
        return bool(self.per_minute) and not self._limiter.test(self._item, who, cost=1 + besides)

    def wait_s(self, who: str) -> int:
        """Whole seconds until there may be one more."""
        reset = self._limiter.get_window_stats(self._item, who).reset_time
        return min(60, max(1, math.ceil(reset - time.time())))


class KeyGuard:
    """
    Lets in who has a key: ``Authorization: Bearer KEY``, or Basic with the key as password, or the
    cookie of a login (:mod:`pho_service.api.guard`), to which browsers are led.
    """

    # As long as no key was ever made and none is needed, everybody on this machine may come in, but
    # no web page that some other site has put into a browser here. Nor may such a page use the key
    # or the cookie that a browser sends by itself, or one of our forms.
    #
    # Nobody may ask too often. After too many wrong keys a host's are compared with those that are
    # known to be right, once a second again, and the database is not asked for others: who has a
    # key behind the same address works on.

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self._requests = Rate(service.settings.max_requests_per_minute)
        self._wrong_keys = Rate(service.settings.max_wrong_keys_per_minute)
        self._known: set[bytes] = set()
        self._known_at = 0.0
        self._tried: Counter[str] = Counter()  # keys that are being looked up, by host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        told_more = path == READY and b"verbose" in scope["query_string"]
        if scope["type"] != "http" or (path in OPEN and not told_more):
            await self.app(scope, receive, send)
            return
        answer = await self._refusal(scope) or self.app
        if answer is self.app and not scope["path"].isprintable():  # a route would not see its end
            answer = problem(404, "not_found", "There is nothing under this address.")
        await answer(scope, receive, send)

    async def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The answer for who may not come in; None for others, whom the scope then names."""
        headers = Headers(scope=scope)
        secret, host = _secret(headers.get("authorization", "")), host_of(scope)
        session = None if _is_bearer(headers) else _session(headers)
        # Who is not known yet is counted before the database is asked.
        unknown = secret is None if session is None else session not in self._known
        if unknown and not self._requests.count(host):
            return self._too_often(host)
        try:
            caller = None if session is None else await self._logged_in(session)
            if caller is None:
                caller = await self.admit(host, secret)
        except HTTPException as error:  # too many wrong keys
            headers_of = dict(error.headers or {})
            return problem(429, "too_many_wrong_keys", error.detail, headers=headers_of)
        except StorageError as error:
            return database_gone(error)
        if caller is not None and caller.key_id and not self._requests.count(str(caller.key_id)):
            return self._too_often(str(caller.key_id))
        if caller is not None and caller.scrape_only and scope["path"] != METRICS:
            return problem(403, "not_for_this_key", _SCRAPE_ONLY)
        at_the_door = scope["path"] in LOGIN
        if caller is None and not at_the_door:
            return _no_key(scope, headers, secret)
        if not _is_bearer(headers) and not _from_own_page(headers, scope):
            return problem(
                403,
                "other_site",
                "A page of another site has sent this. Use the forms of this service, or send the "
                "key as Authorization: Bearer KEY.",
            )
        if (
            caller is not None
            and caller.key_id is None
            and not _from_here(headers, scope["method"])
        ):
            return problem(
                403,
                "other_site",
                "Without keys, only requests to this machine's own name are answered. Make a key "
                "with `pho keys create`.",
            )
        state = scope.setdefault("state", {})
        state["caller"] = caller
        if at_the_door:
            state["admit"] = partial(self.admit, host)
        return None

    async def admit(self, host: str, secret: str | None) -> Caller | None:
        """Tell whose key a secret is; without one, who may come in without a key."""
        if secret is not None and await self._is_hopeless(secret, host):
            raise HTTPException(
                429,
                f"More than {self._wrong_keys.per_minute} wrong keys in a minute came from your "
                "host. Wait as Retry-After says; the operator sets PHO_MAX_WRONG_KEYS_PER_MINUTE.",
                headers={"Retry-After": str(self._wrong_keys.wait_s(host))},
            )
        return await self._looked_up(secret, host)

    async def _logged_in(self, session: bytes) -> Caller | None:
        """Whose login it is, by the SHA-256 of its token."""
        key = await run_in_threadpool(self.service.sessions.find, session)
        if key is None:
            self._known.discard(session)
            return None
        if len(self._known) < _KNOWN:
            self._known.add(session)
        return Caller.of(key, session=session)

    def _caller(self, secret: str | None) -> Caller | None:
        if secret is not None:
            key = self.service.keys.find(secret)
            if key is None:
                return None
            return Caller.of(key)
        if self.service.keys_needed or self.service.keys.exist():
            return None
        return Caller(key_id=None, sees_all=True)

    async def _is_hopeless(self, secret: str, host: str) -> bool:
        """Whether a key is refused without a question to the database: too many were wrong."""
        if not self._wrong_keys.is_spent(host, self._tried[host]):
            return False
        if key_digest(secret) in self._known:
            return False
        now = time.monotonic()
        if now - self._known_at >= _KNOWN_S:
            self._known_at = now
            self._known = await run_in_threadpool(self.service.keys.digests)
        return key_digest(secret) not in self._known

    async def _looked_up(self, secret: str | None, host: str) -> Caller | None:
        """Whose key it is; wrong ones count, those that are being looked up too."""
        if secret is None:
            return await run_in_threadpool(self._caller, None)
        is_known = key_digest(secret) in self._known
        self._tried[host] += not is_known
        try:
            caller = await run_in_threadpool(self._caller, secret)
        finally:
            self._tried[host] -= not is_known
            if not self._tried[host]:
                del self._tried[host]
        if caller is None:
            self._known.discard(key_digest(secret))  # revoked
            self._wrong_keys.count(host)
        elif len(self._known) < _KNOWN:
            self._known.add(key_digest(secret))
        return caller

    def _too_often(self, who: str) -> ASGIApp:
        return problem(
            429,
            "too_many_requests",
            f"More than {self._requests.per_minute} requests in a minute, the most for one key, "
            "or one host without a key. Wait as Retry-After says; the operator sets "
            "PHO_MAX_REQUESTS_PER_MINUTE.",
            headers={"Retry-After": str(self._requests.wait_s(who))},
        )


def _no_key(scope: Scope, headers: Headers, secret: str | None) -> ASGIApp:
    """Ask for a key: a browser by the page that logs it in, a program by its header."""
    reads_pages = "text/html" in headers.get("accept", "") and not _is_bearer(headers)
    expired = SESSION in cookie_parser(headers.get("cookie", ""))
    if reads_pages and scope["method"] in ("GET", "HEAD"):
        return RedirectResponse(f"/login{_next(scope)}", 303)
    if reads_pages:
        detail = (
            "Your login has expired, or its key was revoked, and nothing was changed. Log in in "
            "another tab, at /login, then load this page again to send the form once more."
            if expired
            else "A key is needed, and nothing was changed. Log in in another tab, at /login, then "
            "load this page again to send the form once more."
        )
    elif secret is None:
        detail = "A key is needed, as Authorization: Bearer KEY. `pho keys create` makes one."
    else:
        detail = "This key is not known, has expired, or was revoked. `pho keys create` makes one."
    # Not for what a page of ours loads: a browser would ask for a password in the middle of it.
    by_hand = headers.get("accept", "*/*") == "*/*" and "sec-fetch-mode" not in headers
    is_basic = by_hand and not expired and not scope["path"].startswith("/v1")
    scheme = 'Basic realm="PHO"' if is_basic else "Bearer"
    return problem(401, "no_key", detail, headers={"WWW-Authenticate": scheme})


def _next(scope: Scope) -> str:
    """The query that leads from the login to what was asked for."""
    query = scope["query_string"].decode("latin-1")
    path = quote(scope["path"], safe="/:@") + (f"?{query}" if query else "")
    return "" if path == "/" else "?" + urlencode({"next": path})


def _session(headers: Headers) -> bytes | None:
    """The SHA-256 of the token of a browser's login, right or wrong."""
    token = cookie_parser(headers.get("cookie", "")).get(SESSION)
    return None if token is None else key_digest(token)


def host_of(scope: Scope) -> str:
    """The address of who asks; of IPv6 the network, for one host has as many as it likes."""
    name = str((scope.get("client") or [""])[0])
    try:
        address = ipaddress.ip_address(name)
    except ValueError:  # a socket without addresses
        return name
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address), 64), strict=False))
    return str(address)


def _secret(authorization: str) -> str | None:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, ValueError):
            return ""
        return decoded.partition(":")[2]
    return authorization or None


def _is_bearer(headers: Headers) -> bool:
    """Whether a program has sent its key on purpose, which no browser does by itself."""
    return headers.get("authorization", "").lower().startswith("bearer ")


def _from_own_page(headers: Headers, scope: Scope) -> bool:
    """Whether a browser, if it is one, was told by a page of this service to change something."""
    # As net/http's CrossOriginProtection of Go does it: browsers say so themselves where the
    # connection is secure or local, and name the page's origin otherwise. Where no key is needed,
    # only our forms ask for it, which any page could send; JSON is refused by ``_from_here``.
    keyless = "authorization" not in headers and _session(headers) is None
    if scope["method"] in ("GET", "HEAD") or (keyless and not is_page(scope["path"])):
        return True
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _from_here(headers: Headers, method: str) -> bool:
    """Whether a browser, if it is one, was sent here by a page of this service."""
    if not is_local(_host(f"//{headers.get('host', 'localhost')}")):
        return False
    origin = headers.get("origin")
    if origin is None or method in ("GET", "HEAD"):
        return True
    return is_local(_host(origin))


def _host(url: str) -> str:
    """The name of a URL's host; empty if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_local(host: str) -> bool:
    """Whether a host's name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# The login of browsers: a key is typed once, and a cookie stands for it until the login expires.
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
        message = (
            "This key is not known, has expired, or was revoked. Check that all of it was pasted."
        )
        return _form(to, wrong=message, status=HTTPStatus.FORBIDDEN)
    if caller.scrape_only:
        return _form(to, wrong=_SCRAPE_ONLY, status=HTTPStatus.FORBIDDEN)
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
