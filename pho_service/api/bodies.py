"""
How large the body of a request may be, and how slowly it may come.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pho_service.api.problems import problem

_BODY_S = 30.0  # for a whole body to come, which is small


class BodyLimit:
    """Refuses bodies that are too large, before they are read into memory, or come too slowly."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float = _BODY_S) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_s = max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared and "transfer-encoding" in headers:  # a proxy may go by the other one
            await _two_lengths()(scope, receive, send)
            return
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > self.max_bytes):
            await self._refusal()(scope, receive, send)
            return
        taken, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.max_s

        async def counted() -> Message:
            nonlocal taken, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"The body did not come within {self.max_s:g} seconds. Send it at once."
                raise HTTPException(408, detail, headers={"Connection": "close"}) from None
            complete = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                raise HTTPException(413, self._detail())
            return message

        await self.app(scope, counted, send)

    def _detail(self) -> str:
        return f"The body is larger than {self.max_bytes} bytes, which is the most that is read."

    def _refusal(self) -> ASGIApp:
        return problem(413, "body_too_large", self._detail())


def _two_lengths() -> ASGIApp:
    """For a body that ends in two places: what follows the first may be somebody's request."""
    return problem(
        400,
        "two_lengths",
        "The request has both Content-Length and Transfer-Encoding. Send one of them.",
        headers={"Connection": "close"},
    )
