"""The HTTP benchmark's client: what it counts, and that a stream that went wrong is never counted as a good one."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.http import __main__ as command
from benchmarks.http import client
from nanogpt.bench.http import Answer, Target

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


GOOD = [
    HEAD,
    *(chunk(event({"text": text})) for text in ("a", "b\n\n", "c")),
    chunk(event({"generated_text": "ab\n\nc", "tokens_generated": 3})),
    b"0\r\n\r\n",
]


@contextmanager
def serving(pieces: Sequence[bytes], count: int = 1) -> Iterator[int]:
    """A server that answers ``count`` requests with these pieces, each sent on its own; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        for _ in range(count):
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                request = b""
                while b"}" not in request:
                    request += connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join()
        listener.close()


def job(port: int, streams: int = 1, limit_s: float = 30) -> dict[str, Any]:
    body = {"prompt": " a"}
    return {"port": port, "path": "/generate", "waves": [[body] * streams], "limit_s": limit_s}


def test_tokens_times_and_gaps_of_all_streams_are_counted() -> None:
    with serving(GOOD, count=2) as port:
        result = client.run(job(port, streams=2))
    assert result["tokens"] == [3, 3]
    assert len(result["tokens_per_s"]) == 1
    assert len(result["ttft_s"]) == 2
    # Three pieces a stream have two gaps between them; the summary at the end is no piece.
    assert len(result["gaps_s"]) == 4
    assert min(result["ttft_s"]) > 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_events_are_counted_however_the_bytes_arrive(size: int) -> None:
    data = b"".join(GOOD)
    answer = Answer()
    whole = [answer.feed(data[start : start + size], now=float(start)) for start in range(0, len(data), size)]
    assert whole.index(True) == len(whole) - 1
    pieces, tokens = client.pieces_of(answer)
    assert (len(pieces), tokens) == (3, 3)
    assert pieces == sorted(pieces)


def test_pings_are_no_pieces() -> None:
    pieces = [HEAD, chunk(b": ping\n\n"), *GOOD[1:]]
    with serving(pieces) as port:
        (answer,) = client.wave(Target("127.0.0.1", port, tls=False), "/generate", [{"prompt": " a"}], 30)
    pieces, _ = client.pieces_of(answer)
    assert len(pieces) == 3
    assert answer.body.startswith(b": ping")


def test_llama_servers_last_event_counts_its_tokens() -> None:
    texts = [chunk(event({"content": text, "stop": False})) for text in "abc"]
    pieces = [HEAD, *texts, chunk(event({"content": "", "stop": True, "tokens_predicted": 3})), b"0\r\n\r\n"]
    with serving(pieces) as port:
        result = client.run(job(port))
    assert (result["tokens"], len(result["gaps_s"])) == ([3], 2)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"], "answered 503: busy"),
        ([HEAD, chunk(b'event: error\ndata: {"error": "gone"}\n\n'), b"0\r\n\r\n"], "'error': 'gone'"),
        ([HEAD, GOOD[1]], "ended without its summary"),
    ],
)
def test_a_stream_that_went_wrong_is_no_figure(pieces: list[bytes], reason: str) -> None:
    with serving(pieces) as port, pytest.raises(ValueError, match=reason):
        client.run(job(port))


def test_a_server_that_never_ends_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError, match="1 of 1 streams"):
        client.wave(Target("127.0.0.1", silent.getsockname()[1], tls=False), "/generate", [{"prompt": " a"}], 0.2)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert command.percentile(values, 0.5) == 50
    assert command.percentile(values, 0.99) == 99
    assert command.percentile(values, 1.0) == 100
    assert command.percentile([3.0], 0.99) == 3


def test_the_summary_is_in_milliseconds_and_tells_how_even_the_streams_were() -> None:
    result = {
        "tokens_per_s": [90.0],
        "ttft_s": [0.010, 0.020],
        "gaps_s": [0.001] * 98 + [0.004] * 2,
        "tokens": [128, 128],
        "client_cpu_share": 0.1,
    }
    found = command.summary([result, {**result, "tokens_per_s": [110.0]}])
    assert found["tokens_per_s"] == {"median": 100.0, "min": 90.0, "max": 110.0, "waves": 2}
    assert found["ttft_ms"] == {"p50": 10.0, "p99": 20.0}
    assert found["itl_ms"] == {"p50": 1.0, "p90": 1.0, "p99": 4.0, "max": 4.0}
    assert found["itl_p99_over_median"] == 4.0
    assert found["tokens_per_stream"] == 128


def test_prompts_are_64_tokens_of_both_models(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE

    from benchmarks.cpu.models import MODELS, _write_tokenizer

    assert command.prompt_text(1) != command.prompt_text(2)
    for model in MODELS.values():
        _write_tokenizer(model, tmp_path)
        tokenizer = Tokenizer(BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert len(tokenizer.encode(command.prompt_text(3)).ids) == command.PROMPT
