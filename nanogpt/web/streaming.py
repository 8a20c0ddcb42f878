"""A generation as server-sent events: pieces of text, pings in silence, and one final event.

``data: {"text": …}`` for each piece; at the end ``data:`` with all the fields of the answer that is not streamed, or
``event: error`` with the fields of a refusal. Owned by the thread that holds the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

from flask import Response

from nanogpt.errors import NanoGPTError
from nanogpt.web.answers import PING, event
from nanogpt.web.errors import error_body, unexpected
from nanogpt.web.generation import ClientGone, Outcome, TextGeneration
from nanogpt.web.request_log import RequestLog


class EventStream:
    """The body of a streamed answer. Its ``close`` runs however the answer ends, also before the first byte.

    ``held`` is what the request holds (its place, its text), and is closed with it.
    """

    def __init__(
        self, text: TextGeneration, record: RequestLog, final: Callable[[Outcome], dict[str, Any]], held: ExitStack
    ) -> None:
        self._text = text
        self._record = record
        self._final = final
        self._held = held
        self._events: Iterator[bytes] = iter(())

    def response(self) -> Response:
        """The answer, once its first piece is there: until then a failure is still a plain JSON refusal."""
        pieces = iter(self._text)
        try:
            first = [next(pieces)]
        except StopIteration:
            first = []
        except BaseException:
            self.close()
            raise
        self._events = self._make_events(chain(first, pieces))
        response = Response(self, mimetype="text/event-stream")
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._events)

    def close(self) -> None:
        if self._text.outcome is None and self._record.outcome is None:
            self._record.outcome = ClientGone.code  # gunicorn could not write, or never began to
        self._held.close()
        self._record.describe(self._text)

    def _make_events(self, pieces: Iterator[str | None]) -> Iterator[bytes]:
        try:
            for piece in pieces:
                yield PING if piece is None else event({"text": piece})
            assert self._text.outcome is not None
            yield event(self._final(self._text.outcome))
        except ClientGone as gone:
            self._record.outcome = gone.code
        except Exception as error:
            request_id = self._record.request_id
            refusal = error if isinstance(error, NanoGPTError) else unexpected(error, request_id)
            self._record.outcome = refusal.code
            yield event(error_body(refusal, request_id), "error")
