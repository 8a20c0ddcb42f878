"""The packed-weights reader under damaged files: a short run of tests/fuzz (see docs/cpu-performance.md)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nanogpt._kernels")

FUZZER = Path(__file__).parents[1] / "fuzz" / "packed_weights.py"


@pytest.mark.slow
def test_no_damaged_file_is_taken_for_a_whole_one_or_breaks_the_process() -> None:
    """In a process of its own: what goes wrong in the kernels ends it."""
    ran = subprocess.run([sys.executable, str(FUZZER), "--seconds", "12"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tried, *_, taken = (int(word) for word in ran.stdout.split("\n")[1].split() if word.isdigit())
    assert tried > taken > 0
