"""Single flight: who hears what from one generation, and what happens when somebody leaves, fails or is late."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from web_support import EchoGeneration

from nanogpt.engine.messages import TIMEOUT, Finished, GenerateRequest, Tokens
from nanogpt.errors import EngineDied, NanoGPTError, QueueFull
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings
from nanogpt.web.cache import ResponseCache
from nanogpt.web.flights import Flights, Passenger, Replay, Source


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.002)


KEY = b"k" * 32
PARAMS = SamplingParams(seed=1, max_tokens=50)


class Airport:
    """Flights with an engine whose generations say what the test tells them to."""

    def __init__(self, **settings: Any) -> None:
        self.cache = ResponseCache(Settings(**settings))
        self.flights = Flights(self.cache, 60.0)
        self.generations: list[EchoGeneration] = []
        self.submit: Callable[[], EchoGeneration] = self.generate

    def generate(self) -> EchoGeneration:
        self.generations.append(EchoGeneration(GenerateRequest([1, 2, 3], PARAMS), hold=True))
        return self.generations[-1]

    def board(self, *, expected: bool = True) -> tuple[Source, str]:
        submit: Any = lambda timeout_s: self.submit()  # noqa: E731
        return self.flights.board(KEY, 3, PARAMS, submit, lambda generation: expected)


@pytest.fixture
def airport() -> Airport:
    return Airport()


def passenger(boarded: tuple[Source, str], use: str) -> Passenger:
    source, found = boarded
    assert found == use
    assert isinstance(source, Passenger)
    return source


def hear(source: Source) -> tuple[list[int], Finished]:
    """Everything to the end. Whoever is not woken by an event sleeps on into the test's time limit."""
    token_ids: list[int] = []
    while not isinstance(event := source.get(100.0), Finished):
        assert event is not None, "silence"
        token_ids += event.token_ids
    return token_ids, event


def hear_error(source: Source) -> NanoGPTError:
    with pytest.raises(NanoGPTError) as caught:
        hear(source)
    return caught.value


def test_all_hear_one_generation_whoever_reads(airport: Airport) -> None:
    """The first passenger reads nothing at all, as one whose client is slow: the others do not wait for it."""
    first = passenger(airport.board(), "miss")
    others = [passenger(airport.board(), "hit") for _ in range(20)]
    together = threading.Barrier(len(others) + 1)

    def listen(source: Source) -> tuple[list[int], Finished]:
        together.wait()
        return hear(source)

    with ThreadPoolExecutor(len(others)) as pool:
        heard = [pool.submit(listen, source) for source in others]
        together.wait()
        for token_id in range(30):
            airport.generations[0].events.put(Tokens([token_id]))
        airport.generations[0].finish("length", 30)
        assert all(future.result()[0] == list(range(30)) for future in heard)
        assert all(future.result()[1].reason == "length" for future in heard)
    assert hear(first)[0] == list(range(30))
    assert len(airport.generations) == 1
    stats = airport.cache.stats
    assert (stats.misses, stats.joins, stats.hits, stats.stores, len(airport.flights)) == (1, 20, 20, 1, 0)


def test_who_comes_late_hears_what_was_said_before(airport: Airport) -> None:
    first = passenger(airport.board(), "miss")
    airport.generations[0].events.put(Tokens([5, 6]))
    assert first.get(10.0) == Tokens([5, 6])
    late = passenger(airport.board(), "hit")
    airport.generations[0].events.put(Tokens([7]))
    airport.generations[0].finish("stop", 3)
    assert hear(late)[0] == [5, 6, 7]
    assert hear(first)[0] == [7]
    replay, use = airport.board()
    assert isinstance(replay, Replay)
    assert (use, hear(replay)[0], airport.cache.stats.memory_hits) == ("hit", [5, 6, 7], 1)


def test_one_thread_may_hold_two_seats(airport: Airport) -> None:
    """``n`` greedy choices of one request are one flight: neither may wait for the other."""
    first, second = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    assert second.get(0) is None
    airport.generations[0].events.put(Tokens([1]))
    assert second.get(0) == Tokens([1])
    assert first.get(0) == Tokens([1])
    airport.generations[0].finish("length", 1)
    assert hear(first)[1].reason == hear(second)[1].reason == "length"


def test_the_generation_ends_with_the_last_who_leaves(airport: Airport) -> None:
    first, second = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    generation = airport.generations[0]
    first.abort()
    assert not generation.aborted.is_set()
    generation.events.put(Tokens([9]))
    assert second.get(10.0) == Tokens([9])
    second.abort()
    assert generation.aborted.is_set()
    assert len(airport.flights) == 0
    passenger(airport.board(), "miss")  # nobody boards what was left alone
    assert len(airport.generations) == 2


def test_the_first_one_may_leave_while_it_reads(airport: Airport) -> None:
    """Its thread is in the engine's queue for everybody when it gives up: the next one takes over."""
    first, second = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    generation = airport.generations[0]
    reading = threading.Event()
    original = generation.get

    def get(timeout_s: float) -> Any:
        reading.set()
        return original(timeout_s)

    generation.get = get  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        first_heard = pool.submit(first.get, 0.3)
        assert reading.wait(10)
        second_heard = pool.submit(hear, second)
        assert first_heard.result() is None  # its time is over; it read for nothing
        first.abort()
        generation.events.put(Tokens([4]))
        generation.finish("length", 1)
        assert second_heard.result()[0] == [4]


def test_an_engine_that_dies_is_told_to_all_and_nothing_is_kept(airport: Airport) -> None:
    riders = [passenger(airport.board(), use) for use in ("miss", "hit", "hit")]

    def die(timeout_s: float) -> None:
        raise EngineDied("gone")

    airport.generations[0].get = die  # type: ignore[method-assign]
    errors = [hear_error(rider) for rider in riders]
    assert all(isinstance(error, EngineDied) and error.message == "gone" for error in errors)
    assert len({id(error) for error in errors}) == 3  # each thread's own: raising writes into it
    passenger(airport.board(), "miss")


def test_a_runners_error_is_told_to_all_and_nothing_is_kept(airport: Airport) -> None:
    riders = [passenger(airport.board(), use) for use in ("miss", "hit")]
    airport.generations[0].finish("error", 0, "lost")
    assert [hear(rider)[1].reason for rider in riders] == ["error", "error"]
    passenger(airport.board(), "miss")


def test_half_an_answer_is_nothing_to_keep(airport: Airport, caplog: pytest.LogCaptureFixture) -> None:
    """A server that drains ends texts with what they have."""
    rider = passenger(airport.board(), "miss")
    airport.generations[0].events.put(Tokens([1]))
    airport.generations[0].finish("abort", 1)
    assert hear(rider)[0] == [1]
    passenger(airport.board(), "miss")
    assert not caplog.records


def test_a_refusal_of_the_first_is_not_that_of_the_others(airport: Airport) -> None:
    """It may be for what its client has running already. The others ask the engine themselves."""

    def refuse() -> EchoGeneration:
        flight = airport.flights._flights[KEY]
        wait_for(lambda: len(flight._passengers) == 4, "the others wait for the first")
        airport.submit = airport.generate
        raise QueueFull("busy")

    airport.submit = refuse
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(airport.board)
        wait_for(lambda: len(airport.flights) == 1, "the first one asks the engine")
        others = [pool.submit(airport.board) for _ in range(3)]
        assert isinstance(first.exception(), QueueFull)
        assert [other.result()[1] for other in others] == ["miss"] * 3
    assert len(airport.generations) == 3
    assert len(airport.flights) == 0
    assert airport.cache.stats.misses == 3


def test_everybody_has_a_deadline_of_their_own(airport: Airport) -> None:
    first, second = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    first._deadline = 0.0
    out_of_time = first.get(10.0)
    assert isinstance(out_of_time, Finished)
    assert (out_of_time.reason, out_of_time.error, out_of_time.num_output_tokens) == ("abort", TIMEOUT, 0)
    assert first.get(10.0) is None
    assert not airport.generations[0].aborted.is_set()
    airport.generations[0].events.put(Tokens([3]))
    assert second.get(10.0) == Tokens([3])
    second._deadline = 0.0
    last = second.get(10.0)
    assert isinstance(last, Finished)
    assert (last.reason, last.error, last.num_output_tokens) == ("abort", TIMEOUT, 1)
    assert airport.generations[0].aborted.is_set()
    passenger(airport.board(), "miss")  # half an answer is not kept


def test_nobody_boards_after_the_first_ones_deadline(airport: Airport) -> None:
    """Otherwise a flight could go on for ever, and with it what the engine does for it."""
    passenger(airport.board(), "miss")
    airport.flights._flights[KEY]._deadline = 0.0
    passenger(airport.board(), "miss")
    assert len(airport.generations) == 2
    assert len(airport.flights) == 1


def test_a_stop_text_ends_the_generation_for_all_at_once(airport: Airport) -> None:
    """They all stop at the same token, so a slow one does not keep the engine writing what nobody wants."""
    first, slow = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    generation = airport.generations[0]
    generation.events.put(Tokens([1, 2]))
    assert first.get(10.0) == Tokens([1, 2])
    first.abort("stop")
    assert generation.aborted.is_set()
    assert hear(first)[1].reason == "stop"
    assert slow.get(10.0) == Tokens([1, 2])
    slow.abort("stop")
    replay, _ = airport.board()
    assert (hear(replay)[0], airport.cache.stats.memory_hits) == ([1, 2], 1)


def test_what_is_too_large_to_keep_is_forgotten_as_soon_as_all_have_had_it() -> None:
    airport = Airport(cache_entry_bytes=64)
    first, second = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    flight = airport.flights._flights[KEY]
    heard: list[int] = []
    for token_id in range(100):
        airport.generations[0].events.put(Tokens([token_id]))
        assert first.get(10.0) == Tokens([token_id])
        event = second.get(10.0)
        assert isinstance(event, Tokens)
        heard += event.token_ids
        assert len(flight._events) <= 13
    assert heard == list(range(100))
    passenger(airport.board(), "miss")  # the beginning is gone
    airport.generations[0].finish("length", 100)
    assert hear(first)[1].reason == hear(second)[1].reason == "length"
    assert airport.cache.stats.stores == 0


def test_an_answer_of_another_engine_is_for_those_aboard_only(airport: Airport) -> None:
    first = passenger(airport.board(expected=False), "miss")
    second = passenger(airport.board(expected=False), "miss")
    for generation in airport.generations:
        generation.finish("length", 0)
    assert hear(first)[1].reason == hear(second)[1].reason == "length"
    assert (len(airport.generations), airport.cache.stats.stores) == (2, 0)


def test_without_memory_requests_still_share_what_is_in_the_air() -> None:
    airport = Airport(cache_bytes=0)
    first, second = passenger(airport.board(), "miss"), passenger(airport.board(), "hit")
    airport.generations[0].finish("length", 0)
    assert hear(first)[1].reason == hear(second)[1].reason == "length"
    passenger(airport.board(), "miss")


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_of_coming_and_leaving_all_who_stay_hear_everything(airport: Airport, seed: int) -> None:
    """Eight threads come and leave when they like while the engine writes: nobody hangs, misses or doubles a token."""
    whole = list(range(40))

    def generate() -> EchoGeneration:
        generation = EchoGeneration(GenerateRequest([1, 2, 3], PARAMS), hold=True)
        for token_id in whole:
            generation.events.put(Tokens([token_id]))
        generation.finish("length", len(whole))
        return generation

    def travel(draw: random.Random) -> list[int]:
        source, _ = airport.board()
        patience = draw.choice([0, 1, 20, 1000])
        heard: list[int] = []
        while len(heard) < patience:
            event = source.get(draw.choice([0, 0.001, 10.0]))
            if isinstance(event, Finished):
                assert heard == whole
                return heard
            heard += event.token_ids if event else []
        source.abort()
        return heard

    airport.submit = generate
    with ThreadPoolExecutor(8) as pool:
        travels = [pool.submit(travel, random.Random(100 * seed + number)) for number in range(24)]
        assert all(whole[: len(travel.result(30))] == travel.result() for travel in travels)
    assert len(airport.flights) == 0
