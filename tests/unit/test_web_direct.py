"""Pieces written by the thread that reads the engine's news: in order, whole, and without waiting for any client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.engine.link import Generation
from nanogpt.engine.messages import Finished, Tokens
from nanogpt.errors import EngineDied
from nanogpt.tokenizer import characters
from nanogpt.web.direct import DirectWriter
from nanogpt.web.generation import ClientGone, TextGeneration

TOKENIZER = characters(list("ROME:abcB"))
PATIENCE_S = 30.0


class NoLink:
    """Stands for a connection to an engine: keeps what is said to it."""

    def __init__(self) -> None:
        self.hello: dict[str, Any] = {}
        self.said: list[list[Any]] = []

    def send(self, message: list[Any]) -> None:
        self.said.append(message)


class Stream:
    """A text of an engine that this test plays, its writer in a thread, and its client's end of the connection."""

    def __init__(self, write: Callable[[str], bytes] = str.encode, *, stop: list[str] | None = None) -> None:
        ours, self.client = socket.socketpair()
        ours.settimeout(PATIENCE_S)
        self.client.settimeout(PATIENCE_S)
        self.ours = ours
        self.generation = Generation(NoLink(), 1, PATIENCE_S)  # type: ignore[arg-type]
        self.text = TextGeneration(
            self.generation,
            TOKENIZER,
            stop or [],
            num_prompt_tokens=1,
            started=0.0,
            client_gone=lambda: False,
            silence_s=PATIENCE_S,
        )
        self.writer = DirectWriter(ours, self.generation, self.text, write)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.writer.run()
        except Exception as error:
            self.error = error

    def start(self) -> None:
        self._thread.start()

    def say(self, text: str) -> None:
        self.generation.deliver(Tokens(TOKENIZER.encode(text), None))

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def finish(self) -> None:
        self.generation.deliver(Finished("length", 1, 1))

    def rest(self) -> Iterator[str]:
        """What is left for the stream's own thread."""
        while not self.generation.events.empty():
            event = self.generation.get(0.0)
            if event is not None:
                yield self.text.take(event)

    def close(self) -> None:
        self.ours.close()
        self.client.close()


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = Stream()
    yield made
    made.close()


def chunks(data: bytes) -> list[bytes]:
    """The bodies of HTTP's chunks, which must be whole."""
    found = []
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        assert data[n : n + 2] == b"\r\n"
        found.append(data[:n])
        data = data[n + 2 :]
    return found


def received(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := sock.recv(65536)):
        data += more
    return data


def test_pieces_are_written_in_order_those_that_waited_first(stream: Stream) -> None:
    stream.say("RO")
    stream.start()
    for piece in ("ME", "O:"):
        stream.say(piece)
    stream.finish()
    stream.join()
    stream.ours.shutdown(socket.SHUT_WR)
    assert b"".join(chunks(received(stream.client, 1 << 20))) == b"ROMEO:"
    assert (stream.error, list(stream.rest())) == (None, [""])
    assert stream.text.finished is not None


@pytest.mark.parametrize("sizes", [[400_000], [1000] * 600])
def test_a_client_that_reads_nothing_keeps_only_its_own_thread_waiting(sizes: list[int]) -> None:
    """``say`` returns although nobody reads, and everything arrives whole and in order when somebody does."""
    written: list[bytes] = []

    def write(piece: str) -> bytes:
        written.append(b"%d:" % len(written) + b"x" * sizes[len(written)])
        return written[-1]

    stream = Stream(write)
    stream.start()
    for _ in sizes:
        stream.say("a")
    assert len(written) < len(sizes) or stream.writer._woken.is_set(), "more than a socket holds"
    got: list[bytes] = []

    def read() -> None:
        with suppress(ConnectionResetError):
            got.append(received(stream.client, 1 << 30))

    reader = threading.Thread(target=read)
    reader.start()
    stream.join()
    for _ in stream.rest():  # the stream's own thread goes on as ever
        stream.ours.sendall(b"%X\r\n%b\r\n" % (len(data := write("a")), data))
    stream.ours.close()
    reader.join(PATIENCE_S)
    assert chunks(got[0]) == written
    assert len(written) == len(sizes)
    stream.close()


def test_a_client_that_left_is_noticed(stream: Stream) -> None:
    stream.client.close()
    stream.start()
    stream.say("a")
    stream.say("b")
    stream.join()
    assert isinstance(stream.error, ClientGone)


def test_what_cannot_be_written_is_the_streams_error_and_not_the_reading_threads() -> None:
    def write(piece: str) -> bytes:
        raise ValueError("no form for this")

    stream = Stream(write)
    stream.start()
    stream.say("a")
    stream.join()
    assert isinstance(stream.error, ValueError)
    stream.close()


def test_a_stop_text_wakes_the_streams_own_thread() -> None:
    stream = Stream(stop=["B"])
    stream.start()
    for piece in "aBc":
        stream.say(piece)
    stream.join()
    stream.ours.shutdown(socket.SHUT_WR)
    assert chunks(received(stream.client, 100)) == [b"a"]
    assert stream.text.complete
    stream.close()


def test_the_end_of_the_engine_is_for_the_streams_own_thread(stream: Stream) -> None:
    stream.start()
    stream.say("a")
    stream.generation.deliver(EngineDied("It ended."))
    stream.join()
    with pytest.raises(EngineDied):
        stream.generation.get(0.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["wait", "listen", "say"]), max_size=30))
def test_every_event_comes_once_and_in_order_whoever_listens(turns: list[str]) -> None:
    """Listening begins and ends between any two events, as a stream that is slow now and then makes it."""
    generation = Generation(NoLink(), 1, PATIENCE_S)  # type: ignore[arg-type]
    got: list[int] = []

    def take(event: object) -> bool:
        assert isinstance(event, Tokens)
        if len(got) % 5 == 4:
            return False
        got.extend(event.token_ids)
        return True

    num_said = 0
    for turn in turns:
        if turn == "say":
            generation.deliver(Tokens([num_said], None))
            num_said += 1
        else:
            generation.listen(take if turn == "listen" else None)
        if turn == "wait":
            while isinstance(event := generation.get(0.0), Tokens):
                got += event.token_ids
    generation.listen(None)
    while isinstance(event := generation.get(0.0), Tokens):
        got += event.token_ids
    assert got == list(range(num_said))
