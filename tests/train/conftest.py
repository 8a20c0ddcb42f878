"""Data of a few kilobytes, models of a few thousand weights, and the command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from nanogpt.train.config import TrainConfig
from nanogpt.train.prepare import prepare_text

# A text with a rhythm that a small model learns within seconds.
TEXT = "".join(f"{i % 10} the quick brown fox jumps over the lazy dog\n" for i in range(400))

TINY: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": False, "batch_size": 4, "max_steps": 20,
    "warmup_steps": 2, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "eval_interval": 10, "eval_batches": 4,
    "checkpoint_interval": 10, "log_interval": 5, "threads": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip

Configure = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of characters."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text(TEXT, "utf-8")
    prepare_text(
        [folder / "input.txt"], folder / "characters", tokenizer="characters", vocab_size=0, val_fraction=0.1,
        shard_tokens=5000,
    )  # fmt: skip
    return folder / "characters"


@pytest.fixture
def configure(data: Path, tmp_path: Path) -> Configure:
    """A tiny run's configuration, with changes."""

    def make(**changes: Any) -> TrainConfig:
        return TrainConfig(**{**TINY, "data": str(data), "out_dir": str(tmp_path / "log"), **changes})

    return make


@pytest.fixture(scope="session")
def nanogpt() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``nanogpt ARGUMENTS`` in a process of its own."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nanogpt", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, **options)

    return run
