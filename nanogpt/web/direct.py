"""Pieces of streams written by the thread that reads the engine's news, while their clients take what comes.

A worker's texts get their tokens at the same moment. Waking a thread for each, which waits for the interpreter's lock
three times before its piece is out, takes about as much of the processor's time as the pieces themselves, and takes it
from the engine. So a stream's own thread lends its socket, and only looks up four times a second. What the client
does not take at once it writes itself, waiting, as ever: the reading thread never waits for anybody.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from nanogpt.engine.link import Generation
from nanogpt.engine.messages import Finished, Tokens
from nanogpt.errors import NanoGPTError
from nanogpt.web.generation import ClientGone, TextGeneration


class DirectWriter:
    """For one stream, whose thread calls ``run``. ``write`` makes bytes of a piece of text, or none."""

    def __init__(
        self, sock: socket.socket, generation: Generation, text: TextGeneration, write: Callable[[str], bytes]
    ) -> None:
        self._socket = sock
        self._generation = generation
        self._text = text
        self._write = write
        self._woken = threading.Event()
        self._unsent = b""
        self._error: Exception | None = None

    def run(self) -> None:
        """Have the pieces written as they come: until there is something to do for the stream's own thread.

        Raises: ClientGone, EngineDraining; whatever making bytes of a piece raises.
        """
        if self._text.complete:
            return
        self._woken.clear()
        self._generation.listen(self._on_event)
        try:
            while not self._woken.wait(self._text.look_up_s) and not self._text.is_silent:
                self._text.look_up()
        finally:
            self._generation.listen(None)
            self._send_rest()
        if self._error is not None:
            raise self._error

    def _send_rest(self) -> None:
        unsent, self._unsent = self._unsent, b""
        if unsent:
            try:
                self._socket.sendall(unsent)
            except OSError:
                raise ClientGone("The client took nothing any more.") from None

    def _on_event(self, event: Tokens | Finished | NanoGPTError) -> bool:
        if self._woken.is_set() or not isinstance(event, Tokens) or self._text.complete:
            self._woken.set()
            return False
        try:
            piece = self._text.take(event)
            data = self._write(piece) if piece else b""
            if data:
                self._send(b"%X\r\n%b\r\n" % (len(data), data))
        except Exception as error:
            self._error = error
            self._woken.set()
        if self._text.complete:  # a stop text: the stream's own thread tells the engine
            self._woken.set()
        return True

    def _send(self, chunk: bytes) -> None:
        # Not the socket's own method, which waits where it has a timeout. With one its descriptor does not block.
        try:
            num_sent = os.write(self._socket.fileno(), chunk)
        except BlockingIOError:
            num_sent = 0
        except OSError:
            raise ClientGone("The client closed the connection.") from None
        if num_sent < len(chunk):
            self._unsent = chunk[num_sent:]
            self._woken.set()
