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
    """CPU quotas, in CPUs, of this process's control group and of those above it, in versions 1 and 2."""
    # A line is "0::/path" in version 2 and "4:cpu,cpuacct:/path" in version 1. In a container the path may be the
    # host's, and the container's own group is the root.
    fields = [line.split(":", 2) for line in _read(own).splitlines() if line.count(":") >= 2]
    v2 = next((path for number, controllers, path in fields if (number, controllers) == ("0", "")), "/")
    v1 = next((path for _, controllers, path in fields if "cpu" in controllers.split(",")), "/")
    limits = [_read(each / "cpu.max") for each in _up_to(cgroups, v2)]
    limits += [
        f"{_read(each / 'cpu.cfs_quota_us')} {_read(each / 'cpu.cfs_period_us')}"
        for each in _up_to(cgroups / "cpu", v1)
    ]
    pairs = [limit.split() for limit in limits]
    # No limit is the word "max" in version 2 and -1 in version 1.
    return [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0].isdecimal()]


def _up_to(root: Path, path: str) -> list[Path]:
    """The folder of a group, and those above it."""
    folder = root / path.strip("/")
    return [each for each in [folder, *folder.parents] if each == root or root in each.parents]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
