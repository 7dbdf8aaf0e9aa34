"""
The application: pages, operations, errors, keys, and the dashboard behind them.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pho_service.api import (
    artifacts,
    configurations,
    guard,
    job_list,
    job_page,
    jobs,
    metrics,
    new_job,
    operations,
    problems,
    reference,
    report,
    submission,
    texts,
)
from pho_service.api.answers import Problem
from pho_service.api.dashboard import Dashboard
from pho_service.api.guard import KeyGuard
from pho_service.api.operations import (
    AT_ONCE,
    keep_store_measured,
    keep_store_noted,
    keep_telling,
    keep_up,
)
from pho_service.api.pages import Pages, SafeHeaders, icon
from pho_service.api.requests import BodyLimit, RequestLog
from pho_service.api.schema import without_null
from pho_service.api.service import Service
from pho_service.host.settings import Settings
from storage.database import Database


def create_app(database: Database, settings: Settings, *, keys_needed: bool = False) -> FastAPI:
    service = Service(database, settings, keys_needed=keys_needed)
    dashboard = Dashboard(service)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            keep_store_noted(service),
            keep_store_measured(service),
            keep_up(service),
            *(keep_telling(service) for _ in range(AT_ONCE)),
        ]
        running = [asyncio.create_task(task) for task in tasks]
        yield
        for task in running:
            task.cancel()
        dashboard.close()
        service.close()

    app = FastAPI(
        title="PHO",
        summary="Searches pruning coefficients for large language models.",
        version=version("pho-service"),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # a page of ours, which fetches nothing from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    pages = (job_list, new_job, job_page, guard, reference)
    parts = (
        *pages,
        jobs,
        artifacts,
        submission,
        report,
        texts,
        configurations,
        operations,
        metrics,
    )
    routers = tuple(part.router for part in parts)
    problems.add_handlers(app, [route for router in routers for route in router.routes])
    for router in routers:
        app.include_router(router)
    app.add_route("/favicon.ico", icon, include_in_schema=False)
    app.router.default = dashboard  # after our own routes, and their 405s
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, max_text_bytes=settings.max_upload_bytes
    )
    app.add_middleware(KeyGuard, service=service)
    app.add_middleware(Pages)
    app.add_middleware(RequestLog, answers=service.answers)  # around all others
    app.add_middleware(SafeHeaders)  # also of what it answers itself
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's own way
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with our errors and our keys in it."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        parts = schema["components"]
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        parts["schemas"].update(problem.pop("$defs", {}))
        parts["schemas"]["Problem"] = problem
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's, never sent
            parts["schemas"].pop(unused, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]
        for operation in (op for path in schema["paths"].values() for op in path.values()):
            # FastAPI's own is the name of a function: "Show", "Best".
            operation["summary"] = re.split(r"[.:;](?:\s|$)", operation["description"])[0]
            for parameter in operation.get("parameters", []):
                without_null(parameter)
        app.openapi_schema = schema
    return app.openapi_schema
