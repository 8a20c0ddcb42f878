"""Fixtures of all tests. What is no fixture lies in support.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import find_shared, require_service


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures that lies beside the checkout: checkpoints/, data/."""
    folder = find_shared()
    require_service("../shared", folder is not None, "real checkpoints lie there, made by the upstream projects")
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def shared_checkpoints(shared: Path) -> Path:
    return shared / "checkpoints"
