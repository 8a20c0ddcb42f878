"""The engines of benchmarks/cpu: worker processes, llama.cpp's programs, and how they are installed."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.cpu import engines, install, models
from benchmarks.cpu.engines import EngineFailed, LlamaCpp, Worker
from benchmarks.cpu.workloads import WORKLOADS

TINY = models.Model("tiny", n_layer=1, n_head=2, n_embd=8, vocab_size=600, block_size=16, prefill=12)


# -- worker processes -----------------------------------------------------------------------------------------

WORKER = """
import sys, time
sys.path.insert(0, {folder!r})
from worker import serve

def load(options):
    {load}
    def generate(prompts, new_tokens):
        {generate}
        return [new_tokens] * len(prompts)
    return generate, {{"versions": {{"stand-in": "1"}}}}

serve(load)
"""


def make_worker(
    tmp_path: Path, *, load: str = "pass", generate: str = "pass", sample_s: float = 0.0, limit_s: float = 60
) -> Worker:
    script = tmp_path / "stand_in.py"
    script.write_text(WORKER.format(folder=str(engines.WORKERS), load=load, generate=generate))
    log = tmp_path / "log"
    return Worker(TINY, Path(sys.executable), str(script), {}, log=log, sample_s=sample_s, limit_s=limit_s)


def test_a_worker_is_warmed_up_and_timed(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, generate="time.sleep(0.01)", sample_s=0.05)
    try:
        worker.start()
        assert worker.about["versions"] == {"stand-in": "1"}
        sample = worker.sample(WORKLOADS["W2-8"], 1)
        # Each run takes at least 0.01 s, so that a sample is made of several.
        assert 0 < sample.tokens_per_s <= 8 * 128 / 0.01
        assert sample.peak_mb > 1
    finally:
        worker.close()


def test_prompts_are_fresh_for_every_run(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    worker = make_worker(tmp_path, generate=f"open({str(seen)!r}, 'a').write(str(prompts[0]) + chr(10))")
    try:
        worker.start()
        worker.sample(WORKLOADS["W1"], 100)
        worker.sample(WORKLOADS["W1"], 200)
    finally:
        worker.close()
    lines = seen.read_text().splitlines()
    # Two to warm each of the two lengths up, then both lengths in both samples.
    assert len(lines) == 8
    assert len(set(lines[4:])) == 4


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"load": "import no_such_engine"}, "ModuleNotFoundError: No module named 'no_such_engine'"),
        ({"load": "print('out of memory', file=sys.stderr); sys.exit(7)"}, "exit code 7: out of memory"),
        ({"load": "import os; os.kill(os.getpid(), 11)"}, "exit code -11: it said nothing"),
        ({"generate": "return [3]"}, "asked for 128 new tokens for each of 8, got [3]"),
    ],
)
def test_a_broken_engine_says_why(tmp_path: Path, broken: dict[str, str], reason: str) -> None:
    worker = make_worker(tmp_path, **broken)

    def measure() -> None:
        worker.start()
        worker.sample(WORKLOADS["W2-8"], 1)

    try:
        with pytest.raises(EngineFailed) as failure:
            measure()
    finally:
        worker.close()
    assert reason in str(failure.value)


def test_an_engine_that_hangs_is_given_up_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "END_S", 0.1)
    worker = make_worker(tmp_path, generate="time.sleep(600)", limit_s=1)
    try:
        worker.start()
        with pytest.raises(EngineFailed, match="no answer within 1 s"):
            worker.sample(WORKLOADS["W3"], 1)
    finally:
        worker.close()
    assert worker._process.returncode == -9


# -- llama.cpp's programs -------------------------------------------------------------------------------------


def make_llama(tmp_path: Path, bench: str, limit_s: float = 60) -> LlamaCpp:
    for name in ("llama-bench", "llama-batched-bench"):
        program = tmp_path / name
        program.write_text(f"#!{sys.executable}\nimport sys, time, json\n" + textwrap.dedent(bench))
        program.chmod(0o755)
    return LlamaCpp(TINY, tmp_path, tmp_path / "model.gguf", 2, sample_s=0.0, limit_s=limit_s)


def test_llama_figures_are_read_from_its_json(tmp_path: Path) -> None:
    engine = make_llama(
        tmp_path,
        """
        row = {"build_commit": "abc", "model_type": "gpt2", "samples_ns": [500_000_000]}
        if "-npl" in sys.argv:
            print("noise")
            row = {"pl": 8, "t": 2.0}
        print(json.dumps(row))
        """,
    )
    engine.start()
    assert engine.about == {"build": "abc", "model": "gpt2"}
    assert engine.sample(WORKLOADS["W1"], 1).tokens_per_s == 256
    assert engine.sample(WORKLOADS["W2-8"], 1).tokens_per_s == 512
    assert engine.sample(WORKLOADS["W3"], 1).tokens_per_s == 24


@pytest.mark.parametrize(
    ("bench", "limit_s", "reason"),
    [
        (
            "print('unknown model', file=sys.stderr); sys.exit(1)",
            60,
            "llama-bench ended with exit code 1: unknown model",
        ),
        ("print('no JSON')", 60, "llama-bench ended with exit code 0: it said nothing"),
        ("time.sleep(600)", 0.5, "not done within 0 s"),
    ],
)
def test_a_broken_llama_says_why(tmp_path: Path, bench: str, limit_s: float, reason: str) -> None:
    with pytest.raises(EngineFailed) as failure:
        make_llama(tmp_path, bench, limit_s).start()
    assert reason in str(failure.value)


# -- installation ---------------------------------------------------------------------------------------------


def test_a_failing_step_names_its_last_line_and_its_log(tmp_path: Path) -> None:
    installer = install.Installer(tmp_path, limit_s=60)
    script = "print('Collecting x'); print('ERROR: no matching distribution'); raise SystemExit(1)"
    with pytest.raises(EngineFailed, match=r"pip-x failed: ERROR: no matching distribution \(see .*pip-x\.log\)"):
        installer._run("pip-x", [sys.executable, "-c", script])
    with pytest.raises(EngineFailed, match="No such file or directory"):
        installer._run("gone", [str(tmp_path / "gone")])
    with pytest.raises(EngineFailed, match="was not done within 0 s"):
        install.Installer(tmp_path, limit_s=0.2)._run("slow", [sys.executable, "-c", "import time; time.sleep(60)"])


def test_the_products_constraints_do_not_reach_the_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "constraints.txt")
    monkeypatch.setenv("PIP_BUILD_CONSTRAINT", "constraints.txt")
    script = "import os; raise SystemExit(any('CONSTRAINT' in name for name in os.environ))"
    install.Installer(tmp_path, limit_s=60)._run("env", [sys.executable, "-c", script])


def test_a_conversion_is_done_once_for_a_model_and_again_for_another(tmp_path: Path) -> None:
    installer = install.Installer(tmp_path, limit_s=60)
    folder = models.make_model(TINY, tmp_path / "tiny")
    out = tmp_path / "kind" / "tiny.out"
    count = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.write_text((p.read_text() if p.exists() else '') + '.')"
    )

    def convert() -> str:
        installer._converted(folder, out, lambda: [sys.executable, "-c", count, str(out)])
        return out.read_text()

    assert [convert(), convert()] == [".", "."]
    (folder / "made").write_text("another")
    assert convert() == ".."
