"""What tests import from anywhere (`from support import ROOT`): where things are, and what a missing service means.

A test that needs something that a machine may lack (a command, a server, a device, the fixture folder) asks with
``require_service``: on a desk it is skipped and says why; in CI, where everything has to be there, it fails.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def in_ci() -> bool:
    """Whether everything has to be there, and every test has to run."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def require_service(name: str, found: bool, reason: str) -> None:
    """Go on if ``found``; otherwise skip with the reason, or fail where CI=true."""
    if found:
        return
    message = f"{name} is missing: {reason}"
    if in_ci():
        pytest.fail(f"{message} (in CI a missing service is a failure)", pytrace=False)
    pytest.skip(message)


def find_shared() -> Path | None:
    """The folder ``shared`` beside the checkout (or in it), which holds real checkpoints of every family."""
    for parent in (ROOT, *ROOT.parents):
        if (parent / "shared" / "checkpoints").is_dir():
            return parent / "shared"
    return None
