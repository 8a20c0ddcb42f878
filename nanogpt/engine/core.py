"""The engine: requests in, tokens out. One thread owns it: ``LLM`` in its own process, or the engine process's loop.

    handle = engine.submit(request, sink)    # refuses at once, or accepts: then the sink gets exactly one Finished
    while engine.has_work():
        engine.step()                        # schedule → runner.step → update → events to the sinks

Knows nothing of sockets, text or HTTP. Sinks are called from ``step`` and ``abort``, and may call ``submit`` and
``abort`` themselves.
"""

from __future__ import annotations

import heapq
import logging
import math
import random
import time

import numpy as np

from nanogpt.engine.grammar import Grammars, GrammarState
from nanogpt.engine.messages import TIMEOUT, FinishReason, GenerateRequest
from nanogpt.engine.scheduler import Plan, Scheduler
from nanogpt.engine.sequence import Sequence, Sink
from nanogpt.engine.slots import Slots
from nanogpt.engine.speculation import make_speculation
from nanogpt.engine.stats import EngineStats
from nanogpt.errors import ConcurrencyLimit, EngineDied, EngineDraining, InvalidRequest, QueueFull
from nanogpt.runner.base import Int32, Runner, SamplingState

logger = logging.getLogger("nanogpt.engine")


class Engine:
    """One model's requests.

    ``context_overflow``: ``stop`` ends a text at the model's context (finish_reason ``length``) and refuses a prompt
    that is longer; ``crop`` drops tokens on the left as nanoGPT does. ``eos_token_id`` is the tokenizer's end of text.
    ``max_batch_tokens``: the budget of a step; ``max_mixed_tokens``: of one in which texts wait for their next token.
    Without ``grammars`` a request that has one is refused. ``speculate``: guess tokens with ``auto`` while that pays,
    ``off`` never, or a number wherever there are guesses.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_mixed_tokens: int | None = None,
        max_queue: int = 512,
        prefix_cache: bool = True,
        context_overflow: str = "stop",
        eos_token_id: int | None = None,
        grammars: Grammars | None = None,
        speculate: str = "off",
    ) -> None:
        self.draining = False
        self._runner = runner
        self._config = runner.config
        self._max_queue = max_queue
        self._crop = context_overflow == "crop"
        self._eos = frozenset() if eos_token_id is None else frozenset((eos_token_id,))
        self._grammars = grammars
        self._scheduler = Scheduler(
            Slots(runner.num_slots, runner.config.block_size, prefix_cache=prefix_cache),
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_mixed_tokens=max_mixed_tokens,
            block_size=runner.config.block_size,
            speculation=make_speculation(speculate, runner, max_batch_size),
        )
        self._next_handle = 0
        self._deadlines: list[tuple[float, int]] = []
        self._delivering = False
        self._stats = self._scheduler.stats

    # -- requests ----------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, sink: Sink) -> int:
        """Accept a request; its events go to ``sink``, the last one a Finished. Returns the handle for ``abort``.

        Raises: InvalidRequest, QueueFull, ConcurrencyLimit or EngineDraining; then the sink is never called.
        """
        if self.draining:
            raise EngineDraining("The server is shutting down.", remedy="Send the request again.")
        scheduler = self._scheduler
        self._check_room(request)
        prompt = self._check(request)
        params = request.params
        size = self._config.block_size
        now = time.monotonic()
        # A seed is 64 bits; a fresh one where none was given. Not for secrets.
        seed = random.getrandbits(64) if params.seed is None else params.seed & (2**64 - 1)
        window_start = max(0, len(prompt) - size)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        grammar = None if params.grammar is None else self._grammar(params.grammar, stop_ids)
        sequence = Sequence(
            handle=self._next_handle,
            request=request,
            sink=sink,
            state=SamplingState(params, seed, request.prompt_token_ids, []),
            prompt=prompt,
            max_output_tokens=params.max_tokens if self._crop else min(params.max_tokens, size - len(prompt) + 1),
            stop_ids=stop_ids,
            submitted_at=now,
            deadline=now + request.timeout_s,
            window_start=window_start,
            # Nothing is said of the first token, nor of those before the window.
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * (window_start + 1),
            grammar=grammar,
        )
        self._next_handle += 1
        scheduler.add(sequence)
        heapq.heappush(self._deadlines, (sequence.deadline, sequence.handle))
        if len(self._deadlines) > 1024 and len(self._deadlines) > 2 * (scheduler.num_running + scheduler.num_waiting):
            # Most deadlines outlive their requests: forget those.
            self._deadlines = sorted((s.deadline, s.handle) for s in scheduler.sequences)
        return sequence.handle

    def abort(self, handle: int, reason: FinishReason = "abort") -> None:
        """End a request with what it has. One that has already ended is left alone.

        ``reason`` is ``stop`` for a text that its reader found complete (a stop string).
        """
        self._scheduler.end(handle, reason, time.monotonic())
        self._deliver()

    # -- the loop ----------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return self._scheduler.num_running > 0 or self._scheduler.num_waiting > 0

    def step(self) -> bool:
        """Compute one step and deliver its events. False when there was nothing to compute.

        A step that the runner cannot compute ends that step's requests with ``error``, and the engine goes on.

        Raises: EngineDied when the runner cannot compute anything any more (a lost device): all requests have been
        ended with ``error``, and the engine is of no further use.
        """
        scheduler = self._scheduler
        now = time.monotonic()
        self._expire(now)
        plan = scheduler.schedule(now)
        if plan is not None:
            try:
                for source, target, num_tokens in plan.copies:
                    self._runner.copy_prefix(source, target, num_tokens)
                output = self._runner.step(plan.batch)
                done = time.monotonic()
                scheduler.update(plan, output, done)
            except Exception as error:
                self._fail(plan, error)
            else:
                stats, num_tokens = self._stats, len(plan.batch.token_ids)
                stats.num_steps += 1
                stats.num_computed_tokens += num_tokens
                stats.step.observe(done - now)
                if scheduler.speculation is not None and len(plan.sequences) == plan.num_decoding:
                    num_sequences = len(plan.sequences)
                    scheduler.speculation.observe_step(num_sequences, num_tokens - num_sequences, done - now)
                stats.step_sequences.observe(len(plan.sequences))
                stats.step_tokens.observe(num_tokens)
        self._deliver()
        return plan is not None

    def stats(self) -> EngineStats:
        """The live counters; read them, do not keep them."""
        stats, slots = self._stats, self._scheduler.slots
        stats.num_running = self._scheduler.num_running
        stats.num_waiting = self._scheduler.num_waiting
        stats.num_slots, stats.num_positions = slots.num_slots, slots.held.size
        stats.num_slots_running, stats.num_slots_cached = slots.num_running, slots.num_cached
        stats.num_positions_held = slots.num_positions_held
        return stats

    # -- parts -------------------------------------------------------------------------------------------------

    def _check_room(self, request: GenerateRequest) -> None:
        """Raises: ConcurrencyLimit when this client, QueueFull when the queue has no place for one more."""
        scheduler, client = self._scheduler, request.client
        limit = request.max_concurrency
        if 0 < limit <= scheduler.num_of(client):
            raise ConcurrencyLimit(
                f"You may have {limit} texts under way at once, and have {scheduler.num_of(client)}.",
                remedy="Wait for one of them to end.",
                retry_after_s=1.0,
            )
        # Who waits for a place that is free will have it in the next step.
        free = scheduler.max_running - scheduler.num_running
        num_queued = scheduler.num_waiting - free
        left = self._max_queue - num_queued
        if left <= 0:
            self._stats.num_queue_full += 1
            raise QueueFull(
                f"The server is busy: {scheduler.num_running} requests are running and {scheduler.num_waiting} wait.",
                remedy="Send the request again later.",
            )
        # The last eighth is not for whoever has filled the queue: others always get in.
        if left <= self._max_queue // 8 and 2 * (scheduler.num_waiting_of(client) - free) > self._max_queue:
            self._stats.num_queue_full += 1
            raise QueueFull(
                f"The server is busy: {scheduler.num_waiting_of(client)} of your requests wait, and what is left of "
                f"the queue ({left} of {self._max_queue}) is kept for others.",
                remedy="Send the request again when some of them have ended.",
            )

    def _grammar(self, grammar: str, stop_ids: frozenset[int]) -> GrammarState:
        if self._grammars is None:
            raise InvalidRequest("This engine was not given a tokenizer: it follows no grammar.", field="grammar")
        return self._grammars.start(grammar, stop_ids)

    def _check(self, request: GenerateRequest) -> Int32:
        """The prompt as an array. Whatever would make a whole step fail is refused here, with its one request.

        Raises: InvalidRequest.
        """
        num_tokens, size = self._config.num_tokens, self._config.block_size
        ids = request.prompt_token_ids
        if len(ids) == 0:
            raise InvalidRequest("The prompt has no tokens.", field="prompt", remedy="Send at least one token.")
        if len(ids) > size and not self._crop:
            raise InvalidRequest(
                f"The prompt has {len(ids)} tokens, but the model's context holds {size}.",
                field="prompt",
                remedy="Shorten the prompt, or start the server with NANOGPT_CONTEXT_OVERFLOW=crop.",
            )
        try:
            prompt = np.asarray(ids)
        except ValueError:  # lists of different lengths
            prompt = np.empty(0)
        if prompt.dtype.kind not in "iu" or prompt.ndim != 1:
            raise InvalidRequest("The prompt's token ids must be integers.", field="prompt")
        wrong = np.flatnonzero((prompt < 0) | (prompt >= num_tokens))
        if len(wrong):
            raise InvalidRequest(
                f"Token {wrong[0]} of the prompt is {prompt[wrong[0]]}; this model's ids go up to {num_tokens - 1}.",
                field="prompt",
            )
        if not request.timeout_s >= 0:  # also refuses NaN
            raise InvalidRequest(
                f"timeout_s must be a number of seconds, not {request.timeout_s!r}.", field="timeout_s"
            )
        for token_id, bias in (request.params.logit_bias or {}).items():
            if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
                raise InvalidRequest(
                    f"logit_bias names token {token_id!r}; this model's ids go up to {num_tokens - 1}.",
                    field="logit_bias",
                )
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
                raise InvalidRequest(
                    f"logit_bias of token {token_id} must be a finite number, not {bias!r}.", field="logit_bias"
                )
        return prompt.astype(np.int32)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, handle = heapq.heappop(self._deadlines)
            self._scheduler.end(handle, "abort", now, error=TIMEOUT)

    def _fail(self, plan: Plan, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        logger.error("A step of %d sequences failed: %s", len(plan.sequences), text, exc_info=error)
        self._scheduler.fail(plan.sequences, text, time.monotonic())
        try:
            self._runner.logits(np.zeros(1, np.int32))
        except Exception as lost:
            for sequence in list(self._scheduler.sequences):
                self._scheduler.end(sequence.handle, "error", time.monotonic(), error=text)
            self._deliver()
            raise EngineDied(f"The runner computes nothing any more: {lost}") from error

    def _deliver(self) -> None:
        """Hand over the events in order, also those that sinks cause meanwhile."""
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._scheduler.events:
                sink, event = self._scheduler.events.popleft()
                sink(event)
        finally:
            self._delivering = False
