"""How many CPUs this process may use, for runners that are told ``threads=0``."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The process's affinity, cut by the container's quota: not the host's count of cores.

    More threads than that would be stopped by the kernel in the middle of a step, while the others wait for them.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """CPU quotas, in CPUs, of this process's control group and of those above it (version 2, or version 1's root)."""
    lines = _read(own).splitlines()
    folder = cgroups / next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folders = [folder, *folder.parents]
    limits = [_read(each / "cpu.max") for each in folders[: folders.index(cgroups) + 1]]
    v1 = cgroups / "cpu"
    limits.append(f"{_read(v1 / 'cpu.cfs_quota_us')} {_read(v1 / 'cpu.cfs_period_us')}")
    pairs = [limit.split() for limit in limits]
    # No limit is the word "max" in version 2 and -1 in version 1.
    return [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0].isdecimal()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
