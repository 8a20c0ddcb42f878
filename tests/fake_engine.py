"""An engine process with the fake runner: the real process, loop and socket, without a checkpoint.

Started like the real one, by the real supervisor (``engine_argv=ENGINE_ARGV``). What it loads is said by
``settings.model_checkpoint``, comma-separated: ``step_s=0.01`` (a slower model), ``load_s=0.5``, ``crash`` (ends while
loading with a traceback), ``refuse`` (a bad checkpoint), ``needs=PATH`` (refused unless the file is there),
``killed`` (as by the kernel when memory is short), ``nan`` (no finite logits), ``name=x`` (of another digest) and
``tokenizer=abc`` (a character model). A folder holds a checkpoint whose text is such a list.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from fake_runner import FakeRunner, config

from nanogpt.checkpoint.locate import locate
from nanogpt.engine.process import Model, main, num_slots
from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint
from nanogpt.runner.base import Batch, Float32, Int32, StepOutput
from nanogpt.settings import Settings
from nanogpt.tokenizer import characters

ENGINE_ARGV = (sys.executable, str(Path(__file__).resolve()))
CONFIG = config(block_size=512, num_tokens=200)
TOKENIZER = characters([chr(0x21 + i) for i in range(CONFIG.num_tokens)])


class SlowRunner(FakeRunner):
    step_s = 0.0
    nan = False

    def step(self, batch: Batch) -> StepOutput:
        time.sleep(self.step_s)
        return super().step(batch)

    def logits(self, token_ids: Int32) -> Float32:
        return super().logits(token_ids) + np.float32(np.nan if self.nan else 0)


def load(settings: Settings) -> Model:
    path = ""
    text = settings.model_checkpoint
    if text.startswith("/"):
        path = str(locate(text).path)
        text = Path(path).read_text()
        if not text.endswith(","):
            raise CorruptCheckpoint("The file ends in the middle.")
    options = dict(part.partition("=")[::2] for part in text.split(",") if part)
    assert not {"API_KEY", "ADMIN_KEY", "REDIS_URL"} & set(os.environ)
    assert not settings.api_key
    assert not settings.admin_key
    assert not settings.redis_url
    time.sleep(float(options.get("load_s", 0)))
    if "crash" in options:
        raise RuntimeError("something unforeseen")
    if "refuse" in options:
        raise CorruptCheckpoint("The file is damaged.")
    if "needs" in options and not os.path.exists(options["needs"]):
        raise CheckpointNotFound(f"There is no file at {options['needs']}.")
    if "killed" in options:
        os.kill(os.getpid(), signal.SIGKILL)
    runner = SlowRunner(CONFIG, num_slots(settings), max_batch_tokens=settings.max_batch_tokens)
    runner.step_s = float(options.get("step_s", 0))
    runner.nan = "nan" in options
    name = options.get("name", "fake")
    alphabet = options.get("tokenizer", "")
    spec = characters(list(alphabet)).to_spec() if alphabet else TOKENIZER.to_spec()
    digest = hashlib.sha256(name.encode()).hexdigest()
    card = {"family": "fake"} | ({"path": path} if path else {})
    return Model(runner, name, card, digest, spec, None)


if __name__ == "__main__":
    sys.exit(main(load))
