"""Protects the text side of a generation: what a client sees of tokens, and when."""

from __future__ import annotations

import pytest

from nanogpt.errors import InvalidRequest
from nanogpt.tokenizer import TextStream, characters, gpt2


def test_an_emoji_torn_over_tokens_comes_as_one_character() -> None:
    """Streams of other servers show three replacement characters where the emoji should be."""
    ids = gpt2().encode("a🚀b")
    assert len(ids) > 3, "the emoji is no single token"
    stream = TextStream(gpt2())
    pieces = [stream.push([token_id]) for token_id in ids]
    assert [piece for piece in pieces if piece] == ["a", "🚀", "b"]
    assert stream.finish() == ""


def test_a_torn_last_character_becomes_a_replacement_character_at_the_end_only() -> None:
    ids = gpt2().encode("é🚀")[:-1]
    stream = TextStream(gpt2())
    assert stream.push(ids) == "é"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.text == gpt2().decode(ids)


def test_nothing_follows_a_stop() -> None:
    stream = TextStream(gpt2(), ["\nUser:"])
    ids = gpt2().encode("Yes.\nUser: and now?")
    text = "".join(stream.push([token_id]) for token_id in ids)
    assert text == stream.text == "Yes."
    assert stream.stopped
    assert gpt2().decode(ids[: stream.num_tokens]) == "Yes.\nUser:"
    assert (stream.push(ids), stream.finish()) == ("", "")
    assert gpt2().decode(ids[: stream.num_tokens]) == "Yes.\nUser:", "tokens after the stop are not counted"


def test_what_looked_like_a_stop_is_text_after_all() -> None:
    stream = TextStream(characters("ab\n"), ["\n\nb"])
    assert [stream.push([i]) for i in characters("ab\n").encode("a\n\n\na")] == ["a", "", "", "\n", "\n\na"]


def test_a_held_back_beginning_of_a_stop_is_flushed_at_the_end() -> None:
    stream = TextStream(characters("ab\n"), ["\n\nb"])
    assert stream.push(characters("ab\n").encode("a\n\n")) == "a"
    assert stream.finish() == "\n\n"
    assert not stream.stopped


def test_a_stop_given_as_one_text_is_one_stop() -> None:
    """A str is a sequence of its characters: each of them would be a stop."""
    stream = TextStream(characters("ab "), "ab")
    assert stream.push(characters("ab ").encode("b aab")) == "b a"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        TextStream(gpt2(), ["a", ""])


def test_unknown_ids_are_no_text_but_count() -> None:
    stream = TextStream(gpt2())
    assert stream.push([50257, 10**9, -1, 64]) == "a"
    assert stream.num_tokens == 4


def test_a_hundred_thousand_tokens_take_linear_time() -> None:
    """A stop string that almost matches all the time is the worst case. Quadratic work would end in the time limit."""
    tokenizer = characters("ab")
    num_tokens = 100_000
    stream = TextStream(tokenizer, ["a" * 1000 + "b" * 1000, "ab" * 500 + "b"])
    returned = 0
    for _ in range(num_tokens // 2):
        returned += len(stream.push([0]))
        returned += len(stream.push([1]))
    returned += len(stream.finish())
    assert returned == num_tokens
