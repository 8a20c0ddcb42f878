"""The eight boxes of the deployment guide's checklist, each ticked by what the checks of a live service have found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt.doctor.findings import Finding

BOXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The hardware fits the model", ("hardware", "timeouts")),
    ("What is needed is installed, and works", ("health", "redis")),
    ("The settings are made", ("model", "clock")),
    ("Logs and monitoring are set up", ("logs", "metrics")),
    ("A reverse proxy is configured", ("transport", "reverse_proxy", "streaming", "proxies")),
    ("Security measures are taken", ("keys", "admin", "limits")),
    ("A load test was run", ("load_test",)),
    ("A rollback is prepared", ("rollback",)),
)
"""In the guide's order: what a box says, and the checks that must all be ok for it."""


@dataclass(frozen=True)
class Box:
    number: int
    says: str
    findings: tuple[Finding, ...]

    @property
    def is_ticked(self) -> bool:
        """Everything was looked at, and nothing was found to mend."""
        return bool(self.findings) and all(finding.status == "ok" for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        return {
            "number": self.number,
            "says": self.says,
            "ticked": self.is_ticked,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def tick(findings: Sequence[Finding]) -> list[Box]:
    """The boxes, from the findings of the checks of ``live`` and ``proxy``."""
    return [
        Box(number, says, tuple(finding for finding in findings if finding.check in checks))
        for number, (says, checks) in enumerate(BOXES, 1)
    ]
