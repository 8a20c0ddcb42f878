"""The roofline of a step: what each kernel reads and multiplies, from the shapes, and what the machine needs for that.

``python -m benchmarks.cpu --roofline`` prints it for each model, for 1 to 32 sequences and for the prefill, beside the
times that the kernels took. A kernel can take no less than the longer of two times: its bytes at the bandwidth that was
measured, its multiply-adds at the arithmetic that was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.limits import WEIGHT_BYTES, weight_kb
from benchmarks.cpu.models import Model
from nanogpt.checkpoint import load_checkpoint
from nanogpt.runner.base import Batch, SamplingState
from nanogpt.runner.native import NativeRunner
from nanogpt.sampling_params import SamplingParams

SEQUENCES = (1, 8, 16, 32)
_SAMPLES = 9
_SAMPLE_S = 0.3
_LEAF = 64
"""Tokens that K and V are stored and read by."""


@dataclass(frozen=True)
class Kernel:
    """One kind of work of a step, all layers together. ``products``: multiply-adds."""

    name: str
    num_bytes: float
    products: float


def kernels(model: Model, bits: str, rows: int, context: int, sequences: int, drawn: int) -> Iterator[Kernel]:
    """``rows`` tokens of ``sequences`` texts, each seeing ``context`` tokens; logits of ``drawn`` rows."""
    n, layers, weight = model.n_embd, model.n_layer, WEIGHT_BYTES[bits]
    for name, size in (
        ("q, k, v", 3 * n * n),
        ("projection", n * n),
        ("MLP in", 4 * n * n),
        ("MLP out", 4 * n * n),
    ):
        yield Kernel(name, layers * size * weight, layers * size * float(rows))
    # int8 K and V with a float scale a (token, head); float32 where the weights are.
    wide = 4 if bits == "fp32" else 1
    token = layers * 2 * (n * wide + (0 if bits == "fp32" else 4 * model.n_head))
    stored = -(-context // _LEAF) * _LEAF
    yield Kernel("attention", sequences * stored * token, layers * 2 * n * float(context) * rows)
    yield Kernel("head", model.vocab_size * n * weight, model.vocab_size * n * float(drawn))


@dataclass(frozen=True)
class Case:
    """``sequences`` texts of ``context`` tokens; each step computes ``rows`` tokens in all."""

    title: str
    rows: int
    context: int
    sequences: int


def cases(model: Model) -> list[Case]:
    found = [Case(f"{b} at once", b, model.block_size // 4, b) for b in SEQUENCES]
    return [*found, Case(f"prefill {model.prefill}", model.prefill, model.prefill // 2, 1)]


class Steps:
    """A model's steps, run and timed part by part."""

    def __init__(self, folder: Path, bits: str, threads: int) -> None:
        checkpoint = load_checkpoint(folder)
        self._runner = NativeRunner(checkpoint, precision=bits, num_slots=max(SEQUENCES), threads=threads)
        self.isa = self._runner.isa
        self._tokens = np.random.default_rng(1).integers(0, self._runner.config.num_tokens, 1 << 16, dtype=np.int32)

    def part_ms(self, case: Case) -> dict[str, float]:
        """Median over samples of a step's milliseconds by part, ``step`` (seen from Python) among them."""
        a_sequence = case.rows // case.sequences
        start = 0 if a_sequence > 1 else case.context - 1
        if start:
            for slot in range(case.sequences):
                self._step([slot], 0, start)
        slots = list(range(case.sequences))
        self._step(slots, start, a_sequence)
        samples: list[dict[str, float]] = []
        for _ in range(_SAMPLES):
            self._runner.time_parts()
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < _SAMPLE_S or not count:
                self._step(slots, start, a_sequence)
                count += 1
            seconds = time.perf_counter() - begun
            parts = {name: ns / count / 1e6 for name, ns in self._runner.part_ns().items()}
            samples.append({**parts, "step": seconds / count * 1e3})
        return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}

    def close(self) -> None:
        self._runner.close()

    def _step(self, slots: list[int], start: int, a_sequence: int) -> None:
        count = len(slots)
        greedy = [SamplingState(SamplingParams(temperature=0), 0, (), []) for _ in slots]
        self._runner.step(
            Batch(
                slots=np.array(slots, np.int32),
                starts=np.full(count, start, np.int32),
                num_tokens=np.full(count, a_sequence, np.int32),
                token_ids=self._tokens[: count * a_sequence],
                sampling=greedy,
            )
        )


def table(model: Model, bits: str, limits: dict[str, Any], steps: Steps) -> str:
    """Text: MB, millions of multiply-adds, the least milliseconds where the limits are known, and those it took."""
    lines = []
    for case in cases(model):
        took = steps.part_ms(case)
        lines.append(f"{model.name} {bits}, {case.title}, {case.context} tokens of context, {steps.isa}")
        lines.append(f"  {'kernel':12}{'MB':>9}{'M products':>13}{'least ms':>10}{'took ms':>10}{'G products/s':>14}")
        total, all_ms = Kernel("step", 0.0, 0.0), None
        for kernel in kernels(model, bits, case.rows, case.context, case.sequences, case.sequences):
            least = least_ms(kernel, limits, model, bits)
            all_ms = None if least is None else (all_ms or 0.0) + least
            lines.append(_line(kernel, least, took[kernel.name]))
            total = Kernel("step", total.num_bytes + kernel.num_bytes, total.products + kernel.products)
        lines += [f"  {name:12}{'':32}{took[name]:10.3f}" for name in ("embedding", "sampling")]
        lines += [_line(total, all_ms, took["step"]), ""]
    return "\n".join(lines)


def least_ms(kernel: Kernel, limits: dict[str, Any], model: Model, bits: str) -> float | None:
    """The longer of reading and multiplying; None where a limit was not measured."""
    rates = limits.get("read_gb_per_s") or {}
    units = limits.get("tera_ops_per_s") or {}
    kind = "fp32" if bits == "fp32" else "int8"
    usable = [rate for unit, rate in units.items() if unit.startswith(kind) and rate]
    if not rates or not usable:
        return None
    # A step reads the whole model before it reads a weight again: the rate of that size, or of the next larger one.
    size = weight_kb(model, bits)
    rate = rates[min((key for key in rates if int(key) >= size), key=int, default=max(rates, key=int))]
    return max(kernel.num_bytes / (rate * 1e9), 2 * kernel.products / (max(usable) * 1e12)) * 1e3


def _line(kernel: Kernel, least: float | None, took: float) -> str:
    limit = "–" if least is None else f"{least:.3f}"
    return (
        f"  {kernel.name:12}{kernel.num_bytes / 1e6:9.2f}{kernel.products / 1e6:13.1f}{limit:>10}{took:10.3f}"
        f"{kernel.products / took / 1e6:14.1f}"
    )
