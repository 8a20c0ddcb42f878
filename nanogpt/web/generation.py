"""One generation as the HTTP worker sees it: the engine's tokens become text, and whoever no longer wants them says so.

Owned by the thread that holds the request. Every way out ends the sequence in the engine: the end of the text, a stop
string, a client that left, a deadline, a worker that quits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nanogpt.engine.link import Generation
from nanogpt.engine.messages import GRAMMAR, TIMEOUT, Finished, Tokens
from nanogpt.errors import EngineDied, EngineDraining, InvalidRequest, NanoGPTError, RequestTimeout
from nanogpt.sampling_params import TokenLogprobs
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.text import TextStream
from nanogpt.web import process
from nanogpt.web.cache import BYPASS, HIT
from nanogpt.web.flights import Source

# How long a wait for the engine may keep a thread from noticing that the client left or that the worker quits.
LOOK_UP_S = 0.25


class ClientGone(NanoGPTError):
    """The client closed the connection. Nobody reads this; the status is nginx's for the log."""

    status = 499
    code = "client_closed_request"


@dataclass(frozen=True)
class Outcome:
    """A generation at its end. Units: seconds, from the arrival of the request (queue_s: in the engine)."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cache: str = BYPASS

    @property
    def tokens_per_second(self) -> float:
        """Of the decoding alone: the tokens after the first, over the time after the first. 0: nothing was decoded."""
        if self.cache == HIT:
            return 0.0
        decoding_s = self.total_s - self.ttft_s
        return (self.num_output_tokens - 1) / decoding_s if self.num_output_tokens > 1 and decoding_s > 0 else 0.0


class TextGeneration:
    """Iterate for the pieces of text as they come; then ``outcome`` is there. None: still nothing, after a while.

    ``cache`` is what ``X-Cache`` says. ``stopped`` is called when a stop text has ended the text, before the engine is
    told that the rest is not wanted.

    Raises (from iteration): ClientGone, EngineDied, EngineDraining, RequestTimeout.
    """

    def __init__(
        self,
        generation: Source,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        num_prompt_tokens: int,
        started: float,
        client_gone: Callable[[], bool],
        silence_s: float,
        cache: str = BYPASS,
        on_close: Sequence[Callable[[TextGeneration], None]] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._generation = generation
        self._text = TextStream(tokenizer, stop)
        self._num_prompt_tokens = num_prompt_tokens
        self._started = started
        self._client_gone = client_gone
        self._silence_s = silence_s
        self.cache = cache
        self._ended = False
        self._closed = False
        self._last_piece_at = 0.0
        self._first_token_at = 0.0
        self._on_close = on_close
        self.outcome: Outcome | None = None
        self.refused = False
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        """Of the tokens so far, where they were asked for."""
        self.finished: Finished | None = None
        """The engine's own account, once it is there: then all of the text is."""

    @property
    def num_prompt_tokens(self) -> int:
        return self._num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return self._text.num_tokens

    @property
    def offsets(self) -> list[int]:
        """For each token, the number of characters before it."""
        return self._text.offsets

    @property
    def ttft_s(self) -> float | None:
        return self._first_token_at - self._started if self._first_token_at else None

    @property
    def queue_s(self) -> float | None:
        return None if self.outcome is None else self.outcome.queue_s

    @property
    def finish_reason(self) -> str | None:
        return None if self.outcome is None else self.outcome.finish_reason

    def run(self) -> Outcome:
        """Wait for the whole text."""
        for _ in self:
            pass
        assert self.outcome is not None
        return self.outcome

    def __iter__(self) -> Iterator[str | None]:
        self._last_piece_at = time.monotonic()
        while self.outcome is None:
            piece = self.advance(self.look_up_s)
            if piece:
                yield piece
            elif self.is_silent and self.outcome is None:
                yield None
                self._last_piece_at = time.monotonic()

    @property
    def look_up_s(self) -> float:
        """How long one wait for the engine may be."""
        return min(LOOK_UP_S, self._silence_s)

    @property
    def is_silent(self) -> bool:
        """Whether there has been no piece for so long that the client should be told that somebody is here."""
        return time.monotonic() - self._last_piece_at >= self._silence_s

    @property
    def live(self) -> Generation | None:
        """What the engine itself tells this text of: nothing where it comes from the cache, or with others."""
        return self._generation if isinstance(self._generation, Generation) else None

    def wait_accepted(self) -> None:
        """Needed once where the text was only sent. Raises: what the engine refuses it with."""
        try:
            self._generation.wait_accepted()
        except NanoGPTError:
            self.refused = True
            raise

    def advance(self, timeout_s: float) -> str:
        """Wait so long for the engine's next word. The text that it adds; past the last of it ``outcome`` is there.

        Raises: ClientGone, EngineDied, EngineDraining, RequestTimeout.
        """
        if self.complete:
            self._finish()
            return ""
        event = self._generation.get(timeout_s)
        self.look_up(is_end=isinstance(event, Finished))
        return self.take(event) if event is not None else ""

    def look_up(self, *, is_end: bool = False) -> None:
        """Raises: ClientGone, and EngineDraining where the server stops before the text's end."""
        if self._client_gone():
            raise ClientGone("The client closed the connection.")
        if not is_end and process.stop_at is not None and time.monotonic() >= process.stop_at:
            raise EngineDraining("The server is stopping.", remedy="Send the request again.")

    @property
    def complete(self) -> bool:
        """Whether all of the text is there: the next ``advance`` makes the outcome."""
        return self.finished is not None or self._text.stopped

    def take(self, event: Tokens | Finished) -> str:
        """The text that this event adds. By one thread at a time."""
        if isinstance(event, Tokens):
            now = time.monotonic()
            self._first_token_at = self._first_token_at or now
            piece = self._text.push(event.token_ids)
            if piece:
                self._last_piece_at = now
            num_new = self._text.num_tokens - len(self.token_ids)
            self.token_ids += event.token_ids[:num_new]
            if event.logprobs is not None:
                self.logprobs += event.logprobs[:num_new]
            return piece
        self._ended = True
        self.finished = event
        if event.reason == "error" and (event.error or "").startswith(GRAMMAR):
            raise InvalidRequest(f"The text cannot go on by its {event.error}", field="grammar")
        if event.reason == "error":
            raise EngineDied("The engine failed while it worked on this request.", remedy="Send the request again.")
        if event.error == TIMEOUT and not self._text.num_tokens:
            raise RequestTimeout("The server did not come to this request in time.", remedy="Send it again later.")
        return self._text.finish()

    def close(self) -> None:
        """End the sequence if it is still running. May be called at any time, and again."""
        if self._closed:
            return
        self._closed = True
        if not self._ended:
            self._generation.abort()
        for tell in self._on_close:
            tell(self)

    def _last_event(self) -> Finished | None:
        """The engine's account of a sequence that was aborted because its text is complete: it comes within a step.

        None when it does not, or when the engine is lost meanwhile: the text is complete all the same.
        """
        until = time.monotonic() + 1.0
        with contextlib.suppress(NanoGPTError):
            while (left := until - time.monotonic()) > 0:
                event = self._generation.get(left)
                if isinstance(event, Finished):
                    return event
        return None

    def _finish(self) -> None:
        if self.finished is None:  # a stop text ended it: the engine has to be told
            self._generation.abort("stop")
            self.finished = self._last_event()
        finished = self.finished
        reason = "stop" if self._text.stopped or finished is None else finished.reason
        self._ended = True
        now = time.monotonic()
        self.outcome = Outcome(
            text=self._text.text,
            finish_reason=reason,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._text.num_tokens,
            num_cached_tokens=finished.num_cached_tokens if finished else 0,
            queue_s=finished.timings.queue_s if finished else 0.0,
            ttft_s=(self._first_token_at or now) - self._started,
            total_s=now - self._started,
            prompt_logprobs=finished.prompt_logprobs if finished else None,
            cache=self.cache,
        )
