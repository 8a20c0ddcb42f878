"""What gunicorn's hooks tell the app in the same process: the settings that were checked, and the worker's end.

Set by ``gunicorn_hooks`` (in the arbiter before it forks, and in each worker), read by the app. Under any other server
nothing is set: the app then loads its settings itself, and does not drain.
"""

from __future__ import annotations

from collections.abc import Callable

from nanogpt.keys import KeyRing
from nanogpt.settings import Settings

settings: Settings | None = None
"""The settings that the arbiter checked and that the engine was started with."""

keys: KeyRing | None = None
"""The keys file as the arbiter read it: a worker that is born while the file is broken still knows the former keys."""

stop_at: float | None = None
"""Set once this worker is told to stop: the moment (monotonic) at which its generations end with what they have."""

is_draining: Callable[[], bool] = bool
"""Whether the server as a whole is on its way down and finishes what runs."""
