"""Print the requirements of the installed package, one a line, as pip reads them.

Usage: python tools/requirements.py [--lowest] [EXTRA]
Without EXTRA: what the package itself needs. ``--lowest`` turns every lower bound into that very version.
"""

from __future__ import annotations

import argparse
import re
from importlib.metadata import requires

_EXTRA = re.compile(r"\s*;?\s*(?:and\s+)?extra\s*==\s*['\"]([^'\"]+)['\"]")


def requirements(extra: str | None = None, *, lowest: bool = False) -> list[str]:
    """Requirement lines of the package, or of one of its extras alone."""
    lines = []
    for line in requires("nano-gpt-api") or []:
        found = _EXTRA.search(line)
        if (found.group(1) if found else None) == extra:
            line = _EXTRA.sub("", line)
            lines.append(line.replace(">=", "==", 1) if lowest else line)
    if not lines:
        raise SystemExit(f"requirements: nano-gpt-api has no extra {extra!r}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", nargs="?")
    parser.add_argument("--lowest", action="store_true")
    args = parser.parse_args()
    print("\n".join(requirements(args.extra, lowest=args.lowest)))
