"""The engine as an HTTP worker sees it: requests in, events out, how the engine is, and another model on demand.

One client a process, made after the fork, shared by all its threads. It has one thread of its own, which alone reads
from the sockets and wakes those who wait; requests are sent by the threads that make them. Needs neither NumPy nor the
checkpoint: what a worker has to know of the model, the engine's first message says.

New requests go to the engine that the supervisor names (*published* here once it has said hello: until then the one
before goes on). Links to former engines stay for as long as those live: their requests end on them. A client is of one
role: where a server has a second model, that has a client of its own.

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
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from nanogpt.engine import wire
from nanogpt.engine.history import Role
from nanogpt.engine.launch import connect, ensure_supervisor, reap
from nanogpt.engine.link import EngineLink
from nanogpt.engine.link import Events as Events
from nanogpt.engine.link import Generation as Generation
from nanogpt.engine.messages import GenerateRequest
from nanogpt.engine.status import EngineStatus as EngineStatus
from nanogpt.engine.status import refusal as refusal
from nanogpt.errors import EngineDied, ModelChanged, NanoGPTError
from nanogpt.settings import Settings

logger = logging.getLogger("nanogpt.engine")

# A start that failed is not tried again by every request that comes in the same moment.
_RETRY_S = 0.5
_READ_BYTES = 1 << 18
# The supervisor reads its commands at once, or it hangs.
_CONTROL_TIMEOUT_S = 30.0
# How long a worker may not have heard yet that an engine which refuses was replaced.
_NEWS_S = 1.0
_RESTARTING = "The engine has ended and is started again."
_NO_SUCH_ROLE = "This server was started with one model: there is no second one."
_NO_SUPERVISOR = {
    "state": "loading",
    "reason": "The engine's supervisor has ended and is started again.",
    "engine": None,
    "engine_pid": None,
}


class Reply:
    """The supervisor's answer to a command, which takes as long as the command. For one thread."""

    def __init__(self) -> None:
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def put(self, answer: dict[str, Any]) -> None:
        self._answers.put(answer)

    def get(self, timeout_s: float) -> dict[str, Any] | None:
        """None while there is none. Raises: NanoGPTError, whatever the command was refused with."""
        try:
            answer = self._answers.get(timeout=timeout_s)
        except Empty:
            return None
        if "error" in answer:
            raise wire.read_error(answer["error"])
        return answer


class EngineClient:
    """This process's connection to the supervisor and the engine. Without a supervisor the first need starts one."""

    def __init__(self, settings: Settings, *, role: Role = "main", engine_argv: tuple[str, ...] | None = None) -> None:
        self._settings = settings
        self._role = role
        self._argv: dict[str, Any] = {} if engine_argv is None else {"engine_argv": engine_argv}
        self._changed = threading.Condition()
        self._status = EngineStatus(reason="The engine is starting.")
        self._links: dict[socket.socket, EngineLink] = {}
        self._published: EngineLink | None = None
        self._numbers = itertools.count(1)
        self._closed = False
        self._wanted = True
        self._start_at = 0.0
        self._supervised: dict[str, Any] = {**_NO_SUPERVISOR, "reason": "The engine is starting.", "restarts": 0}
        self._control: socket.socket | None = None
        self._control_buffer = b""
        self._control_lock = threading.Lock()
        self._replies: dict[int, Reply] = {}
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

    def submit(self, request: GenerateRequest, *, engine: int | None = None) -> Generation:
        """Hand a request to the engine, waiting for one that is starting.

        ``engine`` is ``EngineStatus.link`` of the engine whose tokenizer made the request's tokens: it goes to that one
        or to none. Without it, to whichever is published.

        Raises: InvalidRequest, QueueFull, EngineLoading, EngineDraining, EngineUnhealthy, EngineDied or, where
        ``engine`` was given and takes nothing any more, ModelChanged; before anything was generated.
        """
        until = time.monotonic() + self._settings.engine_wait_s
        while True:
            generation = self.send(request, engine=engine, wait_s=until - time.monotonic())
            try:
                generation.wait_accepted()
            except ModelChanged:
                if engine is not None:
                    raise
                continue  # the next turn asks the engine that took over
            return generation

    def send(
        self,
        request: GenerateRequest,
        events: Events | None = None,
        *,
        engine: int | None = None,
        wait_s: float | None = None,
    ) -> Generation:
        """The first half of ``submit``, for who has several requests: send them all, then ``wait_accepted`` of each.
        ``events`` is where the news of this request goes.

        Raises: EngineLoading, EngineDraining, EngineUnhealthy, ModelChanged.
        """
        until = time.monotonic() + (self._settings.engine_wait_s if wait_s is None else wait_s)
        while True:
            link = self._link(engine, until)
            generation = link.submit(request, events) if link is not None else None
            if generation is not None:  # else the engine has died in this very moment
                return generation

    def _link(self, engine: int | None, until: float) -> EngineLink | None:
        """The engine to ask. Raises: ServiceUnavailable when there is none."""
        if engine is not None and self._status.state != "draining":
            with self._changed:
                link = next((link for link in self._links.values() if link.number == engine), None)
            if link is None or link.ended or link.refuses:
                raise ModelChanged("The model was changed at this moment.", remedy="Send the request again.")
            return link
        status = self.wait_ready(until - time.monotonic())
        if status.state != "ready":
            raise refusal(status)
        return self._published

    def _was_replaced(self, link: EngineLink) -> bool:
        """Whether an engine that refuses does so because another serves by now; this process may hear of it later."""
        with self._changed:
            self._changed.wait_for(
                lambda: link.superseded or link.ended or self._status.state == "draining" or self._closed, _NEWS_S
            )
            link.refuses = link.superseded
            return link.superseded

    def command(self, name: str, **fields: Any) -> Reply:
        """Have the supervisor do something: ``reload``, ``rollback``, ``models``.

        Raises: ServiceUnavailable when there is no supervisor to ask.
        """
        reply = Reply()
        self._need()
        with self._changed:
            self._changed.wait_for(
                lambda: self._control is not None or self._status.state == "unhealthy" or self._closed,
                self._settings.engine_wait_s,
            )
        with self._control_lock:
            if self._control is not None:
                number = next(self._numbers)
                self._replies[number] = reply
                command = {"id": number, "command": name, "role": self._role, **fields}
                line = json.dumps(command, ensure_ascii=False) + "\n"
                with contextlib.suppress(OSError):  # the reading thread sees the end, and answers
                    self._control.sendall(line.encode("utf-8", "surrogateescape"))
                return reply
        raise refusal(self.state())

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

    # -- the client's own thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
        finally:
            self._lose_all()
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
                elif key.fileobj is self._control:
                    self._read_control()
                elif isinstance(key.data, EngineLink) and not key.data.ended:
                    self._read_link(key.data)
        except Exception:
            # Whatever it was, nobody may wait for ever: begin again with new connections.
            logger.exception("The connection to the engine is made anew.")
            self._lose_all()

    def _lose_all(self) -> None:
        for link in list(self._links.values()):
            self._lose_link(link)
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
        control.settimeout(_CONTROL_TIMEOUT_S)
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
            values = json.loads(line)
            if "reply" in values:
                with self._control_lock:
                    reply = self._replies.pop(values["reply"])
                reply.put(values)
            else:
                told = values if self._role == "main" else values[self._role]
                self._supervised = told or {**self._supervised, **_NO_SUPERVISOR, "reason": _NO_SUCH_ROLE}
                self._choose()

    def _choose(self) -> None:
        """Publish the engine that the supervisor names, as soon as it has said hello."""
        path = self._supervised["engine"]
        link = next((link for link in self._links.values() if link.path == path), None)
        if link is None and path is not None:
            # Where it has just died, the supervisor will say so.
            with contextlib.suppress(OSError):
                link = EngineLink(next(self._numbers), path)
                link.was_replaced = partial(self._was_replaced, link)
                with self._changed:
                    self._links[link.socket] = link
                self._selector.register(link.socket, selectors.EVENT_READ, link)
        if path is None or (link is not None and link.hello):
            with self._changed:
                if self._published is not None and link is not None and link is not self._published:
                    self._published.superseded = True
                self._published = link
                if link is not None:
                    link.superseded = link.refuses = False
        self._set_state()

    def _read_link(self, link: EngineLink) -> None:
        messages = link.read()
        if messages is None:
            self._lose_link(link)
            self._choose()
            return
        for message in messages:
            if message[0] == wire.STATS:
                link.stats = message[1]
                if link is self._published:
                    self._set_status(stats=link.stats)
            elif message[0] == wire.HELLO:
                if message[1].pop("version") != wire.VERSION:
                    raise ValueError("the engine is of another version than this process: restart the server")
                link.hello = message[1]
                self._choose()

    def _lose_link(self, link: EngineLink) -> None:
        """The engine's connection has ended: so have all requests that were in it."""
        with self._changed:
            if link is self._published:
                self._published = None
                # Together with the engine: whoever is told of its end and asks again, waits for the next one.
                self._status = replace(self._status, stats={})  # of an engine that is no more
                if self._status.state == "ready":
                    self._status = replace(self._status, state="loading", reason=_RESTARTING)
            del self._links[link.socket]
        self._selector.unregister(link.socket)
        link.end()

    def _lose_control(self) -> None:
        """The supervisor has ended, and with it the engine. The next need starts another."""
        if self._control is not None:
            self._selector.unregister(self._control)
            with self._control_lock:
                self._control.close()
                self._control = None
                lost, self._replies = self._replies, {}
            error = wire.error_to_wire(EngineDied("The engine's supervisor has ended."))
            for reply in lost.values():
                reply.put({"error": error})
            self._supervised = {**self._supervised, **_NO_SUPERVISOR}
            self._set_state()
        reap()

    def _set_state(self) -> None:
        """The supervisor's word, but ``ready`` only when the engine itself has said hello."""
        state, reason, link = self._supervised["state"], self._supervised["reason"], self._published
        if state == "ready" and link is None:
            state, reason = "loading", _RESTARTING
        about = {} if link is None else {"link": link.number, "stats": link.stats, **link.hello}
        self._set_status(
            state=state,
            reason=reason,
            restarts=self._supervised["restarts"],
            engine_pid=self._supervised["engine_pid"],
            **about,
        )

    def _set_status(self, **values: Any) -> None:
        with self._changed:
            self._status = replace(self._status, **values)
            self._changed.notify_all()
