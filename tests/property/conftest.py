"""Property tests assert what is true, not how long it takes: a slow moment of the machine is no failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("nanogpt", deadline=None)
settings.load_profile("nanogpt")
