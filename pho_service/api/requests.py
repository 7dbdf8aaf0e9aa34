"""
Every request of the API: its id, its line in the log, and how large its body may be.
"""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pho_service.api.guard import OPEN
from pho_service.api.pages import as_page, is_page
from pho_service.api.problems import problem
from pho_service.api.service import Answers
from pho_service.errors import told_to
from pho_service.host.logs import about, request_span
from pho_service.spec.job_options import entry

logger = logging.getLogger(__name__)

HEADER = "X-Request-ID"
UPLOADS = "/v1/texts"
_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestLog:
    """Gives each request an id, which is in its answer and in every line of the log until then."""

    # A client, or a proxy, may send its own as ``X-Request-ID``. What nobody expected becomes an
    # answer here, while it is known whose it is.

    def __init__(self, app: ASGIApp, answers: Answers) -> None:
        self.app = app
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        status = 0
        began = time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._answers.add(scope, status, time.perf_counter() - began)
                MutableHeaders(scope=message)[HEADER] = request
            await send(message)

        traced = request_span(scope["method"], scope["path"], request)
        with about(request=request), told_to(entry), traced as answered:
            try:
                await self.app(scope, receive, named)
            except asyncio.CancelledError:  # the service stops, and waits no longer
                if status:
                    raise
                answer = problem(503, "stopping", "The service stops. Try again soon.")
                await answer(scope, receive, named)
            except Exception:
                logger.exception("%s %s failed", scope["method"], scope["path"])
                if status:
                    raise  # it is half answered
                answer = problem(500, "internal_error", "The server failed; its log says why.")
                page = as_page(answer, scope) if is_page(scope["path"]) else answer
                await page(scope, receive, named)
            finally:
                if status:  # else its client left before
                    answered(status)
                self._log(scope, status, time.perf_counter() - began)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """A line for each request; the probes of those who look after the process are many."""
        caller = scope.get("state", {}).get("caller")
        level = logging.DEBUG if scope["path"] in OPEN and status == 200 else logging.INFO
        fields = {
            "method": scope["method"],
            "path": scope["path"],  # without the query
            "status": status,
            "milliseconds": round(1000 * seconds, 1),
            "key": caller.key_prefix if caller is not None else None,
        }
        logger.log(level, "%s %s %d", scope["method"], scope["path"], status, extra=fields)


# Limit on the size of the body of a request.
class BodyLimit:
    """Refuses bodies that are too large, before they are read into memory."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_text_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_text_bytes = max_text_bytes  # of one that is uploaded, which goes to the disk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_text = (scope["method"], scope["path"]) == ("POST", UPLOADS)
        most = self.max_text_bytes if is_text else self.max_bytes
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared and "transfer-encoding" in headers:  # a proxy may go by the other one
            await _two_lengths()(scope, receive, send)
            return
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > most):
            refusal = problem(413, "body_too_large", _too_large(most))
            await refusal(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, _too_large(most))
            return message

        await self.app(scope, counted, send)


def _too_large(most: int) -> str:
    return f"The body is larger than {most} bytes, which is the most that is read."


def _two_lengths() -> ASGIApp:
    """For a body that ends in two places: what follows the first may be somebody's request."""
    return problem(
        400,
        "two_lengths",
        "The request has both Content-Length and Transfer-Encoding. Send one of them.",
        headers={"Connection": "close"},
    )
