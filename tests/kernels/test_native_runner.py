"""What the CPU runner promises besides its numbers: refusals, its thread count, and its cache of packed weights."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nanogpt._kernels")

from hypothesis import given, settings
from hypothesis import strategies as st
from native_support import bits, kept_runner, native_runner
from tiny_model import NUM_TOKENS, Part, distribution, everything, log_softmax, step, tiny_checkpoint

from nanogpt.checkpoint import digest
from nanogpt.errors import SettingsError
from nanogpt.runner import native, native_cache
from nanogpt.runner.native import NativeRunner


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match=r"NANOGPT_ISA is 'mmx'.*portable"):
        native_runner(isa="mmx")


def test_a_precision_that_it_cannot_compute_in_is_refused() -> None:
    with pytest.raises(SettingsError, match="bf16"):
        native_runner(precision="bf16")


def test_serving_with_it_imports_no_torch() -> None:
    program = "import sys, nanogpt.runner.native; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("slot", "start", "tokens"),
    [(8 + 1, 0, [1]), (-1, 0, [1]), (0, 24, [1]), (0, -1, [1]), (0, 20, [1] * 5), (0, 0, [40]), (0, 0, [-1])],
)
def test_what_would_be_an_address_outside_is_refused(slot: int, start: int, tokens: list[int]) -> None:
    with pytest.raises(IndexError):
        step(kept_runner(), Part(slot, tokens, start))


def test_padded_ids_are_never_drawn() -> None:
    runner = kept_runner()
    for seed in range(200):
        state = everything(seed=seed, temperature=100.0, top_k=0)
        assert step(runner, Part(0, [1], 0, state)).token_ids[0][0] < NUM_TOKENS


def test_log_probabilities_are_the_models_own_whatever_the_penalties() -> None:
    runner = kept_runner()
    state = everything([3, 4], repetition_penalty=5.0, temperature=0.1, logit_bias={7: 100.0})
    output = step(runner, Part(0, [3, 4], 0, state))
    assert output.token_ids == [[7]]
    np.testing.assert_allclose(distribution(output), log_softmax(runner.logits(np.array([3, 4], np.int32))[-1]))


def test_prompt_log_probabilities_run_alongside_the_following_tokens() -> None:
    runner = kept_runner("wide", "int8", 2)
    text = list(range(150))
    output = step(runner, Part(0, text[:149], 0, None, following=text[1:150]), num_top=1)
    logits = runner.logits(np.array(text, np.int32))[:149, : runner.config.num_tokens].astype(np.float64)
    own = logits[np.arange(149), text[1:]] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose([entry.logprob for entry in output.prompt_logprobs[0]], own, atol=1e-9)


def test_an_idle_runner_uses_no_cpu() -> None:
    runner = native_runner(threads=3)
    step(runner, Part(0, [1, 2, 3]))
    ended = threading.Event()
    ended.wait(0.05)  # past the spinning
    before = os.times()
    ended.wait(0.3)
    after = os.times()
    assert after.user + after.system - before.user - before.system <= 0.05
    runner.close()


def test_closing_ends_its_threads() -> None:
    before = set(os.listdir("/proc/self/task"))
    runner = native_runner(threads=4)
    own = set(os.listdir("/proc/self/task")) - before
    assert len(own) == 3
    runner.close()
    while own & set(os.listdir("/proc/self/task")):  # one that has been joined may stand there for a moment
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of the process's memory")
def test_what_a_longer_text_held_is_given_back() -> None:
    """A server's memory follows the texts that it holds, not the longest that each slot ever had."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    long, short = [1 + i % 30 for i in range(1024)], [5, 6, 7]
    runner = native_runner(num_slots=16, n_layer=8, n_embd=128, block_size=1024)
    first = [step(runner, Part(slot, long, state=everything())) for slot in range(16)][-1]
    full = resident_bytes()
    for slot in range(15):
        step(runner, Part(slot, short, state=everything()))
    # 15 slots of 1,024 tokens, of which 64 are used and 128 kept; for each token 8 layers of K and V of 128 bytes.
    assert full - resident_bytes() > 0.9 * 15 * (1024 - 64 - 128) * 8 * 2 * 128
    # What a slot still holds is as it was, and one that was given back fills again.
    for slot in (15, 0):
        if slot == 0:
            step(runner, Part(0, long[:-1]))
        again = step(runner, Part(slot, long[-1:], 1023, state=everything()))
        np.testing.assert_array_equal(distribution(again), distribution(first))
    runner.close()


def test_the_smallest_model_decodes_in_a_large_batch() -> None:
    """Its matrices are one panel each: what is reckoned a panel or a pair of them must not be divided by none."""
    runner = native_runner(num_slots=20, n_embd=2, n_head=1, block_size=70)
    parts = [Part(slot, [3], 66, everything()) for slot in range(20)]
    for slot in range(20):
        step(runner, Part(slot, [1 + i % 30 for i in range(66)]))
    [alone] = step(runner, parts[0]).token_ids
    assert step(runner, *parts).token_ids == [alone] * 20
    runner.close()


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOGPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settled_checkpoint(folder: Path, seed: int = 0) -> Any:
    """A checkpoint whose file was written long enough ago to be known again by its times."""
    path = folder / f"model-{seed}.pt"
    if not path.exists():
        path.write_bytes(b"weights")
    tiny = tiny_checkpoint(seed)
    return SimpleNamespace(config=tiny.config, tensors=tiny.tensors, path=path)


def count_packing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    real = native.pack_into

    def counted(packed: native_cache.Bytes, *rest: Any) -> None:
        counts.append(packed.size)
        real(packed, *rest)

    monkeypatch.setattr(native, "pack_into", counted)
    return counts


def some_logits(checkpoint: Any, precision: str = "int8") -> np.ndarray[Any, Any]:
    runner = NativeRunner(checkpoint, precision=precision, num_slots=1, threads=1)
    logits = runner.logits(np.array([1, 2, 3], np.int32))
    runner.close()
    return bits(logits)


def test_the_second_start_maps_what_the_first_one_packed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = count_packing(monkeypatch)
    first = some_logits(settled_checkpoint(tmp_path))
    assert len(packed) == 1
    np.testing.assert_array_equal(some_logits(settled_checkpoint(tmp_path)), first)
    assert len(packed) == 1
    some_logits(settled_checkpoint(tmp_path), "int4")
    some_logits(settled_checkpoint(tmp_path, seed=1))
    assert len(packed) == 3
    assert {path.suffix for path in cache.iterdir()} == {".packed"}
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_file_that_takes_several_pieces_is_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_cache, "_PIECE_BYTES", mmap.PAGESIZE)
    packed = count_packing(monkeypatch)
    first = some_logits(settled_checkpoint(tmp_path))
    assert packed[0] > 3 * mmap.PAGESIZE
    np.testing.assert_array_equal(some_logits(settled_checkpoint(tmp_path)), first)
    assert len(packed) == 1, "what was written was read back as it was"


@settings(deadline=None)  # it waits for the disk
@given(data=st.data())
def test_a_damaged_file_is_packed_anew(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_CACHE_DIR", str(folder / "cache"))
        packed = count_packing(patch)
        expected = some_logits(settled_checkpoint(folder))
        [file] = (folder / "cache").iterdir()
        content = bytearray(file.read_bytes())
        header_only = data.draw(st.booleans(), label="in the header's fields")
        how = data.draw(st.sampled_from(["flip", "cut", "extend", "empty"]))
        if how == "flip":
            at = data.draw(st.integers(0, native_cache._HEADER.size - 1 if header_only else len(content) - 1))
            if native_cache._HEADER.size <= at < native_cache._HEADER_BYTES:
                at = 0  # padding, which nothing depends on
            content[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        elif how == "extend":
            content += b"\0"
        else:
            content.clear()
        file.write_bytes(content)
        np.testing.assert_array_equal(some_logits(settled_checkpoint(folder)), expected)
        assert len(packed) == 2
        np.testing.assert_array_equal(some_logits(settled_checkpoint(folder)), expected)
        assert len(packed) == 2


def test_writers_at_the_same_time_leave_one_whole_file(cache: Path, tmp_path: Path) -> None:
    checkpoint = settled_checkpoint(tmp_path)
    results: list[np.ndarray[Any, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(some_logits(checkpoint))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert [path.suffix for path in cache.iterdir()] == [".packed"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOGPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert some_logits(settled_checkpoint(tmp_path)).size


def test_the_folder_stays_under_its_size(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_logits(settled_checkpoint(tmp_path))
    [first] = cache.iterdir()
    os.utime(first, (1, 1))
    monkeypatch.setattr(native_cache, "MAX_BYTES", first.stat().st_size * 5 // 2)
    some_logits(settled_checkpoint(tmp_path, seed=1))
    assert first.exists()
    some_logits(settled_checkpoint(tmp_path, seed=2))
    assert not first.exists()
    assert len(list(cache.iterdir())) == 2


def test_a_digest_is_remembered_only_for_files_at_rest(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    real = digest.weights_sha256
    monkeypatch.setattr(digest, "weights_sha256", lambda c: hashed.append(1) or real(c))
    for _ in range(2):
        some_logits(settled_checkpoint(tmp_path))
    assert len(hashed) == 2  # written just now
    monkeypatch.setattr(digest, "_SETTLED_S", -1.0)
    for _ in range(3):
        some_logits(settled_checkpoint(tmp_path))
    assert len(hashed) == 3
    settled_checkpoint(tmp_path).path.write_bytes(b"other weights")
    some_logits(settled_checkpoint(tmp_path))
    assert len(hashed) == 4
