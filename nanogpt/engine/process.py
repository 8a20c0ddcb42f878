"""The engine process: ``python -m nanogpt.engine.process``, started by the supervisor and by nobody else.

It reads one line of JSON from its standard input (settings, path of its socket, number of the status pipe, a loss gate
or none), loads the checkpoint, tests it, listens, and says on the status pipe how far it is: one JSON object a line
with ``state`` (``loading``, ``ready``, ``failed``), ``reason``, and ``model`` or ``error``. Its standard input stays
open for as long as the supervisor lives; when that ends, however it ends, so does this process, at once. SIGTERM
drains.

Exit codes: 0 drained, 1 the runner was lost or something unforeseen happened, 2 the checkpoint or a setting is wrong.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanogpt import logs
from nanogpt.engine import gates
from nanogpt.engine.core import Engine
from nanogpt.engine.grammar import Grammars
from nanogpt.engine.server import EngineServer
from nanogpt.engine.wire import error_to_wire
from nanogpt.errors import NanoGPTError
from nanogpt.runner.base import Runner
from nanogpt.runner.memory import give_back_memory
from nanogpt.settings import Settings
from nanogpt.tokenizer import tokenizer_from_spec

logger = logging.getLogger("nanogpt.engine")


@dataclass(frozen=True)
class Model:
    """What the engine process serves: a runner, and what HTTP workers have to know of the checkpoint."""

    runner: Runner
    name: str
    card: dict[str, Any]
    digest: str
    tokenizer_spec: dict[str, Any]
    eos_token_id: int | None


def load_model(settings: Settings) -> Model:
    """The settings' checkpoint on the settings' device. Raises: NanoGPTError."""
    from nanogpt.checkpoint import card, load_checkpoint
    from nanogpt.checkpoint.digest import weights_digest
    from nanogpt.engine.described import read_apart
    from nanogpt.runner import create_runner

    checkpoint = load_checkpoint(settings.model_checkpoint, tokenizer=settings.tokenizer, read_tokenizer=read_apart)
    logger.info("Checkpoint %s: %s parameters.", checkpoint.path, f"{checkpoint.config.num_parameters():,}")
    runner = create_runner(
        checkpoint,
        device=settings.device,
        precision=settings.precision,
        runner=settings.runner,
        num_slots=num_slots(settings),
        threads=settings.threads,
    )
    return Model(
        runner=runner,
        name=checkpoint.name,
        card={**card(checkpoint), "arithmetic": runner.arithmetic, "int8_matrices": runner.int8_matrices},
        digest=weights_digest(checkpoint),
        tokenizer_spec=checkpoint.tokenizer.to_spec(),
        eos_token_id=checkpoint.tokenizer.eos_token_id,
    )


def num_slots(settings: Settings) -> int:
    """A slot for each running sequence, and a quarter more that stay prefixes when all places are taken."""
    extra = max(1, settings.max_batch_size // 4) if settings.prefix_cache else 0
    return settings.max_batch_size + extra


def main(load: Callable[[Settings], Model] = load_model) -> int:
    """The life of an engine process. Returns the exit code."""
    started = json.loads(sys.stdin.buffer.readline())
    status = StatusPipe(started["status_fd"])
    threading.Thread(target=_end_with_supervisor, name="end-with-supervisor", daemon=True).start()
    settings = Settings(**started["settings"])
    logs.configure(settings.log_format, settings.log_level)
    # SIGTERM while loading: there is nothing to drain.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    try:
        status.say("loading", f"Loading {settings.model_checkpoint or 'the embedded model'}.")
        since = time.monotonic()
        model = load(settings)
        test(model, started.get("loss_gate"))
        serve(settings, model, started["socket"], status, since)
    except NanoGPTError as error:
        status.say("failed", str(error), error=error_to_wire(error))
        return 2 if error.exit_code == 2 else 1
    except MemoryError:
        status.say("failed", "There is not enough memory for this checkpoint with these settings.")
        return 2
    except Exception as error:
        logger.exception("The engine cannot go on.")
        status.say("failed", f"{type(error).__name__}: {error}")
        return 1
    return 0


def test(model: Model, gate: dict[str, Any] | None) -> None:
    """Before anybody is served. Raises: NanoGPTError when the model computes nothing sensible or fails the gate."""
    gates.smoke_test(model.runner, model.eos_token_id or 0)
    if gate is not None:
        loss = gates.loss_gate(model.runner, tokenizer_from_spec(model.tokenizer_spec), gate)
        logger.info("%s: the loss on the gate's text is %.4f.", model.name, loss)


def _max_mixed_tokens(settings: Settings, runner: Runner) -> int | None:
    """The setting; by default what keeps a step with prompts in it at about twice the time of a full one without.

    On a CPU time goes with the rows that are computed. A GPU computes hundreds in the time of one.
    """
    if settings.max_mixed_tokens:
        return settings.max_mixed_tokens
    return 2 * settings.max_batch_size if runner.device == "cpu" else None


def serve(settings: Settings, model: Model, path: str, status: StatusPipe, since: float) -> None:
    """Listen at ``path`` and serve the model until SIGTERM."""
    runner = model.runner
    engine = Engine(
        runner,
        max_batch_size=settings.max_batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_mixed_tokens=_max_mixed_tokens(settings, runner),
        max_queue=settings.max_queue,
        prefix_cache=settings.prefix_cache,
        context_overflow=settings.context_overflow,
        eos_token_id=model.eos_token_id,
        grammars=Grammars(partial(tokenizer_from_spec, model.tokenizer_spec), runner.config.num_tokens),
        speculate=settings.speculate,
    )
    hello = {
        "model": model.name,
        "device": runner.device,
        "precision": runner.precision,
        "runner": runner.name,
        "block_size": runner.config.block_size,
        "card": model.card,
        "digest": model.digest,
        "tokenizer": model.tokenizer_spec,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(128)
        server = EngineServer(engine, listener, hello=hello, drain_timeout_s=settings.drain_timeout_s)
        server.install_signal_handlers()
        # What was loaded stays: the collector need not walk it again in the middle of a step.
        gc.collect()
        give_back_memory()
        gc.freeze()
        where = f"{runner.device}, {runner.name}, {model.card.get('arithmetic', runner.precision)}"
        logger.info("Ready: %s on %s after %.1f s.", model.name, where, time.monotonic() - since)
        path = model.card.get("path", settings.model_checkpoint)
        about = {"name": model.name, "path": path, "digest": model.digest, "card": model.card}
        status.say("ready", "", model=about)
        server.run()
    runner.close()
    logger.info("Drained: %s ends.", model.name)


class StatusPipe:
    """Tells the supervisor how far this process is."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._file = os.fdopen(fd, "w", encoding="utf-8")

    def say(self, state: str, reason: str, **more: Any) -> None:
        try:
            self._file.write(json.dumps({"state": state, "reason": reason, **more}) + "\n")
            self._file.flush()
        except BrokenPipeError:
            os._exit(1)  # there is no supervisor any more


def _end_with_supervisor() -> None:
    """Wait for the end of standard input: the supervisor is gone, and with it everybody who could use this process."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
