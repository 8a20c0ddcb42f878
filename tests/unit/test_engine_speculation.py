"""When the engine guesses, how much, and what it counts; that guesses never change a text is in tests/property."""

from __future__ import annotations

import logging

import pytest
from fake_runner import FakeRunner, config, expected

from nanogpt.engine.core import Engine
from nanogpt.engine.messages import Finished, GenerateRequest, Tokens
from nanogpt.engine.sequence import Event
from nanogpt.engine.speculation import Speculation, StepCost
from nanogpt.runner.ngram import NgramProposer
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings


class Oracle(NgramProposer):
    """Guesses the text that it was given."""

    def __init__(self, text: list[int]) -> None:
        super().__init__([])
        self.text = text

    def propose(self, output: list[int], limit: int, worth: float) -> list[int]:
        return self.text[len(output) :][: max(0, limit)]


class Told(Speculation):
    text: list[int]

    def proposer(self, sequence: object) -> NgramProposer:
        return Oracle(self.text)


def engine_that_guesses(text: list[int], num_guesses: int = 4, num_tokens: int = 32) -> Engine:
    runner = FakeRunner(config(block_size=32), 4, max_batch_tokens=num_tokens)
    engine = Engine(runner, max_batch_size=4, max_batch_tokens=num_tokens)
    speculation = Told(num_guesses, max_guesses=16, block_size=32)
    speculation.text = text
    engine._scheduler.speculation = speculation
    return engine


def ask(engine: Engine, prompt: list[int], **params: object) -> tuple[list[Tokens], Finished]:
    events: list[Event] = []
    engine.submit(GenerateRequest(prompt, SamplingParams(seed=7, **params)), events.append)  # type: ignore[arg-type]
    while engine.has_work():
        engine.step()
    *tokens, finished = events
    assert isinstance(finished, Finished)
    return [event for event in tokens if isinstance(event, Tokens)], finished


def truth(max_tokens: int) -> list[int]:
    return expected([1, 2, 3], seed=7, max_tokens=max_tokens, config=config(block_size=32))[0]


def test_right_guesses_save_steps_and_are_counted() -> None:
    engine = engine_that_guesses(truth(11))
    tokens, finished = ask(engine, [1, 2, 3], max_tokens=11)
    assert [len(event.token_ids) for event in tokens] == [1, 5, 5]
    assert [token_id for event in tokens for token_id in event.token_ids] == truth(11)
    stats = engine.stats()
    assert (finished.reason, finished.num_output_tokens, stats.num_steps) == ("length", 11, 3)
    assert (stats.num_guessed_tokens, stats.num_accepted_tokens, stats.num_output_tokens) == (8, 8, 11)
    assert stats.itl.count == 10  # each token but the first waited for one before


def test_a_wrong_guess_ends_what_is_kept_of_a_step() -> None:
    text = truth(11)
    wrong = [*text[:3], (text[3] + 1) % 50, *text[4:]]
    tokens, _ = ask(engine_that_guesses(wrong), [1, 2, 3], max_tokens=11)
    assert [len(event.token_ids) for event in tokens][:2] == [1, 3]
    assert [token_id for event in tokens for token_id in event.token_ids] == text


def test_a_stop_token_among_right_guesses_ends_the_text() -> None:
    text = truth(11)
    engine = engine_that_guesses(text)
    tokens, finished = ask(engine, [1, 2, 3], max_tokens=11, stop_token_ids=[text[3]])
    assert [token_id for event in tokens for token_id in event.token_ids] == text[:3]
    assert (finished.reason, finished.num_output_tokens) == ("stop", 3)


def test_what_was_accepted_is_a_prefix_for_the_next() -> None:
    """K and V of right guesses are kept, and those of wrong ones are not."""
    text = truth(12)
    engine = engine_that_guesses([*text[:8], 49, 49, 49, 49])
    ask(engine, [1, 2, 3], max_tokens=10)
    engine._scheduler.speculation = None
    tokens, finished = ask(engine, [1, 2, 3, *text[:9], 4], max_tokens=5)
    assert finished.num_cached_tokens == 12
    again, _ = expected([1, 2, 3, *text[:9], 4], seed=7, max_tokens=5, config=config(block_size=32))
    assert [token_id for event in tokens for token_id in event.token_ids] == again


def test_guesses_come_after_everybody_s_own_tokens() -> None:
    """The budget is for those who decode, then for prompts; guesses have what is left of it."""
    engine = engine_that_guesses(truth(20), num_guesses=8, num_tokens=6)
    events: list[Event] = []
    engine.submit(GenerateRequest([1, 2, 3], SamplingParams(seed=7, max_tokens=20)), events.append)
    engine.step()
    engine.submit(GenerateRequest([9] * 20, SamplingParams(seed=7, max_tokens=1)), [].append)
    plan = engine._scheduler.schedule(0.0)
    assert plan is not None
    assert plan.batch.num_tokens.tolist() == [1, 5]
    assert plan.batch.num_drafts is None


def rows(speculation: Speculation, num_sequences: int, rate: float, num_others: int = 0) -> list[int]:
    """How many guesses so many sequences get whose guesses come true with this chance."""
    engine = Engine(FakeRunner(config(block_size=200), num_sequences), max_batch_size=num_sequences)
    for i in range(num_sequences):
        engine.submit(GenerateRequest([i], SamplingParams(max_tokens=100)), [].append)
    engine.step()
    scheduler = engine._scheduler
    for sequence in scheduler._decoding:
        sequence.output[:] = [1]
        sequence.proposer = NgramProposer([1, 2, 3] * 8, [rate] * 4)
    made = speculation.guesses(scheduler._decoding, num_others, 1000)
    return [0] * num_sequences if made is None else [len(guesses) for guesses in made]


def test_alone_nearly_any_guess_pays_and_among_many_only_a_good_one() -> None:
    speculation = Speculation(None, max_guesses=64, block_size=200)
    speculation._cost._row_share = {1: 1 / 10, 6: 1 / 41}
    assert rows(speculation, 1, 0.4) == [2]
    assert rows(speculation, 1, 0.9) == [8]
    assert rows(speculation, 32, 0.7) == [0] * 32
    assert rows(speculation, 32, 0.95)[:2] == [4, 4]
    assert sum(rows(speculation, 32, 0.9999)) == 64  # the bound on what their logits take


def test_a_machine_on_which_rows_are_dear_guesses_less() -> None:
    speculation = Speculation(None, max_guesses=64, block_size=200)
    for num_guesses in [0, 1, 2, 0, 1] * 40:
        speculation.observe_step(1, num_guesses, 0.001 * (1 + 0.7 * num_guesses))
    assert rows(speculation, 1, 0.55) == [0]
    for num_guesses in [0, 1, 2, 3, 4] * 40:
        speculation.observe_step(1, num_guesses, 0.02 + 0.001 * num_guesses)
    assert rows(speculation, 1, 0.55)[0] > 2


def test_nobody_guesses_while_prompts_are_computed_unless_a_number_was_asked_for() -> None:
    assert rows(Speculation(None, max_guesses=8, block_size=200), 1, 0.9, num_others=4) == [0]
    assert rows(Speculation(2, max_guesses=8, block_size=200), 1, 0.9, num_others=4) == [2]


def test_the_cost_of_a_row_is_measured_through_noise() -> None:
    cost = StepCost()
    for i in range(2000):
        late = 0.05 if i % 50 == 0 else 0.0
        cost.observe(1, i % 3, 0.010 + 0.004 * (i % 3) + late)
    step_s, row_s = cost.of(1)
    assert step_s == pytest.approx(0.010, rel=0.2)
    assert row_s == pytest.approx(0.004, rel=0.3)


def test_a_cost_that_was_measured_is_forgotten_when_nothing_is_guessed_for_long() -> None:
    """Or a machine that was busy for a second would never guess again."""
    cost = StepCost()
    for i in range(200):
        cost.observe(1, i % 2, 0.01 * (1 + i % 2))
    assert cost.of(1)[1] > 0.008
    for _ in range(500):
        cost.observe(1, 0, 0.01)
    assert cost.of(1)[1] > 0.006
    for _ in range(20_000):
        cost.observe(1, 0, 0.01)
    assert cost.of(1)[1] == pytest.approx(0.002, rel=0.05)


def test_where_steps_are_short_nobody_looks() -> None:
    """A look costs microseconds for each sequence: next to a small model's step that is felt. A number is a number."""
    runner = FakeRunner(config(block_size=32), 4)
    for speculate, step_s, looks in (("auto", 0.0004, False), ("auto", 0.0006, True), ("3", 0.0004, True)):
        engine = Engine(runner, speculate=speculate)
        engine.submit(GenerateRequest([1, 2, 1, 2, 1, 2], SamplingParams(max_tokens=8, seed=1)), lambda event: None)
        engine.step()
        speculation = engine._scheduler.speculation
        assert speculation is not None
        speculation.observe_step(1, 0, step_s)
        engine.step()
        (sequence,) = engine._scheduler.sequences
        assert (sequence.proposer is not None) == looks


def test_auto_is_off_where_bits_depend_on_the_rows_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner(config(block_size=32), 4)
    runner.same_bits = False
    with caplog.at_level(logging.DEBUG, "nanogpt.engine"):
        engine = Engine(runner, speculate="auto")
    assert engine._scheduler.speculation is None
    assert "Speculation is off: the fake runner's last bits depend" in caplog.text
    assert Engine(runner, speculate="3")._scheduler.speculation is not None
    assert Engine(runner, speculate="off")._scheduler.speculation is None


def test_the_setting_is_auto_off_or_a_number() -> None:
    assert Settings.load({}, environ={}).speculate == "auto"
    assert Settings.load({}, environ={"NANOGPT_SPECULATE": "4"}).speculate == "4"
    with pytest.raises(Exception, match=r"NANOGPT_SPECULATE is 'often'; it must be one of auto, off, 1, "):
        Settings.load({}, environ={"NANOGPT_SPECULATE": "often"})
