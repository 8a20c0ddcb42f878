"""Another model without a lost request: reload, its gates, rollback, and a folder that is followed. Real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_processes import Served, eventually, marked_processes, request
from fake_engine import CONFIG
from fake_runner import expected

from nanogpt.engine import engines
from nanogpt.engine.client import EngineClient, Generation
from nanogpt.engine.messages import Finished, Tokens
from nanogpt.errors import (
    CorruptCheckpoint,
    InvalidRequest,
    ModelChanged,
    NanoGPTError,
    ReloadConflict,
    ReloadFailed,
)

Serve = Callable[..., Served]


def ask(client: EngineClient, command: str, **fields: Any) -> dict[str, Any]:
    """A command, and its answer."""
    answer = client.command(command, **fields).get(30.0)
    assert answer is not None, "no answer"
    return answer


def reload(client: EngineClient, checkpoint: str, **fields: Any) -> dict[str, Any]:
    return ask(client, "reload", checkpoint=checkpoint, who="admin", **fields)


def states(client: EngineClient) -> list[tuple[str, str]]:
    return [(entry["who"], entry["state"]) for entry in ask(client, "models")["models"]]


def collect(generation: Generation) -> tuple[list[int], Finished]:
    *tokens, finished = generation
    assert isinstance(finished, Finished)
    return [token_id for event in tokens if isinstance(event, Tokens) for token_id in event.token_ids], finished


def engine_processes(mark: str) -> int:
    return sum("fake_engine" in command for command in marked_processes(mark).values())


def test_what_runs_finishes_on_the_old_model_and_what_is_new_goes_to_the_new_one(serve: Serve) -> None:
    client = serve("step_s=0.01,name=one").client()
    running = client.submit(request(max_tokens=100))
    first = client.state()
    answer = reload(client, "name=two")
    assert answer["model"]["name"] == "two"
    assert answer["previous"]["name"] == "one"
    eventually(lambda: client.state().model == "two")
    after = client.submit(request())
    assert after.digest == answer["model"]["digest"] == client.state().digest
    assert running.digest == first.digest != after.digest
    assert collect(after)[0] == expected([1, 2, 3], seed=5, max_tokens=20, config=CONFIG)[0]
    assert collect(running)[0] == expected([1, 2, 3], seed=5, max_tokens=100, config=CONFIG)[0]
    assert client.state().restarts == 0
    assert states(client) == [("start", "standby"), ("admin", "serving")]


def test_a_rollback_is_a_switch_between_engines_that_both_live(serve: Serve) -> None:
    client = serve("name=one").client()
    first_pid = client.wait_ready().engine_pid
    with pytest.raises(ReloadConflict, match="the first"):
        ask(client, "rollback")
    reload(client, "name=two")
    for name in ("one", "two", "one"):
        assert ask(client, "rollback")["model"]["name"] == name
        eventually(lambda name=name: client.state().model == name)
    assert client.state().engine_pid == first_pid
    assert states(client)[-2:] == [("rollback", "standby"), ("rollback", "serving")]


def test_tokens_go_to_the_engine_whose_tokenizer_made_them(serve: Serve) -> None:
    """Also while another one is published; once that engine takes nothing any more, the caller is told.

    What runs on an engine that is replaced twice has all its time: ``drain_timeout_s`` is for the server's end.
    """
    served = serve("step_s=0.015,name=one", drain_timeout_s=0.1)
    client = served.client()
    one = client.wait_ready()
    running = client.submit(request(max_tokens=500))
    reload(client, "name=two")
    eventually(lambda: client.state().model == "two")
    late = client.submit(request(), engine=one.link)
    assert late.digest == one.digest
    collect(late)
    reload(client, "name=three")

    def is_refused() -> bool:
        with contextlib.suppress(ModelChanged):
            collect(client.submit(request(max_tokens=1), engine=one.link))
            return False
        return True

    eventually(is_refused)
    assert client.submit(request()).digest == client.state().digest
    assert collect(running)[1].num_output_tokens == 500


def test_never_a_lost_stream(serve: Serve, mark: str) -> None:
    """Two workers' streams run through five reloads and rollbacks: each ends once and whole; none is refused."""
    served = serve("step_s=0.004,name=0", max_batch_size=64)
    clients = [served.client(), served.client()]
    wrong: list[str] = []
    digests: set[str] = set()
    stop = threading.Event()
    num_ended = 0

    def talk(number: int) -> None:
        nonlocal num_ended
        round = 0
        while not stop.is_set() or round == 0:
            round += 1
            seed, max_tokens = number * 1000 + round, 20 + 45 * (number % 5)
            prompt = [number, round % 200]
            try:
                generation = clients[number % 2].submit(request(prompt, seed=seed, max_tokens=max_tokens))
                output, finished = collect(generation)
                digests.add(generation.digest)
                if (output, finished.reason) != expected(prompt, seed=seed, max_tokens=max_tokens, config=CONFIG):
                    wrong.append(f"{number}/{round}: another text")
                if list(generation):
                    wrong.append(f"{number}/{round}: it ended twice")
            except NanoGPTError as error:
                wrong.append(f"{number}/{round}: {type(error).__name__}: {error}")
        num_ended += 1

    assert clients[0].wait_ready().state == "ready"  # what never served is nothing to go back to
    threads = [threading.Thread(target=talk, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    try:
        for step in range(1, 6):
            reload(clients[0], f"step_s=0.004,name={step}")
            eventually(lambda step=step: len(digests) > step)  # somebody's text was the new model's
            ask(clients[0], "rollback")
            if step % 2:
                ask(clients[0], "rollback")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert num_ended == 10
    assert len(digests) == 6
    # Those that were replaced twice have ended: one serves, one stands by.
    eventually(lambda: engine_processes(mark) == 2)


def test_a_model_that_fails_leaves_the_old_one_serving(serve: Serve, mark: str) -> None:
    client = serve("step_s=0.005", reload_timeout_s=3.0, request_timeout_s=60).client()
    before = client.wait_ready()
    cases: list[tuple[str, type[NanoGPTError], str]] = [
        ("refuse", CorruptCheckpoint, "The file is damaged"),
        ("crash", ReloadFailed, "RuntimeError: something unforeseen"),
        ("killed", ReloadFailed, "killed by SIGKILL"),
        ("nan", CorruptCheckpoint, "no finite logits"),
        ("load_s=60", ReloadFailed, "not ready within 3 s"),
    ]
    for checkpoint, error, says in cases:
        running = client.submit(request(max_tokens=100))
        with pytest.raises(error, match=says):
            reload(client, checkpoint)
        assert collect(running)[1].num_output_tokens == 100
        failed = ask(client, "models")["models"][-1]
        assert (failed["state"], failed["path"]) == ("failed", checkpoint)
        assert says in failed["reason"]
    assert client.state().link == before.link
    assert engine_processes(mark) == 1


def test_the_loss_gate_says_both_numbers(serve: Serve, tmp_path: Path) -> None:
    """The fake model finds each of its 200 tokens equally likely: ln 200 = 5.2983 nats."""
    client = serve().client()
    client.wait_ready()
    text = tmp_path / "val.txt"
    text.write_text("abc" * 400)
    model = "name=two,tokenizer=abc"
    with pytest.raises(ReloadFailed, match=r"5\.2983 nats a token; the gate admits 5\.2900"):
        reload(client, model, loss_gate={"text": str(text), "max_loss": 5.29})
    for wrong, says in ((f"{text}x", "No such file"), (str(tmp_path), "Is a directory"), ("\n", "characters|tokens")):
        with pytest.raises(InvalidRequest, match=says):
            reload(client, model, loss_gate={"text": wrong, "max_loss": 9})
    assert client.state().model == "fake"
    assert reload(client, model, loss_gate={"text": str(text), "max_loss": 5.3})["model"]["name"] == "two"


def test_one_change_at_a_time(serve: Serve) -> None:
    client = serve().client()
    client.wait_ready()
    first = client.command("reload", checkpoint="load_s=1,name=two", who="admin")
    for command in ("reload", "rollback"):
        with pytest.raises(ReloadConflict, match="being loaded: load_s=1,name=two"):
            ask(client, command, checkpoint="name=three", who="admin")
    assert first.get(20.0)


def test_an_engine_that_dies_comes_back_with_its_own_model(serve: Serve) -> None:
    """Also when it was loaded later than the start; one that stands by is forgotten, and loaded when it is needed."""
    client = serve("name=one").client()
    one = client.wait_ready()
    reload(client, "name=two")
    two = eventually(lambda: (now := client.state()).model == "two" and now)
    os.kill(one.engine_pid or 0, signal.SIGKILL)
    eventually(lambda: states(client) == [("start", "retired"), ("admin", "serving")])
    os.kill(two.engine_pid or 0, signal.SIGKILL)
    back = eventually(lambda: (now := client.state()).state == "ready" and now.link != two.link and now)
    assert (back.model, back.restarts) == ("two", 1)
    assert ask(client, "rollback")["model"]["name"] == "one"
    eventually(lambda: client.state().model == "one")
    assert states(client)[-2:] == [("admin", "standby"), ("rollback", "serving")]


def test_without_a_standby_the_former_engine_ends_and_a_rollback_loads_it_again(
    serve: Serve, mark: str, tmp_path: Path
) -> None:
    """But never other weights than those that were served: nanoGPT writes every checkpoint into the same file."""
    checkpoint = tmp_path / "ckpt.pt"
    checkpoint.write_text("step_s=0.01,name=one,")
    client = serve(str(checkpoint), standby=False).client()
    running = client.submit(request(max_tokens=250))
    reload(client, "name=two")
    eventually(lambda: client.state().model == "two")
    assert collect(running)[1].num_output_tokens == 250
    eventually(lambda: engine_processes(mark) == 1)
    checkpoint.write_text("name=later,")
    with pytest.raises(ReloadFailed, match="holds other weights"):
        ask(client, "rollback")
    checkpoint.write_text("name=one,")
    assert ask(client, "rollback")["model"]["name"] == "one"


def test_stopping_ends_every_engine_and_lets_all_of_them_finish(serve: Serve, mark: str) -> None:
    served = serve("step_s=0.01,name=one")
    client = served.client()
    old = client.submit(request(max_tokens=150))
    reload(client, "step_s=0.01,name=two")
    eventually(lambda: client.state().model == "two")
    new = client.submit(request(max_tokens=150))
    loading = client.command("reload", checkpoint="load_s=60", who="admin")
    eventually(lambda: engine_processes(mark) == 3)
    stopping = threading.Thread(target=served.handle.stop, args=(20.0,))
    stopping.start()
    assert [collect(generation)[1].num_output_tokens for generation in (old, new)] == [150, 150]
    with pytest.raises(NanoGPTError, match="shutting down"):
        loading.get(20.0)
    stopping.join()
    assert served.handle.process.returncode == 0
    assert not marked_processes(mark)


def test_a_bad_first_model_is_mended_by_a_reload(serve: Serve) -> None:
    client = serve("refuse").client()
    assert client.wait_ready().state == "unhealthy"
    assert reload(client, "name=two")["previous"] is None
    collect(client.submit(request()))
    assert states(client) == [("start", "failed"), ("admin", "serving")]


# -- a folder that is followed ------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "model_00100.pt").write_text("name=100,")
    return folder


def test_each_new_checkpoint_of_a_folder_is_served(
    serve: Serve, log: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Half a file is refused once, tried again when it has grown, and never served; a rollback stays."""
    client = serve(str(log), follow=True, follow_interval_s=0.05).client()
    assert client.wait_ready().model == "100"
    (log / "model_00200.pt").write_text("name=200")  # half
    eventually(lambda: ("follow", "failed") in states(client))
    assert client.state().model == "100"
    (log / "model_00200.pt").write_text("name=200,")
    eventually(lambda: client.state().model == "200")
    assert ask(client, "rollback")["model"]["name"] == "100"
    (log / "optimizer.txt").write_text("no checkpoint")
    replacement = tmp_path / "new"
    replacement.write_text("name=300,")
    replacement.rename(log / "model_00300.pt")
    eventually(lambda: client.state().model == "300")
    assert states(client) == [
        ("start", "retired"),
        ("follow", "failed"),
        ("follow", "retired"),
        ("rollback", "standby"),
        ("follow", "serving"),
    ]
    assert capfd.readouterr().err.count("The file ends in the middle.") == 1


def test_what_is_followed_passes_the_gate(serve: Serve, log: Path, tmp_path: Path) -> None:
    text = tmp_path / "val.txt"
    text.write_text("abcabcabc")
    gate = {"follow_loss_text": str(text), "follow_max_loss": 5.0}
    client = serve(str(log), follow=True, follow_interval_s=0.05, **gate).client()
    client.wait_ready()
    (log / "model_00200.pt").write_text("name=200,tokenizer=abc,")
    [*_, last] = eventually(
        lambda: models if (models := ask(client, "models")["models"])[-1]["state"] == "failed" else None
    )
    assert "5.2983 nats a token; the gate admits 5.0000" in last["reason"]
    assert client.state().model == "100"


def test_a_restart_serves_the_file_that_was_served_not_the_folders_newest(serve: Serve, log: Path) -> None:
    client = serve(str(log)).client()
    pid = client.wait_ready().engine_pid
    (log / "model_00200.pt").write_text("name=200")
    os.kill(pid or 0, signal.SIGKILL)
    back = eventually(lambda: (now := client.state()).restarts == 1 and now.state == "ready" and now)
    assert back.model == "100"


def test_the_history_keeps_what_is_served_however_often_others_fail() -> None:
    history = engines.History()
    serving = history.add("good", "start")
    serving.set("serving")
    for number in range(300):
        history.add(f"bad-{number}", "follow").set("failed", "x" * 5000)
    found = history.to_list()
    assert found[0]["path"] == "good"
    assert len(found) <= 101
    assert len(found[-1]["reason"]) == 1000
