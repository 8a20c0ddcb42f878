"""Signals that reach a worker before it listens for them."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from nanogpt.web.gunicorn_hooks import post_fork

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@pytest.fixture
def newborn() -> Iterator[SimpleNamespace]:
    """An arbiter as a worker sees it right after the fork: its handlers put signals into its queue."""
    arbiter = SimpleNamespace(SIG_QUEUE=queue.SimpleQueue())
    former = {number: signal.signal(number, lambda n, _: arbiter.SIG_QUEUE.put(n)) for number in STOPS}
    yield arbiter
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_worker_told_to_stop_while_it_is_born_stops(newborn: SimpleNamespace, number: signal.Signals) -> None:
    """gunicorn lost such a signal, and the server then took the whole drain time to end, with nothing to do."""
    signal.raise_signal(number)
    with pytest.raises(SystemExit) as ended:
        post_fork(newborn, None)
    assert ended.value.code == 0


def test_from_then_on_a_signal_to_stop_ends_it_at_once(newborn: SimpleNamespace) -> None:
    signal.raise_signal(signal.SIGTERM)
    newborn.SIG_QUEUE.get_nowait()
    newborn.SIG_QUEUE.put(signal.SIGCHLD)  # not meant for the worker
    post_fork(newborn, None)
    assert [signal.getsignal(number) for number in STOPS] == [signal.SIG_DFL] * 3
