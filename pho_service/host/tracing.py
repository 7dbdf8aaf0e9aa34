"""
Spans of requests and stages for OpenTelemetry, which is only imported if it is wanted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pho_service.errors import InvalidInput
from pho_service.host.logs import about

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_tracer: "Tracer | None" = None


def configure_tracing(service: str) -> None:
    """
    Send spans from now on. Where to, OpenTelemetry reads from its own variables, ``OTEL_...``.

    Args:
        service: What sends them: ``pho-api`` or ``pho-worker``.

    Raises:
        InvalidInput: The packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise InvalidInput(
            "PHO_TRACES needs OpenTelemetry: pip install 'pho-service[otel]', or leave it out."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace_with(provider.get_tracer("pho_service"))


def trace_with(tracer: "Tracer | None") -> None:
    """Make spans with this from now on; None makes none."""
    global _tracer
    _tracer = tracer


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """A span around the block, whose ids are in the block's log."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=attributes) as current, _logged(current):
        yield


@contextmanager
def request_span(method: str, path: str, request: str) -> Iterator[Callable[[int], None]]:
    """
    A span around a request, by OpenTelemetry's conventions for servers of HTTP.

    Args:
        method: ``GET``, say.
        path: Without the query.
        request: Its id.

    Yields:
        Return a function that takes the status of the answer.
    """
    if _tracer is None:
        yield lambda _status: None
        return
    from opentelemetry.trace import SpanKind, StatusCode

    attributes = {"http.request.method": method, "url.path": path, "request": request}
    with (
        _tracer.start_as_current_span(
            f"{method} request", kind=SpanKind.SERVER, attributes=attributes
        ) as current,
        _logged(current),
    ):

        def answered(status: int) -> None:
            current.set_attribute("http.response.status_code", status)
            if status >= 500:
                current.set_status(StatusCode.ERROR)

        yield answered


@contextmanager
def _logged(current: "Span") -> Iterator[None]:
    ids = current.get_span_context()
    with about(trace=f"{ids.trace_id:032x}", span=f"{ids.span_id:016x}"):
        yield
