"""Which route is open to whom, in lines for the log: read off the app's routes and the doorkeeper that guards them."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Flask

from nanogpt.web.auth import Access, Doorkeeper

_WORDS: dict[Access, str] = {"open": "everybody", "key": "whoever has a key", "admin": "whoever has the admin key"}


def exposure(app: Flask) -> dict[Access, list[str]]:
    """``METHODS /route`` of every route, by what it wants."""
    doorkeeper: Doorkeeper = app.extensions["nanogpt.doorkeeper"]
    found: dict[Access, list[str]] = {access: [] for access in _WORDS}
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        methods = "|".join(sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}))
        found[doorkeeper.access(rule.rule)].append(f"{methods} {rule.rule}")
    return found


def exposure_lines(app: Flask) -> Iterator[str]:
    """The table that is logged at the start."""
    for access, routes in exposure(app).items():
        there = ", ".join(routes) if routes else "no route"
        if access == "admin" and not routes:
            there = "no route: without an admin key /admin does not exist"
        yield f"Open to {_WORDS[access]}: {there}."
