"""``python -m nanogpt`` is the command ``nanogpt``."""

import sys

from nanogpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
