"""A run's folder: ``model_%05d.pt``, the symlink ``latest_checkpoint.pt``, and what may be removed.

A checkpoint is written beside its name, forced to the disk and moved there; then the symlink is moved onto the old one;
then old files go. So whenever the process or the machine dies, ``latest_checkpoint.pt`` names a whole file. One
process of a run owns the folder. The files are plain data: ``torch.load(weights_only=True)`` reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from nanogpt.errors import CheckpointError, NanoGPTError

FORMAT: Final = 1
LATEST: Final = "latest_checkpoint.pt"
BEST: Final = "best_checkpoint.pt"
_NAME = re.compile(r"^model_(\d{5,})\.pt$")


def save(folder: Path, step: int, value: Mapping[str, Any], *, keep_last: int, best: bool = False) -> Path:
    """Writes the checkpoint of a step, points the symlinks at it, and removes what is no longer kept.

    Raises: CheckpointError when the disk does not take it; the newest checkpoint is then still the one before.
    """
    path = folder / f"model_{step:05d}.pt"
    scratch = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            with scratch.open("wb") as file:
                torch.save(dict(value), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
            _sync(folder)
        finally:
            scratch.unlink(missing_ok=True)
        for name in (LATEST, BEST) if best else (LATEST,):
            _point(folder / name, path.name)
        _sync(folder)
        if keep_last:
            _remove_old(folder, keep_last)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch.save makes of a full disk
        raise CheckpointError(
            f"Cannot write the checkpoint {path}: {error}.", remedy="The one before it is untouched."
        ) from None
    return path


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None where there is none."""
    link = folder / LATEST
    if link.is_file():
        return link.resolve()
    found = _by_step(folder)
    return found[-1] if found else None


def clean(folder: Path) -> None:
    """Removes what a killed process left half written. For the process that owns the folder."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's value, with tensors on the CPU and mapped into memory. No code in it is executed.

    Raises: CheckpointError.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"Cannot resume from {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT or "optimizer" not in value:
        raise CheckpointError(
            f"Cannot resume from {path}: it was not written by nanogpt train.",
            remedy="nanogpt finetune begins from any checkpoint; resuming needs the optimizer's state.",
        )
    return value


def refuse_occupied(folder: Path) -> None:
    """Raises: NanoGPTError when a new run would mix its files with those of another."""
    found = latest(folder)
    if found is not None:
        raise CheckpointError(
            f"{folder} already holds a run ({found.name}).",
            remedy="Give --resume auto to go on with it, or another folder: --set out_dir=FOLDER.",
        )


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Raises: NanoGPTError when a weight is not finite: such a checkpoint would replace a good one."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NanoGPTError(f"After step {step} the weight {name} is not finite; it was not saved.")


def _by_step(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("model_*.pt") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def _remove_old(folder: Path, keep_last: int) -> None:
    linked = {os.readlink(folder / name) for name in (LATEST, BEST) if (folder / name).is_symlink()}
    for path in _by_step(folder)[:-keep_last]:
        if path.name not in linked:
            path.unlink(missing_ok=True)


def _point(link: Path, name: str) -> None:
    scratch = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    scratch.unlink(missing_ok=True)
    os.symlink(name, scratch)
    os.replace(scratch, link)


def _sync(folder: Path) -> None:
    """Forces the folder's names to the disk: a file that is whole but has no name is lost."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
