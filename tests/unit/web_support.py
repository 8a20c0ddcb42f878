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
from nanogpt.sampling_params import TokenLogprobs
from nanogpt.settings import Settings
from nanogpt.tokenizer import characters
from nanogpt.web import create_app

ALPHABET = "\n !?.,:0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZé你好世界😀"


class EchoGeneration:
    """Repeats the prompt until max_tokens; ``hold`` keeps it silent until it is aborted or let go."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        hold: bool = False,
        error: str | None = None,
        events: Any = None,
        digest: str = "",
    ) -> None:
        self.request = request
        self.digest = digest
        self.aborted = threading.Event()
        self.events: Any = queue.Queue() if events is None else events
        if not hold:
            ids, count = list(request.prompt_token_ids), request.params.max_tokens
            for index in range(count):
                token_id = ids[index % len(ids)]
                self.events.put(Tokens([token_id], self.logprobs(token_id, index)))
            self.finish("error" if error else "length", count, error)

    def logprobs(self, token_id: int, index: int) -> list[TokenLogprobs] | None:
        """Made up: the n-th token has the log probability -n, and is the most probable one of as many as asked for."""
        num_top = self.request.params.logprobs
        return None if num_top is None else [self.logprob(token_id, -float(index), num_top)]

    def logprob(self, token_id: int, logprob: float, num_top: int) -> TokenLogprobs:
        others = [(other, logprob - 1.0 - other) for other in range(num_top) if other != token_id]
        return TokenLogprobs(logprob, 1, [(token_id, logprob), *others][:num_top])

    def finish(self, reason: Any, count: int, error: str | None = None) -> None:
        prompt, num_top = self.request.prompt_token_ids, self.request.params.prompt_logprobs
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if num_top is not None:
            prompt_logprobs = [None] + [self.logprob(token_id, -0.5, num_top) for token_id in prompt[1:]]
        self.events.put(Finished(reason, len(prompt), count, 0, Timings(), error, prompt_logprobs))

    def wait_accepted(self) -> None:
        pass

    def get(self, timeout_s: float) -> Tokens | Finished | None:
        try:
            return self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def abort(self, reason: str = "abort") -> None:
        if not self.aborted.is_set():
            self.aborted.set()
            self.finish(reason, 0)


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

    def submit(self, request: GenerateRequest, *, engine: int | None = None) -> EchoGeneration:
        return self.send(request)

    def send(self, request: GenerateRequest, events: Any = None, *, engine: int | None = None) -> EchoGeneration:
        if self.refuse is not None:
            raise self.refuse
        self.generations.append(
            EchoGeneration(request, hold=self.hold, error=self.error, events=events, digest=self.status.digest or "")
        )
        return self.generations[-1]


def make_app(client: EchoClient | None = None, compare: EchoClient | None = None, **settings: Any) -> Flask:
    """``compare``: the second model's engine, on a server that has one."""
    settings = {"rate_limit": "off", "compare_checkpoint": "second.pt" if compare is not None else "", **settings}
    clients: dict[str, Any] = {"client": client or EchoClient(), "compare_client": compare}
    return create_app(Settings(**settings), counters=Windows(), **clients)
