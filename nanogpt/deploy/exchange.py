"""What travels between a front and a replica: an HTTP request, and the head of its answer. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Request:
    """An HTTP request as a front received it: with its whole body, so that it can be sent to a second replica.

    A body that is larger than a replica admits is cut behind what is admitted; the replica then refuses it.
    """

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes = b""
    client: str = ""
    scheme: str = "http"
    host: tuple[str, int] = ("localhost", 80)
    prefix: str = ""
    """The path below which the application lies, without a slash at its end."""

    def header(self, name: str) -> str:
        """The first of this name (lower case), or nothing."""
        return next((value for key, value in self.headers if key == name), "")

    @property
    def route(self) -> str:
        """The path as the app knows it."""
        return self.path.removeprefix(self.prefix) if self.prefix else self.path

    def without_header(self, name: str) -> Request:
        return replace(self, headers=tuple((key, value) for key, value in self.headers if key != name))


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: Headers

    def header(self, name: str) -> str:
        """The first of this name (lower case), or nothing."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def is_stream(self) -> bool:
        return self.header("content-type").startswith("text/event-stream")
