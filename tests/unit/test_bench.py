"""Protects figures that people decide by: quantiles, goodput, moments of sending, how an answer's bytes are read."""

from __future__ import annotations

import asyncio
import json
import random
import re
from array import array
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from nanogpt.bench import report
from nanogpt.bench.capacity import Capacity, Search, Trial, _Finder, recommend
from nanogpt.bench.http import Answer, Target
from nanogpt.bench.load import Plan, Run, arrivals
from nanogpt.bench.measures import SLO, Outcome, distribution, peak_concurrency, per_second, quantile, summary
from nanogpt.bench.page import page
from nanogpt.bench.prompts import Lengths, Prompts, Server, Workload
from nanogpt.bench.stream import read_answer
from nanogpt.errors import InvalidRequest


def outcome(sent: float, ttft: float, gaps: list[float], **more: Any) -> Outcome:
    return Outcome(
        sent, 0.0, ttft + sum(gaps), ttft_s=ttft, generation_s=sum(gaps), gaps_s=array("d", gaps), prompt_tokens=10,
        output_tokens=len(gaps) + 1, **more,
    )  # fmt: skip


# -- figures ----------------------------------------------------------------------------------------------------------


def test_quantiles_are_numpys() -> None:
    draw = random.Random(3)
    values = sorted(draw.expovariate(1) for _ in range(101))
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))
    assert quantile([7.0], 0.99) == 7.0
    assert distribution([]) is None


def test_a_runs_figures_are_those_of_a_hand_calculation() -> None:
    """Two requests of 3 tokens, 0.1 + 2 * 0.05 s and 0.3 + 2 * 0.1 s, the second sent at 1 s; and one refused."""
    outcomes = [
        outcome(0.0, 0.1, [0.05, 0.05]),
        outcome(1.0, 0.3, [0.1, 0.1]),
        Outcome(1.1, 0.0, 0.01, failure="429 rate_limited"),
    ]
    figures = summary(outcomes, SLO.parse("ttft=200ms,itl=60ms"))
    assert figures["duration_s"] == 1.5
    assert figures["requests_per_s"] == pytest.approx(2 / 1.5, abs=1e-4)
    assert figures["output_tokens_per_s"] == pytest.approx(6 / 1.5)
    assert figures["total_tokens_per_s"] == pytest.approx(26 / 1.5, abs=1e-3)
    assert figures["ttft_ms"]["mean"] == pytest.approx(200)
    assert figures["itl_ms"]["p50"] == pytest.approx(75)
    assert figures["tpot_ms"]["max"] == pytest.approx(100)
    assert figures["e2e_ms"]["max"] == pytest.approx(500)
    assert figures["errors"] == {"429 rate_limited": 1}
    assert figures["peak_concurrency"] == 2
    # Of three requests one was within the limits: the slow one and the refused one count against it.
    assert figures["goodput"]["requests_per_s"] == pytest.approx(1 / 1.5, abs=1e-4)
    assert figures["goodput"]["attainment"] == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("slo", "good"),
    [("ttft=100ms", True), ("ttft=99ms", False), ("itl=50ms", True), ("itl=49ms", False), ("tpot=0.05s", True),
     ("e2e=199ms", False), ("ttft=1s,itl=1s,e2e=201ms", True)],
)  # fmt: skip
def test_every_limit_counts(slo: str, good: bool) -> None:
    assert outcome(0.0, 0.1, [0.0625, 0.0375]).meets(SLO.parse(slo)) is good


def test_one_token_has_no_gap_that_could_be_too_long() -> None:
    assert outcome(0.0, 0.1, []).meets(SLO.parse("itl=1ms,tpot=1ms,ttft=1s"))
    assert outcome(0.0, 0.1, []).tpot_s is None


@pytest.mark.parametrize("text", ["", "ttft", "ttft=200", "ttft=0ms", "latency=2ms", "ttft=-1ms", "ttft=200ms;itl=1ms"])
def test_a_wrong_objective_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidRequest, match="ttft=200ms,itl=50ms"):
        SLO.parse(text)


def test_seconds_count_each_token_once() -> None:
    outcomes = [outcome(0.2, 0.3, [0.2] * 9), outcome(0.9, 0.4, [0.01] * 4), Outcome(1.0, 0.0, 0.5, failure="cut")]
    rows = per_second(outcomes)
    assert sum(row["tokens"] for row in rows) == pytest.approx(15)
    assert sum(row["completed"] for row in rows) == 2
    assert sum(row["failed"] for row in rows) == 1
    assert peak_concurrency(outcomes) == 3


# -- what is sent, and when -------------------------------------------------------------------------------------------


def test_a_seed_repeats_the_moments_of_sending_and_they_are_poissons() -> None:
    times = arrivals(50.0, 7, requests=4000)
    assert times == arrivals(50.0, 7, requests=4000)
    assert times != arrivals(50.0, 8, requests=4000)
    assert times[:100] == arrivals(50.0, 7, duration_s=100.0)[:100], "how a run ends does not change its begin"
    gaps = np.diff([0.0, *times])
    # Of an exponential distribution mean and deviation are the same; 4,000 values are within 5% of it.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)
    assert max(arrivals(50.0, 7, duration_s=2.0)) < 2.0


def test_a_seed_repeats_prompts_and_lengths() -> None:
    workload = Workload(Lengths(20, 40), Lengths(1, 9), shared_prefix=8, prefixes=2, seed=5)
    server = Server("m", vocabulary=50, avoided=frozenset({0}), ours=True)
    first, again = Prompts(workload, server), Prompts(workload, server)
    # A request's prompt does not depend on which were made before it.
    bodies = [json.loads(first.request(i)) for i in range(40)]
    assert bodies == [json.loads(again.request(i)) for i in reversed(range(40))][::-1]
    prompts = [body["prompt"] for body in bodies]
    assert {len(prompt) for prompt in prompts} <= set(range(20, 41))
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 2
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 40
    assert all(0 < token_id < 50 for prompt in prompts for token_id in prompt), "the end of text is no prompt"
    assert {1 <= body["max_tokens"] <= 9 for body in bodies} == {True}
    assert bodies[0]["ignore_eos"] is True
    assert bodies[0]["cache"] is False, "an answer from the response cache is no load"


def test_fields_that_are_not_everyones_are_not_sent_to_everyone() -> None:
    body = json.loads(Prompts(Workload(chat=True), Server("m", ignores_eos=False)).request(0))
    assert "cache" not in body
    assert "ignore_eos" not in body
    assert isinstance(body["messages"][0]["content"], str)


@pytest.mark.parametrize("text", ["0", "-1", "9-3", "many", "1-", "1.5"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--prompt-tokens"):
        Lengths.parse(text, "prompt_tokens")


@pytest.mark.parametrize(
    "url", ["localhost:5000", "ftp://x", "http://", "http://u:p@x", "http://x:99999", "http://x?a=1"]
)
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="The URL is"):
        Target.parse(url)


def test_a_url_may_name_the_api_or_the_server() -> None:
    for url in ("http://host:5000", "http://host:5000/", "http://host:5000/v1", "http://host:5000/v1/"):
        assert Target.parse(url).url == "http://host:5000"
    target = Target.parse("https://host/models/small/v1", "key")
    assert (target.port, target.prefix) == (443, "/models/small")
    assert b"\r\nAuthorization: Bearer key\r\n" in target.request("GET", "/v1/models")


# -- what comes back --------------------------------------------------------------------------------------------------


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    event({"choices": [{"text": "a"}], "usage": None}),
    b": ping\n\n",
    event({"choices": [{"text": "b\n\n"}], "usage": None}) + event({"choices": [{"text": "c"}], "usage": None}),
    event({"choices": [{"text": "", "finish_reason": "length"}], "usage": None}),
    event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}) + event(b"[DONE]"),
]
STREAM = HEAD + b"".join(chunk(data) for data in EVENTS) + b"0\r\n\r\n"


def fed(data: bytes, sizes: list[int] | None = None) -> tuple[Answer, bool]:
    """Piece i of the answer comes at i seconds."""
    answer, whole, at, i = Answer(), False, 0, 0
    while at < len(data):
        size = sizes[i] if sizes and i < len(sizes) else len(data)
        whole = answer.feed(data[at : at + size], float(i))
        at, i = at + size, i + 1
    answer.ended = float(i - 1)
    return answer, whole


def test_an_answer_reads_the_same_however_it_is_cut_into_packets() -> None:
    draw = random.Random(1)
    for sizes in [[1] * len(STREAM), *([draw.randint(1, 40) for _ in range(400)] for _ in range(50))]:
        answer, whole = fed(STREAM, sizes)
        assert whole
        assert bytes(answer.body) == b"".join(EVENTS)
        assert answer.keep
    # As a proxy may send it on: chunks that end where no event does.
    body = b"".join(EVENTS)
    data = HEAD + b"".join(chunk(body[i : i + 7]) for i in range(0, len(body), 7)) + b"0\r\nTrailer: x\r\n\r\n"
    answer, whole = fed(data, [5] * len(data))
    assert whole
    assert read_answer(answer, began=0.0, planned=0.0).failure == ""


def test_times_are_those_of_the_events_with_text() -> None:
    pieces = [HEAD, *(chunk(data) for data in EVENTS), b"0\r\n\r\n"]
    answer, whole = fed(b"".join(pieces), [len(piece) for piece in pieces])
    read = read_answer(answer, began=0.0, planned=0.0)
    assert whole
    # Packet 0 is the head, 1 has "a", 2 a ping, 3 has two texts at once; the reason to end and the usage are no text.
    assert read.ttft_s == 1.0
    assert list(read.gaps_s) == [2.0, 0.0]
    assert (read.prompt_tokens, read.output_tokens) == (9, 4), "the server's own count"
    assert read.tpot_s == pytest.approx(2 / 3)
    assert read.e2e_s == 6.0


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (b'HTTP/1.1 429 X\r\nContent-Length: 38\r\n\r\n{"error":"slow","code":"rate_limited"}', "429 rate_limited"),
        (b'HTTP/1.1 503 X\r\nContent-Length: 31\r\n\r\n{"error":{"code":"queue_full"}}', "503 queue_full"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 6\r\n\r\n<html>", "502"),
        (HEAD + chunk(EVENTS[0]) + b"0\r\n\r\n", "stream: no end"),
        (HEAD + chunk(EVENTS[0] + event({"error": {"code": "engine_died"}})) + b"0\r\n\r\n", "stream: engine_died"),
        (HEAD + chunk(event(b"[DONE]")) + b"0\r\n\r\n", "stream: no text"),
        (HEAD + chunk(event(b"{")) + b"0\r\n\r\n", "stream: no JSON"),
    ],
)
def test_every_way_to_fail_has_its_kind(data: bytes, failure: str) -> None:
    answer, whole = fed(data)
    assert whole
    assert read_answer(answer, began=0.0, planned=0.0).failure == failure


@pytest.mark.parametrize("data", [b"SSH-2.0\r\n\r\n", HEAD + b"zz\r\n", b"HTTP/1.1 2", b"HTTP/1.1 x\r\n\r\n"])
def test_what_is_not_http_is_no_answer(data: bytes) -> None:
    if data == b"HTTP/1.1 2":
        assert fed(data)[1] is False
        return
    with pytest.raises(ValueError):
        fed(data)


# -- the search -------------------------------------------------------------------------------------------------------


def search(limit: float, *, flaky: frozenset[int] = frozenset(), max_trials: int = 20) -> Capacity:
    """The search against a server that meets rates up to the limit; trials of the given numbers go the other way."""
    finder = _Finder(None, Server("m"), Workload(), Search(SLO.parse("ttft=1s"), max_trials=max_trials), print, None)  # type: ignore[arg-type]
    finder.found.alone = {"e2e_ms": {"mean": 1000.0}, "ttft_ms": {"p50": 10.0}}

    async def trial(rate: float, purpose: str) -> Trial:
        met = (rate <= limit) != (len(finder.found.trials) in flaky)
        figures = {"peak_concurrency": 5, "output_tokens_per_s": 100.0}
        finder.found.trials.append(Trial(rate, purpose, met, 1.0, 30, not met, figures, {"warning": None}))
        return finder.found.trials[-1]

    finder._trial = trial  # type: ignore[method-assign]

    async def find() -> None:
        await finder._narrow(*await finder._double(1.0))

    asyncio.run(find())
    return finder.found


@pytest.mark.parametrize("limit", [0.3, 0.99, 1.0, 1.5, 6.2, 100.0])
def test_the_search_ends_within_its_tolerance_and_confirms(limit: float) -> None:
    found = search(limit)
    assert found.confirmed
    assert limit / 1.1 <= found.rate <= limit
    assert [trial.purpose for trial in found.trials][-1] == "confirm"


def test_a_rate_that_was_met_by_luck_is_not_the_result() -> None:
    """Doubling meets 8 by luck: the confirmation refuses it, and the search goes on below."""
    found = search(5.0, flaky=frozenset({3}))
    assert found.trials[3].rate == 8.0
    assert found.trials[3].met
    assert found.confirmed
    assert found.rate <= 5.0


def test_a_search_that_runs_out_of_trials_says_so() -> None:
    found = search(5.0, max_trials=4)
    assert len(found.trials) <= 4
    assert "used up" in found.why


def test_settings_follow_from_what_was_seen() -> None:
    advice = recommend(search(5.0))
    assert advice is not None
    assert advice["NANOGPT_MAX_BATCH_SIZE"]["value"] == 8, "5 at once, in steps of 4"
    assert int(advice["RATE_LIMIT"]["value"].split()[0]) == int(0.8 * search(5.0).rate * 60 / 10)
    assert recommend(search(0.0, max_trials=5)) is None


# -- the page ---------------------------------------------------------------------------------------------------------


class WellFormed(HTMLParser):
    """Every element that is opened is closed, in order; addresses and scripts are collected."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without its begin"
        assert self.open.pop() == tag


def test_the_page_is_whole_by_itself_and_escapes_what_a_server_says() -> None:
    outcomes = [outcome(i / 10, 0.1 + i / 1000, [0.01] * 5) for i in range(2000)]
    outcomes.append(Outcome(1.0, 0.0, 0.1, failure="503 <script>"))
    client = {"cpu_share": 0.1, "cpu_us_per_token": 20.0, "loop_lag_ms": None, "late_ms": None, "warning": "busy <b>"}
    slo = SLO.parse("ttft=200ms")
    made = report.as_json(
        Target.parse("http://127.0.0.1:1"), Server("<script>alert(1)</script>", vocabulary=9), Workload(),
        Plan(rate=10.0, requests=2001), Run(outcomes, client), slo, search(5.0),
    )  # fmt: skip
    for trial in made["capacity"]["trials"]:
        trial["figures"] |= {"ttft_ms": {"p50": 1.0, "p99": 2.0}, "itl_ms": None}
    html = page(json.loads(json.dumps(made)))
    parser = WellFormed()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert parser.seen.count("svg") >= 8
    assert parser.addresses == []
    assert "script" not in parser.seen
    assert not re.search(r"url\(|@import|https?://(?!127\.0\.0\.1)", html)
    assert "prefers-color-scheme: dark" in html
    assert len(html) < 1_000_000, "more points than pixels are left out"
    assert not re.search(r"\bnan\b", html), "a figure that is none"
    assert "2000 of 2001 completed" in report.table(made)
    assert "capacity:" in report.capacity_table(made)
