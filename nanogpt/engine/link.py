"""One connection of an HTTP worker to one engine, and the requests that are under way on it.

A client has several: to the engine that serves, and to former ones for as long as those live. Reading is done by the
client's own thread; requests are sent by the threads that make them.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, TypeAlias

from nanogpt.engine import wire
from nanogpt.engine.launch import connect
from nanogpt.engine.messages import Finished, GenerateRequest, Tokens
from nanogpt.errors import EngineDied, EngineDraining, ModelChanged, NanoGPTError, RequestTimeout

# The engine keeps every deadline itself; past this much more it is stuck, and waiting ends here.
_DEADLINE_GRACE_S = 10.0
# An engine that takes in nothing for so long is given up; it reads between any two steps.
_SEND_TIMEOUT_S = 30.0
_READ_BYTES = 1 << 18


Events: TypeAlias = "SimpleQueue[Tokens | Finished | NanoGPTError | None]"
"""What has come for one request and was not taken yet. None: it was accepted."""

Listener: TypeAlias = Callable[[Tokens | Finished | NanoGPTError], bool]
"""Called by the client's thread. False: it does not take this event, and no further one."""


class Generation:
    """One accepted request. Used by one thread; ``abort`` by any. ``digest`` names the weights that answer it."""

    def __init__(self, link: EngineLink, number: int, timeout_s: float, events: Events | None = None) -> None:
        self._link = link
        self._number = number
        self._deadline = time.monotonic() + timeout_s + _DEADLINE_GRACE_S
        self._ended = False
        self.events: Events = SimpleQueue() if events is None else events
        self._listener: Listener | None = None
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of the engine that this request is in."""
        return str(self._link.hello.get("digest", ""))

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

    def listen(self, listener: Listener | None) -> None:
        """Have the client's thread give the events to ``listener`` instead of keeping them for ``get``: first those
        that wait. What it does not take, and all that follows, is for ``get`` again. None: nobody listens any more, and
        the last call has returned."""
        with self._lock:
            waiting = [self.events.get_nowait() for _ in range(self.events.qsize())]
            self._listener = listener
            for event in waiting:
                self._put(event)

    def deliver(self, event: Tokens | Finished | NanoGPTError) -> None:
        """By the client's thread."""
        with self._lock:
            self._put(event)

    def _put(self, event: Tokens | Finished | NanoGPTError | None) -> None:
        if event is not None and self._listener is not None:
            if self._listener(event):
                return
            self._listener = None
        self.events.put(event)

    def wait_accepted(self) -> None:
        """Needed once after ``send``: the engine's answer comes before its next step; None stands for "accepted".

        Raises: what the engine refuses the request with; ModelChanged when it does so because another serves by now.
        """
        try:
            self.get()
        except (EngineDraining, EngineDied):
            if self._link.was_replaced():
                raise ModelChanged("The model was changed at this moment.", remedy="Send the request again.") from None
            raise

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
            self._link.send([wire.ABORT, self._number, reason])

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()


class EngineLink:
    """``number`` is this link's name within its process: no other one ever has it. ``hello`` is empty until it came.

    Raises: OSError when nobody listens at the path.
    """

    def __init__(self, number: int, path: str) -> None:
        self.number = number
        self.path = path
        self.hello: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}
        self.superseded = False
        """Another engine has been published; this one finishes what it has. Set by the client, as is the next."""
        self.refuses = False
        self.was_replaced: Callable[[], bool] = bool
        """Whether it refuses because another engine serves by now. Set by the client."""
        self.socket = connect(Path(path))
        self.socket.settimeout(_SEND_TIMEOUT_S)
        self._frames = wire.Frames()
        self._pending: dict[int, Generation] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self.ended = False

    # -- for the threads that serve requests -----------------------------------------------------------------------

    def submit(self, request: GenerateRequest, events: Events | None = None) -> Generation | None:
        """Send a request; its first event says whether it was accepted. None: the engine has just been lost."""
        with self._lock:
            if self.ended:
                return None
            generation = Generation(self, next(self._numbers), request.timeout_s, events)
            self._pending[generation._number] = generation
        self.send(wire.submit_message(generation._number, request))
        return generation

    def send(self, message: list[Any]) -> None:
        """If the engine is gone, the reading thread has ended its requests, and nothing happens here."""
        frame = wire.pack(message)
        with self._send_lock:
            if not self.ended:
                try:
                    self.socket.sendall(frame)
                except OSError:
                    # Half a message may have gone: nothing more can follow it. The reading thread sees the end.
                    with contextlib.suppress(OSError):
                        self.socket.shutdown(socket.SHUT_RDWR)

    # -- for the client's thread -----------------------------------------------------------------------------------

    def read(self) -> list[list[Any]] | None:
        """Deliver what arrived to those who wait; returns the other messages, None when the engine is gone."""
        try:
            data = self.socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            return None
        self._frames.feed(data)
        others = []
        for message in self._frames:
            if message[0] == wire.NEWS:
                self._on_news(message)
            else:
                others.append(message)
        return others

    def _on_news(self, message: list[Any]) -> None:
        _, accepted, refused, tokens, finished = message
        pending = self._pending
        for number in accepted:
            pending[number].events.put(None)
        for number, error in refused:
            pending.pop(number).events.put(wire.read_error(error))
        for number, token_ids, logprobs in zip(tokens[::3], tokens[1::3], tokens[2::3], strict=True):
            pending[number].deliver(wire.read_tokens(token_ids, logprobs))
        for number, fields in finished:
            pending.pop(number).deliver(wire.read_finished(fields))

    def end(self) -> None:
        """The connection has ended: so have all requests that were on it."""
        with self._lock:
            self.ended = True
            lost, self._pending = self._pending, {}
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # whoever is just sending stops
        with self._send_lock:
            self.socket.close()
        for generation in lost.values():
            generation.deliver(
                EngineDied("The engine ended while it worked on this request.", remedy="Send the request again.")
            )
