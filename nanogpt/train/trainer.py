"""The training loop: batches in, a model that has learned, checkpoints on the way.

Pretraining and fine-tuning differ in what they hand to ``train``: the model, the batches, and what is stored with it.
Randomness (batches, dropout) is a function of the seed, the step and the micro batch, never of what ran before: a run
that is resumed, or spread over processes, computes what the uninterrupted one on one process computes.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from nanogpt.errors import NanoGPTError, SettingsError
from nanogpt.model.gpt import GPT
from nanogpt.runner.cpus import usable_cpus
from nanogpt.train import checkpoints
from nanogpt.train.batches import Batches, MicroBatch
from nanogpt.train.config import TrainConfig
from nanogpt.train.optimizer import create_optimizers, learning_rate, set_learning_rate
from nanogpt.train.report import Report
from nanogpt.train.throughput import Throughput
from nanogpt.train.workers import Workers


@dataclass(frozen=True)
class Task:
    """What is trained on what. ``stored`` goes into every checkpoint as it is: the tokenizer, the chat template."""

    model: GPT
    train: Batches
    validation: Batches | None
    stored: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """``ended_by`` names the signal that ended the run before ``max_steps``."""

    step: int
    val_loss: float | None
    path: Path | None
    ended_by: int | None = None


def train(
    task: Task, config: TrainConfig, workers: Workers, *, resume: Path | None = None, json_lines: bool = False
) -> Result:
    """Runs to ``max_steps``, or until SIGINT or SIGTERM, which save a checkpoint first.

    Raises: NanoGPTError when the loss is not finite: the checkpoints are those of before. CheckpointError.
    """
    return _Run(task, config, workers, resume, json_lines).run()


def prepare_torch(config: TrainConfig, workers: Workers) -> None:
    """Threads and seeds, before the model is made."""
    if config.accumulation % workers.world:
        raise SettingsError(
            f"accumulation is {config.accumulation}; it must be a multiple of the {workers.world} processes.",
            field="accumulation",
        )
    if workers.device.type == "cpu":
        share = max(1, usable_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        torch.set_num_threads(config.threads or share)
    else:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)


class _Run:
    def __init__(
        self, task: Task, config: TrainConfig, workers: Workers, resume: Path | None, json_lines: bool
    ) -> None:
        self.task, self.config, self.workers = task, config, workers
        self.folder = Path(config.out_dir)
        self.model = task.model.to(workers.device)
        self._bf16 = config.precision == "bf16" or (config.precision == "auto" and _has_bf16(workers.device))
        self.optimizers = create_optimizers(self.model, config, bf16=self._bf16)
        self.step = 0
        self.val_loss: float | None = None
        self.best = math.inf
        self.saved: Path | None = None
        self._saved_step = -1
        if resume is not None:
            self._restore(resume)
        self._forward: Callable[..., Any] = self.model
        if config.compile:
            self._forward = torch.compile(self.model)
        if workers.world > 1:
            self._forward = DistributedDataParallel(
                self._forward, device_ids=[workers.device.index] if workers.device.type == "cuda" else None
            )
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._report: Report | None = None
        self._json = json_lines
        # Losses stay on the device until somebody looks: a look makes the processor wait for the device.
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._norm = torch.zeros(())

    def run(self) -> Result:
        config = self.config
        if self.workers.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoints.clean(self.folder)
            self._report = Report(
                self.folder, max_steps=config.max_steps, start=self.step, json_lines=self._json,
                tensorboard=config.tensorboard,
            )  # fmt: skip
        try:
            with _signals() as caught, _tiny_numbers_are_zero():
                self._loop(caught)
        finally:
            if self._report is not None:
                self._report.close()
        return Result(self.step, self.val_loss, self.saved, caught[0] if caught else None)

    def _loop(self, caught: list[int]) -> None:
        config = self.config
        self.model.train()
        if self.step == 0:
            self._validate()
        throughput = Throughput(self.model.config, config, self.workers)
        batches = self._batches(self.step)
        while self.step < config.max_steps:
            batches, tokens = self._train_step(batches)
            self.step += 1
            throughput.add(tokens)
            last = self.step == config.max_steps
            looked = self.step % config.log_interval == 0 or last
            stopping = bool(caught)
            if self.workers.world > 1:  # all processes stop after the same step
                stopping = looked and self.workers.sums([float(stopping)])[0] > 0
            if looked or stopping:
                self._log(throughput)
            best = False
            if self.step % config.eval_interval == 0 or last:
                with throughput.paused():
                    best = self._validate()
            if last or stopping or self.step % config.checkpoint_interval == 0 or (best and config.keep_best):
                with throughput.paused():
                    self._save(best=best and config.keep_best)
            if stopping:
                return

    # -- one step ----------------------------------------------------------------------------------------------

    def _batches(self, step: int) -> list[tuple[MicroBatch, torch.Tensor, torch.Tensor]]:
        """This process's micro batches of a step, on the device."""
        return [
            (batch, self._to_device(batch.inputs), self._to_device(batch.targets))
            for batch in self.task.train.step(step, self.workers.rank, self.workers.world)
        ]

    def _to_device(self, values: Any) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.workers.device.type == "cuda":
            return tensor.pin_memory().to(self.workers.device, non_blocking=True)
        return tensor

    def _train_step(
        self, batches: list[tuple[MicroBatch, torch.Tensor, torch.Tensor]]
    ) -> tuple[list[tuple[MicroBatch, torch.Tensor, torch.Tensor]], int]:
        """Computes one step; the next one's batches are read while a device is still busy with this one."""
        config, world = self.config, self.workers.world
        tokens = 0
        total: torch.Tensor | float = 0.0
        for i, (batch, inputs, targets) in enumerate(batches):
            last = i == len(batches) - 1
            if config.dropout:
                torch.manual_seed(_dropout_seed(config.seed, self.step, batch.index))
            # Gradients of other processes are needed once a step, with the last micro batch.
            alone = isinstance(self._forward, DistributedDataParallel) and not last
            with self._forward.no_sync() if alone else contextlib.nullcontext():  # type: ignore[attr-defined]
                with self._autocast():
                    _, loss = self._forward(inputs, targets)
                share = loss * batch.weight
                # DDP takes the mean over processes, and the weights of all of them make one.
                (share * world if world > 1 else share).backward()
            total = total + share.detach()
            tokens += inputs.numel()
        following = self._batches(self.step + 1) if self.step + 1 < config.max_steps else []
        if config.grad_clip:
            self._norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.grad_clip)
        set_learning_rate(self.optimizers, config, learning_rate(config, self.step))
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert isinstance(total, torch.Tensor)
        self._pending.append((self.step + 1, total))
        return following, tokens

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self._bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.workers.device.type, dtype=torch.bfloat16)

    # -- looking -----------------------------------------------------------------------------------------------

    def _look(self) -> list[tuple[int, float]]:
        """The losses since the last look, over all processes.

        Raises: NanoGPTError when one is not finite, before anything is saved.
        """
        if not self._pending:
            return []
        values = self.workers.sums(torch.stack([loss for _, loss in self._pending]).tolist())
        steps = [step for step, _ in self._pending]
        self._pending.clear()
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                raise NanoGPTError(
                    f"The loss of step {step} is {value}: the training diverged.",
                    remedy=f"{_kept(self.folder)} Lower learning_rate, or raise warmup_steps, and give --resume auto.",
                )
        return list(zip(steps, values, strict=True))

    def _log(self, throughput: Throughput) -> None:
        losses = self._look()
        numbers = throughput.numbers(self.step)
        if self._report is not None:
            self._report.train(
                self.step,
                losses,
                learning_rate=learning_rate(self.config, self.step - 1),
                grad_norm=float(self._norm),
                **numbers,
            )

    @torch.no_grad()
    def _validate(self) -> bool:
        """Measures the validation loss and says whether it is the lowest so far."""
        if self.task.validation is None:
            return False
        start = time.perf_counter()
        self.model.eval()
        total, count = 0.0, 0.0
        for batch in self.task.validation.in_order(self.config.eval_batches, self.workers.rank, self.workers.world):
            with self._autocast():
                _, loss = self.model(self._to_device(batch.inputs), self._to_device(batch.targets))
            total += float(loss) * batch.weight
            count += batch.weight
        self.model.train()
        total, count = self.workers.sums([total, count])
        self.val_loss = total / count
        if self._report is not None:
            self._report.validation(self.step, self.val_loss, time.perf_counter() - start)
        best = self.val_loss < self.best
        self.best = min(self.best, self.val_loss)
        return best and self.step > 0

    # -- saving ------------------------------------------------------------------------------------------------

    def _save(self, *, best: bool) -> None:
        self._look()
        if not self.workers.first or self.step == self._saved_step:
            return
        checkpoints.check_finite(self.model, self.step)
        value = {
            "format": checkpoints.FORMAT,
            "model": self.model.state_dict(),
            "config": self.model.config.as_dict(),
            "step": self.step,
            "val_loss": self.val_loss,
            "best_val_loss": self.best,
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "training": self.config.as_dict(),
            **self.task.stored,
        }
        self.saved = checkpoints.save(self.folder, self.step, value, keep_last=self.config.keep_last, best=best)
        self._saved_step = self.step
        if self._report is not None:
            self._report.saved(self.step, self.saved)

    def _restore(self, path: Path) -> None:
        value = checkpoints.read(path)
        for key in ("tokenizer", "data_sha256"):
            if value.get(key) != self.task.stored.get(key):
                raise SettingsError(
                    f"{path} was trained on other data: its {key} differs.",
                    remedy="nanogpt finetune goes on with other data; or name the data that it was trained on.",
                    field="data",
                )
        if value["config"] != self.model.config.as_dict():
            differing = [key for key, mine in self.model.config.as_dict().items() if value["config"].get(key) != mine]
            raise SettingsError(
                f"{path} is another model: {', '.join(differing)} differ from the configuration.",
                remedy="Name another out_dir for another model.",
            )
        self.model.load_state_dict(value["model"])
        if ("muon" in value) != ("muon" in self.optimizers):
            was = "muon" if "muon" in value else "adamw"
            raise SettingsError(f"{path} was trained with {was}: --set optimizer={was} goes on.", field="optimizer")
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(value[name])
        self.step, self.val_loss, self.best = value["step"], value["val_loss"], value["best_val_loss"]
        self.saved, self._saved_step = path, self.step


def _has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16; others only imitate it, more slowly than they compute in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _dropout_seed(seed: int, step: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, step, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _kept(folder: Path) -> str:
    newest = checkpoints.latest(folder)
    return f"The last good checkpoint is {newest}." if newest else "No checkpoint had been written."


@contextlib.contextmanager
def _tiny_numbers_are_zero() -> Iterator[None]:
    """Dying gradients would otherwise slow every product that meets them.

    The switch is the whole thread's arithmetic, Python's own floats included, and so it is put back.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Catches the first SIGINT or SIGTERM, so that the step ends and is saved; a second one ends the process."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    for watched in (signal.SIGINT, signal.SIGTERM):
        previous[watched] = signal.signal(watched, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
