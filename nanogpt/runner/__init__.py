"""``create_runner``: which of the runners computes a checkpoint. Importing this loads neither NumPy nor PyTorch."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from nanogpt.errors import MissingDependency, SettingsError

if TYPE_CHECKING:
    from nanogpt.checkpoint.types import Checkpoint
    from nanogpt.runner.base import Runner

__all__ = ["choose_runner", "create_runner", "has_cuda_driver"]

logger = logging.getLogger("nanogpt.runner")

_NATIVE_PRECISIONS = ("auto", "fp32", "int8", "int4")
_NATIVE_ONLY = ("int8", "int4")
# Where a driver shows that there is a CUDA device: Linux, WSL. Looked at before PyTorch, whose import takes seconds.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvhost-ctrl", "/dev/dxg")


def create_runner(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    precision: str = "auto",
    runner: str = "auto",
    num_slots: int = 32,
    threads: int = 0,
) -> Runner:
    """The runner for a checkpoint: PyTorch on CUDA where there is a device, else C++ where it was built, else PyTorch.

    ``auto`` never fails for want of something that another choice could do without.

    Under int4 the matrices that the checkpoint's plan names stay in int8.

    Raises: SettingsError when what was asked for cannot be, MissingDependency when something has to be installed;
    CheckpointError for a plan that cannot be followed.
    """
    name, device = choose_runner(device=device, precision=precision, runner=runner)
    if name == "native":
        from nanogpt.runner.native import NativeRunner

        int8 = _planned(checkpoint) if precision == "int4" else ()
        return NativeRunner(checkpoint, precision=precision, num_slots=num_slots, threads=threads, int8_matrices=int8)
    # Read when OpenMP is loaded, with PyTorch. By default its threads spin while they wait for each other; where HTTP
    # workers or other processes share the cores, that is for one that cannot run: texts took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from nanogpt.runner.torch import TorchRunner
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependency(
            "PyTorch is not installed, and what was asked for needs it."
            if runner == "torch" or device == "cuda" or precision not in _NATIVE_PRECISIONS
            else "This installation has neither the compiled CPU runner nor PyTorch.",
            remedy="pip install 'nano-gpt-api[train]' installs PyTorch; with a C++ compiler, installing "
            "nano-gpt-api again builds the CPU runner.",
        ) from None
    return TorchRunner(checkpoint, device=device, precision=precision, num_slots=num_slots, threads=threads)


def _planned(checkpoint: Checkpoint) -> Collection[str]:
    """The matrices that stay in int8 under int4. Raises: CheckpointError for a plan that cannot be followed."""
    from nanogpt.runner.int4_plan import read_plan

    plan = read_plan(checkpoint)
    if plan is None:
        logger.info(
            "%s has no int4 plan, so every matrix is int4: `nanogpt quantize` measures what that costs, and which of "
            "them should stay in int8.",
            checkpoint.name,
        )
    return plan or ()


def choose_runner(*, device: str = "auto", precision: str = "auto", runner: str = "auto") -> tuple[str, str]:
    """Which runner computes (``native`` or ``torch``), and where (``cpu`` or ``cuda``).

    Raises: SettingsError when what was asked for cannot be, MissingDependency when something has to be installed.
    """
    if runner == "native" and device == "cuda":
        raise SettingsError(
            "The native runner computes on the CPU, not on cuda.", remedy="Use --runner torch.", field="runner"
        )
    if device == "auto":
        native_only = runner == "native" or precision in _NATIVE_ONLY
        device = "cuda" if not native_only and _cuda_available() else "cpu"
    elif device == "cuda":
        _require_cuda()
    if device == "cpu" and (runner == "native" or (runner == "auto" and precision in _NATIVE_PRECISIONS)):
        try:
            import nanogpt.runner.native  # noqa: F401
        except ImportError as error:
            if runner == "native" or precision in _NATIVE_ONLY:
                raise MissingDependency(
                    f"The native runner is not part of this installation ({error}).",
                    remedy="Install a C++ compiler and then nano-gpt-api again, or choose --runner torch "
                    "with precision fp32 or bf16.",
                ) from None
            logger.info("The native runner is not part of this installation (%s): PyTorch computes.", error)
        else:
            return "native", device
    return "torch", device


def has_cuda_driver() -> bool:
    """Whether a driver shows that there may be a CUDA device; PyTorch knows whether there is one."""
    return any(map(os.path.exists, _DRIVER_FILES))


def _cuda_available() -> bool:
    if not has_cuda_driver() or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _require_cuda() -> None:
    """Raises: SettingsError that says why there is no CUDA; MissingDependency without PyTorch."""
    try:
        import torch
    except ModuleNotFoundError:
        raise MissingDependency(
            "device is cuda, but PyTorch is not installed.",
            remedy="pip install 'nano-gpt-api[cuda]', or choose --device cpu.",
        ) from None
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason = f"this PyTorch ({torch.__version__}) was built without CUDA"
        remedy = "Install a CUDA build of PyTorch, or choose --device cpu."
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        reason = f"PyTorch finds no CUDA device{hidden}"
        remedy = "Check nvidia-smi; in Docker start with --gpus all; or choose --device cpu."
    raise SettingsError(f"device is cuda, but {reason}.", remedy=remedy, field="device")
