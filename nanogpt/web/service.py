"""What every generating route does between its schema and its answer: a place, the model, the engine, a text.

Knows no route and no wire format. One a process, shared by its threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import BoundedSemaphore

from flask import current_app, g, request

from nanogpt.engine.messages import GenerateRequest
from nanogpt.errors import QueueFull
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.caller import Caller
from nanogpt.web.connection import make_client_gone
from nanogpt.web.engine import EngineHandle, ServedModel
from nanogpt.web.generation import TextGeneration
from nanogpt.web.limits import Limiter
from nanogpt.web.request_log import RequestLog


class GenerationService:
    """Starts texts on this process's engine."""

    def __init__(self, settings: Settings, engine: EngineHandle) -> None:
        self.settings = settings
        self.engine = engine
        # gunicorn runs a few threads more than this, so that /health answers in time however many texts are being
        # written.
        self._places = BoundedSemaphore(settings.http_threads)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the process's places for requests that generate, held until the answer's last byte.

        Raises: QueueFull when all are taken.
        """
        if not self._places.acquire(blocking=False):
            raise QueueFull("The server is busy.", remedy="Send the request again later.")
        try:
            yield
        finally:
            self._places.release()

    def model(self) -> ServedModel:
        """The model that is served now. Raises: ServiceUnavailable when it does not come in time."""
        return self.engine.model()

    def start(self, model: ServedModel, prompt_token_ids: Sequence[int], params: SamplingParams) -> TextGeneration:
        """Hand a text to the engine; whoever gets it closes it. Raises: whatever the engine refuses it with."""
        record: RequestLog = g.record
        caller: Caller = g.caller
        limiter: Limiter = current_app.extensions["nanogpt.limiter"]
        settle, headers = limiter.reserve(
            caller, len(prompt_token_ids) + self._most_new(model, prompt_token_ids, params)
        )
        g.limit_headers.update(headers)
        try:
            generation = self.engine.client.submit(
                GenerateRequest(
                    prompt_token_ids,
                    params,
                    request_id=record.request_id,
                    client=caller.name,
                    timeout_s=self.settings.request_timeout_s,
                    max_concurrency=caller.max_concurrency or 0,
                )
            )
        except BaseException:
            settle(0)
            raise
        text = TextGeneration(
            generation,
            model.tokenizer,
            params.stop,
            num_prompt_tokens=len(prompt_token_ids),
            started=record.started,
            client_gone=make_client_gone(request.environ),
            silence_s=self.settings.stream_ping_s,
        )
        text.on_close = lambda: settle(text.num_prompt_tokens + text.num_tokens)
        return text

    def _most_new(self, model: ServedModel, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """How many tokens the text can come to: the context may end before max_tokens does."""
        block_size: int | None = model.card.get("block_size")
        if block_size is None or self.settings.context_overflow != "stop":
            return params.max_tokens
        return min(params.max_tokens, max(0, block_size - len(prompt_token_ids) + 1))
