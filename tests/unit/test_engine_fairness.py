"""The engine with a fake runner: whose request is next, who still gets in, and what siblings compute."""

from __future__ import annotations

import pytest
from fake_runner import FakeRunner, config, expected

from nanogpt.engine import wire
from nanogpt.engine.core import Engine
from nanogpt.engine.messages import Finished, GenerateRequest, Tokens
from nanogpt.engine.sequence import Event
from nanogpt.errors import ConcurrencyLimit, QueueFull, TooManyRequests
from nanogpt.sampling_params import SamplingParams


class Client:
    """One key's requests: what it asked, and what it was told."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.handles: list[int] = []
        self.events: list[list[Event]] = []

    def ask(self, prompt: list[int] | None = None, *, max_concurrency: int = 0, **params: object) -> None:
        params.setdefault("max_tokens", 4)
        params.setdefault("seed", 7)
        events: list[Event] = []
        asked = SamplingParams(**params)  # type: ignore[arg-type]
        request = GenerateRequest(prompt or [1, 2, 3], asked, client=self.name, max_concurrency=max_concurrency)
        self.handles.append(self.engine.submit(request, events.append))
        self.events.append(events)

    @property
    def num_begun(self) -> int:
        return sum(any(isinstance(event, Tokens) for event in events) for events in self.events)

    @property
    def num_finished(self) -> int:
        return sum(isinstance(event, Finished) for events in self.events for event in events)


def make_engine(*, places: int, max_queue: int = 512, block_size: int = 32, max_batch_tokens: int = 64) -> Engine:
    runner = FakeRunner(config(block_size), places + 1, max_batch_tokens=max_batch_tokens)
    return Engine(runner, max_batch_size=places, max_batch_tokens=max_batch_tokens, max_queue=max_queue)


# -- places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [1, 4, 32])
def test_five_hundred_of_one_client_do_not_starve_the_one_of_another(places: int) -> None:
    """Measured: B's request is admitted as soon as one place is free, when none of A's 500 but those running has."""
    engine = make_engine(places=places, max_queue=1000, max_batch_tokens=256)
    a, b = Client(engine, "a"), Client(engine, "b")
    for i in range(500):
        a.ask(max_tokens=4 + i % 3)
    engine.step()
    assert a.num_begun == engine.stats().num_running == places
    b.ask()
    while not a.num_finished:
        engine.step()
    assert b.num_begun == 0
    num_ended = a.num_finished
    engine.step()
    assert b.num_begun == 1
    assert a.num_begun == places + num_ended - 1, "the other places are A's again: none stays free"
    while b.num_finished == 0:
        engine.step()
    assert a.num_finished <= 2 * places


def test_clients_that_all_have_work_share_the_places_evenly() -> None:
    engine = make_engine(places=6)
    clients = [Client(engine, name) for name in "abc"]
    for client, num in zip(clients, (200, 40, 20), strict=True):
        for _ in range(num):
            client.ask()
    while clients[2].num_finished < 20:
        engine.step()
    shares = [client.num_finished for client in clients]
    assert max(shares) - min(shares) <= 6, shares


def test_a_stream_of_new_clients_does_not_starve_an_old_one() -> None:
    """One place, and at every moment somebody new: who waits comes before who came later."""
    engine = make_engine(places=1)
    old = Client(engine, "old")
    for _ in range(3):
        old.ask()
    newcomers: list[Client] = []
    for i in range(100):
        newcomers.append(Client(engine, f"new {i}"))
        newcomers[-1].ask(max_tokens=1)
        engine.step()
        if old.num_finished == 3:
            break
    assert old.num_finished == 3
    assert sum(client.num_finished for client in newcomers) >= 2, "nor does the old one starve the new"


def test_one_client_is_served_in_its_own_order() -> None:
    engine = make_engine(places=2)
    a, b = Client(engine, "a"), Client(engine, "b")
    for client in (a, a, a, b, a, b):
        client.ask()
    while engine.has_work():
        engine.step()
        for client in (a, b):
            begun = [bool(events) for events in client.events]
            assert begun == sorted(begun, reverse=True)


# -- the queue ----------------------------------------------------------------------------------------------------


def test_the_last_eighth_of_the_queue_is_not_for_who_has_filled_it() -> None:
    engine = make_engine(places=2, max_queue=64)
    a, b = Client(engine, "a"), Client(engine, "b")
    a.ask(max_tokens=20)
    a.ask(max_tokens=20)
    engine.step()
    for _ in range(56):
        a.ask()
    with pytest.raises(QueueFull, match=r"56 of your requests wait, .*8 of 64.* kept for others"):
        a.ask()
    for _ in range(8):
        b.ask()
    with pytest.raises(QueueFull, match="2 requests are running and 64 wait"):
        b.ask()


def test_who_holds_less_than_half_of_the_queue_may_take_its_last_place() -> None:
    engine = make_engine(places=1, max_queue=16)
    clients = [Client(engine, name) for name in "abcd"]
    for client in [clients[0], *clients * 4]:
        client.ask()
    with pytest.raises(QueueFull):
        clients[0].ask()
    assert engine.stats().num_waiting == 17


@pytest.mark.parametrize("max_queue", [0, 1, 7])
def test_a_small_queue_is_all_for_one_client_too(max_queue: int) -> None:
    engine = make_engine(places=2, max_queue=max_queue)
    a = Client(engine, "a")
    for _ in range(2 + max_queue):
        a.ask()
    with pytest.raises(QueueFull):
        a.ask()


# -- concurrency --------------------------------------------------------------------------------------------------


def test_a_client_has_as_many_at_once_as_it_may_and_no_more() -> None:
    """Running or waiting, both count; what has ended, however it ended, does not. Others are not concerned."""
    engine = make_engine(places=2)
    a, b = Client(engine, "a"), Client(engine, "b")
    for _ in range(3):
        a.ask(max_concurrency=3)
    with pytest.raises(ConcurrencyLimit, match="3 texts under way at once, and have 3") as refused:
        a.ask(max_concurrency=3)
    engine.step()
    with pytest.raises(ConcurrencyLimit):
        a.ask(max_concurrency=3)
    b.ask(max_concurrency=1)
    engine.abort(a.handles[2])
    a.ask(max_concurrency=3)
    while engine.has_work():
        engine.step()
    a.ask(max_concurrency=1)

    error = wire.read_error(wire.error_to_wire(refused.value))
    assert type(error) is ConcurrencyLimit
    assert isinstance(error, TooManyRequests)
    assert (error.status, error.code, error.retry_after_s) == (429, "concurrency_limit", 1.0)


def test_ten_thousand_clients_leave_nothing_behind() -> None:
    engine = make_engine(places=2)
    queue = engine._scheduler._queue
    for i in range(10_000):
        client = Client(engine, str(i))
        client.ask(max_tokens=1)
        if i % 3:
            engine.abort(client.handles[0])
        else:
            engine.step()
    queue.check([])
    assert not queue._clients
    assert len(queue._heap) <= 64


# -- siblings -----------------------------------------------------------------------------------------------------

PROMPT = [i % 40 for i in range(200)]


@pytest.mark.parametrize(("max_batch_tokens", "num_each"), [(512, 1), (64, 8)])
def test_siblings_compute_their_prompt_once(max_batch_tokens: int, num_each: int) -> None:
    """n=8 of a prompt of 200 tokens: 8 x 200 tokens before, now 200 and one for each of the other seven.

    In chunks of 64, 192 are there when the others come, and the last few are not waited for.
    """
    engine = make_engine(places=8, block_size=256, max_batch_tokens=max_batch_tokens)
    client = Client(engine, "a")
    for seed in range(8):
        client.ask(PROMPT, seed=seed, max_tokens=3)
    while engine.has_work():
        engine.step()
    # Of three new tokens the last need not be computed.
    assert engine.stats().num_computed_tokens == 200 + 7 * num_each + 8 * 2
    for seed, (*tokens, finished) in enumerate(client.events):
        output = [token_id for event in tokens if isinstance(event, Tokens) for token_id in event.token_ids]
        assert isinstance(finished, Finished)
        assert (output, finished.reason) == expected(PROMPT, seed=seed, max_tokens=3, config=config(256))
        assert finished.num_cached_tokens == (200 - num_each if seed else 0)


def test_admission_pauses_for_a_sibling_once_and_nobody_overtakes_it() -> None:
    """Its elder fails in the very step that was waited for: the younger one is admitted all the same, and computes."""
    engine = make_engine(places=8, block_size=256, max_batch_tokens=512)
    a, b = Client(engine, "a"), Client(engine, "b")
    a.ask(PROMPT)
    a.ask(PROMPT)
    b.ask([39, *PROMPT])
    engine._runner.fail_next = RuntimeError("out of memory")  # type: ignore[attr-defined]
    engine.step()
    # B comes before A's second: one of A's was running.
    assert [len(events) for events in (*a.events, *b.events)] == [1, 0, 1]
    engine.step()
    assert [len(events) for events in (*a.events, *b.events)] == [1, 1, 1]
    while engine.has_work():
        engine.step()
    assert a.num_finished == 2


@pytest.mark.parametrize("options", [{"prompt_logprobs": 0}, {}])
def test_who_cannot_share_does_not_wait(options: dict[str, object]) -> None:
    """Log probabilities of the prompt need it computed; and a few tokens are computed faster than waited for."""
    engine = make_engine(places=4, block_size=256, max_batch_tokens=1024)
    client = Client(engine, "a")
    for seed in range(4):
        client.ask(PROMPT if options else PROMPT[:10], seed=seed, **options)
    engine.step()
    assert client.num_begun == 4
