"""The engine as an HTTP worker sees it: requests in, events out, and how the engine is.

One client a process, made after the fork, shared by all its threads. It has one thread of its own, which alone reads
from the sockets and wakes those who wait; requests are sent by the threads that make them. Needs neither NumPy nor the
checkpoint: what a worker has to know of the model, the engine's first message says.

    with client.submit(request) as generation:      # raises at once what cannot be; leaving the block aborts the rest
        for event in generation:                    # Tokens …, then one Finished
            ...
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal

from nanogpt.engine import wire
from nanogpt.engine.launch import connect, ensure_supervisor, reap
from nanogpt.engine.messages import Finished, GenerateRequest, Tokens
from nanogpt.engine.status import EngineStatus as EngineStatus
from nanogpt.engine.status import refusal as refusal
from nanogpt.errors import EngineDied, NanoGPTError, RequestTimeout
from nanogpt.settings import Settings

logger = logging.getLogger("nanogpt.engine")

# The engine keeps every deadline itself; past this much more it is stuck, and waiting ends here.
_DEADLINE_GRACE_S = 10.0
# A start that failed is not tried again by every request that comes in the same moment.
_RETRY_S = 0.5
# An engine that takes in nothing for so long is given up; it reads between any two steps.
_SEND_TIMEOUT_S = 30.0
_READ_BYTES = 1 << 18
_RESTARTING = "The engine has ended and is started again."
_NO_SUPERVISOR = {
    "state": "loading",
    "reason": "The engine's supervisor has ended and is started again.",
    "engine": None,
    "engine_pid": None,
}


class Generation:
    """One accepted request. Used by one thread; ``abort`` by any."""

    def __init__(self, client: EngineClient, engine: socket.socket, number: int, timeout_s: float) -> None:
        self._client = client
        self._engine = engine
        self._number = number
        self._deadline = time.monotonic() + timeout_s + _DEADLINE_GRACE_S
        self._ended = False
        self.events: SimpleQueue[Tokens | Finished | NanoGPTError | None] = SimpleQueue()

    def get(self, timeout: float | None = None) -> Tokens | Finished | None:
        """The next event, or None when there is none after ``timeout`` seconds (None: the request's own deadline),
        or none any more.

        Raises: EngineDied at once when the engine is lost; RequestTimeout when it is stuck.
        """
        if self._ended:
            return None
        left = self._deadline - time.monotonic()
        try:
            event = self.events.get(timeout=max(0.0, left if timeout is None else min(timeout, left)))
        except Empty:
            if time.monotonic() < self._deadline:
                return None
            self.abort()
            raise RequestTimeout("The engine did not finish the request in time.") from None
        if isinstance(event, NanoGPTError):
            self._ended = True
            raise event
        if isinstance(event, Finished):
            self._ended = True
        return event

    def __iter__(self) -> Iterator[Tokens | Finished]:
        while not self._ended:
            event = self.get()
            if event is not None:
                yield event

    def abort(self, reason: Literal["abort", "stop"] = "abort") -> None:
        """Nobody wants the rest: the engine ends it between two steps, and a Finished says so. May come too late.

        ``stop``: because the text is complete (a stop string), which is how the engine then counts it.
        """
        if not self._ended:
            self._client._send(self._engine, [wire.ABORT, self._number, reason])

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()


class EngineClient:
    """This process's connection to the supervisor and the engine. Without a supervisor the first need starts one."""

    def __init__(self, settings: Settings, *, engine_argv: tuple[str, ...] | None = None) -> None:
        self._settings = settings
        self._argv: dict[str, Any] = {} if engine_argv is None else {"engine_argv": engine_argv}
        self._changed = threading.Condition()
        self._status = EngineStatus(reason="The engine is starting.")
        self._pending: dict[int, Generation] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._wanted = True
        self._start_at = 0.0
        self._send_lock = threading.Lock()
        self._engine: socket.socket | None = None
        self._engine_path: str | None = None
        self._frames = wire.Frames()
        self._hello: dict[str, Any] | None = None
        self._supervised: dict[str, Any] = {**_NO_SUPERVISOR, "reason": "The engine is starting.", "restarts": 0}
        self._control: socket.socket | None = None
        self._control_buffer = b""
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)
        self._thread.start()

    # -- for the threads that serve requests -----------------------------------------------------------------------

    def state(self) -> EngineStatus:
        """How the engine is, without waiting."""
        self._need()
        return self._status

    def wait_ready(self, timeout_s: float | None = None) -> EngineStatus:
        """Wait for an engine that is starting. Returns whatever is known when it is ready, when it will not come up or
        drains, or after ``timeout_s`` (None: the setting ``engine_wait_s``)."""
        until = time.monotonic() + (self._settings.engine_wait_s if timeout_s is None else timeout_s)
        with self._changed:
            while True:
                self._need()
                left = until - time.monotonic()
                if self._status.state != "loading" or left <= 0 or self._closed:
                    return self._status
                self._changed.wait(min(left, _RETRY_S))

    def submit(self, request: GenerateRequest) -> Generation:
        """Hand a request to the engine, waiting for one that is starting.

        Raises: InvalidRequest, QueueFull, EngineLoading, EngineDraining, EngineUnhealthy or EngineDied, before
        anything was generated.
        """
        until = time.monotonic() + self._settings.engine_wait_s
        generation = None
        while generation is None:
            status = self.wait_ready(until - time.monotonic())
            if status.state != "ready":
                raise refusal(status)
            with self._changed:
                if self._engine is not None:  # else it has died in this very moment
                    generation = Generation(self, self._engine, next(self._numbers), request.timeout_s)
                    self._pending[generation._number] = generation
        self._send(generation._engine, wire.submit_message(generation._number, request))
        # The engine's answer comes before its next step; None stands for "accepted".
        generation.get()
        return generation

    def close(self) -> None:
        """Disconnect; requests that are still in the engine are aborted by it."""
        with self._changed:
            self._closed = True
        self._wake()
        self._thread.join()

    def _need(self) -> None:
        """Somebody needs the engine: if there is no supervisor, the client's thread starts one."""
        if self._control is None and not self._closed:
            self._wanted = True
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_out.send(b"!")

    def _send(self, engine: socket.socket, message: list[Any]) -> None:
        """To this engine and no other: if it is gone, the reading thread has ended its requests."""
        frame = wire.pack(message)
        with self._send_lock:
            if self._engine is engine:
                try:
                    engine.sendall(frame)
                except OSError:
                    # Half a message may have gone: nothing more can follow it. The reading thread sees the end.
                    with contextlib.suppress(OSError):
                        engine.shutdown(socket.SHUT_RDWR)

    # -- the client's own thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
        finally:
            self._lose_engine()
            self._lose_control()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()

    def _turn(self) -> None:
        try:
            if self._wanted and self._control is None and time.monotonic() >= self._start_at:
                self._connect_control()
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_in:
                    self._wake_in.recv(4096)
                elif key.fileobj is self._engine:
                    self._read_engine()
                elif key.fileobj is self._control:
                    self._read_control()
        except Exception:
            # Whatever it was, nobody may wait for ever: begin again with new connections.
            logger.exception("The connection to the engine is made anew.")
            self._lose_engine()
            self._lose_control()

    def _connect_control(self) -> None:
        self._start_at = time.monotonic() + _RETRY_S
        try:
            run_dir = ensure_supervisor(self._settings, **self._argv)
            control = connect(Path(run_dir) / "control.sock")
        except (NanoGPTError, OSError) as error:
            logger.error("The engine cannot be started: %s", error)
            self._set_status(state="unhealthy", reason=str(error))
            return
        finally:
            self._wanted = False  # the needs that came meanwhile are met, too
        self._control, self._control_buffer = control, b""
        self._selector.register(control, selectors.EVENT_READ)

    def _read_control(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._lose_control()
            return
        *lines, self._control_buffer = (self._control_buffer + data).split(b"\n")
        for line in lines:
            self._on_state(json.loads(line))

    def _on_state(self, values: dict[str, Any]) -> None:
        self._supervised = values
        self._follow_engine()
        self._set_state()

    def _follow_engine(self) -> None:
        """Be connected to the engine that the supervisor names, if it names one."""
        path = self._supervised["engine"]
        if path == self._engine_path:
            return
        self._lose_engine()
        if path is None:
            return
        try:
            engine = connect(Path(path))
        except OSError:
            return  # it has just died; the supervisor will say so
        engine.settimeout(_SEND_TIMEOUT_S)
        self._frames = wire.Frames()
        self._engine_path = path
        with self._changed:
            self._engine = engine
        self._selector.register(engine, selectors.EVENT_READ)

    def _read_engine(self) -> None:
        assert self._engine is not None
        try:
            data = self._engine.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._lose_engine()
            self._follow_engine()
            self._set_state()
            return
        self._frames.feed(data)
        for message in self._frames:
            kind = message[0]
            if kind == wire.NEWS:
                self._on_news(message)
            elif kind == wire.STATS:
                self._set_status(stats=message[1])
            elif kind == wire.HELLO:
                self._hello = message[1]
                if self._hello.pop("version") != wire.VERSION:
                    raise ValueError("the engine is of another version than this process: restart the server")
                self._set_state()

    def _on_news(self, message: list[Any]) -> None:
        _, accepted, refused, tokens, finished = message
        pending = self._pending
        for number in accepted:
            pending[number].events.put(None)
        for number, error in refused:
            pending.pop(number).events.put(wire.read_error(error))
        for number, token_ids, logprobs in zip(tokens[::3], tokens[1::3], tokens[2::3], strict=True):
            pending[number].events.put(wire.read_tokens(token_ids, logprobs))
        for number, fields in finished:
            pending.pop(number).events.put(wire.read_finished(fields))

    def _lose_engine(self) -> None:
        """The engine's connection has ended: so have all requests that were in it."""
        with self._changed:
            engine, self._engine = self._engine, None
            lost, self._pending = self._pending, {}
            self._engine_path = None
            self._hello = None
            self._status = replace(self._status, stats={})  # of an engine that is no more
            # Together with the engine: whoever is told of its end and asks again, waits for the next one.
            if self._status.state == "ready":
                self._status = replace(self._status, state="loading", reason=_RESTARTING)
        if engine is not None:
            self._selector.unregister(engine)
            with contextlib.suppress(OSError):
                engine.shutdown(socket.SHUT_RDWR)  # whoever is just sending to it stops
            with self._send_lock:
                engine.close()
        for generation in lost.values():
            generation.events.put(_engine_died())

    def _lose_control(self) -> None:
        """The supervisor has ended, and with it the engine. The next need starts another."""
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
            self._supervised = {**self._supervised, **_NO_SUPERVISOR}
            self._set_state()
        reap()

    def _set_state(self) -> None:
        """The supervisor's word, but ``ready`` only when the engine itself has said hello."""
        state, reason, hello = self._supervised["state"], self._supervised["reason"], self._hello or {}
        if state == "ready" and not hello:
            state, reason = "loading", _RESTARTING
        self._set_status(
            state=state,
            reason=reason,
            restarts=self._supervised["restarts"],
            engine_pid=self._supervised["engine_pid"],
            **hello,
        )

    def _set_status(self, **values: Any) -> None:
        with self._changed:
            self._status = replace(self._status, **values)
            self._changed.notify_all()


def _engine_died() -> EngineDied:
    return EngineDied("The engine ended while it worked on this request.", remedy="Send the request again.")
