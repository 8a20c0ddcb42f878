"""The GPU's kernels without a GPU: where Triton is installed, its interpreter runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import ROOT

pytest.importorskip("triton", reason="comes with PyTorch's CUDA builds; pip install triton")


def test_the_interpreter_gives_what_pytorch_gives() -> None:
    program = [sys.executable, str(ROOT / "tests" / "triton_interpreted.py")]
    result = subprocess.run(program, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
