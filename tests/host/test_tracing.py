"""Spans for OpenTelemetry: of requests, with their ids in the log; none unless they are wanted."""

import gzip
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pho_service.api.app import create_app
from pho_service.errors import InvalidInput
from pho_service.host.logs import _add_fields, configure_tracing, span, trace_with
from pho_service.host.settings import read_settings


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_with(provider.get_tracer("tests"))
    yield exporter
    trace_with(None)


def test_a_block_is_a_span_with_its_attributes(spans):
    with pytest.raises(KeyError), span("search", job="j", attempt=2):
        raise KeyError("k")
    (found,) = spans.get_finished_spans()

    assert found.name == "search"
    assert dict(found.attributes or {}) == {"job": "j", "attempt": 2}
    assert found.status.status_code.name == "ERROR"
    assert found.events[0].name == "exception"


def test_a_request_is_a_span_and_its_line_in_the_log_names_it(spans, database, caplog):
    caplog.handler.addFilter(_add_fields)
    caplog.set_level(logging.INFO, "pho_service.api.requests")
    with TestClient(create_app(database, read_settings()), "http://localhost") as client:
        client.get("/v1/jobs?page_size=2", headers={"X-Request-ID": "mine"})
    (found,) = spans.get_finished_spans()
    (line,) = [r for r in caplog.records if r.name == "pho_service.api.requests"]
    ids = found.get_span_context()

    assert found.name == "GET request"
    assert found.kind is SpanKind.SERVER
    assert dict(found.attributes or {}) == {
        "http.request.method": "GET",
        "url.path": "/v1/jobs",
        "http.response.status_code": 200,
        "request": "mine",
    }
    assert found.status.status_code is StatusCode.UNSET
    assert ids is not None
    assert (line.trace, line.span) == (f"{ids.trace_id:032x}", f"{ids.span_id:016x}")


def test_a_refused_request_is_no_error(spans, database):
    app = create_app(database, read_settings())
    app.add_api_route("/v1/broken", lambda: 1 / 0)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        client.get("/v1/broken")
        client.get("/v1/jobs?page_size=-2")
    found = {(s.attributes or {})["url.path"]: s for s in spans.get_finished_spans()}
    statuses = {
        path: ((s.attributes or {})["http.response.status_code"], s.status.status_code.name)
        for path, s in found.items()
    }

    assert statuses == {"/v1/broken": (500, "ERROR"), "/v1/jobs": (422, "UNSET")}


def test_a_process_sends_its_spans_to_where_opentelemetrys_variables_say(tmp_path):
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

    code = """
from pho_service.host.logs import configure_tracing, request_span, span
configure_tracing("pho-worker")
with span("search", job="j", attempt=2):
    pass
with request_span("GET", "/v1/jobs", "mine") as answered:
    answered(503)
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{collector.server_port}"
            subprocess.run(
                [sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=240,
                env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": url},
            )  # fmt: skip
        finally:
            collector.shutdown()
    ((resource,),) = [request.resource_spans for request in received]
    ((scope,),) = [resource.scope_spans]
    named = {a.key: a.value.string_value for a in resource.resource.attributes}

    assert named["service.name"] == "pho-worker"
    assert [(s.name, s.status.code) for s in scope.spans] == [("search", 0), ("GET request", 2)]


def test_where_the_extra_is_not_installed_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)

    with pytest.raises(InvalidInput, match=r"pip install 'opentelemetry"):
        configure_tracing("pho-api")
