"""Whose request it is behind proxies: what a client writes itself changes nothing, what the proxies write counts."""

from __future__ import annotations

import pytest
from flask import Request
from werkzeug.test import EnvironBuilder

from nanogpt.web.client_address import client_address

PROXY = "10.0.0.1"


def address(trusted_proxies: int, *headers: tuple[str, str], peer: str | None = PROXY) -> str:
    environ = EnvironBuilder(headers=list(headers)).get_environ()
    if peer is not None:
        environ["REMOTE_ADDR"] = peer
    return client_address(Request(environ), trusted_proxies)


FOR, REAL = "X-Forwarded-For", "X-Real-IP"


@pytest.mark.parametrize("header", [FOR, REAL, "Forwarded", "X-Client-IP", "CF-Connecting-IP", "True-Client-IP"])
def test_without_trusted_proxies_no_header_is_believed(header: str) -> None:
    assert address(0, (header, "1.2.3.4")) == PROXY


@pytest.mark.parametrize(
    ("proxies", "chain", "found"),
    [
        (1, "1.2.3.4", "1.2.3.4"),
        (1, "6.6.6.6, 1.2.3.4", "1.2.3.4"),  # the first one is the client's own invention
        (2, "1.2.3.4, 10.0.0.2", "1.2.3.4"),
        (2, "6.6.6.6, 1.2.3.4, 10.0.0.2", "1.2.3.4"),
        (2, "6.6.6.6", PROXY),  # a request that went round one of the proxies
        (1, "", PROXY),
        (1, "unknown", PROXY),
        (1, "1.2.3.4:5678", "1.2.3.4"),
        (1, "[2001:db8:1:2:3::4]:5678", "2001:db8:1:2::/64"),
        (1, "::ffff:1.2.3.4", "1.2.3.4"),
        (1, "1.2.3.4\x00", PROXY),
    ],
)
def test_of_forwarded_for_the_proxies_own_entries_count(proxies: int, chain: str, found: str) -> None:
    assert address(proxies, (FOR, chain)) == found


def test_two_lines_of_forwarded_for_are_one_list() -> None:
    """Some proxies add a line of their own where others go on in the client's."""
    assert address(1, (FOR, "6.6.6.6"), (FOR, "1.2.3.4")) == "1.2.3.4"


def test_the_guides_nginx_block_sends_only_the_real_ip() -> None:
    assert address(1, (REAL, "1.2.3.4")) == "1.2.3.4"


def test_a_proxy_that_sends_both_is_believed() -> None:
    assert address(1, (REAL, "1.2.3.4"), (FOR, "6.6.6.6, 1.2.3.4")) == "1.2.3.4"


@pytest.mark.parametrize("invented", ["6.6.6.6", "7.7.7.7", "", "nonsense"])
@pytest.mark.parametrize("header", [FOR, REAL])
def test_inventing_the_header_that_the_proxy_does_not_set_wins_nothing(header: str, invented: str) -> None:
    """Whatever is invented, it is one and the same client: the proxy."""
    other = REAL if header == FOR else FOR
    assert address(1, (header, invented), (other, "1.2.3.4")) == PROXY


def test_with_two_proxies_the_nearest_ones_real_ip_is_the_other_proxy() -> None:
    assert address(2, (REAL, "10.0.0.2"), (FOR, "1.2.3.4, 10.0.0.2")) == "1.2.3.4"
    assert address(2, (REAL, "10.0.0.2")) == PROXY


def test_an_ipv6_host_is_one_client_with_all_its_addresses() -> None:
    """It has 2**64 of them to choose from."""
    assert address(0, peer="2001:db8::1") == address(0, peer="2001:db8::ffff:2") == "2001:db8::/64"
    assert address(0, peer="2001:db8:0:1::1") != "2001:db8::/64"


@pytest.mark.parametrize("peer", [None, ""])
def test_a_unix_socket_has_no_address(peer: str | None) -> None:
    assert address(0, peer=peer) == "local"
