"""Fixtures of all tests. What is no fixture lies in support.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import find_shared, in_ci, require_service


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="run the tests that start a Ray cluster (make ray-test)")
    parser.addoption("--slow", action="store_true", help="run the tests that compile for minutes; CI always does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--cluster"):
        for item in items:
            if "cluster" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="starts a Ray cluster; make ray-test runs it"))
    if not in_ci() and not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="compiles for minutes; --slow runs it, and CI does"))


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
