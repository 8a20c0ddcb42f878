"""Tokens a second, time left and MFU of a run. Looks at the clock, never at the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from nanogpt.model.config import GPTConfig
from nanogpt.train.config import TrainConfig
from nanogpt.train.workers import Workers

# Dense bfloat16 operations a second, from the vendors' data sheets; matched against the device's name, in this order.
_PEAK_TFLOPS: Final = (("H200", 989), ("H100", 989), ("A100", 312), ("L40S", 362), ("L4", 121), ("A10", 125),
                       ("V100", 125), ("T4", 65), ("4090", 165), ("3090", 71))  # fmt: skip


class Throughput:
    """Counts since the last ``numbers``, over all processes; what is ``paused`` does not count."""

    def __init__(self, model: GPTConfig, config: TrainConfig, workers: Workers) -> None:
        self._config, self._world = config, workers.world
        self._flops = flops_per_token(model)
        self._peak = config.peak_tflops * 1e12 or _peak(workers.device)
        self._tokens = self._steps = 0
        self._seconds_per_step = 0.0
        self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        self._tokens += tokens * self._world
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def numbers(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = self._tokens / seconds
        latest = seconds / self._steps
        # Steps differ with the machine's other work: the time left follows slowly.
        self._seconds_per_step = 0.8 * self._seconds_per_step + 0.2 * latest if self._seconds_per_step else latest
        self._start, self._tokens, self._steps = now, 0, 0
        found = {
            "tokens_per_second": rate,
            "seconds_left": (self._config.max_steps - step) * self._seconds_per_step,
        }
        if self._peak:
            found["mfu"] = rate * self._flops / (self._peak * self._world)
        return found


def flops_per_token(model: GPTConfig) -> int:
    """Forward and backward. Source: PaLM paper (arXiv 2204.02311), appendix B, as nanoGPT computes it."""
    weights = model.num_parameters() - model.block_size * model.n_embd
    return 6 * weights + 12 * model.n_layer * model.n_embd * model.block_size


def _peak(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in name), 0.0)
