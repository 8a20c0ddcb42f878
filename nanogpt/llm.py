"""The Python API: a checkpoint in, texts out, in this process.

>>> with LLM("log/model_40000.pt") as llm:
...     print(llm.generate("Once upon a time", SamplingParams(max_tokens=50))[0].text)

An ``LLM`` has an engine of its own and no thread: whoever waits for a text computes a step, for everybody who waits.
So threads and interleaved streams share one batch. Serving over HTTP is ``nanogpt.web``'s business, not this file's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanogpt.checkpoint import card, load_checkpoint
from nanogpt.engine.core import Engine
from nanogpt.engine.grammar import Grammars
from nanogpt.engine.messages import GRAMMAR, Finished, FinishReason, GenerateRequest, Tokens
from nanogpt.errors import InvalidRequest, NanoGPTError
from nanogpt.runner import create_runner
from nanogpt.sampling_params import SamplingParams, TokenLogprobs
from nanogpt.settings import Settings
from nanogpt.tokenizer.base import empty_prompt
from nanogpt.tokenizer.text import TextStream

if TYPE_CHECKING:
    from nanogpt.model.config import GPTConfig
    from nanogpt.tokenizer.base import Tokenizer

Prompt = str | Sequence[int]

_NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt was continued with.

    ``text`` and ``token_ids`` are the new ones only; ``full_text`` begins with the prompt. A stop string or stop token
    is part of neither; with a stop string, ``token_ids`` runs up to the token that completed it. ``logprobs`` runs
    alongside ``token_ids``, ``prompt_logprobs`` alongside ``prompt_token_ids`` (its first is None), where asked for.
    ``num_cached_tokens`` of the prompt were computed for an earlier one with the same beginning.
    """

    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def full_text(self) -> str:
        return self.prompt + self.text

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class LLM:
    """A checkpoint of any nano-GPT family, ready to generate. May be used by several threads.

    path: a file or a folder such as ``log/``; empty: the model embedded in the package. device: auto, cpu or cuda.
    precision: auto, fp32, bf16, fp16, int8 or int4. runner: auto, native or torch. threads: of a CPU's arithmetic, 0
    for as many as the container may use. max_batch_size: sequences that are computed together. max_batch_tokens: the
    token budget of a step. context_overflow: at the end of the context ``stop``, or ``crop`` the text from the left as
    nanoGPT does. tokenizer: gpt2 or a path, where it cannot be detected. speculate: auto, off, or a number of guesses.

    Raises: CheckpointError, TokenizerError, SettingsError, MissingDependency.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = "",
        *,
        precision: str = "auto",
        device: str = "auto",
        runner: str = "auto",
        threads: int = 0,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        context_overflow: str = "stop",
        tokenizer: str = "",
        speculate: str = "auto",
    ) -> None:
        # The server's settings know the limits of these, and say them.
        self._settings = settings = Settings(
            model_checkpoint=os.fspath(path or ""),
            precision=precision,
            device=device,
            runner=runner,
            threads=threads,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            context_overflow=context_overflow,
            tokenizer=tokenizer,
            speculate=speculate,
        )
        checkpoint = load_checkpoint(settings.model_checkpoint, tokenizer=settings.tokenizer)
        self._runner = create_runner(
            checkpoint,
            device=settings.device,
            precision=settings.precision,
            runner=settings.runner,
            num_slots=settings.max_batch_size,
            threads=settings.threads,
        )
        self.config: GPTConfig = checkpoint.config
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.chat_template: str | None = checkpoint.chat_template
        self.card: dict[str, Any] = {
            **card(checkpoint),
            "device": self._runner.device,
            "precision": self._runner.precision,
            "arithmetic": self._runner.arithmetic,
            "int8_matrices": self._runner.int8_matrices,
            "runner": self._runner.name,
        }
        self._grammars = Grammars(lambda: self.tokenizer, self.config.num_tokens)
        self._lock = threading.Lock()
        self._open: dict[int, _Request] = {}
        self._engine: Engine | None = self._new_engine()

    def _new_engine(self) -> Engine:
        return Engine(
            self._runner,
            max_batch_size=self._settings.max_batch_size,
            max_batch_tokens=self._settings.max_batch_tokens,
            max_queue=_NO_LIMIT,
            context_overflow=self._settings.context_overflow,
            eos_token_id=self.tokenizer.eos_token_id,
            grammars=self._grammars,
            speculate=self._settings.speculate,
        )

    # -- texts -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; one completion for each, in their order.

        A prompt is a text or a list of token ids; a single one gives a list of one. ``params`` is for all of them, or
        a list with one for each. An empty text starts from the end-of-text token, or from a line break where the
        model has none (a character model). All are computed together; Ctrl-C ends them all.

        Raises: InvalidRequest, before anything is computed; NanoGPTError when the model could not compute.
        """
        requests = self._requests(prompts, params)
        try:
            for request in requests:
                self._submit(request)
            for request in requests:
                while not request.finished():
                    self._step(request.finished)
        finally:
            self._abandon(requests)
        return [request.completion() for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The new text, piece by piece, as soon as it is certain; laid end to end the pieces are ``generate``'s text.

        No piece ends within a character or holds a part of a stop string. Leaving the loop, or closing the iterator,
        ends the request.

        Raises: InvalidRequest, at once.
        """
        (request,) = self._requests([prompt], params)
        return self._pieces(request)

    def _pieces(self, request: _Request) -> Iterator[str]:
        try:
            self._submit(request)
            finished = False
            while not finished:
                self._step(request.has_news)
                with self._lock:  # the last piece may have come by another's step, together with the end
                    piece, finished = request.take(), request.finished()
                if piece:
                    yield piece
            request.completion()  # an error is raised here as in generate
        finally:
            self._abandon([request])

    # -- numbers -----------------------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The model's logits at every position of one text. Shapes: ``[T]`` → ``[T, V]``.

        Raises: InvalidRequest when there are more tokens than the context holds, none, or ids that the model lacks.
        """
        ids = np.asarray(token_ids)
        limit = self.config.block_size
        if ids.ndim != 1 or not 0 < len(ids) <= limit:
            raise InvalidRequest(
                f"token_ids has the shape {ids.shape}; it must be one list of 1 to {limit} ids, the model's context.",
                field="token_ids",
            )
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise InvalidRequest(
                f"token_ids must be integers from 0 to {self.config.vocab_size - 1}.", field="token_ids"
            )
        with self._lock:
            self._running()
            return self._runner.logits(ids.astype(np.int32))

    # -- its life ----------------------------------------------------------------------------------------------

    def eval(self) -> LLM:
        """The guide calls ``model.eval()`` after loading. There is nothing to switch: it never trains."""
        return self

    def close(self) -> None:
        """Give back memory and threads. What is being generated ends with ``abort``; the object is not used again."""
        with self._lock:
            if self._engine is not None:
                self._end_all()
                self._engine = None
                self._runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        card = self.card
        return f"LLM({card['path']!r}, device={card['device']!r}, precision={card['precision']!r})"

    # -- parts -------------------------------------------------------------------------------------------------

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Request]:
        batch = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(batch)
        else:
            each = list(params)
            if len(each) != len(batch):
                raise InvalidRequest(f"There are {len(batch)} prompts but {len(each)} params.", field="params")
        return [self._request(prompt, p) for prompt, p in zip(batch, each, strict=True)]

    def _request(self, prompt: Prompt, params: SamplingParams) -> _Request:
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params must be SamplingParams, not {type(params).__name__}.", field="params")
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        token_ids = (
            (self.tokenizer.encode(prompt) or empty_prompt(self.tokenizer)) if isinstance(prompt, str) else list(prompt)
        )
        return _Request(text, token_ids, params, TextStream(self.tokenizer, params.stop))

    def _running(self) -> Engine:
        if self._engine is None:
            raise NanoGPTError("This LLM was closed.", remedy="Make a new one.")
        return self._engine

    def _submit(self, request: _Request) -> None:
        with self._lock:
            engine = self._running()
            request.engine = engine
            message = GenerateRequest(request.prompt_token_ids, request.params, timeout_s=float("inf"))
            request.handle = engine.submit(message, request.receive)
            self._open[id(request)] = request

    def _step(self, done: Callable[[], bool]) -> None:
        """Compute one step, unless what is waited for is there already: another thread may have computed it."""
        with self._lock:
            if done():
                return
            try:
                self._running().step()
            except Exception:
                raise
            except BaseException:
                # Ctrl-C in the middle of a step: what scheduler and slots hold is half of something.
                self._end_all()
                self._engine = self._new_engine()
                raise

    def _abandon(self, requests: Sequence[_Request]) -> None:
        """The caller no longer waits for these; those that have not ended are aborted."""
        with self._lock:
            for request in requests:
                if self._open.pop(id(request), None) is not None and not request.finished():
                    request.engine.abort(request.handle)

    def _end_all(self) -> None:
        for request in self._open.values():
            request.receive(Finished("abort", len(request.prompt_token_ids), len(request.token_ids)))
        self._open.clear()


class _Request:
    """One request on its way: what the engine said of it so far, as text. Changed only under the LLM's lock."""

    engine: Engine
    handle: int

    def __init__(self, prompt: str, prompt_token_ids: list[int], params: SamplingParams, stream: TextStream) -> None:
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.token_ids: list[int] = []
        self._stream = stream
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._end: Finished | None = None
        self._untaken = ""

    def finished(self) -> bool:
        return self._end is not None

    def has_news(self) -> bool:
        self._read()
        return self.finished() or bool(self._untaken)

    def take(self) -> str:
        """The text that has come since the last time."""
        self._read()
        piece, self._untaken = self._untaken, ""
        return piece

    def receive(self, event: Tokens | Finished) -> None:
        if isinstance(event, Finished):
            self._end = self._end or event
            return
        self.token_ids += event.token_ids
        if self._logprobs is not None and event.logprobs is not None:
            self._logprobs += event.logprobs
        if self.params.stop:
            self._read()
            if self._stream.stopped:
                del self.token_ids[self._stream.num_tokens :]
                if self._logprobs is not None:
                    del self._logprobs[self._stream.num_tokens :]
                self.engine.abort(self.handle)

    def _read(self) -> None:
        """To text, what is not yet. Late where no stop string can end the text: between two steps all threads wait."""
        self._untaken += self._stream.push(self.token_ids[self._stream.num_tokens :])
        if self.finished():
            self._untaken += self._stream.finish()

    def completion(self) -> Completion:
        """Raises: NanoGPTError when the engine could not compute it."""
        assert self._end is not None
        self._read()
        if self._end.reason == "error" and (self._end.error or "").startswith(GRAMMAR):
            raise InvalidRequest(f"The text cannot go on by its {self._end.error}", field="grammar")
        if self._end.reason == "error":
            raise NanoGPTError(f"The model could not compute the request: {self._end.error}")
        return Completion(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            text=self._stream.text,
            token_ids=self.token_ids,
            finish_reason="stop" if self._stream.stopped else self._end.reason,
            logprobs=self._logprobs,
            prompt_logprobs=self._end.prompt_logprobs,
            num_cached_tokens=self._end.num_cached_tokens,
        )


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many as a list of many."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__len__"):
        raise InvalidRequest(
            f"prompts must be a text, a list of token ids, or a list of these, not {type(prompts).__name__}.",
            field="prompts",
        )
    batch = [prompt.tolist() if isinstance(prompt, np.generic | np.ndarray) else prompt for prompt in prompts]
    if batch and all(isinstance(item, int) and not isinstance(item, bool) for item in batch):
        return [batch]
    for i, prompt in enumerate(batch):
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, Sequence) or not all(
            isinstance(item, int | np.integer) and not isinstance(item, bool) for item in prompt
        ):
            raise InvalidRequest(
                f"Prompt {i} is {prompt!r}; it must be a text or a list of token ids.", field="prompts"
            )
    return batch


# -- as the deployment guide calls it ---------------------------------------------------------------------------------


def load_model_from_checkpoint(path: str | os.PathLike[str] | None = "", **options: Any) -> LLM:
    """The guide's name for ``LLM(path, **options)``."""
    return LLM(path, **options)


def batch_generate(model: LLM, prompts: Sequence[Prompt], **params: Any) -> list[str]:
    """The guide's name for generating many texts together; each begins with its prompt, as /generate's answer does.

    Keywords are those of SamplingParams, and ``max_length``, the guide's name for ``max_tokens`` (new tokens).

    Raises: InvalidRequest.
    """
    if "max_length" in params:
        if "max_tokens" in params:
            raise InvalidRequest("max_length and max_tokens mean the same; give one of them.", field="max_length")
        params["max_tokens"] = params.pop("max_length")
    known = [field.name for field in fields(SamplingParams)]
    for name in params:
        if name not in known:
            raise InvalidRequest(
                f"There is no parameter {name!r}.", remedy=f"There are max_length, {', '.join(known)}.", field=name
            )
    return [completion.full_text for completion in model.generate(prompts, SamplingParams(**params))]
