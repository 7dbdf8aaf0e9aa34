"""
Limit on the size of the body of a request.
"""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pho_service.api.problems import problem


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
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared and "transfer-encoding" in headers:  # a proxy may go by the other one
            await _two_lengths()(scope, receive, send)
            return
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


def _two_lengths() -> ASGIApp:
    """For a body that ends in two places: what follows the first may be somebody's request."""
    return problem(
        400,
        "two_lengths",
        "The request has both Content-Length and Transfer-Encoding. Send one of them.",
        headers={"Connection": "close"},
    )
