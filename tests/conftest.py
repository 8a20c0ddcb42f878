"""Fixtures of all tests. What is no fixture lies in support.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, find_shared, in_ci, require_service


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="run the tests that start a Ray cluster (make ray-test)")
    parser.addoption("--slow", action="store_true", help="run the tests that compile for minutes; CI always does")


# Files that take longest, the longest first. `make test` hands out files in the order in which they are collected; one
# that began last would keep a single processor busy at the end.
LONG_FILES = (
    "kernels/test_bits.py",
    "docs/test_shell_blocks.py",
    "faults/test_soak.py",
    "services/test_playground.py",
    "train/test_page.py",
    "train/test_training.py",
    "http/test_lifecycle.py",
    "http/test_guide.py",
    "kernels/test_native_runner.py",
    "packaging/test_wheel.py",
    "unit/test_checkpoint_limits.py",
    "engine/test_reload.py",
    "engine/test_processes.py",
    "services/test_playground_models.py",
    "http/test_streams.py",
    "http/test_limits.py",
    "http/test_compare.py",
    "http/test_openapi.py",
    "docs/test_site.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONG_FILES)}
    assert all(path.is_file() for path in order), "LONG_FILES lists a file that is not there"
    items.sort(key=lambda item: order.get(item.path, len(order)))
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
