"""What goes over the engine's socket, byte for byte: length-prefixed msgpack. Shared by the engine and its clients.

A frame is four bytes of length (little-endian) and one msgpack array whose first item says what it is:

    worker → engine   [SUBMIT, id, prompt_token_ids, params, request_id, client, timeout_s,
                       max_concurrency]   [ABORT, id, "abort" or "stop"]
    engine → worker   [HELLO, {...}]   [STATS, {...}]
                      [NEWS, [id accepted …], [[id, error] refused …],
                             [id, token_ids, logprobs or None, …], [[id, finished] …]]

Ids are the worker's own, one for each request of its connection. NEWS is sent at most twice a step and carries all
that happened to this connection's requests since the last one. Knows no NumPy: HTTP workers import it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import msgpack

from nanogpt import errors
from nanogpt.engine.messages import Finished, GenerateRequest, Timings, Tokens
from nanogpt.sampling_params import SamplingParams, TokenLogprobs

VERSION = 3
SUBMIT, ABORT, HELLO, STATS, NEWS = range(5)

MAX_FRAME_BYTES = 64 * 2**20
_LENGTH = struct.Struct("<I")


def pack(message: list[Any]) -> bytes:
    body: bytes = msgpack.packb(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Puts together what arrives in pieces: feed bytes, iterate for whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def __iter__(self) -> Iterator[list[Any]]:
        """Raises: ValueError when the other side does not speak this protocol."""
        buffer = self._buffer
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {length} bytes")
                stop = start + _LENGTH.size + length
                if len(buffer) < stop:
                    break
                body = bytes(buffer[start + _LENGTH.size : stop])
                start = stop
                message = msgpack.unpackb(body, strict_map_key=False)
                if not isinstance(message, list) or not message:
                    raise ValueError("a frame that is no message")
                yield message
        finally:
            del buffer[:start]


# -- requests -------------------------------------------------------------------------------------------------


def submit_message(request_number: int, request: GenerateRequest) -> list[Any]:
    return [
        SUBMIT,
        request_number,
        list(request.prompt_token_ids),
        request.params.to_wire(),
        request.request_id,
        request.client,
        request.timeout_s,
        request.max_concurrency,
    ]


def read_request(fields: list[Any]) -> GenerateRequest:
    """The request of a SUBMIT message, without its first two items. Raises: InvalidRequest."""
    prompt_token_ids, params, request_id, client, timeout_s, max_concurrency = fields
    return GenerateRequest(
        prompt_token_ids, SamplingParams.from_wire(params), request_id, client, timeout_s, max_concurrency
    )


# -- events ---------------------------------------------------------------------------------------------------


def logprobs_to_wire(logprobs: list[TokenLogprobs] | None) -> list[Any] | None:
    return None if logprobs is None else [[item.logprob, item.rank, item.top] for item in logprobs]


def read_tokens(token_ids: list[int], logprobs: list[Any] | None) -> Tokens:
    return Tokens(token_ids, None if logprobs is None else [_read_logprobs(item) for item in logprobs])


def finished_to_wire(finished: Finished) -> list[Any]:
    prompt_logprobs = finished.prompt_logprobs
    return [
        finished.reason,
        finished.num_prompt_tokens,
        finished.num_output_tokens,
        finished.num_cached_tokens,
        list(asdict(finished.timings).values()),
        finished.error,
        None
        if prompt_logprobs is None
        else [None if item is None else [item.logprob, item.rank, item.top] for item in prompt_logprobs],
    ]


def read_finished(fields: list[Any]) -> Finished:
    reason, num_prompt, num_output, num_cached, timings, error, prompt_logprobs = fields
    return Finished(
        reason,
        num_prompt,
        num_output,
        num_cached,
        Timings(*timings),
        error,
        None
        if prompt_logprobs is None
        else [None if item is None else _read_logprobs(item) for item in prompt_logprobs],
    )


def _read_logprobs(item: list[Any]) -> TokenLogprobs:
    logprob, rank, top = item
    return TokenLogprobs(logprob, rank, [(token_id, value) for token_id, value in top])


# -- errors ---------------------------------------------------------------------------------------------------


def error_to_wire(error: errors.NanoGPTError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "remedy": error.remedy,
        "field": error.field,
        "retry_after_s": error.retry_after_s,
    }


def read_error(values: dict[str, Any]) -> errors.NanoGPTError:
    """The same error, of the same class, on the other side of the socket."""
    error = _ERRORS.get(values["code"], errors.NanoGPTError)(values["message"], remedy=values["remedy"])
    error.field, error.retry_after_s = values["field"], values["retry_after_s"]
    return error


_ERRORS: dict[str, type[errors.NanoGPTError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.NanoGPTError)
}
