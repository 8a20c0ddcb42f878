"""What this machine has to offer, read once. The checks judge it; tests put other numbers in its place."""

from __future__ import annotations

import ctypes
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from nanogpt.errors import NanoGPTError
from nanogpt.runner import choose_runner, has_cuda_driver
from nanogpt.runner.cpus import usable_cpus

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized


@dataclass(frozen=True)
class Gpu:
    """The GPU that PyTorch would use; without one, ``problem`` says why not, and ``remedy`` what could be done."""

    name: str = ""
    free_bytes: int = 0
    problem: str = ""
    remedy: str = ""
    has_driver: bool = False


@dataclass(frozen=True)
class Machine:
    """Memory and CPUs are what this process may use: a container's limits, not its host's."""

    cpus: int
    free_bytes: int
    max_open_files: int
    clock_is_synchronized: bool | None
    """None where the system does not tell."""
    now: float
    gpu: Gpu


def read_machine(device: str = "auto") -> Machine:
    """``device`` as the settings have it: PyTorch's import, which takes seconds, is worth it only where it may help."""
    return Machine(
        cpus=usable_cpus(),
        free_bytes=free_memory(),
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock_is_synchronized=_clock_is_synchronized(),
        now=time.time(),
        gpu=_read_gpu(device),
    )


def _read_gpu(device: str) -> Gpu:
    has_driver = has_cuda_driver()
    if not has_driver and device != "cuda":
        return Gpu(problem="There is no NVIDIA driver on this machine.")
    try:
        choose_runner(device="cuda")
    except NanoGPTError as error:
        return Gpu(problem=error.message, remedy=error.remedy or "", has_driver=has_driver)
    import torch

    return Gpu(torch.cuda.get_device_name(), int(torch.cuda.mem_get_info()[0]), has_driver=True)


def free_memory(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes that may still be taken: the machine's, cut by the container's limit. Pages of files count as free."""
    found = [value for value in (_meminfo(meminfo), *_cgroup_rooms(cgroups, own)) if value is not None]
    return max(0, min(found)) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(path: Path) -> int | None:
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_rooms(cgroups: Path, own: Path) -> list[int | None]:
    """What each control group from this process's upwards leaves (version 2, and version 1's root)."""
    lines = _read(own).splitlines()
    folder = cgroups / next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folders = [folder, *folder.parents]
    rooms = [
        _room(each, "memory.max", "memory.current", "inactive_file") for each in folders[: folders.index(cgroups) + 1]
    ]
    rooms.append(_room(cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return rooms


def _room(folder: Path, limit: str, used: str, droppable: str) -> int | None:
    most, current = _read(folder / limit).strip(), _read(folder / used).strip()
    if not most.isdecimal() or not current.isdecimal():  # no such file, or "max"
        return None
    stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    cached = stat.get(droppable, "0")
    return int(most) - int(current) + (int(cached) if cached.isdecimal() else 0)


def _clock_is_synchronized() -> bool | None:
    """What the kernel knows of it: chrony, ntpd and systemd-timesyncd tell it."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # a struct timex of zeros only reads
    except AttributeError:
        return None
    return None if state < 0 else state != _TIME_ERROR


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
