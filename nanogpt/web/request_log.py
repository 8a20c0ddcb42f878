"""The two lines that a request leaves in the log, and its id. Prompts, answers, keys and query strings never do.

``Request: POST /generate id=…`` when it comes, ``Response: 200 POST /generate id=… tokens=… ttft_s=… total_s=…`` when
its last byte is written (for a stream: when it ends). The same two moments count it for ``/metrics`` and begin and end
its trace. A path is named only when it is a route of ours, and a method
only when HTTP knows it: whatever else stands there is the client's text.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from flask import Request

from nanogpt.sampling_params import SamplingParams
from nanogpt.web.generation import TextGeneration
from nanogpt.web.group import TextGroup
from nanogpt.web.metrics import metrics
from nanogpt.web.tracing import RequestTrace

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probed every few seconds by whatever watches the server: of no interest to a reader unless something is wrong.
# So are the files of the page at /.
_PROBES = frozenset({"/health", "/ready", "/metrics", "/playground/<build>/<name>"})
# What a generation ends with when nothing went wrong; any other outcome is the code of an error.
_FINISH_REASONS = frozenset({"stop", "length", "abort"})


def request_id(request: Request) -> str:
    """The client's X-Request-Id where it is a plain short token, otherwise a fresh one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass
class RequestLog:
    """One request's lines. Used by the thread that holds the request."""

    request_id: str
    method: str
    route: str
    trace: RequestTrace
    started: float = field(default_factory=time.monotonic)
    num_tokens: int | None = None
    ttft_s: float | None = None
    cache: str | None = None
    """What X-Cache says: hit, miss or bypass. Of several texts, a miss if any was one."""
    outcome: str | None = None
    """A generation's finish_reason, or the code of what it was refused or ended with."""
    model: str | None = None
    num_prompt_tokens: int = 0
    queue_s: float | None = None
    caller: str | None = None

    @classmethod
    def start(cls, request: Request, request_id: str) -> RequestLog:
        route = request.url_rule.rule if request.url_rule is not None else "(no route)"
        method = request.method if request.method in _METHODS else "(no method)"
        self = cls(request_id, method, route, RequestTrace(request.headers, method, route))
        metrics.http_begins()
        self._write(f"Request: {self.method} {self.route} id={request_id}", {})
        return self

    def generation_begins(
        self, model: str, params: SamplingParams, num_prompt_tokens: int
    ) -> Callable[[TextGeneration], None] | None:
        """A text of this request is in the engine. Returns what is to be told of its end."""
        self.model = model
        self.num_prompt_tokens += num_prompt_tokens
        operation = "chat" if self.route.endswith("/chat/completions") else "text_completion"
        return self.trace.generation(operation, model, params, num_prompt_tokens)

    def note_cache(self, use: str) -> None:
        """Where a text of this request is from: ``hit``, ``miss`` or ``bypass``."""
        self.cache = use
        metrics.cache(use)

    def describe(self, text: TextGeneration | TextGroup) -> None:
        """Note what a generation came to, for the last line."""
        self.num_tokens, self.ttft_s = text.num_tokens, text.ttft_s
        if text.finish_reason is not None:
            self.outcome = text.finish_reason
            self.queue_s = text.queue_s

    def finish(self, status: int) -> None:
        total_s = time.monotonic() - self.started
        known = {
            "outcome": self.outcome,
            "tokens": self.num_tokens,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 4),
            "total_s": round(total_s, 4),
            "prompt_tokens": self.num_prompt_tokens or None,
            "queue_s": None if self.queue_s is None else round(self.queue_s, 4),
            "model": self.model,
            "cache": self.cache,
            "caller": self.caller,
            "trace_id": self.trace.trace_id,
        }
        code = None if self.outcome in _FINISH_REASONS else self.outcome
        metrics.http_ends(self.method, self.route, status, total_s, code)
        self.trace.end(status, {"error.type": code, "nanogpt.request_id": self.request_id})
        fields: dict[str, object] = {"status": status, **{name: v for name, v in known.items() if v is not None}}
        rest = " ".join(f"{name}={value}" for name, value in fields.items() if name != "status")
        self._write(f"Response: {status} {self.method} {self.route} id={self.request_id} {rest}", fields)

    def _write(self, line: str, fields: dict[str, object]) -> None:
        level = logging.DEBUG if self.route in _PROBES else logging.INFO
        if log.isEnabledFor(level):
            fields = {"request_id": self.request_id, "method": self.method, "path": self.route, **fields}
            log.log(level, "%s", line, extra={"fields": fields})
