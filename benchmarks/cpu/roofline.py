"""The roofline of a step: what each kernel reads and multiplies, from the shapes, and what the machine needs for that.

``python -m benchmarks.cpu --roofline`` prints it for each model, for 1 to 32 sequences and for the prefill. A kernel
can take no less than the longer of two times: its bytes at the bandwidth that was measured, its multiply-adds at the
arithmetic that was. The kernels report no times of their own to put beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.cpu.limits import WEIGHT_BYTES, weight_kb
from benchmarks.cpu.models import Model

SEQUENCES = (1, 8, 16, 32)
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


def table(model: Model, bits: str, limits: dict[str, Any]) -> str:
    """Text: MB, millions of multiply-adds, and the least milliseconds where the limits are known."""
    lines = []
    cases = [(f"{b} at once", b, model.block_size // 4, b, b) for b in SEQUENCES]
    cases.append((f"prefill {model.prefill}", model.prefill, model.prefill // 2, 1, 1))
    for title, rows, context, sequences, drawn in cases:
        lines.append(f"{model.name} {bits}, {title}, {context} tokens of context")
        lines.append(f"  {'kernel':12}{'MB':>9}{'M products':>13}{'least ms':>10}")
        total, all_ms = Kernel("sum", 0.0, 0.0), None
        for kernel in kernels(model, bits, rows, context, sequences, drawn):
            least = least_ms(kernel, limits, model, bits)
            all_ms = None if least is None else (all_ms or 0.0) + least
            lines.append(_line(kernel, least))
            total = Kernel("sum", total.num_bytes + kernel.num_bytes, total.products + kernel.products)
        lines += [_line(total, all_ms), ""]
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


def _line(kernel: Kernel, least: float | None) -> str:
    time = "–" if least is None else f"{least:.3f}"
    return f"  {kernel.name:12}{kernel.num_bytes / 1e6:9.2f}{kernel.products / 1e6:13.1f}{time:>10}"
