"""A tokenizer as the engine needs it, which is its description: read in a process of its own.

While a vocabulary of 50,000 entries is read it is 20 MB of small objects. Freed, they leave holes in the interpreter's
heap that it neither fills nor gives back, and libraries that the engine has no use for: 20 MB of GPT-2's engine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from nanogpt.checkpoint.load import Found
from nanogpt.engine.wire import error_to_wire, read_error
from nanogpt.errors import NanoGPTError
from nanogpt.tokenizer import Tokenizer, tokenizer_from_spec


@dataclass(eq=False)
class DescribedTokenizer:
    """A tokenizer whose description is known. The tokenizer itself is made of it when somebody needs it."""

    name: str
    num_tokens: int
    eos_token_id: int | None
    spec: dict[str, Any]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_from_spec(self.spec)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, allow_special=allow_special)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def to_spec(self) -> dict[str, Any]:
        return self.spec


def read_apart(find: Callable[[], Found]) -> Found:
    """For ``load_checkpoint``. Elsewhere than on Linux, where a fork may not be safe, the tokenizer is read here.

    Raises: what ``find`` raises; MemoryError when the system ended the process that read it.
    """
    if sys.platform != "linux":
        return find()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _describe(find, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        raise MemoryError
    if status != 0:
        raise RuntimeError("the process that read the tokenizer has failed")
    found = json.loads(answer)
    if "error" in found:
        raise read_error(found["error"])
    return DescribedTokenizer(**found["tokenizer"]), tuple(found["notes"])


def _describe(find: Callable[[], Found], writing: int) -> NoReturn:
    """The child's whole life. It shares the parent's files and must leave them as they are: no clean-up of any kind."""
    try:
        try:
            tokenizer, notes = find()
            known = {
                "name": tokenizer.name,
                "num_tokens": tokenizer.num_tokens,
                "eos_token_id": tokenizer.eos_token_id,
                "spec": tokenizer.to_spec(),
            }
            answer: dict[str, Any] = {"tokenizer": known, "notes": notes}
        except NanoGPTError as error:
            answer = {"error": error_to_wire(error)}
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    except BrokenPipeError:  # the engine was ended meanwhile
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)
