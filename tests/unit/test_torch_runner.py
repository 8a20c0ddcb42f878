"""The PyTorch runner against the model's own forward pass, and what only a runner does: slots, guesses, reports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_model import NUM_TOKENS, Part, Text, distribution, everything, log_softmax, step, tiny_checkpoint

from nanogpt.errors import NanoGPTError, SettingsError
from nanogpt.runner.cpus import usable_cpus
from nanogpt.sampling_params import SamplingParams

torch = pytest.importorskip("torch")

from nanogpt.model.gpt import GPT  # noqa: E402
from nanogpt.runner import step_graphs  # noqa: E402
from nanogpt.runner.torch import TorchRunner, padded_head  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
PROMPT = [5, 1, 7, 33, 2, 2, 19]


def make(device: str = "cpu", **options: Any) -> TorchRunner:
    return TorchRunner(
        tiny_checkpoint(), device=device, **{"precision": "fp32", "num_slots": 6, "threads": 1, **options}
    )


@pytest.fixture(params=[*DEVICES, "cpu, graphs"])
def runner(request: pytest.FixtureRequest) -> Iterator[TorchRunner]:
    """On a CPU, on a device, and on a CPU with the graphs that a device has, not recorded."""
    runner = make(request.param.split(",")[0])
    if "graphs" in request.param:
        runner.use_graphs()
    yield runner
    runner.close()


def test_logits_are_the_models(runner: TorchRunner) -> None:
    model = GPT.from_checkpoint(tiny_checkpoint())
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT]))[0][0].numpy()
    logits = runner.logits(np.array(PROMPT, np.int32))
    assert logits.dtype == np.float32
    assert logits.shape == (len(PROMPT), runner.config.vocab_size)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_step_gives_what_the_whole_text_gives(runner: TorchRunner) -> None:
    """Prompts and single tokens of five sequences in one step, in slots that held something else before."""
    texts = [PROMPT, PROMPT[::-1], [3], [8, 8, 8, 9], [30, 1]]
    step(runner, *(Part(slot, [slot] * runner.config.block_size) for slot in range(5)))
    step(runner, *(Part(b, text[:-1]) for b, text in enumerate(texts) if len(text) > 1))
    decoding = [Part(b, text[-1:], len(text) - 1, everything()) for b, text in enumerate(texts)]
    decoding[1] = Part(1, texts[1], 0, everything())  # a whole prompt in the middle of the others
    output = step(runner, *decoding)
    for b, text in enumerate(texts):
        expected = log_softmax(runner.logits(np.array(text, np.int32))[-1])
        np.testing.assert_allclose(distribution(output, b), expected, atol=1e-5, err_msg=str(text))


def test_the_context_can_be_filled_to_its_end(runner: TorchRunner) -> None:
    size = runner.config.block_size
    whole = [i % NUM_TOKENS for i in range(size)]
    step(runner, Part(0, whole[:-1]))
    output = step(runner, Part(0, whole[-1:], size - 1, everything()))
    expected = log_softmax(runner.logits(np.array(whole, np.int32))[-1])
    np.testing.assert_allclose(distribution(output), expected, atol=1e-5)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(temperature=1.5, top_k=0),
                                    SamplingParams(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.3)],
                         ids=["greedy", "sampled", "penalties"])  # fmt: skip
@pytest.mark.parametrize("num_guesses", [1, 3, 7])
@pytest.mark.parametrize("wrong_every", [0, 1, 2, 5], ids=lambda n: f"wrong every {n}")
def test_guesses_change_nothing_but_the_number_of_steps(
    runner: TorchRunner, params: SamplingParams, num_guesses: int, wrong_every: int
) -> None:
    plain = Text(runner, 0, PROMPT, params, seed=11).generate(15)
    oracle = [(t + 1) % NUM_TOKENS if wrong_every and i % wrong_every == 0 else t for i, t in enumerate(plain)]
    guessed = Text(runner, 1, PROMPT, params, seed=11)
    assert guessed.generate(15, oracle, num_guesses) == plain
    assert guessed.num_steps <= 15
    if wrong_every == 0:
        assert guessed.num_steps == 1 + -(-14 // (num_guesses + 1)), "every right guess was kept"
    if wrong_every == 1:
        assert guessed.num_steps == 15, "no wrong guess was kept"


def test_log_probabilities_run_alongside_the_kept_guesses(runner: TorchRunner) -> None:
    params = SamplingParams(temperature=0.0, logprobs=2)
    text = Text(runner, 0, PROMPT, params)
    plain = list(Text(runner, 1, PROMPT, params).generate(5))
    text.generate(1)
    output = step(runner, text.part([plain[1], plain[2], (plain[3] + 1) % NUM_TOKENS]))
    assert output.token_ids == [plain[1:4]]
    assert [entry.top[0][0] for entry in output.logprobs[0]] == plain[1:4]
    assert [entry.rank for entry in output.logprobs[0]] == [1, 1, 1]


def test_prompt_log_probabilities_over_a_border_of_chunks(runner: TorchRunner) -> None:
    """The last token of a chunk is reported with the first of the next: the runner is told what follows."""
    expected = log_softmax(runner.logits(np.array(PROMPT, np.int32)))
    other = Part(3, [4, 4, 4], state=everything())
    first = step(runner, other, Part(0, PROMPT[:3], following=PROMPT[1:4]), num_top=3)
    second = step(runner, Part(0, PROMPT[3:], 3, everything(), following=PROMPT[4:]), num_top=3)
    assert list(first.prompt_logprobs) == [1]
    entries = first.prompt_logprobs[1] + second.prompt_logprobs[0]
    assert len(entries) == len(PROMPT) - 1
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[i, PROMPT[i + 1]], abs=1e-5)
        assert entry.rank == 1 + int((expected[i] > expected[i, PROMPT[i + 1]]).sum())
        assert [t for t, _ in entry.top] == np.argsort(-expected[i])[:3].tolist()
    np.testing.assert_allclose(distribution(second), expected[-1], atol=1e-5)


def test_a_chunk_in_the_middle_of_a_prompt_samples_nothing(runner: TorchRunner) -> None:
    output = step(runner, Part(0, PROMPT[:3]), Part(1, PROMPT, state=everything()))
    assert output.token_ids[0] == []
    assert len(output.token_ids[1]) == 1
    assert list(output.logprobs) == [1]


def test_a_copied_prefix_is_as_good_as_a_computed_one(runner: TorchRunner) -> None:
    step(runner, Part(2, [*PROMPT, 9, 9]))
    step(runner, Part(4, [1] * 12))  # what lay there before
    runner.copy_prefix(2, 4, len(PROMPT) - 1)
    output = step(runner, Part(4, PROMPT[-1:], len(PROMPT) - 1, everything()))
    expected = log_softmax(runner.logits(np.array(PROMPT, np.int32))[-1])
    np.testing.assert_allclose(distribution(output), expected, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_are_close_to_32(device: str, precision: str) -> None:
    low, exact = make(device, precision=precision), make(device)
    assert low.precision == precision
    a, b = (r.logits(np.array(PROMPT, np.int32)) for r in (low, exact))
    assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
    # and through the slots, where K and V are kept in 16 bits
    step(low, Part(0, PROMPT[:-1]))
    output = step(low, Part(0, PROMPT[-1:], len(PROMPT) - 1, everything()))
    np.testing.assert_allclose(distribution(output), log_softmax(a[-1]), atol=0.05 * np.abs(b).max())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(temperature=1.2, top_p=0.9)])
def test_a_device_writes_the_text_of_the_cpu(params: SamplingParams) -> None:
    on_cpu, on_device = (Text(make(d), 0, PROMPT, params, seed=3).generate(15) for d in ("cpu", "cuda"))
    assert on_device == on_cpu


def test_kernels_that_do_not_compile_are_a_warning_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Images without a C compiler are common: the server then starts all the same, with PyTorch's own kernels."""

    def try_out() -> None:
        raise RuntimeError("Failed to find C compiler.\nMore of it.")

    kernels = ModuleType("triton_kernels")
    monkeypatch.setattr(kernels, "try_out", try_out, raising=False)
    monkeypatch.setitem(sys.modules, "nanogpt.runner.triton_kernels", kernels)
    monkeypatch.setattr("nanogpt.runner.triton_kernels", kernels, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere")
    assert step_graphs.triton_kernels.__wrapped__() is None
    [warning] = caplog.messages
    assert "RuntimeError: Failed to find C compiler.)" in warning
    assert "apt-get install gcc python3-dev" in warning
    monkeypatch.setattr(kernels, "try_out", lambda: None)
    assert step_graphs.triton_kernels.__wrapped__() is kernels


def test_a_step_that_is_too_large_for_the_graphs_is_computed_all_the_same() -> None:
    runner = make()
    runner.use_graphs()
    assert runner._graphs is not None
    runner._graphs.most_tokens = 4
    step(runner, Part(0, PROMPT[:-1]), Part(1, PROMPT[:3]))
    output = step(runner, Part(0, PROMPT[-1:], len(PROMPT) - 1, everything()))
    expected = log_softmax(runner.logits(np.array(PROMPT, np.int32))[-1])
    np.testing.assert_allclose(distribution(output), expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_head_gives_the_models_logits_from_one_copy_of_the_weights(tied: bool) -> None:
    """On a device the head has a multiple of 64 rows; the embedding looks into the same memory."""
    model = GPT.from_checkpoint(tiny_checkpoint(tied=tied))
    x = torch.randn(3, model.config.n_embd)
    with torch.no_grad():
        expected = model.head(x)
        padded = padded_head(model)
        np.testing.assert_allclose(padded(x), expected, atol=1e-6)
        np.testing.assert_allclose(model.head(x), expected, atol=1e-6)
        weight = model.transformer.wte.weight if model.lm_head is None else model.lm_head.weight
        weight[0] += 1.0
        assert torch.equal(padded(x)[:, 0], model.head(x)[:, 0])
        assert not torch.equal(padded(x)[:, 0], expected[:, 0])


def test_variants_of_the_family_go_through_the_same_code() -> None:
    changes: dict[str, Any] = {"bias": False, "tied": False, "activation": "gelu_erf", "n_inner": 24}
    checkpoint = tiny_checkpoint(**changes)
    runner = TorchRunner(checkpoint, threads=1)
    step(runner, Part(0, PROMPT[:-1]))
    output = step(runner, Part(0, PROMPT[-1:], len(PROMPT) - 1, everything()))
    with torch.no_grad():
        expected = GPT.from_checkpoint(checkpoint)(torch.tensor([PROMPT]))[0][0, -1].numpy()
    np.testing.assert_allclose(distribution(output), log_softmax(expected), atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of the process's memory")
def test_the_memory_of_slots_is_committed_as_it_is_touched() -> None:
    """Memory is weights and what sequences really use: 64 slots of GPT-2 would otherwise take 4.8 GB at once."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    checkpoint = tiny_checkpoint(block_size=4096)
    before = resident_bytes()
    runner = TorchRunner(checkpoint, num_slots=1024, threads=1)
    reserved = runner._kv.nbytes
    step(runner, Part(0, PROMPT), Part(1023, PROMPT, state=everything()))
    assert reserved >= 2**30
    assert resident_bytes() - before < reserved / 20


def test_the_weights_are_the_runners_own() -> None:
    """A file that training writes anew must not change the weights of a running server."""
    checkpoint = tiny_checkpoint()
    runner = TorchRunner(checkpoint, threads=1)
    before = runner.logits(np.array(PROMPT, np.int32))
    for tensor in checkpoint.tensors.values():
        tensor.raw[...] = np.nan
    np.testing.assert_array_equal(runner.logits(np.array(PROMPT, np.int32)), before)


def test_logits_that_are_no_numbers_are_an_error_and_not_a_text() -> None:
    checkpoint = tiny_checkpoint()
    checkpoint.tensors["transformer.ln_f.bias"].raw[...] = np.nan
    runner = TorchRunner(checkpoint, threads=1)
    with pytest.raises(NanoGPTError, match="not finite numbers"):
        step(runner, Part(0, PROMPT, state=everything()))


def test_a_precision_of_the_other_runner_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"precision is 'int4'; .* fp32, bf16, fp16.* native"):
        make(precision="int4")


def test_threads_are_what_was_asked_for(tmp_path: Path) -> None:
    make(threads=1)
    assert torch.get_num_threads() == 1
    make(threads=0)
    assert torch.get_num_threads() == 1, "what was already lowered stays low"


def test_a_containers_quota_counts_and_not_the_hosts_cores(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    group = tmp_path / "fs" / "pod" / "container"
    group.mkdir(parents=True)
    own.write_text("0::/pod/container\n")
    (group / "cpu.max").write_text("max 100000\n")
    unlimited = usable_cpus(tmp_path / "fs", own)
    (group.parent / "cpu.max").write_text("50000 100000\n")
    assert usable_cpus(tmp_path / "fs", own) == 1 <= unlimited
    (tmp_path / "fs" / "cpu").mkdir()
    (tmp_path / "fs" / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "fs" / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (group.parent / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(tmp_path / "fs", own) == unlimited
    group = tmp_path / "fs" / "cpu" / "unit"
    group.mkdir()
    (group / "cpu.cfs_quota_us").write_text("90000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    own.write_text("5:cpuset:/elsewhere\n4:cpu,cpuacct:/unit/inner\n0::/pod/container\n")
    assert usable_cpus(tmp_path / "fs", own) == 1, "version 1: the group's own limit, or one above it"
