"""A server with OpenAI's completions that computes nothing: each token is sent at the moment when it is due.

``python -m benchmarks.paced_server PORT``. What a load generator measures of it is known beforehand: the first token
after ``TTFT_S``, the others ``ITL_S`` apart. Used by ``benchmarks.peer_load --paced``. One asyncio loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

TTFT_S, ITL_S = 0.3, 0.05
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            if head[0].startswith("post"):
                await _stream(writer, json.loads(body))
            else:
                said = b'{"data": [{"id": "default"}], "status": "healthy"}'
                writer.write(_HEAD % b"application/json" + _chunk(said) + _chunk(b""))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _stream(writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time() + TTFT_S
    prompt = asked["prompt"]
    tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    writer.write(_HEAD % b"text/event-stream")
    for number in range(asked["max_tokens"]):
        await asyncio.sleep(due - loop.time())
        due += ITL_S
        usage = {"prompt_tokens": tokens, "completion_tokens": number + 1, "total_tokens": tokens + number + 1}
        event = {"choices": [{"index": 0, "text": " a", "finish_reason": None}], "usage": usage}
        writer.write(_chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
        await writer.drain()
    event = {"choices": [], "usage": usage}
    writer.write(_chunk(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n") + _chunk(b""))
    await writer.drain()


async def _serve(port: int) -> None:
    async with await asyncio.start_server(_talk, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
