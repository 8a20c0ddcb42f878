"""The engine with a fake runner: how requests end, what is refused, what survives a failure, what a prefix saves."""

from __future__ import annotations

import itertools
import math

import pytest
from fake_runner import FakeRunner, config, expected

from nanogpt.engine.core import Engine
from nanogpt.engine.messages import TIMEOUT, Finished, GenerateRequest, Tokens
from nanogpt.engine.sequence import Event
from nanogpt.errors import EngineDied, EngineDraining, InvalidRequest, QueueFull
from nanogpt.sampling_params import SamplingParams


def request(prompt: list[int], *, timeout_s: float = 300.0, **params: object) -> GenerateRequest:
    params.setdefault("seed", 7)
    params.setdefault("max_tokens", 5)
    return GenerateRequest(prompt, SamplingParams(**params), timeout_s=timeout_s)  # type: ignore[arg-type]


def run(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def ask(engine: Engine, asked: GenerateRequest) -> tuple[list[int], Finished]:
    """Run one request to its end."""
    events: list[Event] = []
    engine.submit(asked, events.append)
    run(engine)
    *tokens, finished = events
    assert isinstance(finished, Finished)
    return [token_id for event in tokens if isinstance(event, Tokens) for token_id in event.token_ids], finished


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(config(block_size=32), 4, max_batch_tokens=16)


@pytest.fixture
def engine(runner: FakeRunner) -> Engine:
    return Engine(runner, max_batch_size=3, max_batch_tokens=16, max_queue=2)


# -- how a request ends -------------------------------------------------------------------------------------------


def test_length(engine: Engine, runner: FakeRunner) -> None:
    output, finished = ask(engine, request([1, 2, 3], max_tokens=6))
    assert (output, finished.reason) == expected([1, 2, 3], seed=7, max_tokens=6, config=runner.config)
    assert (finished.num_prompt_tokens, finished.num_output_tokens, finished.error) == (3, 6, None)


@pytest.mark.parametrize("num_prompt", [1, 20, 31, 32])
def test_the_context_ends_with_length_after_all_the_tokens_that_fit(engine: Engine, num_prompt: int) -> None:
    """The last token need not be computed, so a prompt that fills the context still gets one."""
    output, finished = ask(engine, request([1] * num_prompt, max_tokens=1000))
    assert len(output) == 32 - num_prompt + 1
    assert finished.reason == "length"


def test_a_stop_token_is_neither_reported_nor_counted(engine: Engine, runner: FakeRunner) -> None:
    whole, _ = ask(engine, request([1, 2, 3], max_tokens=8))
    output, finished = ask(engine, request([1, 2, 3], max_tokens=8, stop_token_ids=[whole[4]]))
    assert output == whole[: whole.index(whole[4])]
    assert finished.reason == "stop"
    assert finished.num_output_tokens == len(output)


def test_the_end_of_text_stops_unless_it_is_ignored(runner: FakeRunner) -> None:
    whole, _ = expected([1, 2, 3], seed=7, max_tokens=8, config=runner.config)
    engine = Engine(runner, max_batch_size=1, max_batch_tokens=16, eos_token_id=whole[5])
    at = whole.index(whole[5])
    assert ask(engine, request([1, 2, 3], max_tokens=8))[0] == whole[:at]
    assert ask(engine, request([1, 2, 3], max_tokens=8, ignore_eos=True))[0] == whole


def test_crop_goes_on_past_the_context_with_its_last_tokens(runner: FakeRunner) -> None:
    """As nanoGPT does: the window's positions begin at 0 again, and a prompt that is too long loses its beginning."""
    engine = Engine(runner, max_batch_size=2, max_batch_tokens=16, context_overflow="crop")
    for prompt in ([5, 6], list(range(45))):
        output, finished = ask(engine, request(prompt, max_tokens=50))
        assert (output, finished.reason) == expected(prompt, seed=7, max_tokens=50, config=runner.config, crop=True)
        assert finished.num_prompt_tokens == len(prompt)


def test_an_abort_ends_it_with_what_it_has(engine: Engine) -> None:
    running: list[Event] = []
    handle = engine.submit(request([1], max_tokens=20), running.append)
    engine.step()
    engine.step()
    engine.abort(handle)
    assert [type(event) for event in running] == [Tokens, Tokens, Finished]
    assert isinstance(running[-1], Finished)
    assert (running[-1].reason, running[-1].num_output_tokens) == ("abort", 2)
    engine.abort(handle)
    engine.abort(12345)
    assert len(running) == 3
    assert not engine.has_work()


def test_a_waiting_request_can_be_aborted(engine: Engine) -> None:
    handles, events = [], []
    for i in range(4):
        events.append([])
        handles.append(engine.submit(request([i + 1], max_tokens=3), events[i].append))
    engine.step()
    engine.abort(handles[3])
    (finished,) = events[3]
    assert (finished.reason, finished.num_output_tokens) == ("abort", 0)
    run(engine)
    assert all(isinstance(of[-1], Finished) and of[-1].reason == "length" for of in events[:3])


def test_the_deadline_ends_it_with_what_it_has(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 0.25)
    monkeypatch.setattr("nanogpt.engine.core.time.monotonic", lambda: next(clock))
    output, finished = ask(engine, request([1], max_tokens=30, timeout_s=3.0))
    assert (finished.reason, finished.error) == ("abort", TIMEOUT)
    assert 0 < len(output) == finished.num_output_tokens < 30
    assert 3.0 <= finished.timings.total_s < 4.0
    # Deadlines of requests that ended earlier mean nothing.
    assert ask(engine, request([1], max_tokens=2, timeout_s=3.0))[1].reason == "length"
    for _ in range(20):
        next(clock)
    assert ask(engine, request([1], max_tokens=2, timeout_s=30.0))[1].reason == "length"


def test_ten_thousand_requests_leave_no_deadlines_behind(engine: Engine) -> None:
    for _ in range(3000):
        engine.abort(engine.submit(request([1]), lambda event: None))
    assert len(engine._deadlines) <= 1025


def test_timings_are_those_of_the_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("nanogpt.engine.core.time.monotonic", lambda: now)
    events: list[Event] = []
    engine.submit(request([1], max_tokens=2), events.append)
    for now in (53.0, 57.0):  # noqa: B007 (the clock reads it)
        engine.step()
    assert isinstance(events[-1], Finished)
    timings = events[-1].timings
    assert (timings.queue_s, timings.ttft_s, timings.total_s) == (3.0, 3.0, 7.0)


def test_a_runner_that_guesses_stops_at_the_right_token(runner: FakeRunner) -> None:
    """Several tokens in one step: those after the one that ends the output do not count."""
    whole, _ = expected([4, 2], seed=7, max_tokens=9, config=runner.config)
    runner.num_guesses = 3
    engine = Engine(runner, max_batch_size=1, max_batch_tokens=16)
    assert ask(engine, request([4, 2], max_tokens=9))[0] == whole
    at = whole.index(whole[5])
    output, finished = ask(engine, request([4, 2], max_tokens=9, stop_token_ids=[whole[5]], logprobs=1))
    assert (output, finished.reason) == (whole[:at], "stop")


# -- log probabilities --------------------------------------------------------------------------------------------


def test_logprobs_run_alongside_the_tokens(engine: Engine) -> None:
    events: list[Event] = []
    engine.submit(request([1, 2], max_tokens=4, logprobs=2), events.append)
    run(engine)
    for event in events[:-1]:
        assert isinstance(event, Tokens)
        assert event.logprobs is not None
        assert [-item.logprob for item in event.logprobs] == event.token_ids
        assert [len(item.top) for item in event.logprobs] == [2]


def test_prompt_logprobs_of_a_prompt_in_chunks(engine: Engine) -> None:
    """Each chunk is asked for the tokens that follow its own, over its border too; a prefix would hide them."""
    prompt = list(range(1, 31))
    ask(engine, request(prompt))
    _, finished = ask(engine, request(prompt, max_tokens=1, prompt_logprobs=3))
    assert finished.prompt_logprobs is not None
    assert finished.prompt_logprobs[0] is None
    assert [-item.logprob for item in finished.prompt_logprobs if item] == prompt[1:]
    assert finished.num_cached_tokens == 0


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (request([]), "no tokens"),
        (request([1] * 33), "33 tokens, but the model's context holds 32"),
        (request([1, 50, 2]), "Token 1 of the prompt is 50; this model's ids go up to 49"),
        (request([1, -1]), "Token 1 of the prompt is -1"),
        (request([1, 2**40]), "Token 1 of the prompt is 1099511627776"),
        (request([1, 10**30]), "must be integers"),
        (request([1, "a"]), "must be integers"),  # type: ignore[list-item]
        (request([1.5]), "must be integers"),  # type: ignore[list-item]
        (request([[1], [2]]), "must be integers"),  # type: ignore[list-item]
        (request([[1], [2, 3]]), "must be integers"),  # type: ignore[list-item]
        (request([1], logit_bias={50: 1.0}), "logit_bias names token 50"),
        (request([1], logit_bias={"a": 1.0}), "logit_bias names token 'a'"),
        (request([1], logit_bias={3: math.nan}), "finite"),
        (request([1], timeout_s=math.nan), "timeout_s"),
    ],
)
def test_a_request_that_would_break_a_step_is_refused_alone(engine: Engine, asked: GenerateRequest, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        engine.submit(asked, lambda event: pytest.fail("a refused request has no events"))
    assert not engine.has_work()


def test_the_queue_is_bounded(engine: Engine) -> None:
    """Three run, two wait, the sixth is refused at once; when one ends there is a place again."""
    handles = [engine.submit(request([1], max_tokens=9), lambda event: None) for _ in range(5)]
    with pytest.raises(QueueFull) as refused:
        engine.submit(request([1]), lambda event: None)
    assert refused.value.status == 503
    assert refused.value.retry_after_s
    engine.step()
    engine.abort(handles[0])
    engine.submit(request([1]), lambda event: None)
    with pytest.raises(QueueFull):
        engine.submit(request([1]), lambda event: None)


def test_a_draining_engine_finishes_what_it_has_accepted(engine: Engine) -> None:
    events: list[Event] = []
    engine.submit(request([1]), events.append)
    engine.draining = True
    with pytest.raises(EngineDraining):
        engine.submit(request([1]), lambda event: None)
    run(engine)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "length"


# -- failures -----------------------------------------------------------------------------------------------------


def test_a_failed_step_ends_only_its_own_requests(engine: Engine, runner: FakeRunner) -> None:
    events: list[list[Event]] = [[] for _ in range(5)]
    for i in range(5):
        engine.submit(request([i + 1], max_tokens=3), events[i].append)
    runner.fail_next = RuntimeError("out of memory")
    run(engine)
    for failed in events[:3]:
        (finished,) = failed
        assert isinstance(finished, Finished)
        assert (finished.reason, finished.error) == ("error", "RuntimeError: out of memory")
    for i in (3, 4):
        output = [token_id for event in events[i][:-1] for token_id in event.token_ids]  # type: ignore[union-attr]
        assert output == expected([i + 1], seed=7, max_tokens=3, config=runner.config)[0]
    # What the failed step has written is no prefix for anybody.
    assert ask(engine, request([1], max_tokens=3))[0] == expected([1], seed=7, max_tokens=3, config=runner.config)[0]


def test_a_runner_that_samples_nothing_ends_its_requests(
    engine: Engine, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_draw", lambda batch, b, kept, output: [])
    output, finished = ask(engine, request([1]))
    assert (output, finished.reason) == ([], "error")


def test_a_lost_device_ends_everything_and_says_so(engine: Engine, runner: FakeRunner) -> None:
    events: list[list[Event]] = [[] for _ in range(5)]
    for i in range(5):
        engine.submit(request([1]), events[i].append)
    runner.lost = True
    with pytest.raises(EngineDied, match="the device is lost"):
        engine.step()
    assert [of[-1].reason for of in events] == ["error"] * 5  # type: ignore[union-attr]
    assert not engine.has_work()


# -- sinks --------------------------------------------------------------------------------------------------------


def test_a_sink_may_abort_and_submit(engine: Engine) -> None:
    """A stop string is found while tokens are delivered: the sequence ends there, and the others go on in order."""
    depth = 0
    events: list[list[Event]] = [[], [], []]

    def sink(event: Event) -> None:
        nonlocal depth
        depth += 1
        assert depth == 1, "a sink is never called from within a sink"
        events[0].append(event)
        if len(events[0]) == 2:
            engine.abort(first)
            engine.abort(second)
            engine.submit(request([3], max_tokens=2), events[2].append)
        depth -= 1

    first = engine.submit(request([1], max_tokens=9), sink)
    second = engine.submit(request([2], max_tokens=9), events[1].append)
    run(engine)
    assert [type(event) for event in events[0]] == [Tokens, Tokens, Finished]
    assert [type(event) for event in events[1]] == [Tokens, Tokens, Finished]
    assert [type(event) for event in events[2]] == [Tokens, Tokens, Finished]


# -- the prefix cache ---------------------------------------------------------------------------------------------


def test_a_prompt_that_goes_on_from_a_finished_text_computes_only_what_is_new(
    engine: Engine, runner: FakeRunner
) -> None:
    prompt = list(range(12))
    output, _ = ask(engine, request(prompt, max_tokens=6))
    before = runner.num_computed_tokens
    longer = [*prompt, *output, 3, 4]
    again, finished = ask(engine, request(longer, max_tokens=1))
    assert again == expected(longer, seed=7, max_tokens=1, config=runner.config)[0]
    # All but the last token that was sampled, which nobody had to compute.
    assert finished.num_cached_tokens == len(prompt) + len(output) - 1
    assert runner.num_computed_tokens - before == 3


def test_a_live_sequence_is_a_prefix_too(engine: Engine, runner: FakeRunner) -> None:
    prompt = list(range(12))
    engine.submit(request(prompt, max_tokens=20), lambda event: None)
    engine.step()
    output, finished = ask(engine, request([*prompt, 40], seed=8, max_tokens=3))
    assert output == expected([*prompt, 40], seed=8, max_tokens=3, config=runner.config)[0]
    assert finished.num_cached_tokens == 12


def test_without_the_prefix_cache_everything_is_computed(runner: FakeRunner) -> None:
    engine = Engine(runner, max_batch_size=3, max_batch_tokens=16, prefix_cache=False)
    for _ in range(2):
        _, finished = ask(engine, request(list(range(12)), max_tokens=3))
        assert finished.num_cached_tokens == 0


def test_the_least_recently_used_prefix_gives_way(engine: Engine) -> None:
    """Four slots: the fifth text takes the place of the one that was used longest ago."""
    texts = [[i] * 10 for i in range(5)]
    for text in texts[:4]:
        ask(engine, request(text, max_tokens=1))
    ask(engine, request([*texts[0], 9], max_tokens=1))  # used again
    ask(engine, request(texts[4], max_tokens=1))
    assert ask(engine, request([*texts[2], 9], max_tokens=1))[1].num_cached_tokens == 10
    assert ask(engine, request([*texts[0], 9], max_tokens=1))[1].num_cached_tokens == 10
    assert ask(engine, request([*texts[1], 9], max_tokens=1))[1].num_cached_tokens == 0


# -- fairness -----------------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_those_who_decode(runner: FakeRunner) -> None:
    """While the long prompt is computed in chunks, the others get a token in every step; and it gets on, too."""
    engine = Engine(runner, max_batch_size=3, max_batch_tokens=4, prefix_cache=False)
    runner.max_batch_tokens = 4
    decoding: list[list[Event]] = [[], []]
    for i in range(2):
        engine.submit(request([i + 1], max_tokens=30), decoding[i].append)
    engine.step()
    long: list[Event] = []
    engine.submit(request([3] * 20, max_tokens=2), long.append)
    for step in range(10):
        assert not long
        engine.step()
        assert [len(of) for of in decoding] == [step + 2] * 2
    assert long, "two tokens a step are left for twenty tokens"


def test_a_step_in_which_others_decode_takes_fewer_tokens_of_a_prompt(runner: FakeRunner) -> None:
    """Alone a prompt has the whole budget; beside others it is computed in chunks that do not keep them waiting."""
    engine = Engine(runner, max_batch_size=3, max_batch_tokens=16, max_mixed_tokens=6, prefix_cache=False)
    engine.submit(request([1] * 16, max_tokens=10), lambda event: None)
    engine.step()
    engine.submit(request([2] * 12, max_tokens=2), lambda event: None)
    computed = [runner.num_computed_tokens]
    while engine.has_work():
        engine.step()
        computed.append(runner.num_computed_tokens)
    assert computed[:4] == [16, 22, 28, 31], "five of the prompt beside one of the text, twice, and then the last two"


@pytest.mark.parametrize("max_mixed_tokens", [1, 3])
def test_however_small_that_budget_is_a_prompt_gets_on(runner: FakeRunner, max_mixed_tokens: int) -> None:
    engine = Engine(runner, max_batch_size=3, max_batch_tokens=16, max_mixed_tokens=max_mixed_tokens)
    events: list[list[Event]] = [[] for _ in range(3)]
    for i in range(3):
        engine.submit(request([i + 1] * 8, max_tokens=16), events[i].append)
    run(engine)
    assert [type(of[-1]) for of in events] == [Finished] * 3


def test_decoding_sequences_do_not_stall_a_prompt(runner: FakeRunner) -> None:
    """As many sequences as the budget has tokens: none is left out, because no more than that run."""
    engine = Engine(runner, max_batch_size=3, max_batch_tokens=2)
    events: list[list[Event]] = [[] for _ in range(3)]
    for i in range(3):
        engine.submit(request([i + 1] * 4, max_tokens=4), events[i].append)
    run(engine)
    assert [type(of[-1]) for of in events] == [Finished] * 3


def test_seeds_are_64_bits_and_a_missing_one_is_fresh(engine: Engine) -> None:
    same = [ask(engine, request([1], seed=seed, max_tokens=8))[0] for seed in (-1, 2**64 - 1)]
    assert same[0] == same[1]
    fresh = [tuple(ask(engine, request([1], seed=None, max_tokens=8))[0]) for _ in range(4)]
    assert len(set(fresh)) > 1
