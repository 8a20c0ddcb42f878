"""Checks of what stands between a client and the server: TLS, buffering, time-outs, and who a client is taken for.

Each is measured from outside, with requests of the kind that clients send; no proxy's configuration is read.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanogpt.doctor.findings import Finding, check, fail, ok, warn
from nanogpt.doctor.service import Answer, Service, TooSlow, Unreachable, can_come_from

_CERTIFICATE_WARN_S = 14 * 86_400
# A stream has to take this long before its arrival says anything, and a buffered one shows in each attempt.
_MIN_STREAM_S = 0.02
_ATTEMPTS = 3
# How much longer an answer may take when the server is full; and what most proxies wait for one by default.
_UNDER_LOAD = 4
_USUAL_TIMEOUT_S = 60
# Addresses that no client has (RFC 2544), so that nobody's count is touched.
_FORGED = "198.18.{}.{}"
_OTHER_LOOPBACK = "127.0.0.77"
_REFUSALS = (400, 401, 403, 429)


@check("tls")
def transport(service: Service) -> Iterator[Finding]:
    """Whether keys and prompts are read on the way, and how long the certificate holds."""
    answer = service.get("/health", key="none")
    if not service.is_private:
        yield warn(
            f"Plain http to {service.host}: everybody on the way reads prompts, answers and keys.",
            "Serve https in the proxy.",
        )
    elif not service.is_tls:
        yield ok("Plain http on this machine's own address.")
    else:
        ends = str(answer.certificate.get("notAfter", ""))
        left = ssl.cert_time_to_seconds(ends) - time.time() if ends else 0.0
        said = f"https; the certificate holds until {ends}"
        yield (
            warn(f"{said}.", "Renew it, and let that happen by itself.")
            if left < _CERTIFICATE_WARN_S
            else ok(f"{said}.")
        )


@check("a-reverse-proxy")
def reverse_proxy(service: Service) -> Iterator[Finding]:
    """Whether anything stands in front that ends TLS and holds slow clients."""
    answer = service.get("/health", key="none")
    if answer.front:
        yield ok(f"{answer.front} stands in front.")
    elif service.is_tls:
        yield ok("TLS ends in front of the server.")
    else:
        yield warn("No proxy shows itself: this is the server's own address.", "Ask through the proxy: --url https://…")


@dataclass(frozen=True)
class Arrival:
    """How a stream's events came (seconds since the request was sent), and how long the server wrote on them."""

    times: list[float]
    num_pieces: int
    written_s: float
    tokens: int

    @property
    def spread_s(self) -> float:
        return self.times[-1] - self.times[0]

    @property
    def came_as_written(self) -> bool:
        """Over half of the time in which they were written, and in many pieces, not in a proxy's buffers."""
        return self.spread_s >= self.written_s / 2 and self.num_pieces >= max(3, len(self.times) / 10)


@check("streams-come-all-at-once")
def streaming(service: Service) -> Iterator[Finding]:
    """Whether the tokens of a stream arrive one by one, as they were written."""
    last: Arrival | None = None
    for attempt in range(_ATTEMPTS):  # a machine that is busy may delay one; a buffer delays all
        try:
            answer = service.post("/generate", _long_body(service, attempt) | {"stream": True})
        except Unreachable as error:
            yield fail(f"A stream does not come to its end: {error.message}", "Raise the proxy's time-outs.")
            return
        if (refused := _not_now(answer)) is not None:
            yield refused
            return
        if answer.headers.get_content_type() != "text/event-stream":
            yield fail(
                f"A stream is answered {answer.status} {answer.headers.get_content_type()}.", "Is this /generate?"
            )
            return
        arrival = arrival_of(answer)
        if arrival is None:
            yield fail(
                f"A stream was cut off after {answer.seconds:.1f} s, {len(answer.body):,} bytes in.",
                "Raise the proxy's time-outs; if there is none, the server's log says why.",
            )
            return
        if arrival.written_s >= _MIN_STREAM_S:
            last = arrival
            if arrival.came_as_written:
                yield ok(
                    f"{len(arrival.times)} events came in {arrival.num_pieces} pieces over {arrival.spread_s:.2f} s,"
                    f" written in {arrival.written_s:.2f} s: {arrival.tokens / arrival.written_s:,.0f} tokens/s."
                )
                return
    if last is None:
        yield warn(
            "Streams end too soon to tell whether they are buffered.", "Raise NANOGPT_MAX_NEW_TOKENS and ask again."
        )
        return
    yield fail(
        f"Streams are held back: {len(last.times)} events, written in {last.written_s:.2f} s, came in"
        f" {last.num_pieces} pieces over {last.spread_s:.2f} s.",
        "nginx: proxy_buffering off, and gzip off; others: switch off buffering and compression of text/event-stream.",
    )


def arrival_of(answer: Answer) -> Arrival | None:
    """When each event was there whole; None for a stream without its end, which has the timings."""
    times: list[float] = []
    text = b""
    last = b""
    for moment, data in answer.pieces:
        *events, text = (text + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                times.append(moment)
                last = event
    try:
        end = json.loads(last[6:])
        timings = end["timings"]
        written_s = float(timings["total_s"]) - float(timings["ttft_s"])
        tokens = int(end["tokens_generated"])
    except (ValueError, KeyError, TypeError):
        return None
    return Arrival(times, len(answer.pieces), written_s, tokens)


@check("slow-answers-and-time-outs")
def timeouts(service: Service) -> Iterator[Finding]:
    """Whether the longest answer, in one piece, comes through."""
    try:
        answer = service.post("/generate", _long_body(service, 0, service.max_new_tokens))
    except TooSlow as slow:
        yield warn(
            f"The longest answer: {slow.message}", "Lower NANOGPT_MAX_NEW_TOKENS, or wait longer with --timeout."
        )
        return
    except Unreachable:
        yield fail(
            f"The connection is cut before the longest answer ({service.max_new_tokens:,} tokens) is there.",
            "Raise the proxy's time-outs above request_timeout_s.",
        )
        return
    if (refused := _not_now(answer)) is not None:
        yield refused
        return
    took = answer.seconds
    if answer.status != 200:
        if answer.code == "timeout":
            says, remedy = (
                "request_timeout_s ends it",
                "Raise NANOGPT_REQUEST_TIMEOUT_S, or lower NANOGPT_MAX_NEW_TOKENS.",
            )
        else:
            says = f"{answer.front or 'the server'} answers {answer.status}"
            remedy = "Raise its time-outs (nginx: proxy_read_timeout) above request_timeout_s."
        yield fail(f"The longest answer does not come through: {says} after {took:.1f} s.", remedy)
        return
    tokens = answer.fields.get("tokens_generated")
    said = f"The longest answer ({tokens} tokens) comes through, in {took:.1f} s"
    if answer.fields.get("finish_reason") == "abort":
        yield fail(
            f"{said}, cut by request_timeout_s.", "Raise NANOGPT_REQUEST_TIMEOUT_S, or lower NANOGPT_MAX_NEW_TOKENS."
        )
    elif took * _UNDER_LOAD > _USUAL_TIMEOUT_S:
        yield warn(
            f"{said}; a full server takes several times as long, and most proxies wait for {_USUAL_TIMEOUT_S} s.",
            "Set the proxy's time-out above request_timeout_s (nginx: proxy_read_timeout 300s).",
        )
    else:
        yield ok(f"{said}.")


@check("all-clients-share-one-limit")
def proxies(service: Service) -> Iterator[Finding]:
    """Whether a client is counted as itself: not as the proxy, and not as whoever it claims to be.

    Seen by RateLimit-Remaining: what one account has left goes down by one with each of its requests, and no other's.
    """
    # On this machine a proxy has our own address. Asked from another one of ours, it is told from us.
    us = _OTHER_LOOPBACK if service.host == "127.0.0.1" and can_come_from(_OTHER_LOOPBACK) else ""
    answer = _counted(service, us)
    if answer.status in (401, 403):
        yield ok("Clients are counted by their keys: addresses do not matter.")
        return
    if (before := _left(answer)) is None:
        yield ok("Nothing is counted by address: RATE_LIMIT is off, or not told.")
        return
    is_shared = False
    if us:
        _counted(service, "127.0.0.1")
        answer = _counted(service, us)
        is_shared = before - (_left(answer) or 0) > 1
        before = _left(answer) or 0
    claimed = _counted(service, us, forge=True)
    is_other = (_left(claimed) or 0) >= before
    again = _counted(service, us, forge=True) if is_other else claimed
    if 429 in (answer.status, claimed.status, again.status):
        yield warn("Not measured: the limit is used up.", "Ask again in a minute, or raise RATE_LIMIT meanwhile.")
        return
    if is_other and (_left(again) or 0) >= (_left(claimed) or 0):
        yield fail(
            "A client that invents an address in X-Forwarded-For is counted as that one, each time anew.",
            "Set NANOGPT_TRUSTED_PROXIES to the number of proxies in front; they must add to the header, or set it.",
        )
    elif is_other:
        yield warn(
            "Who sends an X-Forwarded-For of its own is counted as the proxy.",
            "Let the proxy set it: proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
        )
    elif is_shared:
        yield fail(
            "Two clients with different addresses share one limit: the server takes the proxy for both.",
            "Set NANOGPT_TRUSTED_PROXIES to the number of proxies in front, and let them send X-Forwarded-For.",
        )
    elif not us and (answer.front or service.is_tls):
        request_id = answer.headers.get("X-Request-Id", "")
        yield warn(
            "No address can be forged; whether all clients share the proxy's cannot be told from one address.",
            f"Look for id={request_id} in the server's log: is caller=address:… yours? If not, set"
            " NANOGPT_TRUSTED_PROXIES.",
        )
    else:
        yield ok("A client is counted by its own address, and cannot claim another.")


def _counted(service: Service, source: str, *, forge: bool = False) -> Answer:
    """A request that is refused and counted, from one of our addresses, or as if from one that nobody has."""
    headers = {}
    if forge:
        address = _FORGED.format(secrets.randbelow(256), 1 + secrets.randbelow(254))
        headers = {"X-Forwarded-For": address, "X-Real-IP": address}
    return service.ask("POST", "/generate", key="none", body={}, headers=headers, source=source)


def _left(answer: Answer) -> int | None:
    """How many requests are left to whom the server took us for."""
    return answer.number("RateLimit-Remaining")


def _long_body(service: Service, seed: int, tokens: int = 300) -> dict[str, object]:
    """An answer of many tokens that nobody has asked for before."""
    return {
        "prompt": service.prompt,
        "max_length": min(tokens, service.max_new_tokens),
        "cache": False,
        "seed": seed + 1,
    }


def _not_now(answer: Answer) -> Finding | None:
    """What to say where the server refuses to generate at all."""
    if answer.status not in _REFUSALS or not answer.code:
        return None
    words = str(answer.fields.get("error") or answer.code)
    if answer.status == 429:
        return warn(
            f"Not measured: {words}", f"Ask again in {answer.headers.get('Retry-After', '60')} s, or with a key."
        )
    return warn(f"Not measured: {words}", "Set API_KEY to a key that may generate.")


CHECKS = (transport, reverse_proxy, streaming, timeouts, proxies)
