"""Any order of submitting, stepping, aborting, failing and expiring: the engine's promises hold after every action.

The runner is a fake whose next token depends on all that its slot really holds, so that a slot mixed up, a position
left out or a wrong prefix shows in the output. Who is admitted is held against the rule, told here a second time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from fake_runner import FakeRunner, config, expected
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanogpt.engine.core import Engine
from nanogpt.engine.messages import TIMEOUT, Finished, GenerateRequest, Tokens
from nanogpt.engine.scheduler import Plan
from nanogpt.engine.sequence import Event, Sequence
from nanogpt.engine.speculation import Speculation
from nanogpt.errors import ConcurrencyLimit, InvalidRequest, QueueFull
from nanogpt.runner.ngram import NgramProposer
from nanogpt.sampling_params import SamplingParams

NUM_TOKENS = 40


@dataclass
class Asked:
    """One accepted request, and all that its sink was told."""

    prompt: list[int]
    params: SamplingParams
    timeout_s: float
    client: str
    events: list[Event] = field(default_factory=list)
    aborts_at_first_token: int | None = None

    @property
    def finished(self) -> Finished | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Finished) else None

    @property
    def output(self) -> list[int]:
        return [token_id for event in self.events if isinstance(event, Tokens) for token_id in event.token_ids]


class Guessing(Speculation):
    """Guesses of which most are right: the fake model's texts hardly ever repeat themselves."""

    def __init__(self, machine: EngineMachine, num_guesses: int, **limits: int) -> None:
        super().__init__(num_guesses, **limits)
        self._machine = machine

    def proposer(self, sequence: Sequence) -> NgramProposer:
        params = sequence.request.params
        prompt = list(sequence.request.prompt_token_ids)
        text, _ = expected(
            prompt,
            seed=params.seed or 0,
            max_tokens=params.max_tokens,
            config=self._machine.config,
            crop=self._machine.crop,
        )
        return Oracle([token_id ^ 1 if i % 4 == 3 else token_id for i, token_id in enumerate(text)])


class Oracle(NgramProposer):
    def __init__(self, text: list[int]) -> None:
        super().__init__([])
        self._oracle = text

    def propose(self, output: list[int], limit: int, worth: float) -> list[int]:
        return self._oracle[len(output) :][: max(0, limit)]


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(2, 12),
        max_batch_size=st.integers(1, 5),
        extra_slots=st.integers(0, 3),
        max_batch_tokens=st.integers(1, 16),
        max_mixed_tokens=st.none() | st.integers(1, 16),
        max_queue=st.integers(0, 6) | st.integers(8, 20),
        prefix_cache=st.booleans(),
        min_copy_tokens=st.sampled_from([1, 8]),
        min_shared_tokens=st.sampled_from([1, 3, 16]),
        crop=st.booleans(),
        num_guesses=st.sampled_from([0, 0, 1, 3]),
        num_drafts=st.sampled_from([0, 0, 1, 4]),
    )
    def start(
        self,
        block_size: int,
        max_batch_size: int,
        extra_slots: int,
        max_batch_tokens: int,
        max_mixed_tokens: int | None,
        max_queue: int,
        prefix_cache: bool,
        min_copy_tokens: int,
        min_shared_tokens: int,
        crop: bool,
        num_guesses: int,
        num_drafts: int,
    ) -> None:
        self.config = config(block_size, NUM_TOKENS)
        self.crop = crop
        self.prefix_cache = prefix_cache
        self.max_running = min(max_batch_size, max_batch_tokens)
        self.max_queue = max_queue
        self.runner = FakeRunner(self.config, max_batch_size + extra_slots, max_batch_tokens=max_batch_tokens)
        self.runner.num_guesses = num_guesses
        self.engine = Engine(
            self.runner,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_mixed_tokens=max_mixed_tokens,
            max_queue=max_queue,
            prefix_cache=prefix_cache,
            context_overflow="crop" if crop else "stop",
        )
        self.scheduler = self.engine._scheduler
        self.scheduler.slots._min_copy_tokens = min_copy_tokens
        self.scheduler._min_shared_tokens = min_shared_tokens
        if num_drafts:
            self.scheduler.speculation = Guessing(self, num_drafts, max_guesses=6, block_size=block_size)
        self.admit = self.scheduler.schedule
        self.scheduler.schedule = self.schedule  # type: ignore[method-assign]
        self.asked: dict[int, Asked] = {}
        self.num_admitted = 0
        self.served: dict[str, float] = {}
        """When each client was served last, in admissions; who comes (again) does so half before the latest one."""
        self.may_fail: set[int] = set()

    # Few different tokens, and often a text that was there before, so that prompts share prefixes of all lengths.
    @rule(
        prompt=st.lists(st.integers(0, 1), max_size=20),
        again=st.none() | st.tuples(st.integers(0, 100), st.integers(0, 20)),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 3),
        stop_ids=st.lists(st.integers(0, NUM_TOKENS - 1), max_size=3),
        timeout_s=st.sampled_from([1000.0, 1000.0, 1000.0, 0.0]),
        wants_prompt_logprobs=st.booleans(),
        aborts=st.none() | st.integers(0, 10),
        client=st.sampled_from(["ann", "ann", "ann", "bob", "cem", ""]),
        max_concurrency=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def submit(
        self,
        prompt: list[int],
        again: tuple[int, int] | None,
        max_tokens: int,
        seed: int,
        stop_ids: list[int],
        timeout_s: float,
        wants_prompt_logprobs: bool,
        aborts: int | None,
        client: str,
        max_concurrency: int,
    ) -> None:
        if again is not None and self.asked:
            former = self.asked[sorted(self.asked)[again[0] % len(self.asked)]]
            prompt = [*former.prompt, *former.output][: again[1]] + prompt[:2]
        prompt = prompt or [0]
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=stop_ids,
            prompt_logprobs=2 if wants_prompt_logprobs else None,
        )
        asked = Asked(prompt, params, timeout_s, client, aborts_at_first_token=aborts)

        def sink(event: Event) -> None:
            asked.events.append(event)
            if len(asked.events) == 1 and asked.aborts_at_first_token in self.asked:
                self.engine.abort(asked.aborts_at_first_token)

        request = GenerateRequest(prompt, params, client=client, timeout_s=timeout_s, max_concurrency=max_concurrency)
        own = [handle for handle, other in self.asked.items() if not other.finished and other.client == client]
        if 0 < max_concurrency <= len(own):
            with pytest.raises(ConcurrencyLimit, match=str(max_concurrency)):
                self.engine.submit(request, sink)
        elif not self.has_room(own):
            with pytest.raises(QueueFull):
                self.engine.submit(request, sink)
        elif len(prompt) > self.config.block_size and not self.crop:
            with pytest.raises(InvalidRequest, match=str(self.config.block_size)):
                self.engine.submit(request, sink)
        else:
            self.asked[self.engine.submit(request, sink)] = asked
            if not own:
                self.served[client] = self.num_admitted - 0.5

    def has_room(self, own: list[int]) -> bool:
        """The queue is what waits beyond the free places; its last eighth is not for who holds more than half."""
        left = self.max_running + self.max_queue - sum(other.finished is None for other in self.asked.values())
        num_free = self.max_running - self.scheduler.num_running
        own_queued = sum(handle not in self.scheduler._running for handle in own) - num_free
        return left > (self.max_queue // 8 if own_queued > self.max_queue / 2 else 0)

    def schedule(self, now: float) -> Plan | None:
        """In the scheduler's place: it chooses, and every choice was the fair one."""
        running = Counter(s.request.client for s in self.scheduler._running.values())
        before = set(self.scheduler._running)
        waiting: dict[str, list[int]] = {}
        for handle in sorted(s.handle for s in self.scheduler._queue):
            waiting.setdefault(self.asked[handle].client, []).append(handle)
        plan = self.admit(now)
        for handle in self.scheduler._running:
            if handle not in before:
                chosen = min(waiting, key=lambda c: (running[c], self.served[c], waiting[c][0]))
                client = self.asked[handle].client
                assert (running[client], self.served[client]) == (running[chosen], self.served[chosen])
                assert handle == waiting[client].pop(0), "first come, first served within a client"
                if not waiting[client]:
                    del waiting[client]
                running[client] += 1
                self.num_admitted += 1
                self.served[client] = self.num_admitted
        assert plan or not before
        return plan

    @rule()
    def step(self) -> None:
        scheduler = self.scheduler
        had_work = self.engine.has_work()
        in_turn = [*scheduler._decoding, *list(scheduler._filling)[:1]]
        before = {s.handle: (s.num_computed, len(s.output), s.window_start) for s in in_turn}
        self.engine.step()
        assert self.engine.has_work() <= had_work
        for s in in_turn:
            # Whoever decodes, and the first of those who compute a prompt, gets on in every step.
            assert self.asked[s.handle].finished or (s.num_computed, len(s.output), s.window_start) != before[s.handle]

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.asked))))

    @precondition(lambda self: self.engine.has_work())
    @rule()
    def fail(self) -> None:
        """The runner breaks in the middle of a step: with what it has written, nobody knows."""
        self.runner.fail_next = RuntimeError("out of memory")
        self.may_fail |= {handle for handle, asked in self.asked.items() if not asked.finished}
        self.engine.step()
        self.runner.fail_next = None

    @invariant()
    def no_slot_is_lost_or_owned_twice(self) -> None:
        if hasattr(self, "scheduler"):
            sequences = list(self.scheduler._running.values())
            self.scheduler._queue.check(sequences)
            self.scheduler.slots.check({s.slot for s in sequences})
            assert len({s.slot for s in sequences}) == len(sequences)
            assert sorted(s.handle for s in sequences) == sorted(
                s.handle for s in (*self.scheduler._decoding, *self.scheduler._filling)
            )

    @invariant()
    def what_is_running_is_bounded(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.num_running <= self.scheduler.max_running
            assert self.scheduler.num_running + self.scheduler.num_waiting <= self.max_running + self.max_queue
            unfinished = {handle for handle, asked in self.asked.items() if not asked.finished}
            assert unfinished == {s.handle for s in self.scheduler.sequences}

    @invariant()
    def first_come_first_served(self) -> None:
        """Within a client; and whoever computes a prompt keeps its place in the line."""
        if not hasattr(self, "scheduler"):
            return
        for client in {asked.client for asked in self.asked.values()}:
            waiting = [s.handle for s in self.scheduler._queue if s.request.client == client]
            running = [s.handle for s in self.scheduler._running.values() if s.request.client == client]
            filling = [s.handle for s in self.scheduler._filling if s.request.client == client]
            assert waiting == sorted(waiting)
            assert not waiting or max(running, default=-1) < waiting[0]
            assert self.crop or filling == sorted(filling)

    @invariant()
    def every_request_ends_at_most_once_and_says_what_the_model_says(self) -> None:
        for handle, asked in getattr(self, "asked", {}).items():
            assert sum(isinstance(event, Finished) for event in asked.events) == (asked.finished is not None)
            text, reason = expected(
                asked.prompt,
                seed=asked.params.seed or 0,
                max_tokens=asked.params.max_tokens,
                config=self.config,
                crop=self.crop,
                stop_ids=asked.params.stop_token_ids,
            )
            finished = asked.finished
            if finished is None or finished.reason in ("abort", "error"):
                assert asked.output == text[: len(asked.output)]
            else:
                assert (asked.output, finished.reason) == (text, reason)
            if finished is not None:
                assert finished.num_output_tokens == len(asked.output)
                assert finished.num_prompt_tokens == len(asked.prompt)
                assert finished.num_cached_tokens <= (len(asked.prompt) - 1 if self.prefix_cache else 0)
                assert finished.reason != "error" or handle in self.may_fail
                assert finished.error != TIMEOUT or asked.timeout_s == 0
                self.check_prompt_logprobs(asked, finished)

    def check_prompt_logprobs(self, asked: Asked, finished: Finished) -> None:
        if asked.params.prompt_logprobs is None:
            assert finished.prompt_logprobs is None
        elif finished.reason in ("stop", "length"):
            window = max(0, len(asked.prompt) - self.config.block_size) + 1
            assert finished.prompt_logprobs is not None
            told = [None if item is None else -item.logprob for item in finished.prompt_logprobs]
            assert told == [None] * window + asked.prompt[window:]

    def teardown(self) -> None:
        """Left alone, the engine ends everything, in as many steps as there are tokens to compute at most."""
        if not hasattr(self, "engine"):
            return
        most = sum((len(a.prompt) + a.params.max_tokens) * (self.config.block_size + 1) for a in self.asked.values())
        for _ in range(most):
            if not self.engine.step():
                break
        assert not self.engine.has_work()
        self.every_request_ends_at_most_once_and_says_what_the_model_says()
        assert all(asked.finished for asked in self.asked.values())
        assert self.scheduler.slots.num_running == 0


EngineMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngineMachine = EngineMachine.TestCase
