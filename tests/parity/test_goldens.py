"""Every family's real checkpoint against what its upstream's own code computed from it, in float32.

``rel`` is max|a - b| / max|b| over all logits of a position, padding included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")

from nanogpt.llm import LLM
from nanogpt.sampling_params import SamplingParams

REL = 1e-4
LOSS = 1e-3
GREEDY_LENGTH = 32

# The checkpoint as a user names it, and the golden that belongs to it.
FIXTURES = {
    "01_nanogpt_char/ckpt.pt": "01_nanogpt_char/golden",
    "01b_nanogpt_char_tiny/ckpt.pt": "01b_nanogpt_char_tiny/golden",
    "02_nanogpt_bpe/ckpt.pt": "02_nanogpt_bpe/golden",
    "02_nanogpt_bpe/ckpt_orig_mod.pt": "02_nanogpt_bpe/golden",
    "03_build_nanogpt/log/model_00200.pt": "03_build_nanogpt/golden",
    "04_nano-gpt_fork/log/model_00100.pt": "04_nano-gpt_fork/golden_pretrain",
    "04_nano-gpt_fork/logs_finetune/model_00030.pt": "04_nano-gpt_fork/golden_finetune",
    "05_llmc/gpt2_d2.bin": "05_llmc/golden_fp32",
    "05_llmc/gpt2_d2_bf16.bin": "05_llmc/golden_bf16",
    "06_hf_gpt2/safetensors": "06_hf_gpt2/golden",
    "06_hf_gpt2/bin": "06_hf_gpt2/golden",
    "06_hf_gpt2/prefixless": "06_hf_gpt2/golden",
}


@dataclass(frozen=True)
class Case:
    llm: LLM
    arrays: dict[str, npt.NDArray[Any]]
    info: dict[str, Any]

    def ids(self, name: str) -> list[int]:
        result: list[int] = self.arrays[name].tolist()
        return result


@pytest.fixture(scope="module", params=FIXTURES)
def case(request: pytest.FixtureRequest, shared_checkpoints: Path) -> Iterator[Case]:
    golden = shared_checkpoints / FIXTURES[request.param]
    with np.load(golden.with_name(golden.name + ".npz")) as file:
        arrays = dict(file)
    info = json.loads(golden.with_name(golden.name + ".json").read_text())
    with LLM(shared_checkpoints / request.param, runner="torch", device="cpu", precision="fp32", threads=1) as llm:
        yield Case(llm, arrays, info)


def log_normalizer(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The logarithm of the sum of the exponentials of each row."""
    highest = logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float32] = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[..., 0]
    return result


@pytest.mark.parametrize("prompt", ["p1", "p2", "p3"])
def test_logits(case: Case, prompt: str) -> None:
    golden = case.arrays[f"logits_{prompt}"]
    logits = case.llm.logits(case.ids(f"prompt_{prompt}"))[-1]
    assert logits.shape == golden.shape
    assert np.abs(logits - golden).max() / np.abs(golden).max() < REL


@pytest.mark.parametrize("prompt", ["p1", "p2"])
def test_greedy_continuation(case: Case, prompt: str) -> None:
    """Token for token, through K and V that are kept between steps."""
    params = SamplingParams(max_tokens=GREEDY_LENGTH, temperature=0.0, ignore_eos=True)
    (completion,) = case.llm.generate(case.ids(f"prompt_{prompt}"), params)
    assert completion.token_ids == case.ids(f"greedy_{prompt}")
    assert completion.finish_reason == "length"


def test_greedy_continuation_in_company(case: Case) -> None:
    """Both prompts and both again, in one batch, with chunks of prompts beside them."""
    params = SamplingParams(max_tokens=GREEDY_LENGTH, temperature=0.0, ignore_eos=True)
    names = ["p1", "p2", "p2", "p1"]
    filler = [case.ids("prompt_p3")[: n + 20] for n in range(4)]
    prompts = [prompt for pair in zip([case.ids(f"prompt_{n}") for n in names], filler, strict=True) for prompt in pair]
    completions = case.llm.generate(prompts, params)
    for name, completion in zip(names, completions[::2], strict=True):
        assert completion.token_ids == case.ids(f"greedy_{name}")


@pytest.mark.parametrize("prompt", ["p1", "p2"])
def test_walk_that_never_repeats_a_token(case: Case, prompt: str) -> None:
    """Small models loop; this walk does not. Its tokens are banned one by one, its log probabilities are the model's.

    The golden's softmax is over the whole table, padding included; ours is over the tokens that there are. So the
    golden is brought to ours by the share that the model gives to the padding.
    """
    walk, golden = case.ids(f"norep_{prompt}"), case.arrays[f"norep_logprob_{prompt}"]
    context = case.ids(f"prompt_{prompt}")
    for expected, logprob in zip(walk, golden, strict=True):
        banned = dict.fromkeys(context, -1e9)
        params = SamplingParams(max_tokens=1, temperature=0.0, logit_bias=banned, logprobs=0, ignore_eos=True)
        (completion,) = case.llm.generate(context, params)
        assert completion.token_ids == [expected]
        assert completion.logprobs is not None
        logits = case.llm.logits(context)[-1]
        padding = log_normalizer(logits) - log_normalizer(logits[: case.llm.config.num_tokens])
        assert completion.logprobs[0].logprob - padding == pytest.approx(float(logprob), abs=1e-4)
        context = [*context, expected]


def test_loss(case: Case) -> None:
    """The mean loss over 4,096 tokens of held-out text, and the first window's token by token."""
    ids = case.arrays["ce_ids"]
    size, count = case.llm.config.block_size, len(ids) - 1
    losses = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        logits = case.llm.logits(ids[start:stop])
        losses.append(log_normalizer(logits) - logits[np.arange(stop - start), ids[start + 1 : stop + 1]])
    np.testing.assert_allclose(losses[0], case.arrays["nll_w0"], atol=LOSS)
    assert np.concatenate(losses).mean() == pytest.approx(case.info["cross_entropy"]["mean_nats"], abs=LOSS)


def test_texts_are_the_goldens(case: Case) -> None:
    """The tokenizer that was found for the checkpoint gives the upstream's ids and texts."""
    for name in ("p1", "p2"):
        golden = case.info["prompts"][name]
        assert case.llm.tokenizer.encode(golden["text"]) == golden["ids"]
        assert case.llm.tokenizer.decode(golden["greedy32"]) == golden["greedy_text"]
