"""Which sequence computes how many tokens in the next step. Owned by the engine's loop; knows no model and no socket.

The algorithm, in words:

There are no phases. A running sequence has ``num_left`` tokens of its context still to be computed: one while it
decodes, more while its prompt (or its moved window) is being computed. A step's budget is ``max_batch_tokens`` tokens:

1. Every sequence with one token left gets it.
2. What is left of the budget goes to the sequences with more to compute, first come first served, in chunks. The
   budget of a step in which somebody decodes may be smaller (``max_mixed_tokens``): they wait for what it computes.
3. What is still left admits waiting requests, fairly among clients (``FairQueue``), while there is a place among
   ``max_batch_size`` running ones; each starts with the longest prefix that any slot holds.

A sequence whose context is complete after the step samples a token. No more than ``max_batch_tokens`` sequences run, so
step 1 always fits, and step 2 always has a token when somebody needs one: a long prompt never stalls those who decode,
and those who decode never stall a prompt. A request is admitted only when there are tokens for it, not before: the
later it looks for a prefix, the more there is to find.

What is left after that may hold guesses (speculation): tokens that probably follow those of a sequence that decodes,
computed and sampled in the same step. It keeps what was drawn up to the first wrong one. K and V of wrong guesses lie
past what the slot is known to hold and are overwritten; there is nothing to take back.

Siblings (n > 1, best_of, one list) come together, when none of them has been computed. When the next request shares
with a running sequence a beginning that only this step computes, admission pauses until the next step, where that is a
prefix to copy: n siblings compute their prompt once. Tokens are left in step 3 only when everybody's context will be
complete after the step, so one pause is enough; a request causes one at most, in a step in which somebody computes, and
nobody overtakes it. So the order stays, and nobody waits for ever.

At the end of the context (``block_size``) a sequence finishes with ``length``, or, with ``crop``, its window moves on
by one token each step and is computed again from position 0, as nanoGPT does; it then queues at the end of step 2's
line.

A stop token (the tokenizer's end of text unless ``ignore_eos``, and ``stop_token_ids``) ends the output and is not part
of it: it is neither reported nor counted. A grammar's text ends with ``stop``, too, when nothing can follow it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from nanogpt.engine.messages import GRAMMAR, Finished, FinishReason, Timings, Tokens
from nanogpt.engine.queue import FairQueue
from nanogpt.engine.sequence import Event, Sequence, Sink
from nanogpt.engine.slots import Slots, num_common
from nanogpt.engine.speculation import Speculation
from nanogpt.engine.stats import EngineStats
from nanogpt.errors import NanoGPTError
from nanogpt.runner.base import Batch, Int32, PromptLogprobs, StepOutput


@dataclass(slots=True)
class Plan:
    """One step: first the copies in order (source, target, num_tokens), then the batch.

    ``sequences`` runs alongside the batch: first ``num_decoding`` with one token each (and guesses after it), then
    those with chunks.
    """

    batch: Batch
    sequences: list[Sequence]
    num_decoding: int
    copies: list[tuple[int, int, int]] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences of one engine. Events are collected in ``events`` for the engine to deliver."""

    def __init__(
        self,
        slots: Slots,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_mixed_tokens: int | None = None,
        block_size: int,
        speculation: Speculation | None = None,
    ) -> None:
        self.slots = slots
        self.speculation = speculation
        self.max_running = min(max_batch_size, max_batch_tokens, slots.num_slots)
        self._budget = max_batch_tokens
        self._mixed_budget = max_batch_tokens if max_mixed_tokens is None else min(max_mixed_tokens, max_batch_tokens)
        self._block_size = block_size
        # A pause costs a step: it must save a few tokens.
        self._min_shared_tokens = 16
        self._queue = FairQueue()
        self._decoding: list[Sequence] = []
        self._filling: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self.stats = EngineStats()
        # When the last step ended: every sequence that is decoding got its last token then.
        self._updated_at = 0.0
        self.events: deque[tuple[Sink, Event]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def sequences(self) -> Iterable[Sequence]:
        return chain(self._running.values(), self._queue)

    def add(self, sequence: Sequence) -> None:
        self._queue.add(sequence)

    def num_waiting_of(self, client: str) -> int:
        return self._queue.num_waiting(client)

    def num_of(self, client: str) -> int:
        """This client's sequences, running or waiting."""
        return self._queue.num_running(client) + self._queue.num_waiting(client)

    # -- a step ------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Plan | None:
        """The next step, or None when nobody has anything to compute."""
        sequences = self._decoding.copy()
        num_decoding = len(sequences)
        left = self._budget - num_decoding
        if num_decoding:
            left = min(left, max(1, self._mixed_budget - num_decoding))
        chunks: list[int] = []
        copies: list[tuple[int, int, int]] = []
        for sequence in self._filling:
            if not left:
                break
            sequences.append(sequence)
            chunks.append(min(sequence.num_left, left))
            left -= chunks[-1]
        while left and self._queue and len(self._running) < self.max_running:
            sequence = self._queue.first()
            if self._pauses_for(sequence):
                break
            self._admit(sequence, now, copies)
            sequences.append(sequence)
            chunks.append(min(sequence.num_left, left))
            left -= chunks[-1]
        if not sequences:
            return None
        guesses = None
        if self.speculation is not None:
            guesses = self.speculation.guesses(self._decoding, sum(chunks), self._budget - num_decoding - sum(chunks))
        return Plan(self._batch(sequences, num_decoding, chunks, guesses), sequences, num_decoding, copies)

    def update(self, plan: Plan, output: StepOutput, now: float) -> None:
        """Take in what the runner computed and sampled.

        Raises: RuntimeError when the runner broke its contract; ``fail`` then ends the plan's sequences.
        """
        self._record(plan)
        if plan.batch.num_drafts is not None:
            self._count_guesses(plan, output)
        stats = self.stats
        since_last, self._updated_at = now - self._updated_at, now
        num_single = plan.num_decoding
        for b, (sequence, new) in enumerate(zip(plan.sequences, output.token_ids, strict=True)):
            if b < plan.num_decoding:
                sequence.num_computed += 1
            else:
                sequence.num_computed += int(plan.batch.num_tokens[b])
                if sequence.prompt_logprobs is not None and b in output.prompt_logprobs:
                    sequence.prompt_logprobs += output.prompt_logprobs[b]
                if sequence.num_left:
                    continue
                self._filling.remove(sequence)
                self._decoding.append(sequence)
            if not sequence.first_token_at:
                sequence.first_token_at = now
                stats.ttft.observe(now - sequence.submitted_at)
            elif b >= plan.num_decoding:
                stats.itl.observe(now - sequence.moved_at)
            reason: FinishReason | None = None
            if len(new) == 1 and new[0] not in sequence.stop_ids:
                sequence.output.append(new[0])
                if len(sequence.output) >= sequence.max_output_tokens:
                    reason = "length"
            else:
                new, reason = self._accept(sequence, new)
                if b < plan.num_decoding:
                    num_single -= 1
                    if new:
                        stats.itl.observe(since_last / len(new), len(new))
            error = None
            if sequence.grammar is not None and reason != "stop":
                reason, error = self._follow_grammar(sequence, new, reason)
            if new:
                stats.num_output_tokens += len(new)
                logprobs = output.logprobs[b][: len(new)] if b in output.logprobs else None
                self.events.append((sequence.sink, Tokens(new, logprobs)))
            if reason is not None:
                self._finish(sequence, reason, now, error=error)
            elif sequence.num_computed >= self._block_size:
                self._move_window(sequence, now)
        if num_single:
            stats.itl.observe(since_last, num_single)

    # -- endings -----------------------------------------------------------------------------------------------

    def end(self, handle: int, reason: FinishReason, now: float, *, error: str | None = None) -> None:
        """End a sequence between steps, with what it has. A handle that has already ended is no news."""
        sequence = self._queue.get(handle) or self._running.get(handle)
        if sequence is not None:
            self._finish(sequence, reason, now, error=error)

    def fail(self, sequences: Iterable[Sequence], error: str, now: float) -> None:
        """End the sequences of a step that the runner could not compute; what their slots hold is not trusted."""
        for sequence in sequences:
            if sequence.handle in self._running:
                self.slots.clear(sequence.slot)
                self._finish(sequence, "error", now, error=error)

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float, *, error: str | None = None) -> None:
        if self._running.pop(sequence.handle, None) is None:
            self._queue.remove(sequence)
        else:
            self._queue.ended(sequence)
            try:
                self._decoding.remove(sequence)
            except ValueError:
                self._filling.remove(sequence)
            self.slots.release(sequence.slot, keep=True)
        started = sequence.admitted_at or now
        timings = Timings(
            queue_s=started - sequence.submitted_at,
            ttft_s=(sequence.first_token_at or now) - sequence.submitted_at,
            total_s=now - sequence.submitted_at,
        )
        self._count_finished(sequence, reason, timings)
        finished = Finished(
            reason=reason,
            num_prompt_tokens=len(sequence.prompt),
            num_output_tokens=len(sequence.output),
            num_cached_tokens=sequence.num_cached,
            timings=timings,
            error=error,
            prompt_logprobs=sequence.prompt_logprobs,
        )
        self.events.append((sequence.sink, finished))

    def _count_finished(self, sequence: Sequence, reason: FinishReason, timings: Timings) -> None:
        stats = self.stats
        stats.finished[reason] += 1
        if reason in ("stop", "length"):  # how long nobody waited to the end would say little of the others
            stats.e2e.observe(timings.total_s)
            stats.prompt_tokens.observe(len(sequence.prompt))
            stats.output_tokens.observe(len(sequence.output))

    # -- parts -------------------------------------------------------------------------------------------------

    def _pauses_for(self, sequence: Sequence) -> bool:
        """Whether the next one should be admitted in the next step, when what it shares has been computed."""
        if sequence.paused or not self._filling or not self.slots.prefix_cache:
            return False
        token_ids, reuse = _start(sequence)
        shared = max(num_common(token_ids[:reuse], _start(other)[0]) for other in self._filling)
        if shared < self._min_shared_tokens:
            return False
        sequence.paused = shared - self.slots.num_reusable(token_ids, reuse) >= self._min_shared_tokens
        return sequence.paused

    def _admit(self, sequence: Sequence, now: float, copies: list[tuple[int, int, int]]) -> None:
        """Give a waiting sequence a slot."""
        grant = self.slots.acquire(*_start(sequence))
        if grant.copy_from is not None:
            copies.append((grant.copy_from, grant.slot, grant.num_cached))
        sequence.slot = grant.slot
        sequence.num_computed = sequence.num_cached = grant.num_cached
        sequence.admitted_at = now
        if sequence.grammar is not None:
            sequence.state.mask = sequence.grammar.first_mask()
        self._queue.serve(sequence)
        stats = self.stats
        stats.num_prompt_tokens += len(sequence.prompt)
        stats.num_queried_tokens += len(sequence.prompt) - sequence.window_start
        stats.num_cached_tokens += grant.num_cached
        stats.queue.observe(now - sequence.submitted_at)
        self._running[sequence.handle] = sequence
        self._filling.append(sequence)

    def _batch(
        self, sequences: list[Sequence], num_decoding: int, chunks: list[int], guesses: list[list[int]] | None
    ) -> Batch:
        starts = np.array([s.num_computed for s in sequences], np.int32)
        num_tokens = np.ones(len(sequences), np.int32)
        num_drafts: Int32 | None = None
        latest = [s.output[-1] for s in sequences[:num_decoding]]
        if guesses is not None:
            num_drafts = np.zeros(len(sequences), np.int32)
            num_drafts[:num_decoding] = [len(of) for of in guesses]
            num_tokens += num_drafts
            latest = [token_id for last, of in zip(latest, guesses, strict=True) for token_id in (last, *of)]
        token_ids = np.array(latest, np.int32)
        prompt_logprobs: dict[int, PromptLogprobs] | None = None
        if chunks:
            num_tokens[num_decoding:] = chunks
            pieces: list[Int32] = [token_ids]
            for b, (sequence, n) in enumerate(zip(sequences[num_decoding:], chunks, strict=True), num_decoding):
                start = sequence.num_computed
                pieces.append(sequence.context(start, start + n))
                if sequence.prompt_logprobs is not None and not sequence.output:
                    following = sequence.prompt[sequence.window_start + start + 1 :][:n]
                    prompt_logprobs = prompt_logprobs or {}
                    prompt_logprobs[b] = PromptLogprobs(following, sequence.request.params.prompt_logprobs or 0)
            token_ids = np.concatenate(pieces)
        return Batch(
            slots=np.array([s.slot for s in sequences], np.int32),
            starts=starts,
            num_tokens=num_tokens,
            token_ids=token_ids,
            sampling=[s.state for s in sequences[:num_decoding]]
            + [s.state if s.num_left == n else None for s, n in zip(sequences[num_decoding:], chunks, strict=True)],
            num_drafts=num_drafts,
            prompt_logprobs=prompt_logprobs,
        )

    def _record(self, plan: Plan) -> None:
        batch, n = plan.batch, plan.num_decoding
        num_decoding = n
        if batch.num_drafts is not None:
            ends = np.cumsum(batch.num_tokens[:n])
            self.slots.record_one_each(batch.slots[:n], batch.starts[:n], batch.token_ids[ends - batch.num_tokens[:n]])
            n = int(ends[-1])
        elif n:
            self.slots.record_one_each(batch.slots[:n], batch.starts[:n], batch.token_ids[:n])
        for b in range(num_decoding, len(plan.sequences)):
            stop = n + int(batch.num_tokens[b])
            self.slots.record(int(batch.slots[b]), int(batch.starts[b]), batch.token_ids[n:stop])
            n = stop

    def _count_guesses(self, plan: Plan, output: StepOutput) -> None:
        assert plan.batch.num_drafts is not None
        num_guesses = plan.batch.num_drafts.tolist()
        for sequence, n, new in zip(plan.sequences, num_guesses, output.token_ids, strict=True):
            if n and new and sequence.proposer is not None:
                sequence.proposer.observe(n, len(new) - 1)
                self.stats.num_guessed_tokens += n
                self.stats.num_accepted_tokens += len(new) - 1

    def _accept(self, sequence: Sequence, new: list[int]) -> tuple[list[int], FinishReason | None]:
        """Take sampled tokens one by one up to the one that ends the output. Returns those that count, and the end.

        The runner has computed all of ``new`` but its last token.
        """
        if not new:
            raise RuntimeError("the runner sampled nothing for a sequence whose context was complete")
        reason: FinishReason | None = None
        kept: list[int] = []
        for token_id in new:
            if token_id in sequence.stop_ids:
                reason = "stop"
                break
            kept.append(token_id)
            if len(sequence.output) + len(kept) >= sequence.max_output_tokens:
                reason = "length"
                break
        computed = new[:-1][: len(kept)]
        self.slots.record(sequence.slot, sequence.num_computed, computed)
        sequence.num_computed += len(computed)
        sequence.output += kept
        return kept, reason

    def _follow_grammar(
        self, sequence: Sequence, new: list[int], reason: FinishReason | None
    ) -> tuple[FinishReason | None, str | None]:
        """The grammar takes in the sampled tokens and says what may follow. Returns the end, if it is one, and why."""
        assert sequence.grammar is not None
        try:
            sequence.state.mask = sequence.grammar.advance(new)
        except NanoGPTError as error:
            return "error", f"{GRAMMAR}{error}"
        # A text that is complete with the last token that it may have is complete.
        return ("stop" if sequence.state.mask is None else reason), None

    def _move_window(self, sequence: Sequence, now: float) -> None:
        """The context is one token too long: drop it on the left. All positions change, so nothing computed holds."""
        sequence.window_start = len(sequence.prompt) + len(sequence.output) - self._block_size
        sequence.num_computed = 0
        sequence.moved_at = now
        self.slots.clear(sequence.slot)
        self._decoding.remove(sequence)
        self._filling.append(sequence)


def _start(sequence: Sequence) -> tuple[Int32, int]:
    """What a waiting sequence will compute, and how much of that may be reused: the last token's logits are wanted."""
    num_context = len(sequence.prompt) - sequence.window_start
    reuse = 0 if sequence.prompt_logprobs is not None else num_context - 1
    return sequence.context(0, num_context), reuse
