"""The CPU benchmark's own arithmetic and its word that a broken peer is a row, not a crash.

No engine is installed here: small scripts stand in for the worker processes and for llama.cpp's programs.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.cpu import __main__ as command
from benchmarks.cpu import limits, load, models, peers, report, roofline
from benchmarks.cpu.engines import EngineFailed, Sample
from benchmarks.cpu.workloads import WORKLOADS, tokens_per_s

TINY = models.Model("tiny", n_layer=1, n_head=2, n_embd=8, vocab_size=600, block_size=16, prefill=12)


def quiet(value: float, foreign: float = 0.0, peak_mb: float = 1.0) -> Sample:
    return Sample(value, wall_s=1.0, foreign=foreign, peak_mb=peak_mb)


# -- models ---------------------------------------------------------------------------------------------------


def test_prompts_differ_by_seed_and_hold_no_special_ids() -> None:
    first = models.prompts(600, 3, 50, seed=1)
    assert first == models.prompts(600, 3, 50, seed=1)
    assert first != models.prompts(600, 3, 50, seed=2)
    assert {len(prompt) for prompt in first} == {50}
    assert all(256 <= token < 599 for prompt in first for token in prompt)


def test_the_model_is_one_that_the_product_itself_loads(tmp_path: Path) -> None:
    from nanogpt.checkpoint import load_checkpoint

    folder = models.make_model(TINY, tmp_path / "tiny")
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    assert (config.n_layer, config.n_head, config.n_embd) == (1, 2, 8)
    assert (config.vocab_size, config.block_size, config.tied, config.activation) == (600, 16, True, "gelu_tanh")
    assert checkpoint.tensors["transformer.wte.weight"].float32().std() == pytest.approx(0.02, rel=0.05)


def test_the_model_is_made_once_and_again_only_for_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = models.make_model(TINY, tmp_path / "tiny") / "model.safetensors"
    made = weights.stat().st_mtime_ns
    models.make_model(TINY, tmp_path / "tiny")
    assert weights.stat().st_mtime_ns == made
    monkeypatch.setattr(models, "_FORMAT", models._FORMAT + 1)
    models.make_model(TINY, tmp_path / "tiny")
    assert weights.stat().st_mtime_ns != made


def test_the_tokenizer_is_a_byte_level_bpe_that_keeps_any_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    folder = models.make_model(TINY, tmp_path / "tiny")
    tokenizer = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.decode(tokenizer.encode("!! naïve 你好").ids) == "!! naïve 你好"
    assert len(tokenizer.encode("!!").ids) == 1


# -- figures --------------------------------------------------------------------------------------------------


def test_what_each_workload_counts() -> None:
    gpt2 = models.MODELS["gpt2"]
    # Decode alone: the time to the first token is taken off.
    assert tokens_per_s(WORKLOADS["W1"], gpt2, [1.5, 1.3], [0.3, 0.5]) == pytest.approx(127 / 1.0)
    assert tokens_per_s(WORKLOADS["W2-32"], gpt2, [2.0], []) == 32 * 128 / 2.0
    assert tokens_per_s(WORKLOADS["W3"], gpt2, [0.5, 1.5], []) == 896.0


def test_a_disturbed_sample_counts_only_where_there_are_too_few_quiet_ones() -> None:
    samples = [quiet(50, foreign=0.4), quiet(100), quiet(60, foreign=0.2), quiet(104), quiet(102)]
    assert report.figure(samples, 3) == report.Figure(102, 100, 104, 3, 0)
    assert report.figure(samples, 4) == report.Figure(101, 60, 104, 4, 1)
    assert report.figure([], 3) is None


def test_ours_is_held_against_the_best_peer_of_the_same_bits() -> None:
    def row(engine: str, bits: str, mode: str, value: float) -> report.Result:
        return report.Result("small", engine, bits, mode, samples={"W1": [quiet(value)]})

    results = [
        row(peers.OURS, "int8", "int8", 300.0),
        row("llama.cpp", "int8", "Q8_0", 100.0),
        row("openvino", "int8", "int8, stateful", 200.0),
        row("llama.cpp", "int4", "Q4_0", 500.0),
    ]
    assert report.ratios(results, ["W1", "W3"], 5) == [
        {"model": "small", "bits": "int8", "workload": "W1", "ratio": 1.5, "best_peer": "openvino int8, stateful"}
    ]
    printed = report.table(results, ["W1"], 5, {})
    assert "**ours / best int8 peer** | **1.50 ×**" in printed
    assert "best int4 peer" not in printed


def test_the_memory_limit_is_bandwidth_over_the_weights_of_a_step() -> None:
    small = models.MODELS["small"]
    kb = limits.weight_kb(small, "int8")
    assert kb == round((12 * 6 * 384**2 + 4096 * 384) / 1024)
    found = limits.decode_limit({"read_gb_per_s": {str(kb): 12.0}}, small, "int8")
    assert found == pytest.approx(12e9 / (kb * 1024))
    assert limits.decode_limit({"error": "there is no C++ compiler"}, small, "int8") is None


def test_a_limit_is_the_best_that_the_machine_ever_did() -> None:
    disturbed = {"read_gb_per_s": {"1024": 50.0, "4096": 30.0}, "tera_ops_per_s": {"any": 0}}
    other = {"read_gb_per_s": {"1024": 40.0, "4096": 60.0}, "tera_ops_per_s": {"any": 0}}
    assert limits.highest(disturbed, other)["read_gb_per_s"] == {"1024": 50.0, "4096": 60.0}
    assert limits.highest({"error": "once"}, other) == other
    assert limits.highest(other, {"error": "once"}) == other


def test_foreign_load_is_what_others_used(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([100.0, 103.0, 103.0])
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr(load, "busy_s", lambda: next(busy))
    monkeypatch.setattr(load.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    watch = load.Watch()
    # 3 s busy on two processors in 2 s: own 2 s, others 1 s of 4.
    assert watch.foreign(2.0) == 0.25
    # The counters are coarse; a process that used a tick more than they tell is no negative load.
    assert watch.foreign(3.01) == 0.0


# -- the whole run --------------------------------------------------------------------------------------------


class FakeEngine:
    def __init__(self, fails_at: str = "") -> None:
        self.about = {"versions": {"fake": "1"}}
        self.closed = 0
        self._fails_at = fails_at

    def start(self) -> None: ...

    def sample(self, workload: object, seed: int) -> Sample:
        name = workload.name  # type: ignore[attr-defined]
        if name == self._fails_at:
            raise EngineFailed("it broke")
        return quiet(100.0 + seed / 100)

    def close(self) -> None:
        self.closed += 1


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, FakeEngine | str], *words: str
) -> tuple[int, dict]:
    def make(name: str):
        def maker(context: peers.Context) -> FakeEngine:
            engine = made[name]
            if isinstance(engine, str):
                raise EngineFailed(engine)
            return engine

        return maker

    monkeypatch.setattr(command, "ROWS", [peers.Row(name, "int8", "m", make(name)) for name in made])
    monkeypatch.setattr(command.limits, "measure", lambda cache, threads: {"error": "not here"})
    monkeypatch.setattr(command, "MODELS", {"small": models.MODELS["small"]})
    monkeypatch.setattr(command, "make_model", lambda model, folder: folder)
    out = tmp_path / "out.json"
    status = command.main(
        [
            "--models",
            "small",
            "--cache",
            str(tmp_path),
            "--out",
            str(out),
            "--wait-idle",
            "0",
            "--workloads",
            "W1,W3",
            *words,
        ]
    )
    return status, json.loads(out.read_text())


def test_a_broken_peer_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half = FakeEngine(fails_at="W3")
    good = FakeEngine()
    made: dict[str, FakeEngine | str] = {"gone": "pip-gone failed: no such package", "half": half, "good": good}
    status, document = run(tmp_path, monkeypatch, made, "--repeats", "2")
    assert status == 0
    rows = {row["engine"]: row for row in document["rows"]}
    assert rows["gone"]["error"] == "pip-gone failed: no such package"
    assert rows["half"]["error"] == "W3: it broke"
    assert set(rows["half"]["tokens_per_s"]) == {"W1"}
    assert rows["good"]["error"] is None
    assert rows["good"]["tokens_per_s"]["W3"]["repeats"] == 2
    assert good.closed
    assert half.closed
    printed = capsys.readouterr().out
    assert "- gone m: pip-gone failed: no such package" in printed
    assert "| good m | 102 (101–102) | 102 (101–102) | 1 |" in printed


def test_nothing_measured_at_all_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, document = run(tmp_path, monkeypatch, {"gone": "no"})
    assert status == 1
    assert document["machine"]["threads"] == 2


def test_disturbed_samples_are_taken_again_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    values = iter([quiet(10, foreign=0.5), quiet(100), quiet(100), quiet(100), quiet(100)])
    monkeypatch.setattr(engine, "sample", lambda workload, seed: next(values))
    _, document = run(tmp_path, monkeypatch, {"e": engine}, "--repeats", "2", "--retakes", "3")
    figures = document["rows"][0]["tokens_per_s"]
    assert figures["W1"] == {"median": 100, "min": 100, "max": 100, "repeats": 2, "disturbed": 0}
    assert len(document["rows"][0]["samples"]["W3"]) == 2


def test_an_engine_has_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 1000))
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    _, document = run(tmp_path, monkeypatch, {"e": FakeEngine()}, "--limit", "1500")
    assert document["rows"][0]["error"] == "W1: took more than 1500 s in all"


@pytest.mark.parametrize("words", [["--only", "llama"], ["--workloads", "W9"], ["--models", ""]])
def test_unknown_names_are_refused_with_those_that_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.arguments(words)
    assert end.value.code == 2
    assert "known are" in capsys.readouterr().err


def test_the_rows_cover_every_engine_in_both_bit_widths() -> None:
    ours = [row.bits for row in peers.ROWS if row.engine == peers.OURS]
    assert ours == ["int8", "int4"]
    assert len({row.name for row in peers.ROWS}) == len(peers.ROWS)


def test_a_turn_is_kept_until_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free() -> bool:
        with path.open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    path = tmp_path / "lock"
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr(load.time, "monotonic", lambda: next(clock))
    turns = load.Turns(path, hold_s=35)
    with turns:
        assert not free()
    assert not free()
    with turns:
        assert not free()
    assert free()


def test_waiting_for_a_quiet_machine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.Watch, "foreign", lambda self, own: 1.0)
    monkeypatch.setattr(load.time, "sleep", lambda seconds: None)
    before = time.monotonic()
    load.wait_until_idle(0.05)
    assert time.monotonic() - before >= 0.05


def test_the_roofline_adds_up_to_the_model_and_names_the_slower_limit() -> None:
    model = models.MODELS["gpt2"]
    found = list(roofline.kernels(model, "int8", rows=32, context=64, sequences=32, drawn=32))
    weights = [kernel for kernel in found if kernel.name != "attention"]
    assert sum(kernel.num_bytes for kernel in weights) == model.matrix_weights
    assert sum(kernel.products for kernel in weights) == 32 * model.matrix_weights
    [attention] = (kernel for kernel in found if kernel.name == "attention")
    assert attention.num_bytes == 32 * 64 * 12 * 2 * (768 + 4 * 12)
    limits_found = {"read_gb_per_s": {"1024": 100.0, "2000000": 10.0}, "tera_ops_per_s": {"int8 AVX2": 1.0, "any": 0}}
    head = weights[-1]
    assert roofline.least_ms(head, limits_found, model, "int8") == pytest.approx(50257 * 768 / 1e10 * 1e3)
    prefill = roofline.Kernel("MLP in", 1.0, 1e9)
    assert roofline.least_ms(prefill, limits_found, model, "int8") == pytest.approx(2.0)
    assert roofline.least_ms(head, {"error": "no compiler"}, model, "int8") is None


def test_the_roofline_shows_what_every_kernel_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SAMPLES", 1)
    monkeypatch.setattr(roofline, "_SAMPLE_S", 0.0)
    model = models.Model("tiny", n_layer=2, n_head=2, n_embd=64, vocab_size=512, block_size=64, prefill=60)
    steps = roofline.Steps(models.make_model(model, tmp_path), "int8", 2)
    took = steps.part_ms(roofline.cases(model)[1])
    # Parts lie within the step, one after the other.
    assert all(ms > 0 for ms in took.values())
    assert sum(took.values()) - took["step"] <= took["step"]
    shown = roofline.table(model, "int8", {}, steps)
    steps.close()
    assert all(name in shown for name in ("q, k, v", "attention", "MLP out", "head", "sampling", "prefill 60"))
