"""What every generating route does between its schema and its answer: a place, the model, its engine, a text.

Knows no route and no wire format. One a process, shared by its threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import BoundedSemaphore

from flask import g, request

from nanogpt.engine.client import Events, Generation
from nanogpt.engine.messages import GenerateRequest
from nanogpt.errors import ConcurrencyLimit, InvalidRequest, ModelChanged, QueueFull
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.cache import BYPASS, ResponseCache
from nanogpt.web.caller import Caller
from nanogpt.web.connection import make_client_gone
from nanogpt.web.engine import ServedModel
from nanogpt.web.flights import Flights, Source
from nanogpt.web.generation import TextGeneration
from nanogpt.web.group import TextGroup
from nanogpt.web.limits import Limiter
from nanogpt.web.metrics import metrics
from nanogpt.web.models import Models
from nanogpt.web.request_log import RequestLog
from nanogpt.web.shedding import LoadShedder


class GenerationService:
    """Starts texts on the engine of whichever model is asked for."""

    def __init__(self, settings: Settings, models: Models, limiter: Limiter, shedder: LoadShedder) -> None:
        self.settings = settings
        self.models = models
        self._limiter = limiter
        self._shedder = shedder
        # gunicorn runs a few threads more than this, so that /health answers in time however many texts are being
        # written.
        self._places = BoundedSemaphore(settings.http_threads)
        self.cache = ResponseCache(settings)
        self._flights = Flights(self.cache, settings.request_timeout_s)

    def _note_refusal(self, caller: Caller, error: BaseException) -> None:
        """Count a refusal by the engine, and remember a full queue."""
        if isinstance(error, ConcurrencyLimit):
            metrics.refused("concurrency")
        elif isinstance(error, QueueFull):
            self._shedder.note_full(caller)

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

    def model(self, name: str = "") -> ServedModel:
        """The model that is served now under this name; without one the default.

        Raises: ModelNotFound, ServiceUnavailable when it does not come in time.
        """
        return self.models.get(name)

    def start(
        self,
        model: ServedModel,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache: bool = True,
        events: Events | None = None,
    ) -> TextGeneration:
        """Begin a text, from the engine or the cache; whoever gets it closes it. ``cache``: what the client wishes.

        With ``events``, where its news goes, it is only sent: its ``wait_accepted`` is the second half, and the cache
        is not asked. Raises: whatever the engine refuses it with, TokensLimited.
        """
        record: RequestLog = g.record
        caller: Caller = g.caller

        def submit(timeout_s: float) -> Generation:
            wanted = GenerateRequest(
                prompt_token_ids,
                params,
                request_id=record.request_id,
                client=caller.name,
                timeout_s=timeout_s,
                max_concurrency=caller.max_concurrency or 0,
            )
            generation = self._submit(model, wanted, events)
            self._shedder.note_room(caller)
            return generation

        def is_of_this_model(generation: Generation) -> bool:
            return generation.digest == model.digest

        settle, headers = self._limiter.reserve(
            caller, len(prompt_token_ids) + self._most_new(model, prompt_token_ids, params)
        )
        g.limit_headers.update(headers)
        key = self.cache.key(model.fingerprint, prompt_token_ids, params) if cache and events is None else None
        source: Source
        try:
            if key is None:
                self.cache.stats.add("bypasses")
                source, use = submit(self.settings.request_timeout_s), BYPASS
            else:
                source, use = self._flights.board(key, len(prompt_token_ids), params, submit, is_of_this_model)
        except BaseException as error:
            settle(0)
            self._note_refusal(caller, error)
            raise
        record.note_cache(use)

        def settle_text(text: TextGeneration) -> None:
            settle(0 if text.refused else text.num_prompt_tokens + text.num_tokens)

        begun = record.generation_begins(model.name, params, len(prompt_token_ids))
        return TextGeneration(
            source,
            model.tokenizer,
            params.stop,
            num_prompt_tokens=len(prompt_token_ids),
            started=record.started,
            client_gone=make_client_gone(request.environ),
            silence_s=self.settings.stream_ping_s,
            cache=use,
            on_close=[settle_text] if begun is None else [settle_text, begun],
        )

    def start_many(
        self, model: ServedModel, texts: Sequence[tuple[Sequence[int], SamplingParams]], *, cache: bool = True
    ) -> TextGroup:
        """Hand all texts of one request to the engine, before any of them is waited for; whoever gets them closes them.

        Where there is but one, it may come from the cache.

        Raises: whatever the engine refuses one of them with; then none of them goes on. InvalidRequest for more texts
        than the key may ever have at once.
        """
        limit = g.caller.max_concurrency
        if limit is not None and len(texts) > limit:
            raise InvalidRequest(
                f"The request asks for {len(texts)} texts at once; this key may have {limit}.",
                field="n",
                remedy="Ask for fewer, in several requests.",
            )
        if len(texts) == 1:
            return TextGroup(self.settings.stream_ping_s, self.start(model, *texts[0], cache=cache))
        try:
            return self._start_many(model, texts)
        except ModelChanged:
            return self._start_many(self._successor(model), texts)

    def _start_many(self, model: ServedModel, texts: Sequence[tuple[Sequence[int], SamplingParams]]) -> TextGroup:
        group = TextGroup(self.settings.stream_ping_s)
        try:
            for prompt_token_ids, params in texts:
                group.add(self.start(model, prompt_token_ids, params, events=group.next_events()))
            group.wait_accepted()
        except BaseException as error:
            group.close()
            self._note_refusal(g.caller, error)
            raise
        return group

    def _submit(self, model: ServedModel, request: GenerateRequest, events: Events | None) -> Generation:
        """To the model's own engine; when that takes nothing any more, to the next one if the tokens mean the same."""
        client = model.handle.client
        if events is not None:
            return client.send(request, events, engine=model.engine)
        try:
            return client.submit(request, engine=model.engine)
        except ModelChanged:
            return client.submit(request, engine=self._successor(model).engine)

    def _successor(self, model: ServedModel) -> ServedModel:
        """The model that is served instead. Raises: ModelChanged where the same tokens are other texts to it."""
        now = model.handle.model()
        if now.tokenizer is not model.tokenizer:
            raise ModelChanged("The model was changed at this moment.", remedy="Send the request again.")
        return now

    def _most_new(self, model: ServedModel, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """How many tokens the text can come to: the context may end before max_tokens does."""
        block_size: int | None = model.card.get("block_size")
        if block_size is None or self.settings.context_overflow != "stop":
            return params.max_tokens
        return min(params.max_tokens, max(0, block_size - len(prompt_token_ids) + 1))
