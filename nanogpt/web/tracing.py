"""Traces by OpenTelemetry (the extra ``otel``): what a request waited for, from HTTP through queue, prefill and decode.

    POST /generate                       (server span; continues the client's ``traceparent``)
    └─ text_completion my-model          (one for each text, with gen_ai.* attributes; never a prompt or an answer)
       ├─ queue   ├─ prefill   └─ decode (as the engine measured them)

Off unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``) is set; the other standard
``OTEL_*`` variables configure it. Each worker has a provider of its own, made after the fork by the first request: a
bounded queue that drops what does not fit, and a thread that sends, so that no request ever waits for a collector.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nanogpt._version import __version__
from nanogpt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from werkzeug.datastructures import Headers

    from nanogpt.web.generation import TextGeneration

log = logging.getLogger(__name__)

# How long a worker that ends may still send spans.
_LAST_SPANS_S = 3.0
_COMPLAIN_EVERY_S = 60.0
# W3C Trace Context, section 3.2.2. Later versions may append fields.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


class RequestTrace:
    """One HTTP request's span, and its id in the log. Without OpenTelemetry only the id that the client sent."""

    def __init__(self, headers: Headers, method: str, route: str) -> None:
        tracer = _provider.tracer()
        self._tracer = tracer
        self._span: Any = None
        self.traceparent: str | None = None
        """For the answer's headers."""
        self.trace_id: str | None = None
        if tracer is None:
            given = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
            self.trace_id = given[1] if given else None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        self._span = tracer.start_span(
            f"{method} {route}",
            TraceContextTextMapPropagator().extract(carrier),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
        )
        context = self._span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"

    def generation(
        self, operation: str, model: str, params: SamplingParams, num_prompt_tokens: int
    ) -> Callable[[TextGeneration], None] | None:
        """A text is on its way; call what is returned when it has ended, however it did."""
        if self._span is None or not self._span.is_recording():
            return None
        span = self._start(
            f"{operation} {model}",
            self._span,
            time.time_ns(),
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "nanogpt",
                "gen_ai.request.model": model,
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.top_k": params.top_k,
                "gen_ai.request.frequency_penalty": params.frequency_penalty,
                "gen_ai.request.presence_penalty": params.presence_penalty,
                "gen_ai.request.seed": params.seed,
                "gen_ai.usage.input_tokens": num_prompt_tokens,
            },
        )
        return lambda text: self._end_generation(span, model, text)

    def _end_generation(self, span: Any, model: str, text: TextGeneration) -> None:
        outcome, finished = text.outcome, text.finished
        reason = outcome.finish_reason if outcome else finished.reason if finished else "abort"
        span.set_attribute("gen_ai.response.model", model)
        span.set_attribute("gen_ai.usage.output_tokens", text.num_tokens)
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        if finished is not None:
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", finished.num_cached_tokens)
            timings, begin = finished.timings, span.start_time
            at = begin
            for name, end_s in (("queue", timings.queue_s), ("prefill", timings.ttft_s), ("decode", timings.total_s)):
                child = self._start(name, span, at, {})
                at = max(at, begin + int(end_s * 1e9))
                child.end(at)
        span.end()

    def end(self, status: int, attributes: Mapping[str, Any]) -> None:
        """The last byte is written."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("http.response.status_code", status)
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
            if status >= 500:
                self._span.set_status(StatusCode.ERROR)
            self._span.end()

    def _start(self, name: str, parent: Any, start: int, attributes: Mapping[str, Any]) -> Any:
        from opentelemetry.trace import set_span_in_context

        assert self._tracer is not None
        known = {key: value for key, value in attributes.items() if value is not None}
        return self._tracer.start_span(name, set_span_in_context(parent), attributes=known, start_time=start)


class _Provider:
    """This process's tracer, made when it is first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = -1
        self._tracer: Any = None

    def tracer(self) -> Any:
        """None: there are no traces."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self._tracer = self._make() if is_wanted(os.environ) else None
                    self._pid = os.getpid()
        return self._tracer

    def _make(self) -> Any:
        # What it logs quotes headers and addresses, which may hold keys; failures are told by _Exporter.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            own = {"service.version": __version__}
            if not os.environ.get("OTEL_SERVICE_NAME") and "service.name" not in os.environ.get(
                "OTEL_RESOURCE_ATTRIBUTES", ""
            ):
                own["service.name"] = "nano-gpt-api"
            provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
            processor = BatchSpanProcessor(_make_exporter(OTLPSpanExporter()))
            provider.add_span_processor(processor)
        except ImportError:
            log.warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: there are no traces. "
                "pip install 'nano-gpt-api[otel]' brings it."
            )
            return None
        except Exception as error:
            log.error("There are no traces: a variable OTEL_… is wrong (%s).", type(error).__name__)
            return None
        _send_the_rest_at_exit(provider.shutdown)
        return provider.get_tracer("nanogpt", __version__)


def _make_exporter(exporter: Any) -> Any:
    """The exporter, with complaints of ours: few, and without what a collector or an address may say."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Exporter(SpanExporter):
        silent_until = 0.0

        def export(self, spans: Any) -> SpanExportResult:
            try:
                result: SpanExportResult = exporter.export(spans)
            except Exception:
                result = SpanExportResult.FAILURE
            if result is not SpanExportResult.SUCCESS and time.monotonic() >= self.silent_until:
                self.silent_until = time.monotonic() + _COMPLAIN_EVERY_S
                log.warning("The OpenTelemetry collector did not take %d spans; they are lost.", len(spans))
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Exporter()


def _send_the_rest_at_exit(shutdown: Callable[[], None]) -> None:
    """Send what is queued when the process ends, but wait no longer than for a collector that answers."""
    ending, pid = threading.Event(), os.getpid()

    def send() -> None:
        ending.wait()
        shutdown()

    # Started now: at exit Python starts no threads any more.
    thread = threading.Thread(target=send, name="last-spans", daemon=True)
    thread.start()

    def at_exit() -> None:
        if os.getpid() == pid:
            ending.set()
            thread.join(_LAST_SPANS_S)

    atexit.register(at_exit)


_provider = _Provider()
