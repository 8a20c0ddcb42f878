"""The int4 plan: which matrices of a model stay in int8 under ``--precision int4``. A small JSON file beside it.

``nanogpt quantize`` writes it, and whoever computes the model in int4 reads it: the engine, ``LLM``, the commands. For
the file ``model.pt`` it is ``model.pt.int4.json``, in a model's folder ``int4.json``: it goes where the model goes. It
names the weights that were measured. A plan that cannot be followed is refused instead of left aside: somebody set a
limit on the loss, and without the plan nothing holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.digest import weights_digest
from nanogpt.checkpoint.types import Checkpoint
from nanogpt.errors import CheckpointError
from nanogpt.model.config import GPTConfig

FORMAT = 1
_MAX_BYTES = 1 << 20
_POSITIONS = "transformer.wpe.weight"


def matrix_sizes(config: GPTConfig) -> dict[str, int]:
    """The matrices that are quantized, by their names, with how many weights each has."""
    return {
        name.removesuffix(".weight"): shape[0] * shape[1]
        for name, shape in config.tensor_shapes().items()
        if len(shape) == 2 and name != _POSITIONS
    }


def plan_path(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint's plan lies, if it has one."""
    path = checkpoint.path
    return path / "int4.json" if path.is_dir() else path.with_name(f"{path.name}.int4.json")


def read_plan(checkpoint: Checkpoint) -> frozenset[str] | None:
    """The matrices that stay in int8; None without a plan.

    Raises: CheckpointError where the plan is damaged, of another model, or of other weights.
    """
    path = plan_path(checkpoint)
    if not os.path.lexists(path):
        return None
    plan = _read(path)
    unknown = sorted(plan["int8"] - matrix_sizes(checkpoint.config).keys())
    if unknown:
        raise _unusable(path, f"it names {unknown[0]!r}, which is no matrix of {checkpoint.name}")
    digest = weights_digest(checkpoint)
    if plan["weights_sha256"] != digest:
        measured = plan["weights_sha256"]
        raise _unusable(path, f"it is for the weights {measured:.12}, and {checkpoint.name} has {digest:.12}")
    return frozenset(plan["int8"])


def require_place(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError where no plan could be kept beside this checkpoint."""
    path = plan_path(checkpoint)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _no_place(path, "nothing can be written there")


def write_plan(checkpoint: Checkpoint, int8: Iterable[str], measured: Mapping[str, Any]) -> Path:
    """Keep a plan beside its checkpoint, whole or not at all. ``measured``: for people, and never read again.

    Raises: CheckpointError where nothing can be written there.
    """
    plan = {
        "format": FORMAT,
        "weights_sha256": weights_digest(checkpoint),
        "int8": [name for name in matrix_sizes(checkpoint.config) if name in set(int8)],
        "measured": dict(measured),
    }
    path = plan_path(checkpoint)
    _write(path, (json.dumps(plan, indent=2) + "\n").encode())
    return path


def carry_plan(source: Checkpoint, converted: Checkpoint) -> Path | None:
    """Copy the plan of a checkpoint beside the same weights in another form; None where there is none or they differ.

    Raises: CheckpointError.
    """
    path = plan_path(source)
    if read_plan(source) is None or weights_digest(source) != weights_digest(converted):
        return None
    target = plan_path(converted)
    _write(target, path.read_bytes())
    return target


def _read(path: Path) -> dict[str, Any]:
    """What can be known of a plan without its model. ``int8`` is a set."""
    try:
        if not path.is_file():
            raise _unusable(path, "it is no file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror or error}") from None
    if len(data) > _MAX_BYTES:
        raise _unusable(path, f"it is larger than {_MAX_BYTES:,} bytes")
    try:
        plan = json.loads(data)
    except (ValueError, RecursionError):
        raise _unusable(path, "it is not JSON") from None
    if not isinstance(plan, dict):
        raise _unusable(path, "it is no JSON object")
    if plan.get("format") != FORMAT:
        raise _unusable(path, f"its format is {_short(plan.get('format'))}; this version reads {FORMAT}")
    digest, int8 = plan.get("weights_sha256"), plan.get("int8")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise _unusable(path, f"weights_sha256 is {_short(digest)}, not a SHA-256 in hexadecimal")
    if not isinstance(int8, list) or not all(isinstance(name, str) for name in int8):
        raise _unusable(path, f"int8 is {_short(int8)}, not a list of names")
    return {**plan, "int8": set(int8)}


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        try:
            with new.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
    except OSError as error:
        raise _no_place(path, error.strerror or str(error)) from None


def _unusable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The int4 plan {path} cannot be used: {reason}.",
        remedy="Make it again with nanogpt quantize; or remove it, and every matrix is int4.",
    )


def _no_place(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The int4 plan cannot be kept as {path}: {reason}.",
        remedy="Copy or link the checkpoint into a folder that you may write to and serve it from there; or measure "
        "only, with --no-plan.",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
