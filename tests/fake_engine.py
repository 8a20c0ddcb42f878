"""An engine process with the fake runner: the real process, loop and socket, without a checkpoint.

Started like the real one, by the real supervisor (``engine_argv=ENGINE_ARGV``). What it loads is said by
``settings.model_checkpoint``, comma-separated: ``step_s=0.01`` (a slower model), ``load_s=0.5``, ``crash`` (ends while
loading with a traceback), ``refuse`` (a bad checkpoint), ``needs=PATH`` (refused unless the file is there).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fake_runner import FakeRunner, config

from nanogpt.engine.process import Model, main, num_slots
from nanogpt.errors import CheckpointNotFound, CorruptCheckpoint
from nanogpt.runner.base import Batch, StepOutput
from nanogpt.settings import Settings

ENGINE_ARGV = (sys.executable, str(Path(__file__).resolve()))
CONFIG = config(block_size=512, num_tokens=200)


class SlowRunner(FakeRunner):
    step_s = 0.0

    def step(self, batch: Batch) -> StepOutput:
        time.sleep(self.step_s)
        return super().step(batch)


def load(settings: Settings) -> Model:
    options = dict(part.partition("=")[::2] for part in settings.model_checkpoint.split(",") if part)
    assert not {"API_KEY", "REDIS_URL"} & os.environ.keys()
    assert not settings.api_key
    assert not settings.redis_url
    time.sleep(float(options.get("load_s", 0)))
    if "crash" in options:
        raise RuntimeError("something unforeseen")
    if "refuse" in options:
        raise CorruptCheckpoint("The file is damaged.")
    if "needs" in options and not os.path.exists(options["needs"]):
        raise CheckpointNotFound(f"There is no file at {options['needs']}.")
    runner = SlowRunner(CONFIG, num_slots(settings), max_batch_tokens=settings.max_batch_tokens)
    runner.step_s = float(options.get("step_s", 0))
    return Model(runner, "fake", {"family": "fake"}, "0" * 64, {"kind": "fake"}, None)


if __name__ == "__main__":
    sys.exit(main(load))
