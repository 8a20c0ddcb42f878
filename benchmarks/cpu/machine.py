"""What a figure has to be told with: the processor, its instruction sets, the memory, the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_TELLING = re.compile(r"^(avx|amx|fma$|asimd|sve|i8mm|bf16|sme)")


def describe(threads: int) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    cpu_fields = ("model name", "cpu family", "model", "stepping")
    cpu = {key: m.group(1) for key in cpu_fields if (m := re.search(rf"^{key}\s*:\s*(.*)$", cpuinfo, re.MULTILINE))}
    total = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "instruction_sets": sorted(f for f in (flags.group(1).split() if flags else []) if _TELLING.match(f)),
        "caches": _caches(),
        "memory_mb": int(total.group(1)) // 1024 if total else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _caches() -> dict[str, str]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (folder.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind.lower()}"] = size
    return found


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
