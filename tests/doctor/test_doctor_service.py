"""``nanogpt doctor --url``: what it tells of a service by what that answers, without a server of ours."""

from __future__ import annotations

import http.client
import json

import pytest
from doctor_support import Capture

from nanogpt import cli
from nanogpt.doctor import live, proxy
from nanogpt.doctor.checklist import BOXES, tick
from nanogpt.doctor.findings import Finding
from nanogpt.doctor.proxy import arrival_of
from nanogpt.doctor.service import Answer, Service, parse_metrics
from nanogpt.errors import InvalidRequest, NanoGPTError, SettingsError

# -- a service --------------------------------------------------------------------------------------------------


def answer(pieces: list[tuple[float, bytes]], status: int = 200, **headers: str) -> Answer:
    message = http.client.HTTPMessage()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return Answer(status, message, pieces, 0.0, pieces[-1][0] if pieces else 0.0)


END = b'data: {"tokens_generated": 99, "timings": {"ttft_s": 0.1, "total_s": 1.1}}\n\n'


def event(number: int) -> bytes:
    return b'data: {"text": "%d"}\n\n' % number


@pytest.mark.parametrize(
    ("pieces", "as_written"),
    [
        ([(0.1 + i / 100, event(i)) for i in range(100)] + [(1.1, END)], True),
        ([(0.1 + i / 20, event(i) + event(i)) for i in range(20)] + [(1.1, END)], True),
        ([(1.2, b"".join(map(event, range(100))) + END)], False),
        ([(1.2 + i / 1000, event(i)) for i in range(100)] + [(1.3, END)], False),
        ([(0.4, b"".join(map(event, range(50)))), (1.1, b"".join(map(event, range(50))) + END)], False),
        ([(0.1, event(1)[:3]), (0.2, event(1)[3:6]), (1.0, event(1)[6:]), (1.2, END)], False),
    ],
    ids=["one by one", "two by two", "at the end", "fast at the end", "two buffers", "nothing whole before the end"],
)
def test_a_stream_that_was_held_back_is_seen_by_when_its_events_came(
    pieces: list[tuple[float, bytes]], as_written: bool
) -> None:
    arrival = arrival_of(answer(pieces))
    assert arrival is not None
    assert arrival.came_as_written is as_written


def test_a_stream_without_its_end_was_cut_off() -> None:
    assert arrival_of(answer([(0.1, event(1))])) is None
    assert arrival_of(answer([(0.1, b"event: error\n" + END)])) is None
    assert arrival_of(answer([])) is None


def test_the_largest_batch_is_read_off_the_histogram() -> None:
    page = '# HELP x\nbroken\nnanogpt_step_sequences_bucket{le="1.0"} 1\n'
    for bound, count in (("2.0", 5), ("4.0", 5), ("8.0", 6), ("+Inf", 6)):
        page += f'nanogpt_step_sequences_bucket{{model_name="a",le="{bound}"}} {count}\n'
    assert live.largest_batch(parse_metrics(page)) == 5
    assert live.largest_batch({}) == 0


def test_the_histograms_of_two_models_are_one() -> None:
    """A server with two checkpoints tells each one's steps."""
    page = "".join(
        f'nanogpt_step_sequences_bucket{{le="{le}",model_name="{model}"}} {count}\n'
        for model, counts in (("a", (3, 3, 3)), ("b", (0, 7, 7)))
        for le, count in zip(("1.0", "8.0", "+Inf"), counts, strict=True)
    )
    assert live.largest_batch(parse_metrics(page)) == 2


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("localhost:5000", InvalidRequest),
        ("file:///etc/passwd", InvalidRequest),
        ("http://localhost:port", InvalidRequest),
        ("https://user:secret@example.com", InvalidRequest),
        ("http://gpt.example.com", SettingsError),
    ],
)
def test_where_a_key_is_not_sent(url: str, error: type[NanoGPTError]) -> None:
    """Plain http to another machine is refused before anything is sent, and no message holds a key."""
    with pytest.raises(error) as caught:
        Service(url, api_key="s3cret")
    assert caught.value.exit_code == 2
    assert "s3cret" not in str(caught.value)


def test_plain_http_is_taken_where_it_was_allowed_or_there_is_no_key() -> None:
    assert not Service("http://gpt.example.com", api_key="k", allow_plain_http=True).is_private
    assert not Service("http://gpt.example.com").is_private
    assert Service("https://gpt.example.com", api_key="k").is_private
    assert Service("http://[::1]:5000", api_key="k").is_private


def test_a_server_of_another_kind_is_told_and_asked_nothing_more(stranger: str, capsys: Capture) -> None:
    assert cli.main(["doctor", "--url", stranger]) == 1
    out = capsys.readouterr().out
    assert "answers 302 and points to https://elsewhere.example.com/" in out
    assert "\x1b" not in out
    assert "0 ok, 0 warn, 1 fail" in out


def test_nobody_there_leaves_every_box_open(capsys: Capture) -> None:
    assert cli.main(["doctor", "--checklist", "--url", "http://127.0.0.1:1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [box["ticked"] for box in report["checklist"]] == [False] * 8
    assert "Connection refused" in report["findings"][0]["says"]


def test_the_checklist_has_the_guides_eight_boxes_and_every_check_of_a_service() -> None:
    assert len(BOXES) == 8
    in_boxes = {name for _, names in BOXES for name in names}
    assert in_boxes == {check.name for check in (*live.CHECKS, *proxy.CHECKS)}
    assert not any(box.is_ticked for box in tick([]))
    good = [Finding("ok", "", check=name) for name in in_boxes]
    assert all(box.is_ticked for box in tick(good))
    assert [box.number for box in tick([*good, Finding("warn", "", check="metrics")]) if not box.is_ticked] == [4]
