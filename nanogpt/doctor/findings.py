"""What a check is and what it finds. Knows nothing of what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from nanogpt.errors import NanoGPTError
from nanogpt.logs import one_line

Status = Literal["ok", "warn", "fail"]
Subject = TypeVar("Subject")

PAGE = "docs/troubleshooting.md"
# Servers are strangers: whatever one says of itself is cut to what a person reads.
_MAX_CHARS = 500


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``see`` is the chapter that explains it; an ok needs no ``remedy``."""

    status: Status
    says: str
    remedy: str = ""
    check: str = ""
    see: str = ""

    def to_dict(self) -> dict[str, str]:
        return {
            "check": self.check,
            "status": self.status,
            "says": self.says,
            "remedy": self.remedy,
            "see": self.see,
        }


def ok(says: str) -> Finding:
    return Finding("ok", says)


def warn(says: str, remedy: str) -> Finding:
    """It works, and will not always."""
    return Finding("warn", says, remedy)


def fail(says: str, remedy: str) -> Finding:
    """It does not work, or it is open to whom it should not be."""
    return Finding("fail", says, remedy)


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """A function that looks at one thing, under its name. ``anchor`` is its chapter in PAGE."""

    name: str
    anchor: str
    look: Callable[[Subject], Iterable[Finding]]

    def run(self, subject: Subject) -> Iterator[Finding]:
        """Its findings, as they are found. What our own code refuses is one of them."""
        see = f"{PAGE}#{self.anchor}"
        try:
            for finding in self.look(subject):
                yield self._stamped(finding, see)
        except NanoGPTError as error:
            yield self._stamped(fail(error.message, error.remedy or f"{see} says more."), see)

    def _stamped(self, finding: Finding, see: str) -> Finding:
        return replace(
            finding,
            says=one_line(finding.says)[:_MAX_CHARS],
            remedy=one_line(finding.remedy)[:_MAX_CHARS],
            check=self.name,
            see=see,
        )


def check(anchor: str) -> Callable[[Callable[[Subject], Iterable[Finding]]], Check[Subject]]:
    """Make a function a check: its name is what the report calls it."""

    def make(look: Callable[[Subject], Iterable[Finding]]) -> Check[Subject]:
        return Check(look.__name__, anchor, look)

    return make


def gigabytes(count: float) -> str:
    """A size as people say it: 1.5 GB, 230 MB, 40 kB."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count:,} times")
