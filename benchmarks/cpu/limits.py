"""The machine's own limits, measured in the same run as the engines: what no engine can exceed here."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.cpu.models import MODELS, Model

_SOURCE = Path(__file__).with_name("limits.cc")
_SIZES_MB = (1, 4, 16, 32, 64, 128, 256, 1024)

WEIGHT_BYTES = {"int8": 1.0, "int4": 0.5 + 2 / 64, "fp32": 4.0}
"""Bytes that reading one weight takes at least. int4: a 16-bit scale for a group of 64."""


def weight_kb(model: Model, bits: str) -> int:
    """What one decode step reads of the matrices."""
    return round(model.matrix_weights * WEIGHT_BYTES[bits] / 1024)


def measure(cache: Path, threads: int) -> dict[str, Any]:
    """``read_gb_per_s`` by size in KB, ``tera_ops_per_s`` by unit; ``error`` when it cannot be measured."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return {"error": "there is no C++ compiler"}
    program = cache / "limits"
    command = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", str(_SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        return {"error": f"the compiler refused limits.cc: {built.stderr.strip()[-300:]}"}
    sizes = {size * 1024 for size in _SIZES_MB}
    sizes |= {weight_kb(model, bits) for model in MODELS.values() for bits in ("int8", "int4")}
    ran = subprocess.run(
        [str(program), str(threads), *map(str, sorted(sizes))], capture_output=True, text=True, timeout=120
    )
    if ran.returncode:
        return {"error": f"limits ended with exit code {ran.returncode}: {ran.stderr.strip()[-300:]}"}
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def highest(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements the higher figure of each kind: what the machine can do is what it once did."""
    if "error" in first or "error" in second:
        return second if "error" in first else first
    return {
        kind: {key: max(value, second[kind].get(key, 0.0)) for key, value in figures.items()}
        for kind, figures in first.items()
    }


def decode_limit(limits: dict[str, Any], model: Model, bits: str) -> float | None:
    """Tokens/s at which reading the weights alone takes all the time."""
    size = weight_kb(model, bits)
    rate = limits.get("read_gb_per_s", {}).get(str(size))
    return rate * 1e9 / (size * 1024) if rate else None
