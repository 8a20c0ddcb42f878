"""Run by test_training.py: four runs that SIGKILL ends at four places of their second save. Prints what survived.

The children are forks of one process, so that PyTorch is imported once.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every first optimizer imports it: here once for all four

from nanogpt.train import checkpoints
from nanogpt.train.config import TrainConfig
from nanogpt.train.pretrain import pretrain


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str) -> None:
    """Make the second checkpoint's save fatal."""
    real_save, real_replace, real_remove = torch.save, os.replace, checkpoints._remove_old

    def save(value: dict[str, Any], file: Any) -> None:
        if where == "writing" and value["step"] == 20:
            whole = io.BytesIO()
            real_save(value, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()
        real_save(value, file)

    def replace(source: Any, target: Any) -> None:
        second = Path(target).name == "model_00020.pt"
        linked = Path(target).name == checkpoints.LATEST and os.readlink(source) == "model_00020.pt"
        if (where == "naming" and second) or (where == "linking" and linked):
            die()
        real_replace(source, target)

    def remove_old(folder: Path, keep_last: int) -> None:
        if where == "removing" and (folder / "model_00020.pt").exists():
            die()
        real_remove(folder, keep_last)

    torch.save, os.replace, checkpoints._remove_old = save, replace, remove_old


def main() -> None:
    values, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    survived = {}
    for where in ("writing", "naming", "linking", "removing"):
        config = TrainConfig(**{**values, "out_dir": str(folder / where)})
        child = os.fork()
        if child == 0:
            arm(where)
            pretrain(config)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{where}: the child ended with {status}"
        assert os.WTERMSIG(status) == signal.SIGKILL
        newest = checkpoints.latest(folder / where)
        assert newest is not None
        survived[where] = checkpoints.read(newest)["step"]
    print(json.dumps(survived))


if __name__ == "__main__":
    main()
