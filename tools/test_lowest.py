"""Run the unit tests with the oldest versions of the core dependencies that pyproject.toml admits.

A lower bound that nobody ran is a guess. The tools that run the tests (pytest, Hypothesis) and PyTorch keep their
pinned versions: users choose the former never and the latter by their hardware. Arguments go to pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from requirements import requirements

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "safetensors", "torch")


def main() -> int:
    pinned = dict(re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M))
    core = requirements(lowest=True)
    print("lowest:", ", ".join(core), flush=True)
    with tempfile.TemporaryDirectory(prefix="nanogpt-lowest-") as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, *core, *(f"{tool}=={pinned[tool]}" for tool in TOOLS)], check=True)
        arguments = sys.argv[1:] or ["tests/unit"]
        return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
