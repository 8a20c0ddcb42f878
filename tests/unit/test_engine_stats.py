"""What the engine counts is what happened: against the events that it handed out, in every way a request can go."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_runner import FakeRunner, config

from nanogpt.engine.core import Engine
from nanogpt.engine.messages import Finished, GenerateRequest, Tokens
from nanogpt.engine.sequence import Event
from nanogpt.engine.stats import BOUNDS, EngineStats, Histogram
from nanogpt.errors import QueueFull
from nanogpt.sampling_params import SamplingParams


class Asked:
    """One request, and what came of it."""

    def __init__(self, engine: Engine, prompt: list[int], **params: object) -> None:
        self.events: list[Event] = []
        params.setdefault("seed", 7)
        self.handle = engine.submit(GenerateRequest(prompt, SamplingParams(**params)), self.events.append)  # type: ignore[arg-type]

    @property
    def end(self) -> Finished:
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]

    @property
    def num_tokens_by_step(self) -> list[int]:
        return [len(event.token_ids) for event in self.events if isinstance(event, Tokens)]


def run(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


@pytest.mark.parametrize("num_guesses", [0, 2])
@pytest.mark.parametrize("context_overflow", ["stop", "crop"])
def test_the_counts_are_those_of_the_events(num_guesses: int, context_overflow: str) -> None:
    """Also when a runner guesses tokens ahead, and when windows move: every token after a text's first step has waited
    for the one before it, and together they waited from the first token to the end."""
    runner = FakeRunner(config(block_size=32), 5, max_batch_tokens=16)
    runner.num_guesses = num_guesses
    engine = Engine(runner, max_batch_size=4, max_batch_tokens=16, context_overflow=context_overflow)
    asked = [Asked(engine, [1 + i] * n, max_tokens=m) for i, (n, m) in enumerate([(3, 9), (20, 1), (30, 60), (9, 25)])]
    run(engine)
    stats = engine.stats()
    assert stats.finished == {"stop": 0, "abort": 0, "error": 0, **Counter(one.end.reason for one in asked)}
    assert stats.num_prompt_tokens == stats.prompt_tokens.sum == 62
    assert stats.num_output_tokens == stats.output_tokens.sum == sum(sum(one.num_tokens_by_step) for one in asked)
    assert stats.queue.count == stats.ttft.count == stats.e2e.count == stats.prompt_tokens.count == 4
    assert stats.itl.count == sum(sum(one.num_tokens_by_step[1:]) for one in asked)
    timings = [one.end.timings for one in asked]
    assert stats.itl.sum == pytest.approx(sum(t.total_s - t.ttft_s for t in timings))
    assert stats.ttft.sum == pytest.approx(sum(t.ttft_s for t in timings))
    assert stats.e2e.sum == pytest.approx(sum(t.total_s for t in timings))
    assert stats.queue.sum == pytest.approx(sum(t.queue_s for t in timings))
    assert stats.step.count == stats.step_tokens.count == stats.step_sequences.count == stats.num_steps
    assert stats.step_tokens.sum == stats.num_computed_tokens


def test_a_prefix_that_was_there_counts_as_hit() -> None:
    engine = Engine(FakeRunner(config(block_size=32), 5), max_batch_size=2, max_batch_tokens=16)
    prompt = list(range(20))
    for _ in range(2):
        Asked(engine, prompt, max_tokens=2)
        run(engine)
    stats = engine.stats()
    assert (stats.num_queried_tokens, stats.num_cached_tokens) == (40, 19)


def test_how_requests_end() -> None:
    """A text that its reader found complete is a stop; one that nobody waits for is an abort, and no latency."""
    engine = Engine(FakeRunner(config(block_size=64), 5), max_batch_size=4, max_batch_tokens=16)
    asked = [Asked(engine, [i + 1], max_tokens=40) for i in range(3)]
    engine.step()
    engine.step()
    engine.abort(asked[0].handle, "stop")
    engine.abort(asked[1].handle)
    assert [asked[0].end.reason, asked[1].end.reason] == ["stop", "abort"]
    run(engine)
    stats = engine.stats()
    assert stats.finished == {"stop": 1, "length": 1, "abort": 1, "error": 0}
    assert stats.e2e.count == 2


def test_a_step_that_fails_is_an_error_for_its_sequences() -> None:
    runner = FakeRunner(config(block_size=64), 5)
    engine = Engine(runner, max_batch_size=4, max_batch_tokens=16)
    Asked(engine, [1], max_tokens=5)
    runner.fail_next = RuntimeError("a step that cannot be")
    run(engine)
    assert engine.stats().finished["error"] == 1


def test_what_is_held_now() -> None:
    engine = Engine(FakeRunner(config(block_size=32), 5), max_batch_size=2, max_batch_tokens=16, max_queue=1)
    running = [Asked(engine, [i, i], max_tokens=9) for i in (1, 2)]
    engine.step()
    Asked(engine, [3, 3], max_tokens=9)
    with pytest.raises(QueueFull):
        Asked(engine, [4, 4], max_tokens=9)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_queue_full) == (2, 1, 1)
    assert (stats.num_slots, stats.num_slots_running, stats.num_slots_cached) == (5, 2, 0)
    assert (stats.num_positions, stats.num_positions_held) == (5 * 32, 4)
    run(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert (stats.num_slots_running, stats.num_slots_cached) == (0, 3)
    assert running[0].end.reason == "length"


def test_a_value_lies_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    """As Prometheus' `le` has it."""
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 2, 4, 5, 100):
        histogram.observe(value)
    histogram.observe(3, times=10)
    assert histogram.counts == [2, 2, 11, 2]
    assert histogram.sum == 0.5 + 1 + 1.5 + 2 + 4 + 5 + 100 + 30


def test_what_goes_over_the_wire_is_a_copy() -> None:
    stats = EngineStats()
    sent = stats.to_wire()
    stats.ttft.observe(1.0)
    stats.finished["stop"] += 1
    assert sent == EngineStats().to_wire()
    assert all(len(sent[name]) == len(bounds) + 2 for name, bounds in BOUNDS.items())
