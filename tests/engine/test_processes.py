"""The supervisor, the engine process and the client together, as real processes: answers, deaths, drains, leaks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_processes import Served, eventually, marked_processes, request
from fake_engine import CONFIG, TOKENIZER
from fake_runner import expected

from nanogpt import grammars
from nanogpt.engine import wire
from nanogpt.engine.client import EngineClient, Generation
from nanogpt.engine.launch import start_supervisor
from nanogpt.engine.messages import Finished, Tokens
from nanogpt.errors import (
    ConcurrencyLimit,
    EngineDied,
    EngineDraining,
    EngineLoading,
    EngineUnhealthy,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
)
from nanogpt.settings import Settings

Serve = Callable[..., Served]

# The fake model says this much to everybody: slow enough to be caught in the middle of it.
ENDLESS = {"max_tokens": 500}


def collect(generation: Generation) -> tuple[list[int], Finished]:
    *tokens, finished = generation
    assert isinstance(finished, Finished)
    return [token_id for event in tokens if isinstance(event, Tokens) for token_id in event.token_ids], finished


def is_gone(pid: int) -> bool:
    """The process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process to live for."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


# -- answers ------------------------------------------------------------------------------------------------------


def test_a_request_and_its_answer(serve: Serve) -> None:
    client = serve(api_key="secret", redis_url="redis://:secret@host").client()
    output, finished = collect(client.submit(request()))
    assert (output, finished.reason) == expected([1, 2, 3], seed=5, max_tokens=20, config=CONFIG)
    assert finished.timings.total_s >= finished.timings.ttft_s > 0
    status = client.state()
    assert (status.state, status.model, status.device, status.restarts) == ("ready", "fake", "cpu", 0)
    assert (status.card, status.tokenizer, status.block_size) == ({"family": "fake"}, TOKENIZER.to_spec(), 512)


def test_two_hundred_requests_from_two_workers_are_not_mixed_up(serve: Serve) -> None:
    served = serve()
    clients = [served.client(), served.client()]
    wrong: list[int] = []

    def ask(i: int) -> None:
        prompt, max_tokens = [i % 200, *range(i % 40)], 1 + i % 30
        output, finished = collect(clients[i % 2].submit(request(prompt, seed=i, max_tokens=max_tokens, logprobs=1)))
        if (output, finished.reason) != expected(prompt, seed=i, max_tokens=max_tokens, config=CONFIG):
            wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    eventually(lambda: clients[0].state().stats["num_running"] == 0)


def test_a_refusal_is_the_same_error_on_this_side(serve: Serve) -> None:
    client = serve("step_s=0.01", max_batch_size=1, max_queue=1).client()
    with pytest.raises(InvalidRequest, match="600 tokens") as refused:
        client.submit(request([1] * 600))
    assert (refused.value.field, refused.value.status) == ("prompt", 400)
    assert refused.value.remedy
    with client.submit(request(**ENDLESS)), client.submit(request(**ENDLESS)):
        with pytest.raises(QueueFull) as full:
            client.submit(request())
        assert full.value.retry_after_s == 1.0
    eventually(lambda: client.state().num_running == 0)
    collect(client.submit(request()))


def test_logprobs_cross_the_socket(serve: Serve) -> None:
    client = serve().client()
    *tokens, finished = client.submit(request([7, 8], max_tokens=2, logprobs=1, prompt_logprobs=2))
    assert [event.logprobs[0].top for event in tokens] == [  # type: ignore[union-attr,index]
        [(event.token_ids[0], -float(event.token_ids[0]))]  # type: ignore[union-attr]
        for event in tokens
    ]
    assert finished.prompt_logprobs[0] is None  # type: ignore[union-attr,index]
    assert finished.prompt_logprobs[1].top == [(8, 0.0)] * 2  # type: ignore[union-attr,index]


def test_grammars_and_limits_cross_the_socket(serve: Serve) -> None:
    """The engine process makes the vocabulary from the tokenizer that it sends to its workers."""
    client = serve("step_s=0.01").client()
    number = grammars.from_regex("<[0-9]{6}>")
    output, finished = collect(client.submit(request(grammar=number)))
    assert re.fullmatch("<[0-9]{6}>", TOKENIZER.decode(output))
    assert finished.reason == "stop"
    with pytest.raises(InvalidRequest, match="no token of this model's vocabulary"):
        client.submit(request(grammar=grammars.from_regex("[日本語]+")))
    mine = replace(request(**ENDLESS), client="mine", max_concurrency=1)
    with client.submit(mine), pytest.raises(ConcurrencyLimit):
        client.submit(mine)


def test_silence_and_deadlines(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """``get`` comes back empty-handed so that a stream can be kept alive; the engine ends what takes too long."""
    client = serve("step_s=0.3").client()
    generation = client.submit(request(**ENDLESS, timeout_s=1.0))
    assert any(generation.get(0.01) is None for _ in range(20))
    output, finished = collect(generation)
    assert (finished.reason, finished.error) == ("abort", "timeout")
    assert output
    # An engine that does not even do that is given up.
    monkeypatch.setattr("nanogpt.engine.link._DEADLINE_GRACE_S", -0.5)
    stuck = client.submit(request(timeout_s=1.0, **ENDLESS))
    with pytest.raises(RequestTimeout):
        collect(stuck)


def test_whoever_leaves_frees_the_place(serve: Serve) -> None:
    served = serve("step_s=0.01")
    leaving, staying = served.client(), served.client()
    generations = [leaving.submit(request(**ENDLESS)) for _ in range(3)]
    staying_on = staying.submit(request(max_tokens=60))
    eventually(lambda: staying.state().num_running == 4)
    generations[0].abort()
    assert collect(generations[0])[1].reason == "abort"
    leaving.close()
    eventually(lambda: staying.state().num_running <= 1)
    assert collect(staying_on)[0] == expected([1, 2, 3], seed=5, max_tokens=60, config=CONFIG)[0]
    with pytest.raises(EngineDied):
        list(generations[1])


# -- deaths -------------------------------------------------------------------------------------------------------


def test_the_engine_is_killed_in_mid_stream(serve: Serve) -> None:
    """The stream ends at once, the state says so, and the next request is answered by the next engine."""
    client = serve("step_s=0.01").client()
    generation = client.submit(request(**ENDLESS))
    assert isinstance(generation.get(), Tokens)
    engine_pid = client.state().engine_pid
    assert engine_pid
    since = time.monotonic()
    os.kill(engine_pid, signal.SIGKILL)
    with pytest.raises(EngineDied) as died:
        collect(generation)
    assert time.monotonic() - since < 2.0  # the promise of the specification
    assert (died.value.status, died.value.retry_after_s) == (503, 1.0)
    assert collect(client.submit(request()))[0] == expected([1, 2, 3], seed=5, max_tokens=20, config=CONFIG)[0]
    assert time.monotonic() - since < 5.0  # likewise
    status = client.state()
    assert (status.state, status.restarts) == ("ready", 1)
    assert status.engine_pid != engine_pid


def test_an_engine_that_is_starting_is_waited_for_but_not_for_ever(serve: Serve) -> None:
    served = serve("load_s=1.5")
    hasty, patient = served.client(engine_wait_s=0.1), served.client()
    with pytest.raises(EngineLoading) as refused:
        hasty.submit(request())
    assert refused.value.retry_after_s
    assert hasty.state().state == "loading"
    collect(patient.submit(request()))


def test_a_bad_checkpoint_is_said_in_its_own_words_and_tried_again(serve: Serve, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    client = serve(f"needs={checkpoint}").client()
    status = client.wait_ready()
    assert (status.state, status.reason) == ("unhealthy", f"There is no file at {checkpoint}.")
    with pytest.raises(EngineUnhealthy, match="There is no file at"):
        client.submit(request())
    checkpoint.touch()
    eventually(lambda: client.state().state == "ready")
    collect(client.submit(request()))


@pytest.mark.parametrize(("model", "reason"), [("crash", "RuntimeError: something unforeseen"), ("refuse", "damaged")])
def test_an_engine_that_cannot_start_is_unhealthy(serve: Serve, model: str, reason: str) -> None:
    status = serve(model).client().wait_ready()
    assert status.state == "unhealthy"
    assert reason in status.reason


def test_the_owner_is_killed(serve: Serve, owner: subprocess.Popen[bytes], mark: str) -> None:
    """However the HTTP server dies, its engine does not outlive it."""
    served = serve("step_s=0.01", owner_pid=owner.pid)
    client = served.client()
    generation = client.submit(request(**ENDLESS))
    owner.kill()
    owner.wait()
    with pytest.raises(EngineDied):
        collect(generation)
    eventually(lambda: is_gone(served.handle.pid), within_s=2.0)
    eventually(lambda: not marked_processes(mark), within_s=2.0)
    eventually(lambda: not os.path.exists(served.handle.run_dir), within_s=2.0)


def test_the_supervisor_is_killed(serve: Serve) -> None:
    """The engine ends with it; the next request starts another of both."""
    served = serve("step_s=0.01")
    client = served.client()
    generation = client.submit(request(**ENDLESS))
    engine_pid = client.state().engine_pid
    assert engine_pid
    os.kill(served.handle.pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        collect(generation)
    eventually(lambda: is_gone(engine_pid), within_s=2.0)
    collect(client.submit(request()))
    assert client.state().engine_pid != engine_pid
    assert os.path.exists(served.handle.run_dir)
    # It lives for the same owner, and is not this fixture's to stop: end it as a server would be.
    supervisor = eventually(lambda: supervisor_pid(client))
    os.kill(supervisor, signal.SIGTERM)
    eventually(lambda: is_gone(supervisor))


def supervisor_pid(client: EngineClient) -> int | None:
    return client._supervised.get("pid")


def test_an_engine_that_hangs_holds_nobody_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, it neither reads nor ends: whoever sends to it gives up after a while, and the others with them."""
    monkeypatch.setattr("nanogpt.engine.link._SEND_TIMEOUT_S", 0.3)
    client = serve("step_s=0.01").client()
    waiting = client.submit(request(**ENDLESS))
    engine_pid = client.state().engine_pid
    assert engine_pid
    os.kill(engine_pid, signal.SIGSTOP)
    threads = [threading.Thread(target=send_without_end, args=(client,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    with pytest.raises(EngineDied):
        collect(waiting)
    for thread in threads:
        thread.join()
    os.kill(engine_pid, signal.SIGKILL)
    eventually(lambda: client.state().engine_pid not in (engine_pid, None))
    collect(client.submit(request()))


def send_without_end(client: EngineClient) -> None:
    """More than a socket holds."""
    link = client._published
    while link is not None and not link.ended:
        link.send([wire.ABORT, "x" * 100_000])


@pytest.mark.parametrize("engine_argv", [("/no/such/python",), (sys.executable, "-c", "import sys; sys.exit(7)")])
def test_a_process_that_cannot_be_started_is_no_end_of_the_supervisor(engine_argv: tuple[str, ...]) -> None:
    handle = start_supervisor(Settings(), os.getpid(), engine_argv=engine_argv)
    client = EngineClient(Settings(), engine_argv=engine_argv)
    status = client.wait_ready()
    assert status.state == "unhealthy"
    assert status.reason in (
        "The engine process cannot be started: No such file or directory.",
        "The engine ended with exit code 7.",
    )
    client.close()
    handle.stop(10.0)
    assert handle.process.returncode == 0


# -- drains -------------------------------------------------------------------------------------------------------


def test_stopping_lets_running_requests_finish_and_refuses_new_ones(serve: Serve) -> None:
    served = serve("step_s=0.01")
    client = served.client()
    generation = client.submit(request(max_tokens=100))
    generation.get()
    stopping = threading.Thread(target=served.handle.stop, args=(20.0,))
    stopping.start()
    eventually(lambda: client.state().state == "draining")
    with pytest.raises(EngineDraining):
        client.submit(request())
    output, finished = collect(generation)
    assert (len(output), finished.reason) == (99, "length")
    stopping.join()
    assert served.handle.process.returncode == 0
    assert not os.path.exists(served.handle.run_dir)


def test_a_drain_ends_in_time(serve: Serve) -> None:
    served = serve("step_s=0.05", drain_timeout_s=0.3)
    client = served.client()
    generation = client.submit(request(**ENDLESS))
    served.handle.stop(10.0)
    assert collect(generation)[1].reason == "abort"
    assert served.handle.process.returncode == 0


def test_stopping_while_the_model_is_loading(serve: Serve) -> None:
    served = serve("load_s=60")
    client = served.client()
    eventually(lambda: client.state().engine_pid)
    served.handle.stop(30.0)
    assert served.handle.process.returncode == 0


# -- manners ------------------------------------------------------------------------------------------------------


def test_nobody_polls_while_there_is_nothing_to_do(serve: Serve, mark: str) -> None:
    """Asked by what cannot be a matter of the machine's speed: how often the processes went to sleep."""
    client = serve().client()
    collect(client.submit(request()))
    processes = eventually(lambda: pids if len(pids := marked_processes(mark)) == 2 else None)

    def sleeps() -> int:
        files = [path for pid in processes for path in Path(f"/proc/{pid}/task").glob("*/status")]
        lines = [line for path in files for line in path.read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    time.sleep(0.5)  # the last statistics are sent
    before = sleeps()
    time.sleep(2.0)
    assert sleeps() - before <= 3


def test_ctrl_c_in_the_terminal_is_not_for_the_engine(serve: Serve) -> None:
    served = serve()
    client = served.client()
    engine_pid = eventually(lambda: client.state().engine_pid)
    assert os.getsid(served.handle.pid) == os.getsid(engine_pid) == served.handle.pid != os.getsid(0)


@pytest.mark.parametrize("module", ["supervisor", "client", "launch", "messages"])
def test_what_the_http_workers_import_is_light(module: str) -> None:
    code = f"import sys, nanogpt.engine.{module}; print({{'numpy', 'torch', 'flask'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_the_log_says_what_happens(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    client = serve().client()
    collect(client.submit(request()))
    os.kill(client.state().engine_pid or 0, signal.SIGKILL)
    eventually(lambda: client.state().restarts == 1)
    log: Any = capfd.readouterr().err
    assert " - INFO - Ready: fake on cpu" in log
    assert " - ERROR - The engine was killed by SIGKILL. It is started again." in log
