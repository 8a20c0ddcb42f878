"""Protects streamed text: the same as the whole decode for every split, never half a character, nothing of a stop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt.tokenizer import TextStream, characters, gpt2

BYTE_IDS = {gpt2().token_bytes(i): i for i in range(256)}

# Every proper beginning of a well-formed character, by the 64 characters that share it. Source: Unicode 15, table 3-7.
INCOMPLETE = {
    chr(first).encode()[:length]
    for first in range(0x80, 0x110000, 0x40)
    if not 0xD800 <= first <= 0xDFFF
    for length in range(1, len(chr(first).encode()))
}

TEXTS = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("中文的你好「」，。ñé\u0301\u0308\u200d👩🏽‍🚀🇨🇳\ufffd\x00\n ab"),
    ),
    max_size=30,
)
# Lone continuations, overlong forms, surrogates, past the last character, torn and doubled lead bytes.
BROKEN = st.sampled_from(
    [
        b"\x80", b"\xbf\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xf0\x80\x80\x80",
        b"\xed\xa0\x80", b"\xed\xa0\xbd\xed\xb8\x80", b"\xed", b"\xed\xa0", b"\xf4\x90\x80\x80", b"\xf5\x80", b"\xff",
        b"\xfe", b"\xe4", b"\xe4\xb8", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x91", b"\xe4\xe4\xb8\xad", b"\xf0\x9f\xe4\xb8",
    ]
)  # fmt: skip
BYTES = st.lists(st.one_of(TEXTS.map(str.encode), BROKEN, st.binary(max_size=6)), max_size=8).map(b"".join)


@st.composite
def tokens_of_bytes(draw: st.DrawFn) -> list[int]:
    """Any bytes, cut anywhere: pieces that are tokens as they are, all others a token a byte."""
    data = draw(BYTES)
    ids: list[int] = []
    while data:
        piece, data = data[:1], data[1:]
        ids.append(BYTE_IDS[piece])
    return ids


TOKENS = st.one_of(
    tokens_of_bytes(),
    TEXTS.map(lambda text: gpt2().encode(text)),
    st.lists(st.integers(0, 50300), max_size=20),
)


def split(items: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    borders = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    return [items[start:end] for start, end in itertools.pairwise(borders)]


CUTS = st.lists(st.integers(0, 60), max_size=8)


def certain(data: bytes) -> str:
    """The text that no further byte can change."""
    for length in (3, 2, 1):
        if data[-length:] in INCOMPLETE:
            data = data[:-length]
            break
    return data.decode("utf-8", errors="replace")


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """The text before the stop that is complete first; None if there is none. Quadratic, and obviously right."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@given(TOKENS, CUTS)
@example([BYTE_IDS[b"\xed"], BYTE_IDS[b"\xa0"], BYTE_IDS[b"\x80"]], [1, 2])
def test_pushes_add_up_to_the_whole_decode(ids: list[int], cuts: list[int]) -> None:
    stream = TextStream(gpt2())
    pushed = [stream.push(part) for part in split(ids, cuts)]
    text = "".join(pushed) + stream.finish()
    assert text == stream.text == gpt2().decode(ids)
    assert stream.num_tokens == len(ids)
    assert not stream.stopped


@given(TOKENS)
def test_text_comes_as_soon_as_it_is_certain_and_never_before(ids: list[int]) -> None:
    """Half a character is held back; a byte that can never be part of one is not."""
    stream = TextStream(gpt2())
    data, returned = b"", ""
    for token_id in ids:
        data += gpt2().token_bytes(token_id)
        returned += stream.push([token_id])
        assert returned == certain(data)


@given(TOKENS)
def test_offsets_tell_where_a_token_begins(ids: list[int]) -> None:
    stream = TextStream(gpt2())
    stream.push(ids)
    data = b""
    expected = []
    for token_id in ids:
        expected.append(len(certain(data)))
        data += gpt2().token_bytes(token_id)
    assert stream.offsets == expected


SMALL = st.text("ab\ufffd中", min_size=1, max_size=4)


@given(
    st.lists(st.sampled_from([b"a", b"b", b"ab", b"\xe4", b"\xb8", b"\xad", b"\xe4\xb8\xad"]), max_size=25),
    st.lists(SMALL, max_size=4),
    CUTS,
)
@example([b"a", b"a", b"b"], ["aab", "ab"], [1])
@example([b"a", b"b", b"a", b"b", b"b"], ["abb"], [])
@example([b"\xe4"], ["\ufffd"], [])
@settings(max_examples=300)
def test_the_stop_that_is_complete_first_ends_the_text(pieces: list[bytes], stop: list[str], cuts: list[int]) -> None:
    """Over torn characters, over token borders, overlapping and nested stops, and however the tokens arrive."""
    ids = [BYTE_IDS[bytes((byte,))] for piece in pieces for byte in piece]
    stream = TextStream(gpt2(), stop)
    returned = ""
    for part in split(ids, cuts):
        returned += stream.push(part)
        assert returned == stream.text
    returned += stream.finish()

    whole = gpt2().decode(ids)
    cut = cut_at_stop(whole, stop)
    assert returned == (whole if cut is None else cut)
    assert stream.stopped == (cut is not None)

    count = len(ids)
    for n in range(len(ids), 0, -1):
        data = b"".join(map(gpt2().token_bytes, ids[:n]))
        if cut_at_stop(certain(data), stop) is not None:
            count = n
    assert stream.num_tokens == count
    assert len(stream.offsets) == count


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_what_can_become_a_stop_is_held_back(text: str, stop: list[str]) -> None:
    """What is held back is a beginning of a stop, and the longest: anything less would break the stop later."""
    tokenizer = characters("ab")
    stream = TextStream(tokenizer, stop)
    returned = ""
    for end, token_id in enumerate(tokenizer.encode(text), 1):
        returned += stream.push([token_id])
        if stream.stopped:
            assert returned == cut_at_stop(text[:end], stop)
            break
        beginnings = [n for s in stop for n in range(len(s)) if text[:end].endswith(s[:n])]
        assert returned == text[: end - max(beginnings)]
