"""Memory that loading a model leaves behind. Called once a process, by whoever has loaded."""

from __future__ import annotations

import ctypes


def give_back_memory() -> None:
    """What loading used and freed goes back to the system, not to a heap that will not grow so large again.

    With glibc only; others do so by themselves, or not at all. Takes a few milliseconds.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
