"""Print constraints.txt anew: the version of everything that is installed in this environment.

Run it by ``make constraints`` in an environment that holds nothing but the package and its extra ``dev``. A version
that needs a newer Python than the package itself does gets a marker: an older Python then takes what fits it.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions

_HEADER = """\
# The versions that tests and CI run with, on Python 3.11, with PyTorch for the CPU. Written by `make constraints`.
# The package itself admits more (pyproject.toml); `make test-lowest` tests the other end."""
_NOT_PINNED = {"pip", "nano-gpt-api"}
_OLDEST = (3, 10)


def main() -> None:
    lines = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name in _NOT_PINNED:
            continue
        public_version = distribution.version.partition("+")[0]
        bound = re.search(r">=\s*(\d+)\.(\d+)", distribution.metadata.get("Requires-Python") or "")
        marker = ""
        if bound and (int(bound[1]), int(bound[2])) > _OLDEST:
            marker = f'; python_version >= "{bound[1]}.{bound[2]}"'
        lines[name] = f"{name}=={public_version}{marker}"
    print(_HEADER, *(lines[name] for name in sorted(lines)), sep="\n")


if __name__ == "__main__":
    main()
