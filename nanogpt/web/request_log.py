"""The two lines that a request leaves in the log, and its id. Prompts, answers, keys and query strings never do.

``Request: POST /generate id=…`` when it comes, ``Response: 200 POST /generate id=… tokens=… ttft_s=… total_s=…`` when
its last byte is written (for a stream: when it ends). A path is named only when it is a route of ours, and a method
only when HTTP knows it: whatever else stands there is the client's text.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from flask import Request

from nanogpt.web.generation import TextGeneration

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probed every few seconds by whatever watches the server: of no interest to a reader unless something is wrong.
_PROBES = frozenset({"/health", "/ready"})


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
    started: float = field(default_factory=time.monotonic)
    num_tokens: int | None = None
    ttft_s: float | None = None
    cache: str | None = None
    """What X-Cache says: hit, miss or bypass. Of several texts, a miss if any was one."""
    outcome: str | None = None
    """A generation's finish_reason, or the code of what it was refused or ended with."""

    @classmethod
    def start(cls, request: Request, request_id: str) -> RequestLog:
        route = request.url_rule.rule if request.url_rule is not None else "(no route)"
        self = cls(request_id, request.method if request.method in _METHODS else "(no method)", route)
        self._write(f"Request: {self.method} {self.route} id={request_id}", {})
        return self

    def note_cache(self, use: str) -> None:
        self.cache = use if self.cache is None or use == "miss" else self.cache

    def describe(self, text: TextGeneration) -> None:
        """Note what a generation came to, for the last line."""
        self.num_tokens, self.ttft_s = text.num_tokens, text.ttft_s
        if text.outcome is not None:
            self.outcome = text.outcome.finish_reason

    def finish(self, status: int) -> None:
        fields: dict[str, object] = {"status": status}
        if self.outcome is not None:
            fields["outcome"] = self.outcome
        if self.cache is not None:
            fields["cache"] = self.cache
        if self.num_tokens is not None:
            fields["tokens"] = self.num_tokens
        if self.ttft_s is not None:
            fields["ttft_s"] = round(self.ttft_s, 4)
        fields["total_s"] = round(time.monotonic() - self.started, 4)
        rest = " ".join(f"{name}={value}" for name, value in fields.items() if name != "status")
        self._write(f"Response: {status} {self.method} {self.route} id={self.request_id} {rest}", fields)

    def _write(self, line: str, fields: dict[str, object]) -> None:
        level = logging.DEBUG if self.route in _PROBES else logging.INFO
        if log.isEnabledFor(level):
            fields = {"request_id": self.request_id, "method": self.method, "path": self.route, **fields}
            log.log(level, "%s", line, extra={"fields": fields})
