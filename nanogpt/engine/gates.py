"""What a model has to pass before it serves: it computes, and where asked its loss on a text is low enough.

Run by the engine process, between loading and the report that it is ready. Knows nothing of how it is started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.engine.core import Engine
from nanogpt.engine.messages import Finished, GenerateRequest
from nanogpt.engine.sequence import Event
from nanogpt.errors import CorruptCheckpoint, EngineDied, InvalidRequest, ReloadFailed
from nanogpt.runner.base import Runner
from nanogpt.sampling_params import SamplingParams
from nanogpt.tokenizer.base import Tokenizer

_SMOKE_TOKENS = 4
_MAX_TEXT_BYTES = 16 * 2**20


def smoke_test(runner: Runner, start_token_id: int) -> None:
    """A few tokens, by the way that requests take, and finite logits.

    Raises: CorruptCheckpoint, or EngineDied when nothing can be computed.
    """
    events: list[Event] = []
    engine = Engine(runner, max_batch_size=1, max_queue=1, prefix_cache=False)
    max_tokens = min(_SMOKE_TOKENS, runner.config.block_size)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine.submit(GenerateRequest([start_token_id], params), events.append)
    while engine.has_work():
        engine.step()
    output: list[int] = []
    for event in events:
        if not isinstance(event, Finished):
            output += event.token_ids
        elif event.reason == "error":
            raise EngineDied(f"The model cannot be computed: {event.error}")
    logits = runner.logits(np.asarray([start_token_id, *output][: runner.config.block_size], np.int32))
    if not np.isfinite(logits[:, : runner.config.num_tokens]).all():
        raise CorruptCheckpoint(
            f"The model computes no finite logits in {runner.precision}.",
            remedy="Its weights are damaged or its training diverged; nanogpt inspect shows more.",
        )


def loss_gate(runner: Runner, tokenizer: Tokenizer, gate: Mapping[str, Any]) -> float:
    """The mean loss (nats a token) on the gate's text, as ``nanogpt eval --loss`` computes it.

    Raises: ReloadFailed when it is above ``max_loss``; InvalidRequest when the text is none.
    """
    loss = mean_loss(runner, tokenizer.encode(_text(str(gate["text"]))))
    max_loss = float(gate["max_loss"])
    if not loss <= max_loss:  # also refuses NaN
        raise ReloadFailed(
            f"Its loss on the given text is {loss:.4f} nats a token; the gate admits {max_loss:.4f}.",
            remedy="Train further, or raise max_loss.",
        )
    return loss


def mean_loss(runner: Runner, token_ids: list[int]) -> float:
    """Window by window of the context's length, without overlap. Padded ids do not count."""
    window, total = runner.config.block_size, len(token_ids) - 1
    if total < 1:
        raise InvalidRequest(f"The loss gate's text has {total + 1} tokens; a loss needs two.", field="loss_gate.text")
    loss = 0.0
    for start in range(0, total, window):
        ids = np.asarray(token_ids[start : start + window + 1], np.int32)
        logits = runner.logits(ids[:-1])[:, : runner.config.num_tokens].astype(np.float64)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        loss += float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).sum())
        if not math.isfinite(loss):
            break
    return loss / total


def _text(given: str) -> str:
    """The text itself where it has a line break, else the content of the file that it names.

    Raises: InvalidRequest.
    """
    if "\n" in given:
        return given
    path = Path(given)
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise InvalidRequest(
                f"The loss gate's text {path} is larger than {_MAX_TEXT_BYTES} bytes.",
                field="loss_gate.text",
                remedy="A few hundred kilobytes tell as much.",
            )
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is one, and so is a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRequest(
            f"The loss gate's text {str(path)[:200]!r} cannot be read: {reason}.",
            field="loss_gate.text",
            remedy="Name a file on the server; a text that is given literally needs a line break.",
        ) from None
