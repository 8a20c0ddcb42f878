"""An OTLP/HTTP collector in the test's process: it decodes what a server sends and keeps the spans."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Span:
    """One span as plain data."""

    def __init__(self, span: Any, resource: dict[str, Any]) -> None:
        self.name: str = span.name
        self.kind: int = span.kind
        self.trace_id: str = span.trace_id.hex()
        self.span_id: str = span.span_id.hex()
        self.parent_id: str = span.parent_span_id.hex()
        self.start_ns, self.end_ns = int(span.start_time_unix_nano), int(span.end_time_unix_nano)
        self.is_error = span.status.code == 2
        self.attributes = _attributes(span.attributes)
        self.resource = resource

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(found: dict[str, Any]) -> Any:
        kind, inner = next(iter(found.items()))
        if kind == "arrayValue":
            return [value(item) for item in inner.get("values", [])]
        return int(inner) if kind == "intValue" else inner

    return {pair.key: value(MessageToDict(pair.value)) for pair in pairs}


class Collector:
    """Listens on a loopback port. ``hang`` makes it answer nothing until it is closed."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.headers: list[dict[str, str]] = []
        self.raw = b""
        self.hang = threading.Event()
        self._closing = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if collector.hang.is_set():
                    collector._closing.wait()
                    return
                collector._take(self.path, dict(self.headers), body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        assert path == "/v1/traces"
        self.headers.append(headers)
        self.raw += body
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            resource = _attributes(group.resource.attributes)
            self.spans += [Span(span, resource) for scope in group.scope_spans for span in scope.spans]

    def tree(self, trace_id: str) -> dict[str, Span]:
        """The spans of a trace by name."""
        return {span.name: span for span in list(self.spans) if span.trace_id == trace_id}

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
