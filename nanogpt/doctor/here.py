"""What is checked on this machine: the settings that ``nanogpt serve`` would start with, the readings, the checkpoint.

The checkpoint is loaded when the first check asks for it, once, and so is the model that is computed on trial. A second
model is served with the same settings: it has a ``Here`` of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nanogpt.doctor.readings import Machine
from nanogpt.engine.process import num_slots
from nanogpt.errors import NanoGPTError
from nanogpt.runner import choose_runner
from nanogpt.settings import Settings

if TYPE_CHECKING:
    from nanogpt.checkpoint.types import Checkpoint

# Measured on Linux, rounded up: an engine before its model, by runner; arbiter and supervisor; an HTTP worker.
_ENGINE_BYTES = {"native": 40_000_000, "torch": 400_000_000}
_OWNERS_BYTES = 50_000_000
_WORKER_BYTES = 60_000_000
_WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.1, "int4": 0.7}
_TRIAL_TOKENS = 32


@dataclass(frozen=True)
class Need:
    """Bytes that serving one model takes at most."""

    weights: int
    kv: int
    engine: int
    """The process that has the model, without it."""
    where: str
    """``cpu`` or ``cuda``: where weights, K and V lie."""

    @property
    def model(self) -> int:
        return self.weights + self.kv


@dataclass(frozen=True)
class Trial:
    """What a model did when it was computed: alone, one token after the other."""

    runner: str
    device: str
    precision: str
    token_s: float


@dataclass(frozen=True)
class Here:
    settings: Settings
    machine: Machine

    @cached_property
    def _loaded(self) -> Checkpoint | NanoGPTError:
        from nanogpt.checkpoint import load_checkpoint

        try:
            return load_checkpoint(self.settings.model_checkpoint, tokenizer=self.settings.tokenizer)
        except NanoGPTError as error:
            return error

    @property
    def checkpoint(self) -> Checkpoint | None:
        """None where it cannot be served; ``refusal`` then says why."""
        return None if isinstance(self._loaded, NanoGPTError) else self._loaded

    @property
    def refusal(self) -> NanoGPTError | None:
        return self._loaded if isinstance(self._loaded, NanoGPTError) else None

    @cached_property
    def second(self) -> Here | None:
        """The model to compare with, looked at as the supervisor starts it; None where there is none."""
        s = self.settings
        if not s.compare_checkpoint:
            return None
        return replace(self, settings=replace(s, model_checkpoint=s.compare_checkpoint, compare_checkpoint=""))

    def runner(self) -> tuple[str, str]:
        """Name and device of the runner. Raises: SettingsError, MissingDependency."""
        s = self.settings
        return choose_runner(device=s.device, precision=s.precision, runner=s.runner)

    def need(self, checkpoint: Checkpoint) -> Need:
        """What serving this checkpoint with these settings takes.

        Raises: SettingsError, MissingDependency; CheckpointError for an int4 plan that cannot be followed.
        """
        from nanogpt.runner.int4_plan import matrix_sizes, read_plan  # NumPy

        name, device = self.runner()
        precision = self.settings.precision
        if precision == "auto":
            precision = "int8" if name == "native" else "fp32" if device == "cpu" else "bf16"
        config = checkpoint.config
        positions = (num_slots(self.settings) + 1) * config.block_size
        # K and V of the native runner are bytes with a scale, those of PyTorch are of the weights' type.
        kv_bytes = 1.1 if name == "native" and precision != "fp32" else _WEIGHT_BYTES[precision]
        weights = config.num_parameters() * _WEIGHT_BYTES[precision]
        if precision == "int4":
            in_int8 = sum(n for name, n in matrix_sizes(config).items() if name in (read_plan(checkpoint) or ()))
            weights += in_int8 * (_WEIGHT_BYTES["int8"] - _WEIGHT_BYTES["int4"])
        return Need(
            weights=int(weights),
            kv=int(2 * config.n_layer * config.n_embd * positions * kv_bytes),
            engine=_ENGINE_BYTES[name],
            where=device,
        )

    def other_bytes(self) -> int:
        """What the processes take that have no model, whatever the number of models."""
        return _OWNERS_BYTES + self.settings.http_workers * (_WORKER_BYTES + self.settings.cache_bytes)

    @cached_property
    def trial(self) -> Trial | NanoGPTError | None:
        """The model computed as it would be served, for a moment; why that failed; None without a model or room."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return None
        try:
            need = self.need(checkpoint)
            if need.where == "cpu" and need.weights > self.machine.free_bytes:
                return None
            return _compute(checkpoint, self.settings)
        except NanoGPTError as error:
            return error


def _compute(checkpoint: Checkpoint, settings: Settings) -> Trial:
    """Raises: NanoGPTError."""
    from nanogpt.engine.gates import smoke_test
    from nanogpt.runner import create_runner

    runner = create_runner(
        checkpoint,
        device=settings.device,
        precision=settings.precision,
        runner=settings.runner,
        num_slots=1,
        threads=settings.threads,
    )
    try:
        start = checkpoint.tokenizer.eos_token_id or 0
        smoke_test(runner, start)
        count = min(_TRIAL_TOKENS, checkpoint.config.block_size)
        return Trial(runner.name, runner.device, runner.arithmetic, _seconds_for(runner, start, count) / count)
    finally:
        runner.close()


def _seconds_for(runner: Any, start: int, count: int) -> float:
    from nanogpt.engine.core import Engine
    from nanogpt.engine.messages import GenerateRequest
    from nanogpt.sampling_params import SamplingParams

    engine = Engine(runner, max_batch_size=1, max_queue=1, prefix_cache=False)
    engine.submit(
        GenerateRequest([start], SamplingParams(seed=1, max_tokens=count, ignore_eos=True)), lambda event: None
    )
    since = time.perf_counter()
    while engine.has_work():
        engine.step()
    return time.perf_counter() - since
