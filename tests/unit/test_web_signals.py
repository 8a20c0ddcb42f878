"""Signals that reach a worker at awkward moments."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from nanogpt.web.gunicorn_hooks import post_fork
from nanogpt.web.gunicorn_worker import SheddingWorker

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


def test_ctrl_c_waits_for_nothing_that_the_main_thread_holds() -> None:
    """It came while the thread pool was given a request, or a second time: the worker lived until it was killed."""
    worker = SheddingWorker(0, os.getppid(), [], None, 30, Config(), None)
    worker.tpool = ThreadPoolExecutor(1)
    worker.method_queue.init()

    def signals_in_the_midst_of_a_submit() -> None:
        with worker.tpool._shutdown_lock:
            worker.handle_quit(signal.SIGINT, None)
            worker.handle_quit(signal.SIGINT, None)

    main_thread = threading.Thread(target=signals_in_the_midst_of_a_submit, daemon=True)
    main_thread.start()
    main_thread.join(5.0)
    assert not main_thread.is_alive()
    with pytest.raises(SystemExit) as ended:
        worker.method_queue.run_callbacks(None)  # as its main loop does next
    assert ended.value.code == 0
    worker.method_queue.close()
    worker.tmp.close()
