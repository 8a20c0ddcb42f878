"""What the tests of ``nanogpt doctor`` share: a healthy machine's readings, and short words for asking a check."""

from __future__ import annotations

from typing import Any

import pytest

from nanogpt.doctor.findings import Check, Finding
from nanogpt.doctor.here import Here
from nanogpt.doctor.readings import Gpu, Machine
from nanogpt.settings import Settings

Capture = pytest.CaptureFixture[str]
HEALTHY = Machine(
    cpus=2,
    free_bytes=16_000_000_000,
    max_open_files=65_536,
    clock_is_synchronized=True,
    now=1_800_000_000.0,
    gpu=Gpu(problem="There is no NVIDIA driver on this machine."),
)


def here(model: str = "", readings: Machine = HEALTHY, **settings: Any) -> Here:
    return Here(Settings(model_checkpoint=model, **settings), readings)


def found(check: Check[Any], subject: Any) -> list[Finding]:
    return list(check.run(subject))


def statuses(check: Check[Any], subject: Any) -> list[str]:
    return [finding.status for finding in found(check, subject)]


def the_one(check: Check[Any], subject: Any) -> Finding:
    """The only finding that is not ok; the only one where all are."""
    findings = found(check, subject)
    return next((finding for finding in findings if finding.status != "ok"), findings[0])
