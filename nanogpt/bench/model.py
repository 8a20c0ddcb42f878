"""How fast a checkpoint computes by itself: prefill and decode by batch, memory, and the share of the memory's speed.

The runner's steps are called as the engine calls them, sampling included, without engine, tokenizer or HTTP. A decode
step has to read every weight once, and each sequence's K and V: that many bytes over the step's time is compared with
how fast this machine reads a buffer of the same size, by the same number of threads, in the same run. Near 1 nothing
but faster memory or fewer bytes helps; far below, arithmetic or overhead is what takes the time.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt._version import __version__
from nanogpt.checkpoint import card, load_checkpoint
from nanogpt.errors import InvalidRequest
from nanogpt.model.config import GPTConfig
from nanogpt.runner import create_runner
from nanogpt.runner.base import Batch, Runner, SamplingState
from nanogpt.runner.cpus import usable_cpus
from nanogpt.runner.int4_plan import matrix_sizes
from nanogpt.sampling_params import SamplingParams
from nanogpt.settings import Settings

FORMAT = 1
# Bytes of a weight, and of an element of K or V. int4: 64 weights share a scale of 16 bits.
_WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}
_KV_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 1.0}
_MIN_READ_BYTES = 1 << 20
_READ_ATTEMPTS = 5


@dataclass(frozen=True)
class Job:
    """``prompt_tokens`` 0: an eighth of the context. ``seconds``: of each figure, after one step that warms up."""

    batches: tuple[int, ...] = (1, 4, 16, 32)
    prompt_tokens: int = 0
    seconds: float = 1.0
    seed: int = 1


Say = Callable[[str], None]


def measure(settings: Settings, job: Job, say: Say = lambda text: None) -> dict[str, Any]:
    """All figures of one checkpoint. Raises: CheckpointError, SettingsError, MissingDependency, InvalidRequest."""
    before = _memory()
    started = time.perf_counter()
    checkpoint = load_checkpoint(settings.model_checkpoint, tokenizer=settings.tokenizer)
    runner = create_runner(
        checkpoint,
        device=settings.device,
        precision=settings.precision,
        runner=settings.runner,
        num_slots=max(job.batches),
        threads=settings.threads,
    )
    load_s = time.perf_counter() - started
    try:
        config = runner.config
        prompt = job.prompt_tokens or max(1, config.block_size // 8)
        if prompt >= config.block_size:
            raise InvalidRequest(
                f"--prompt-tokens is {prompt}; the model's context of {config.block_size} leaves no room to go on.",
                field="prompt_tokens",
            )
        threads = settings.threads or usable_cpus()
        weights = weight_bytes(config, runner.precision, runner.int8_matrices)
        say(f"reading {weights / 1e6:,.1f} MB as fast as the machine can")
        speed = _cuda_bandwidth() if runner.device == "cuda" else read_speed(weights, threads)
        loaded = _memory()
        rows = []
        for batch in job.batches:
            say(f"batch {batch}")
            rows.append(_row(runner, batch, prompt, job, speed))
        about = card(checkpoint)
        return {
            "format": FORMAT,
            "tool": f"nanogpt bench model {__version__}",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": {"architecture": platform.machine(), "processor": _processor(), "usable_cpus": usable_cpus()},
            "model": {name: about.get(name) for name in ("name", "family", "parameters", "n_layer", "n_head", "n_embd",
                                                        "block_size", "num_tokens")},
            "runner": runner.name, "device": runner.device, "precision": runner.precision,
            "arithmetic": runner.arithmetic,
            "threads": threads if runner.device == "cpu" else None,
            "prompt_tokens": prompt, "load_s": round(load_s, 3),
            "weight_bytes": weights, "kv_bytes_a_sequence": _kv_bytes(config, runner.precision, config.block_size),
            "memory_bytes": {"before": before, "loaded": loaded, "after": _memory(), **_cuda_memory(runner)},
            "read_bytes_per_s": round(speed), "rows": rows,
        }  # fmt: skip
    finally:
        runner.close()


def weight_bytes(config: GPTConfig, precision: str, int8_matrices: Sequence[str] | None = None) -> int:
    """What a decode step reads of the matrices: the blocks and the output head; of the embedding one row a sequence."""
    sizes = {name: n for name, n in matrix_sizes(config).items() if config.tied or name != "transformer.wte"}
    int8 = int8_matrices or ()
    return round(sum(n * _WEIGHT_BYTES["int8" if name in int8 else precision] for name, n in sizes.items()))


def read_speed(size: int, threads: int) -> float:
    """Bytes a second that so many threads read of a buffer of that size: the best of a few attempts."""
    each = max(size, _MIN_READ_BYTES) // threads // 8
    parts = [np.ones(each, np.int64) for _ in range(threads)]
    rounds = max(2, round(2e8 / (each * 8 * threads)))

    def read(part: Any) -> None:
        for _ in range(rounds):
            np.add.reduce(part)  # without the interpreter's lock; BLAS would start threads of its own

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READ_ATTEMPTS):
            started = time.perf_counter()
            list(pool.map(read, parts))
            best = max(best, each * 8 * threads * rounds / (time.perf_counter() - started))
    return best


def _row(runner: Runner, batch: int, prompt: int, job: Job, speed: float) -> dict[str, Any]:
    """Medians over the steps of about ``job.seconds``."""
    draw = np.random.default_rng(job.seed)
    ids = draw.integers(0, runner.config.num_tokens, (batch, prompt), np.int32)
    params = SamplingParams(max_tokens=runner.config.block_size, ignore_eos=True)
    slots = np.arange(batch, dtype=np.int32)

    def sampling() -> list[SamplingState | None]:
        return [SamplingState(params, b, ids[b].tolist(), []) for b in range(batch)]

    def prefill() -> None:
        zeros = np.zeros(batch, np.int32)
        runner.step(Batch(slots, zeros, zeros + prompt, ids.reshape(-1), sampling()))

    prefill_s = _timed(prefill, job.seconds)
    states = sampling()
    position, token_ids = prompt, ids[:, -1].copy()
    times: list[float] = []
    ends = time.perf_counter() + job.seconds
    room = runner.config.block_size - prompt
    while not times or (time.perf_counter() < ends and len(times) < 10_000):
        if position == prompt + room:  # the context is full: the texts begin anew behind their prompts
            position, states = prompt, sampling()
        starts = np.full(batch, position, np.int32)
        started = time.perf_counter()
        output = runner.step(Batch(slots, starts, np.ones(batch, np.int32), token_ids, states))
        times.append(time.perf_counter() - started)
        token_ids = np.array([new[0] for new in output.token_ids], np.int32)
        for state, token_id in zip(states, token_ids.tolist(), strict=True):
            if state is not None:
                state.output_token_ids.append(token_id)
        position += 1
    step_s = statistics.median(times[1:] or times)
    middle = prompt + min(len(times), room) // 2
    weights = weight_bytes(runner.config, runner.precision, runner.int8_matrices)
    step_bytes = weights + batch * _kv_bytes(runner.config, runner.precision, middle)
    return {
        "batch": batch,
        "prefill_tokens_per_s": round(batch * prompt / prefill_s, 2),
        "prefill_ms": round(prefill_s * 1000, 4),
        "decode_tokens_per_s": round(batch / step_s, 2),
        "decode_step_ms": round(step_s * 1000, 4),
        "decode_steps": len(times),
        "step_bytes": step_bytes,
        "bytes_per_s": round(step_bytes / step_s),
        "share_of_read_speed": round(step_bytes / step_s / speed, 4),
    }


def _timed(work: Callable[[], None], seconds: float) -> float:
    """The median time of the work, after once."""
    work()
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while not times or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _kv_bytes(config: GPTConfig, precision: str, tokens: int) -> int:
    return round(2 * config.n_layer * config.n_embd * tokens * _KV_BYTES[precision])


def _cuda_bandwidth() -> float:
    """Bytes a second of a sum over 1 GiB on the device."""
    import torch

    data = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    best = 0.0
    for _ in range(_READ_ATTEMPTS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            data.sum()
        torch.cuda.synchronize()
        best = max(best, 10 * data.nbytes / (time.perf_counter() - started))
    return best


def _cuda_memory(runner: Runner) -> dict[str, int]:
    if runner.device != "cuda":
        return {}
    import torch

    return {"cuda_peak": torch.cuda.max_memory_allocated()}


def _memory() -> int | None:
    """Resident bytes of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def table(report: dict[str, Any]) -> str:
    model, memory = report["model"], report["memory_bytes"]
    size = f"{model['parameters'] / 1e6:,.1f} million parameters" if model["parameters"] else "unknown size"
    threads = f", {report['threads']} threads" if report["threads"] else ""
    device = f"; {_mb(memory['cuda_peak'])} of the device at most" if "cuda_peak" in memory else ""
    lines = [
        f"{model['name'] or 'the embedded model'}: {size}, context {model['block_size']:,}",
        f"{report['runner']} runner on {report['device']}, {report['arithmetic']}{threads};"
        f" {report['machine']['processor']}",
        f"a step reads {_mb(report['weight_bytes'])} of weights; this machine reads"
        f" {report['read_bytes_per_s'] / 1e9:,.1f} GB/s of a buffer of that size",
        "",
        f"{'batch':>6}{'prefill':>16}{'decode':>16}{'step':>12}{'reads':>12}{'of the':>10}",
        f"{'':>6}{'tokens/s':>16}{'tokens/s':>16}{'ms':>12}{'GB/s':>12}{'speed':>10}",
    ]
    lines += [
        f"{row['batch']:>6}{row['prefill_tokens_per_s']:>16,.0f}{row['decode_tokens_per_s']:>16,.0f}"
        f"{row['decode_step_ms']:>12.3f}{row['bytes_per_s'] / 1e9:>12.1f}{row['share_of_read_speed']:>10.0%}"
        for row in report["rows"]
    ]
    lines += [
        "",
        f"prompts of {report['prompt_tokens']} tokens, computed in one step; a sequence's K and V take up to"
        f" {_mb(report['kv_bytes_a_sequence'])}",
        f"memory: {_mb(memory['loaded'])} with the model loaded ({_mb(memory['before'])} before),"
        f" {_mb(memory['after'])} at the end{device}; loaded in {report['load_s']:.1f} s",
    ]
    return "\n".join(lines)


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.1f} MB"
