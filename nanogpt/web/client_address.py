"""Which address a request comes from, behind as many proxies as the operator says there are.

Every header can be forged but for what the trusted proxies themselves wrote: of ``X-Forwarded-For`` the last
``trusted_proxies`` entries, each proxy having added the address that it saw. ``X-Real-IP`` is set by some nearest
proxies (nginx in the guide's block) instead, or as well. With one proxy it is believed where ``X-Forwarded-For`` is
missing. Where both are there and differ, one of them is the client's own invention, and nobody can tell which: such
requests all count as the proxy's own, so that inventing addresses wins nothing.
"""

from __future__ import annotations

import ipaddress
import re

from flask import Request

_IPV6_PREFIX = 64
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d+)?|([^:\s]+):\d+")


def client_address(request: Request, trusted_proxies: int) -> str:
    """The client's address, for counting: one IPv4 address, or the /64 network that an IPv6 host has to itself."""
    peer = request.remote_addr or "local"
    address = _forwarded(request, trusted_proxies) if trusted_proxies else None
    return address or _plain(peer) or peer


def _forwarded(request: Request, trusted_proxies: int) -> str | None:
    """What the proxies say; None where they do not, or where it cannot be what they say."""
    chain = [entry.strip() for line in request.headers.getlist("X-Forwarded-For") for entry in line.split(",")]
    told = _plain(chain[-trusted_proxies]) if len(chain) >= trusted_proxies else None
    if trusted_proxies > 1 or "X-Real-IP" not in request.headers:
        return told
    real = _plain(request.headers["X-Real-IP"].strip())
    return real if not chain or real == told else None


def _plain(text: str) -> str | None:
    """An address in its one form; None for what is none."""
    if (match := _WITH_PORT.fullmatch(text)) is not None:
        text = match[1] or match[2]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), _IPV6_PREFIX), strict=False))
