"""Speculation's guesses come from the text itself, and stop where they do not come true."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanogpt.runner.ngram import NgramProposer


def test_what_followed_before_is_proposed() -> None:
    assert NgramProposer([5, 1, 2, 3, 4, 9, 1, 2]).propose(3) == [3, 4, 9]


def test_the_longest_match_counts_and_of_equals_the_latest() -> None:
    assert NgramProposer([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]).propose(1) == [3]
    assert NgramProposer([1, 2, 3, 1, 2, 4, 9, 1, 2]).propose(1) == [4]


def test_a_text_without_repetition_is_not_guessed() -> None:
    assert NgramProposer(range(100)).propose(8) == []


def test_guessing_stops_while_it_does_not_pay_and_is_tried_again() -> None:
    proposer = NgramProposer([1, 2, 3] * 10)
    made = []
    for _ in range(200):
        guesses = proposer.propose(8)
        made.append(len(guesses))
        proposer.accept(len(guesses), 0)
    assert sum(made[20:]) <= 2 * 180 // 32 + 2
    assert any(made[20:])
    for _ in range(2000):
        guesses = proposer.propose(8)
        proposer.accept(len(guesses), len(guesses))
    assert len(proposer.propose(8)) > 2


@given(text=st.lists(st.integers(0, 3), max_size=60), limit=st.integers(0, 8))
def test_a_proposal_is_a_piece_of_the_text_after_its_end(text: list[int], limit: int) -> None:
    guesses = NgramProposer(text).propose(limit)
    assert len(guesses) <= limit
    if guesses:
        piece = [*text[-2:], *guesses]
        assert any(text[i : i + len(piece)] == piece for i in range(len(text)))
