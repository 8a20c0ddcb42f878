"""Bodies as they come over a real connection: in chunks, too large, cut off, slow to begin."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from http_support import Server

BODY = json.dumps({"prompt": "To be", "max_length": 3}).encode()
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


def send(server: Server, data: bytes, *, then_close: bool = False) -> tuple[int, Any]:
    """The status and the JSON that the server answers these bytes with."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(data)
        if then_close:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        while part := sock.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def test_a_body_in_chunks(server: Server) -> None:
    status, answer = send(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY[:7], BODY[7:]))
    assert (status, answer["prompt"]) == (200, "To be")


def test_a_generator_of_chunks_from_a_client_library(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        yield BODY[:5]
        yield BODY[5:]

    answer = requests.post(
        server.url + "/generate", data=pieces(), headers={"Content-Type": "application/json"}, timeout=30
    )
    assert answer.status_code == 200


def test_too_large_a_body_is_refused_before_it_is_sent(server: Server) -> None:
    status, answer = send(server, HEAD + b"Content-Length: 1048577\r\n\r\n", then_close=True)
    assert (status, answer["code"]) == (413, "payload_too_large")


def test_chunks_without_end_are_refused(server: Server) -> None:
    chunk = b"x" * 65536
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*[chunk] * 17)
    status, answer = send(server, data)
    assert (status, answer["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (b"Content-Length: 100\r\n\r\n{", "shorter"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", "incomplete"),
        (b"Transfer-Encoding: chunked\r\n\r\nfive\r\n{}\r\n", "malformed"),
    ],
)
def test_a_body_that_is_cut_off_or_malformed(server: Server, rest: bytes, says: str) -> None:
    status, answer = send(server, HEAD + rest, then_close=True)
    assert status == 400
    assert says in answer["error"]


def test_a_connection_is_good_for_many_requests_also_refused_ones(server: Server) -> None:
    with requests.Session() as session:
        for body, status in [(BODY, 200), (b"{", 400), (b"x" * 2000, 400), (BODY, 200)]:
            answer = session.post(
                server.url + "/generate", data=body, headers={"Content-Type": "application/json"}, timeout=30
            )
            assert answer.status_code == status
