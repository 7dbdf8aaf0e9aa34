"""
What stands before every operation: keys, and the size of what comes in.
"""

import base64
import binascii
import ipaddress
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pho_service.api.problems import database_gone, problem
from pho_service.api.service import Caller, Service
from storage.studies import StorageError

OPEN = ("/healthz", "/readyz")  # for those who look after the process


class KeyGuard:
    """
    Lets in who has a key: ``Authorization: Bearer KEY``, or Basic with the key as password.

    Browsers ask for the latter. As long as no key was ever made and none is
    needed, everybody on this machine may come in, but no web page that some
    other site has put into a browser here.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        secret = _secret(headers.get("authorization", ""))
        try:
            caller = await run_in_threadpool(self._caller, secret)
        except StorageError as error:
            await database_gone(error)(scope, receive, send)
            return
        if caller is None:
            scheme = "Bearer" if scope["path"].startswith("/v1") else 'Basic realm="PHO"'
            detail = (
                "A key is needed, as Authorization: Bearer KEY. `pho keys create` makes one."
                if secret is None
                else "This key is not known, or was revoked. `pho keys create` makes a new one."
            )
            answer = problem(401, "no_key", detail, headers={"WWW-Authenticate": scheme})
            await answer(scope, receive, send)
            return
        if caller.key_id is None and not _from_here(headers, scope["method"]):
            answer = problem(
                403,
                "other_site",
                "Without keys, only requests to this machine's own name are answered. Make a key "
                "with `pho keys create`.",
            )
            await answer(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)

    def _caller(self, secret: str | None) -> Caller | None:
        if secret is not None:
            key = self.service.keys.find(secret)
            return None if key is None else Caller(key_id=key.id, sees_all=key.sees_all)
        if self.service.keys_needed or self.service.keys.exist():
            return None
        return Caller(key_id=None, sees_all=True)


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


class BodyLimit:
    """Refuses bodies that are too large, before they are read into memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > self.max_bytes):
            await self._refusal()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                raise HTTPException(413, self._detail())
            return message

        await self.app(scope, counted, send)

    def _detail(self) -> str:
        return f"The body is larger than {self.max_bytes} bytes, which is the most that is read."

    def _refusal(self) -> ASGIApp:
        return problem(413, "body_too_large", self._detail())
