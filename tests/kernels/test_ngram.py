"""Speculation's guesses come from the text itself, and stop where they do not come true."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanogpt.runner.ngram import LENGTHS, NgramProposer


def guesses(text: list[int], limit: int, worth: float = 0.0) -> list[int]:
    return NgramProposer(text).propose([], limit, worth)


def test_what_followed_before_is_proposed() -> None:
    assert guesses([5, 1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]


def test_the_longest_match_counts_and_of_equals_the_latest() -> None:
    assert guesses([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1) == [3]
    assert guesses([1, 2, 3, 1, 2, 4, 9, 1, 2], 1) == [4]


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    """The latest occurrence ends shortly before the text does: fewer tokens follow it than may be guessed."""
    assert guesses([9, 1, 1, 1], 4) == [1, 1, 1, 1]
    assert guesses([9, 1, 2, 3, 1, 2, 3], 5) == [1, 2, 3, 1, 2]


def test_a_text_without_repetition_is_not_guessed() -> None:
    assert guesses(list(range(100)), 8) == []


def test_token_ids_that_are_no_characters_are_tokens() -> None:
    """Halves of surrogate pairs, and ids past 16 bits."""
    text = [0xD800, 0xDFFF, 70_000, 0, 0xD800, 0xDFFF]
    assert guesses(text, 2) == [70_000, 0]


def test_the_output_belongs_to_the_text() -> None:
    proposer = NgramProposer([1, 2, 3])
    output = [1]
    assert proposer.propose(output, 2, 0.0) == []
    output += [2]
    assert proposer.propose(output, 2, 0.0) == [3, 1]


def test_only_guesses_likelier_than_their_worth_are_made() -> None:
    proposer = NgramProposer([1, 2, 3] * 10)
    assert len(proposer.propose([], 8, 0.2)) == 2  # 0.5, 0.25
    assert proposer.propose([], 8, 0.5) == []
    for _ in range(100):
        proposer.observe(len(proposer.propose([], 8, 0.0)), 8)
    assert len(proposer.propose([], 8, 0.9)) == 8
    assert proposer.chance(8) > 7


def test_guesses_that_are_not_made_are_measured_all_the_same() -> None:
    """A sequence whose text begins to repeat itself is found out, without a row having been computed for it."""
    proposer = NgramProposer(range(100, 120))
    output: list[int] = []
    assert proposer.best == 0.5
    for _ in range(100):
        output += [1, 2, 3, 4]
        for _ in range(4):
            proposer.skip(output)
    assert proposer.best > 0.9
    for i in range(200):
        output.append(200 + i * i)
        proposer.observe(8, 0)
        proposer.skip(output)
    assert proposer.best < 0.9


def test_what_one_sequence_learns_the_next_one_begins_with() -> None:
    shared = [0.5] * len(LENGTHS)
    proposer = NgramProposer([1, 2, 3] * 10, shared)
    for _ in range(500):
        proposer.observe(len(proposer.propose([], 4, 0.0)), 0)
    assert NgramProposer([1], shared).best == 0.5  # other lengths of matches
    assert min(shared) < 0.2
    assert NgramProposer([1, 2, 3] * 10, shared).propose([], 4, 0.3) == []


@given(text=st.lists(st.integers(0, 3), max_size=60), split=st.integers(0, 60), limit=st.integers(0, 8))
def test_a_proposal_is_what_followed_the_same_tokens_before(text: list[int], split: int, limit: int) -> None:
    proposer = NgramProposer(text[:split])
    made = proposer.propose(text[split:], limit, 0.0)
    assert len(made) <= limit
    for i, token_id in enumerate(made):
        so_far = [*text, *made[:i]]
        pieces = [so_far[k : k + 2] for k in range(len(so_far) - 2) if so_far[k + 2] == token_id]
        assert so_far[-2:] in pieces
