"""The sampler: what each parameter does, in which order, and where a draw's random number comes from.

The same tests hold the NumPy reference and the sampler for CUDA devices, which runs on a CPU as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from nanogpt.errors import NanoGPTError
from nanogpt.runner import sampler
from nanogpt.runner.base import Batch, Float32, SamplingState
from nanogpt.runner.philox import philox, uniforms
from nanogpt.runner.sampler import Row, largest, sampled_rows, token_logprobs
from nanogpt.sampling_params import SamplingParams

Sample = Callable[[Float32, Sequence[Row], int], list[int]]


def on_torch(device: str) -> Sample:
    def sample(logits: Float32, rows: Sequence[Row], num_tokens: int) -> list[int]:
        torch = pytest.importorskip("torch")
        from nanogpt.runner import sampler_torch

        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        result: list[int] = sampler_torch.sample(torch.from_numpy(logits).to(device), rows, num_tokens).tolist()
        if min(result) < 0:  # as the runner does, after its one transfer
            raise sampler.not_finite()
        return result

    return sample


@pytest.fixture(params=["numpy", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def sample(request: pytest.FixtureRequest) -> Sample:
    return sampler.sample if request.param == "numpy" else on_torch("cpu" if request.param == "torch" else "cuda")


def row(seed: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (), **params: Any) -> Row:
    defaults = {"temperature": 1.0, "top_k": 0}
    return Row(0, 0, SamplingState(SamplingParams(**{**defaults, **params}), seed, prompt, list(output)), [])


def drawn(sample: Sample, logits: Sequence[float], n: int = 400, **options: Any) -> set[int]:
    """Every id that n seeds draw."""
    table = np.tile(np.array(logits, np.float32), (n, 1))
    return set(sample(table, [row(seed, **options) for seed in range(n)], len(logits)))


# -- random numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_known_answers(counter: str, key: str, expected: str) -> None:
    """Source: kat_vectors of Random123 (Salmon et al.), philox4x32 with 10 rounds."""

    def words(text: str) -> np.ndarray[Any, Any]:
        return np.array([[int(word, 16)] for word in text.split()], np.uint64)

    np.testing.assert_array_equal(philox(words(counter), words(key)), words(expected))


def test_a_seed_and_an_index_make_one_number() -> None:
    """As runner/base.py words it; every sampler, the C++ one too, must draw the same."""
    word_0, word_1 = 0x6627E8D5, 0xE169C58D
    assert uniforms([0], [0])[0] == ((word_0 | word_1 << 32) >> 11) / 2**53
    assert uniforms([-1], [5])[0] == uniforms([2**64 - 1], [5])[0]
    numbers = uniforms([7] * 50 + list(range(50)), [*range(50), *([7] * 50)])
    assert len(set(numbers.tolist())) == 99  # seed 7 with index 7 is there twice
    assert ((numbers >= 0) & (numbers < 1)).all()


# -- what the parameters do ----------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals(sample: Sample) -> None:
    logits = np.array([[1, 3, 3, 2], [5, 5, 5, 5], [-9, -9, -8, -8]], np.float32)
    assert sample(logits, [row(temperature=0.0)] * 3, 4) == [1, 0, 2]


def test_draws_follow_the_softmax(sample: Sample) -> None:
    n, temperature = 20_000, 0.7
    logits = np.array([0.5, -1.0, 2.0, 0.0, -3.0], np.float32)
    ids = sample(np.tile(logits, (n, 1)), [row(seed, temperature=temperature) for seed in range(n)], 5)
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    deviation = np.abs(np.bincount(ids, minlength=5) / n - p) / np.sqrt(p * (1 - p) / n)
    assert deviation.max() < 4  # the seeds are fixed: this passes always or never


def test_padding_is_never_drawn(sample: Sample) -> None:
    """build-nanogpt pads 50,257 to 50,304; the padding's logits are whatever training left there."""
    logits = np.array([[0, 1, 0.5, 99, 99]] * 200, np.float32)
    rows = [row(seed, temperature=seed % 3, top_k=seed % 5) for seed in range(200)]
    assert set(sample(logits, rows, 3)) == {0, 1, 2}


def test_top_k_is_exactly_k_and_equals_go_by_id(sample: Sample) -> None:
    assert drawn(sample, [1, 2, 2, 2, 2, 0], top_k=3) == {1, 2, 3}
    assert drawn(sample, [2, 1, 1, 3, 1, 1], top_k=4) == {0, 1, 2, 3}
    assert drawn(sample, [7] * 100, top_k=2) == {0, 1}
    assert drawn(sample, [1, 2, 3], top_k=1000) == {0, 1, 2}


def test_top_p_is_the_smallest_set_that_reaches_it(sample: Sample) -> None:
    logits = np.log([0.4, 0.1, 0.3, 0.2]).tolist()
    assert drawn(sample, logits, top_p=0.39) == {0}
    assert drawn(sample, logits, top_p=0.41) == {0, 2}
    assert drawn(sample, logits, top_p=0.69) == {0, 2}
    assert drawn(sample, logits, top_p=0.71) == {0, 2, 3}
    assert drawn(sample, logits, top_p=0.0) == {0}, "one candidate is always left"
    assert drawn(sample, [1, 1, 1, 1], top_p=0.5) == {0, 1}, "equals go by id"


def test_min_p_is_relative_to_the_most_probable(sample: Sample) -> None:
    logits = np.log([0.5, 0.1, 0.3, 0.04]).tolist()
    assert drawn(sample, logits, min_p=0.19) == {0, 1, 2}
    assert drawn(sample, logits, min_p=0.21) == {0, 2}
    assert drawn(sample, logits, min_p=1.0) == {0}


def test_filters_act_one_after_the_other(sample: Sample) -> None:
    """Temperature before top_p, and top_p on what top_k left."""
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert drawn(sample, logits, top_p=0.5) == {0, 1}
    assert drawn(sample, logits, top_p=0.5, temperature=0.2) == {0}
    assert drawn(sample, logits, top_p=0.5, top_k=2) == {0}, "0.4 of 0.7 is more than a half"


def test_a_tiny_temperature_is_greedy_and_no_overflow(sample: Sample) -> None:
    assert drawn(sample, [1, 3, 3.0001, 2], n=20, temperature=5e-324) == {2}


def test_bias_bans_and_forces(sample: Sample) -> None:
    assert drawn(sample, [1, 2, 3], logit_bias={2: -100, 1: -1e300}) == {0}
    assert drawn(sample, [1, 2, 3], logit_bias={0: 1e308}) == {0}
    assert drawn(sample, [1, 2, 3], logit_bias={0: 100}, top_k=1) == {0}, "before top_k"
    assert drawn(sample, [1, 2, 3], logit_bias={0: 100}, temperature=0.0) == {0}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # ids:     0    1    2    3    4   seen in the prompt: 1; in the output: 2, 2, 3
        ({"presence_penalty": 0.5}, [1.0, 2.0, 2.5, -1.5, 0.5]),
        ({"frequency_penalty": 0.5}, [1.0, 2.0, 2.0, -1.5, 0.5]),
        ({"presence_penalty": 0.25, "frequency_penalty": -0.5}, [1.0, 2.0, 3.75, -0.75, 0.5]),
        ({"repetition_penalty": 2.0}, [1.0, 1.0, 1.5, -2.0, 0.5]),
        ({"repetition_penalty": 2.0, "logit_bias": {0: 1, 3: 3}}, [2.0, 1.0, 1.5, 1.0, 0.5]),
        ({"repetition_penalty": 2.0, "presence_penalty": 0.5}, [1.0, 1.0, 1.0, -2.5, 0.5]),
    ],
)
def test_penalties(sample: Sample, params: dict[str, Any], expected: list[float]) -> None:
    """The logits after penalties, told from the frequencies of the draws being those of the expected logits."""
    logits = np.array([[1, 2, 3, -1, 0.5]] * 500, np.float32)
    penalized = sample(logits, [row(s, [1], [2, 2, 3], **params) for s in range(500)], 5)
    plain = sample(np.array([expected] * 500, np.float32), [row(s, [1], [2, 2, 3]) for s in range(500)], 5)
    assert penalized == plain


def test_sampling_leaves_the_models_logits_alone(sample: Sample) -> None:
    """Log probabilities are the model's own: the same array is read after sampling."""
    logits = np.random.default_rng(0).standard_normal((3, 50), np.float32)
    before = logits.copy()
    sample(logits, [row(i, [1], [2], repetition_penalty=2.0, logit_bias={3: 5}, top_k=5) for i in range(3)], 50)
    np.testing.assert_array_equal(logits, before)


def test_the_random_number_is_that_of_the_output_index(sample: Sample) -> None:
    logits = np.zeros((1, 1000), np.float32)
    for index in (0, 1, 63):
        expected = int(uniforms([9], [index])[0] * 1000)
        assert sample(logits, [row(9, output=[1] * index)], 1000) == [expected]


def test_company_changes_nothing(sample: Sample) -> None:
    """The same row gives the same token alone, and among others with other parameters in any order."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((40, 300)) * 3).astype(np.float32)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {}, {"top_k": 5}, {"top_k": 5, "top_p": 0.5}, {"top_p": 0.9}, {"min_p": 0.1},
        {"repetition_penalty": 1.5}, {"top_k": 50, "temperature": 2.0},
    ]  # fmt: skip
    rows = [row(i, [1, 2], [3] * i, **kinds[i % len(kinds)]) for i in range(40)]
    together = sample(logits, rows, 290)
    assert [sample(logits[i : i + 1], rows[i : i + 1], 290)[0] for i in range(40)] == together
    order = rng.permutation(40)
    assert sample(logits[order], [rows[i] for i in order], 290) == [together[i] for i in order]


def test_a_wide_nucleus_of_a_large_vocabulary(sample: Sample) -> None:
    """More candidates than are looked at first, and than are looked at second."""
    logits = np.random.default_rng(2).standard_normal((1, 20_000), np.float32)
    p = np.exp(logits[0].astype(np.float64))
    p /= p.sum()
    for top_p in (0.05, 0.4, 0.98):
        best_first = np.argsort(-p, kind="stable")
        kept = set(best_first[: 1 + int(np.searchsorted(p[best_first].cumsum(), top_p))].tolist())
        ids = [sample(logits, [row(seed, top_p=top_p)], 20_000)[0] for seed in range(20)]
        assert kept.issuperset(ids)
        # inverse CDF over the kept ids in ascending order
        ascending = np.array(sorted(kept))
        cumulative = p[ascending].cumsum()
        at = np.searchsorted(cumulative, uniforms(range(20), [0] * 20) * cumulative[-1], side="right")
        assert ids == ascending[at].tolist()


def test_logits_that_are_no_numbers_are_an_error(sample: Sample) -> None:
    for value in (np.nan, np.inf):
        for params in ({"temperature": 0.0}, {"top_k": 2}, {}):
            logits = np.array([[1, value, 2, 3]], np.float32)
            with pytest.raises(NanoGPTError, match="not finite"):
                sample(logits, [row(**params)], 4)


# -- rows, guesses and reports -------------------------------------------------------------------------------------


def test_rows_of_a_batch_with_guesses() -> None:
    states = [row(output=[4, 4]).state, None, row().state]
    batch = Batch(
        slots=np.arange(3, dtype=np.int32),
        starts=np.zeros(3, np.int32),
        num_tokens=np.array([3, 4, 2], np.int32),
        token_ids=np.arange(9, dtype=np.int32),
        sampling=states,
        num_drafts=np.array([2, 0, 0], np.int32),
    )
    rows = sampled_rows(batch)
    assert [(r.sequence, r.token, r.drafts, r.output_index) for r in rows] == [
        (0, 0, [], 2), (0, 1, [1], 3), (0, 2, [1, 2], 4), (2, 8, [], 0),
    ]  # fmt: skip
    assert sampler.collect(batch, rows, [1, 9, 7, 5]) == ([[1, 9], [], [5]], [0, 1, 3])
    assert sampler.collect(batch, rows, [1, 2, 7, 5]) == ([[1, 2, 7], [], [5]], [0, 1, 2, 3])
    assert sampler.collect(batch, rows, [3, 2, 7, 5]) == ([[3], [], [5]], [0, 3])


def test_log_probabilities_are_the_models_over_the_real_tokens() -> None:
    logits = np.array([[1, 3, 3, 2, 99], [0, 0, 0, 0, 99]], np.float32)
    first, second = token_logprobs(logits, [2, 3], 2, 4)
    p = np.exp(logits[0, :4]) / np.exp(logits[0, :4]).sum()
    assert first.logprob == pytest.approx(np.log(p[2]))
    assert first.rank == 2, "the equal before it is ranked first"
    assert [t for t, _ in first.top] == [1, 2]
    assert first.top[1][1] == first.logprob
    assert (second.logprob, second.rank) == (pytest.approx(np.log(0.25)), 4)
    assert [t for t, _ in second.top] == [0, 1]
    assert token_logprobs(logits, [2, 3], 0, 4)[0].top == []
    assert len(token_logprobs(logits, [2, 3], 100, 4)[0].top) == 4, "no more than there are"


@pytest.mark.parametrize("num_values", [1, 2, 7, 65, 1000, 5000])
def test_the_largest_k_with_ties(num_values: int) -> None:
    rng = np.random.default_rng(num_values)
    values = rng.integers(-3, 3, (4, num_values)).astype(np.float32)
    values[3] = rng.standard_normal(num_values)
    for k in sorted({1, 2, 5, 50, num_values // 2, num_values - 1, num_values} & set(range(1, num_values + 1))):
        for ids, x in zip(largest(values, k), values, strict=True):
            expected = sorted(range(num_values), key=lambda i, x=x: (-x[i], i))[:k]  # type: ignore[misc]
            assert ids.tolist() == sorted(expected)
