"""
optuna-dashboard below the same host and login, for reading only.
"""

import functools
import warnings

import optuna
from a2wsgi import WSGIMiddleware
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from pho_service.api.pages import ours
from pho_service.api.problems import database_gone, problem
from pho_service.api.service import Caller, Service
from pho_service.shown.parts import policy_hash
from storage.studies import StorageError, StudyStorage, end_connections

# The dashboard's own paths: they are compiled into its pages, so it cannot be moved.
_PREFIXES = ("/dashboard", "/api/", "/static/", "/csv/", "/artifacts/")
# What its page lacks: a way back, names that a screen reader can say, and contrast. What it has too
# much: buttons that create, rename, delete and write notes, all of which are refused here.
_MORE = ours("dashboard.html")
_RUNS = f"script-src {policy_hash(ours('dashboard.js'))} "


class Dashboard:
    """An ASGI application for everything that is not the API's."""

    # Who may see all jobs may read all studies; nobody can change one here.

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = await self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        # Its program comes compressed only, and fails for those who say nothing of that.
        if scope["path"].startswith("/static/"):
            rest = [h for h in scope["headers"] if h[0] != b"accept-encoding"]
            scope = {**scope, "headers": [*rest, (b"accept-encoding", b"gzip")]}
        failed = False
        page: Message | None = None  # the start of the answer that is one
        body = b""

        async def unless_failed(message: Message) -> None:
            nonlocal failed, page, body
            if message["type"] == "http.response.start":
                failed = message["status"] >= 500
                if Headers(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                    page = message
                    return
            if failed:
                return
            if page is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                await _send_page(page, body, send)

        await self._app(scope, receive, unless_failed)  # type: ignore[arg-type]  # a2wsgi's types
        if failed:  # the database went away after it was asked for
            await database_gone(StorageError("optuna-dashboard failed"))(scope, receive, send)

    def close(self) -> None:
        if "_app" in self.__dict__:
            self._app.executor.shutdown(wait=False)
        if "_storage" in self.__dict__:
            self._storage.remove_session()
            end_connections(self._storage.engine)

    async def _refusal(self, scope: Scope) -> JSONResponse | None:
        path = scope["path"]
        if not path.startswith(_PREFIXES):
            return problem(404, "not_found", f"Nothing is at {path}. /docs lists what is.")
        if scope["method"] not in ("GET", "HEAD"):
            return problem(
                405,
                "read_only",
                "The dashboard is for reading. Jobs are changed under /v1/jobs.",
                headers={"Allow": "GET, HEAD"},
            )
        caller = scope["state"]["caller"]
        assert isinstance(caller, Caller)
        if not caller.sees_all:
            return problem(
                403,
                "not_for_this_key",
                "The dashboard shows the studies of all keys, but this key sees its own jobs "
                "alone. `pho keys create --all-jobs` makes one that sees all.",
            )
        try:
            await run_in_threadpool(self._service.database.check)
        except StorageError as error:
            return database_gone(error)
        return None

    @functools.cached_property
    def _storage(self) -> StudyStorage:
        return StudyStorage(
            self._service.database.studies_url, engine_kwargs={"pool_pre_ping": True}
        )

    @functools.cached_property
    def _app(self) -> WSGIMiddleware:
        import optuna_dashboard

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return WSGIMiddleware(optuna_dashboard.wsgi(self._storage))


async def _send_page(start: Message, body: bytes, send: Send) -> None:
    """Send a page of the dashboard with what it lacks; one without a body stays so."""
    whole = body.replace(b"</body>", f"{_MORE}</body>".encode(), 1)
    headers = MutableHeaders(raw=[*start["headers"]])
    if body:
        headers["content-length"] = str(len(whole))
    else:  # of HEAD: the length is that of another body
        del headers["content-length"]
    policy = headers.get("content-security-policy", "")
    headers["content-security-policy"] = policy.replace("script-src ", _RUNS)
    for name in ("last-modified", "etag"):  # of the file, which is not what is sent
        del headers[name]
    await send({**start, "headers": headers.raw})
    await send({"type": "http.response.body", "body": whole})
