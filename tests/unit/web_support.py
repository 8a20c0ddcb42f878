"""An engine for the tests of the web part that need none: it speaks the client's language and answers from a script.

What it writes is the prompt's own characters again, one token each, so that every answer is known beforehand.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

from flask import Flask

from nanogpt.engine.client import EngineStatus
from nanogpt.engine.messages import Finished, GenerateRequest, Timings, Tokens
from nanogpt.engine.windows import Windows
from nanogpt.settings import Settings
from nanogpt.tokenizer import characters
from nanogpt.web import create_app

ALPHABET = "\n !?.,:0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZé你好世界😀"


class EchoGeneration:
    """Repeats the prompt until max_tokens; ``hold`` keeps it silent until it is aborted or let go."""

    def __init__(self, request: GenerateRequest, *, hold: bool = False, error: str | None = None) -> None:
        self.request = request
        self.aborted = threading.Event()
        self.events: queue.Queue[Tokens | Finished] = queue.Queue()
        if not hold:
            ids, count = list(request.prompt_token_ids), request.params.max_tokens
            for index in range(count):
                self.events.put(Tokens([ids[index % len(ids)]]))
            self.finish("error" if error else "length", count, error)

    def finish(self, reason: Any, count: int, error: str | None = None) -> None:
        self.events.put(Finished(reason, len(self.request.prompt_token_ids), count, 0, Timings(), error))

    def get(self, timeout_s: float) -> Tokens | Finished | None:
        try:
            return self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def abort(self) -> None:
        if not self.aborted.is_set():
            self.aborted.set()
            self.finish("abort", 0)


class EchoClient:
    """Stands for the EngineClient. ``refuse`` is raised by submit; ``hold`` and ``error`` see EchoGeneration."""

    def __init__(self) -> None:
        self.status = EngineStatus(
            state="ready", model="echo", device="cpu", block_size=1024, tokenizer=characters(list(ALPHABET)).to_spec()
        )
        self.refuse: Exception | None = None
        self.hold = False
        self.error: str | None = None
        self.generations: list[EchoGeneration] = []

    def state(self) -> EngineStatus:
        return self.status

    def wait_ready(self, timeout_s: float | None = None) -> EngineStatus:
        return self.status

    def submit(self, request: GenerateRequest) -> EchoGeneration:
        if self.refuse is not None:
            raise self.refuse
        self.generations.append(EchoGeneration(request, hold=self.hold, error=self.error))
        return self.generations[-1]


def make_app(client: EchoClient | None = None, **settings: Any) -> Flask:
    settings = {"rate_limit": "off", **settings}
    return create_app(Settings(**settings), client=client or EchoClient(), counters=Windows())  # type: ignore[arg-type]
