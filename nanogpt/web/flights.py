"""Single flight: identical requests that are open at the same time listen to one generation.

A flight is one generation of a text that must repeat, its passengers are the requests that wait for it. No thread of
its own flies it: whichever passenger waits reads the engine's events for all. So nobody depends on the first one, and
the generation goes on until the last passenger has left. Each passenger has its own pace, deadline and client.

Used by all threads of a worker. ``Flights``' lock is taken before a flight's, never after.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

from nanogpt.engine.client import Generation
from nanogpt.engine.messages import TIMEOUT, Finished, Tokens
from nanogpt.errors import RequestTimeout
from nanogpt.sampling_params import SamplingParams, TokenLogprobs
from nanogpt.web.cache import HIT, MISS, ResponseCache
from nanogpt.web.cache_entry import Entry, size_of, unpack

# The engine says how a request ended within a step of being told to end it; longer is not worth waiting.
_LAST_WORDS_S = 0.25


class Source(Protocol):
    """What a text is made from: the engine's ``Generation``, or what stands for one."""

    def get(self, timeout: float | None = None) -> Tokens | Finished | None: ...

    def abort(self, reason: Literal["abort", "stop"] = "abort") -> None: ...

    def wait_accepted(self) -> None: ...


class Replay:
    """An answer from the cache, told as the engine would tell it."""

    def __init__(self, entry: Entry) -> None:
        self._events = entry.events()

    def get(self, timeout: float | None = None) -> Tokens | Finished | None:
        return self._events.pop(0) if self._events else None

    def wait_accepted(self) -> None:
        """It has been, when it was computed."""

    def abort(self, reason: Literal["abort", "stop"] = "abort") -> None:
        """Nothing runs."""


class Flights:
    """The flights of this process by their answers' keys, in front of the cache."""

    def __init__(self, cache: ResponseCache, timeout_s: float) -> None:
        self._cache = cache
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._flights: dict[bytes, Flight] = {}

    def board(
        self,
        key: bytes,
        num_prompt_tokens: int,
        params: SamplingParams,
        submit: Callable[[float], Generation],
        expected: Callable[[Generation], bool],
    ) -> tuple[Source, str]:
        """A source of the answer, and ``hit`` or ``miss``.

        ``submit`` hands the request to the engine with a time limit; ``expected`` says whether the engine that took it
        is the one that the key names. Raises: what ``submit`` raises.
        """
        deadline = time.monotonic() + self._timeout_s
        stats = self._cache.stats
        first: Flight | None = None
        with self._lock:
            flight = self._flights.get(key)
            passenger = flight.board(deadline) if flight is not None else None
            # Looked up under the lock: a flight that has just landed is in the cache before it is off the table.
            packed = self._cache.recall(key) if passenger is None else None
            if passenger is None and packed is None:
                first = Flight(self, key, num_prompt_tokens, params, self._cache.max_entry_bytes, deadline)
                self._flights[key] = first
                passenger = first.board(deadline)
        if packed is not None:
            stats.add("memory_hits")
            return Replay(unpack(packed, key, num_prompt_tokens, params)), HIT
        assert passenger is not None
        if first is not None:
            return passenger, self._take_off(first, submit, expected)
        if passenger.wait_off():
            stats.add("joins")
            return passenger, HIT
        # The first one was refused, perhaps for what its client has running: this one asks for itself.
        stats.add("misses")
        return submit(self._timeout_s), MISS

    def land(self, flight: Flight, entry: Entry | None) -> None:
        """The flight is over; ``entry`` is its answer if that may be kept."""
        packed = self._cache.keep(flight.key, entry, flight.params) if entry is not None else None
        self.remove(flight)
        if packed is not None:
            self._cache.keep_shared(flight.key, packed)

    def remove(self, flight: Flight) -> None:
        """Nobody boards it any more."""
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]

    def __len__(self) -> int:
        return len(self._flights)

    def _take_off(
        self, flight: Flight, submit: Callable[[float], Generation], expected: Callable[[Generation], bool]
    ) -> str:
        try:
            entry = self._cache.recall_shared(flight.key, flight.num_prompt_tokens, flight.params)
            if entry is not None:
                flight.replay(entry)
                self.remove(flight)
                self._cache.stats.add("redis_hits")
                return HIT
            # Whoever boards at the last moment has as much time as the first one had.
            generation = submit(2 * self._timeout_s)
        except BaseException:
            flight.refuse()
            self.remove(flight)
            raise
        flight.take_off(generation, record=expected(generation))
        self._cache.stats.add("misses")
        return MISS


class Flight:
    """One generation, and what it has said so far for those who come later."""

    def __init__(
        self,
        flights: Flights,
        key: bytes,
        num_prompt_tokens: int,
        params: SamplingParams,
        max_recorded_bytes: int,
        deadline: float,
    ) -> None:
        self.key = key
        self.num_prompt_tokens = num_prompt_tokens
        self.params = params
        self._flights = flights
        # Nobody boards after it; the engine goes on for the sake of the last ones.
        self._deadline = deadline
        self._changed = threading.Condition(threading.Lock())
        self._generation: Generation | None = None
        self._refused = False
        self._passengers: set[Passenger] = set()
        self._events: list[Tokens | Finished] = []
        self._num_dropped = 0
        # While it records all events are there: for whoever boards, and for the cache.
        self._recording = True
        self._room_bytes = max_recorded_bytes
        self._is_read = False
        self._over = False
        # Over, and with an answer that may be told again. The cache has it in a moment.
        self._whole = False
        self._error: Exception | None = None
        self._complete_at: int | None = None

    # -- on the ground ----------------------------------------------------------------------------------------------

    def board(self, deadline: float) -> Passenger | None:
        """A place, or None when there is none any more."""
        with self._changed:
            left_alone = self._generation is not None and not self._passengers
            ended = (self._over or left_alone) and not self._whole
            if self._refused or ended or not self._recording or time.monotonic() >= self._deadline:
                return None
            passenger = Passenger(self, deadline)
            self._passengers.add(passenger)
            return passenger

    def take_off(self, generation: Generation, *, record: bool) -> None:
        with self._changed:
            self._generation = generation
            self._recording = record
            self._changed.notify_all()

    def replay(self, entry: Entry) -> None:
        """The answer was there already."""
        with self._changed:
            self._events = entry.events()
            self._over = self._whole = True
            self._changed.notify_all()

    def refuse(self) -> None:
        """It does not go."""
        with self._changed:
            self._refused = True
            self._changed.notify_all()

    def wait_off(self, until: float) -> bool:
        """Wait for the first passenger, who asks Redis and the engine. False: it was refused.

        Raises: RequestTimeout.
        """
        with self._changed:
            while self._generation is None and not (self._over or self._refused):
                if not self._changed.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                    raise RequestTimeout(
                        "The server did not come to this request in time.", remedy="Send it again later."
                    )
            return not self._refused

    # -- in the air -------------------------------------------------------------------------------------------------

    def next_event(self, passenger: Passenger, timeout_s: float) -> Tokens | Finished | None:
        """The passenger's next event; None when there is none within the time. Raises: what Generation.get raises."""
        until = time.monotonic() + timeout_s
        has_read = False
        while True:
            with self._changed:
                event = self._take(passenger)
                if event is not None or self._over:
                    return event
                left_s = until - time.monotonic()
                if left_s <= 0 and (has_read or self._is_read):
                    return None
                if self._is_read:
                    self._changed.wait(left_s)
                    continue
                self._is_read = has_read = True
            event = self._read(passenger, max(0.0, left_s))
            if event is not None:
                return event

    def leave(self, passenger: Passenger) -> bool:
        """Whether that was the last one: then the generation ends, too."""
        with self._changed:
            self._passengers.discard(passenger)
            is_last = not self._passengers and not self._over
        if is_last:
            self._flights.remove(self)
            if self._generation is not None:
                self._generation.abort()
        return is_last

    def complete(self, position: int) -> None:
        """A stop text ends the text with the event before ``position``: for this passenger, and so for all of them."""
        with self._changed:
            if self._complete_at is not None or self._over:
                return
            self._complete_at = position
        if self._generation is not None:
            self._generation.abort("stop")

    def _take(self, passenger: Passenger) -> Tokens | Finished | None:
        index = max(0, passenger.position - self._num_dropped)
        if index < len(self._events):
            event = self._events[index]
            passenger.position = self._num_dropped + index + 1
            if isinstance(event, Finished):
                self._passengers.discard(passenger)
            if not self._recording:
                self._forget()
            return event
        if self._error is not None:  # one for each thread: raising writes into it
            raise copy.copy(self._error).with_traceback(self._error.__traceback__)
        return None

    def _forget(self) -> None:
        """Drop what all have had."""
        done = min((passenger.position for passenger in self._passengers), default=0) - self._num_dropped
        if done > 0:
            del self._events[:done]
            self._num_dropped += done

    def _read(self, passenger: Passenger, timeout_s: float) -> Tokens | Finished | None:
        """One event from the engine, for everybody. Returns the passenger's own next one."""
        assert self._generation is not None
        event: Tokens | Finished | None = None
        entry: Entry | None = None
        error: Exception | None = None
        try:
            event = self._generation.get(timeout_s)
        except Exception as caught:
            error = caught
        with self._changed:
            self._is_read = False
            if event is not None:
                self._events.append(event)
                self._room_bytes -= size_of(event)
                self._recording = self._recording and self._room_bytes >= 0
            if isinstance(event, Finished):
                entry = self._entry(event)
                self._whole = entry is not None
                self._over = True
            elif error is not None:
                self._error, self._over = error, True
            if self._passengers != {passenger}:  # else nobody waits, and it costs as much as a token's text
                self._changed.notify_all()
            if not self._over:
                return self._take(passenger)
        self._flights.land(self, entry)
        return None

    def _entry(self, finished: Finished) -> Entry | None:
        """The answer, if it is a whole one that may be kept."""
        reason, events = finished.reason, self._events[:-1]
        if self._complete_at is not None:
            reason, events = "stop", events[: self._complete_at]
        if not self._recording or finished.error or reason not in ("stop", "length"):
            return None
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for event in events:
            assert isinstance(event, Tokens)
            token_ids += event.token_ids
            logprobs += event.logprobs or ()
        return Entry(
            reason,
            finished.num_prompt_tokens,
            finished.num_cached_tokens,
            token_ids,
            None if self.params.logprobs is None else logprobs,
            finished.prompt_logprobs,
        )


class Passenger:
    """One request's way to hear a flight. Used by one thread; stands for the engine's ``Generation``."""

    def __init__(self, flight: Flight, deadline: float) -> None:
        self.position = 0
        self._flight = flight
        self._deadline = deadline
        self._num_tokens = 0
        self._ended = False

    def wait_off(self) -> bool:
        return self._flight.wait_off(self._deadline)

    def get(self, timeout: float | None = None) -> Tokens | Finished | None:
        """See ``Generation.get``. The deadline is this request's own, whoever else listens."""
        if self._ended:
            return None
        left_s = max(0.0, self._deadline - time.monotonic())
        try:
            event = self._flight.next_event(self, left_s if timeout is None else min(timeout, left_s))
        except Exception:
            self._ended = True
            raise
        if event is None and time.monotonic() >= self._deadline:
            event = self._time_out()
        self._ended = isinstance(event, Finished)
        if isinstance(event, Tokens):
            self._num_tokens += len(event.token_ids)
        return event

    def wait_accepted(self) -> None:
        """It has been: nobody boards what was not."""

    def abort(self, reason: Literal["abort", "stop"] = "abort") -> None:
        """This request needs no more. ``stop``: a stop text was in the last event, and what the engine still writes is
        nobody's; else what the others hear goes on."""
        if reason == "stop":
            self._flight.complete(self.position)
        self._flight.leave(self)

    def _time_out(self) -> Finished:
        """The end that the engine gives to a request which is out of time."""
        is_last, until = self._flight.leave(self), time.monotonic() + _LAST_WORDS_S
        event: Tokens | Finished | None = None
        while is_last and not isinstance(event, Finished) and time.monotonic() < until:
            event = self._flight.next_event(self, until - time.monotonic())
        known = event if isinstance(event, Finished) else Finished("abort", self._flight.num_prompt_tokens, 0)
        return replace(known, reason="abort", num_output_tokens=self._num_tokens, error=TIMEOUT)
