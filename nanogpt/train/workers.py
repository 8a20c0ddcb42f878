"""The processes of a run: one, or those that ``torchrun`` started. Says which one this is, and adds numbers up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanogpt.errors import SettingsError


@dataclass(frozen=True)
class Workers:
    """``rank`` 0 owns the folder and the terminal."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added over all processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]


@contextmanager
def join(device: str) -> Iterator[Workers]:
    """The processes of this run, for as long as it lasts. torchrun tells by the environment.

    Raises: SettingsError when there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "device is cuda, but PyTorch finds no CUDA device.", remedy="Use --set device=cpu.", field="device"
        )
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Workers(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
