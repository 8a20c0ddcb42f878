"""The HTTP API: a Flask app that checks requests, hands them to the engine and writes its answers."""

from nanogpt.web.app import create_app

__all__ = ["create_app"]
