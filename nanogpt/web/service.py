"""What every generating route does between its schema and its answer: a place, the model, the engine, a text.

Knows no route and no wire format. One a process, shared by its threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import BoundedSemaphore

from flask import g, request

from nanogpt.engine.client import Generation
from nanogpt.engine.messages import GenerateRequest
from nanogpt.errors import QueueFull
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.cache import BYPASS, ResponseCache
from nanogpt.web.caller import Caller
from nanogpt.web.connection import make_client_gone
from nanogpt.web.engine import EngineHandle, ServedModel
from nanogpt.web.flights import Flights, Passenger, Source
from nanogpt.web.generation import TextGeneration
from nanogpt.web.request_log import RequestLog


class GenerationService:
    """Starts texts on this process's engine."""

    def __init__(self, settings: Settings, engine: EngineHandle) -> None:
        self.settings = settings
        self.engine = engine
        # gunicorn runs a few threads more than this, so that /health answers in time however many texts are being
        # written.
        self._places = BoundedSemaphore(settings.http_threads)
        self.cache = ResponseCache(settings)
        self._flights = Flights(self.cache, settings.request_timeout_s)

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

    def start(
        self, model: ServedModel, prompt_token_ids: Sequence[int], params: SamplingParams, *, cache: bool = True
    ) -> TextGeneration:
        """Begin a text, from the engine or the cache; whoever gets it closes it. ``cache``: what the client wishes.

        Raises: whatever the engine refuses it with.
        """
        record: RequestLog = g.record
        caller: Caller = g.caller

        def submit(timeout_s: float) -> Generation:
            return self.engine.client.submit(
                GenerateRequest(
                    prompt_token_ids,
                    params,
                    request_id=record.request_id,
                    client=caller.name,
                    timeout_s=timeout_s,
                    max_concurrency=caller.max_concurrency or 0,
                )
            )

        def is_of_this_model(generation: Generation) -> bool:
            return bool(getattr(generation, "digest", model.digest) == model.digest)

        source: Source
        key = self.cache.key(model.fingerprint, prompt_token_ids, params) if cache else None
        if key is None:
            self.cache.stats.add("bypasses")
            source, use = submit(self.settings.request_timeout_s), BYPASS
        else:
            source, use = self._flights.board(key, len(prompt_token_ids), params, submit, is_of_this_model)
        record.note_cache(use)
        return TextGeneration(
            source,
            model.tokenizer,
            params.stop,
            num_prompt_tokens=len(prompt_token_ids),
            started=record.started,
            client_gone=make_client_gone(request.environ),
            silence_s=self.settings.stream_ping_s,
            cache=use,
            stopped=source.complete if isinstance(source, Passenger) else None,
        )
