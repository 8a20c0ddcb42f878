"""karpathy/nanoGPT's train.py against ``nanogpt train``: same machine, configuration, seed, data and number of steps.

Measured are tokens a second, from the median time of a step after the first ten, and the validation loss of what each
wrote, computed for both by one runner in float32 over the whole validation split. Batches and first weights are drawn
by each program in its own way. nanoGPT's code is a clone that the caller names; nothing of it is in this repository.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.checkpoint import load_checkpoint
from nanogpt.checkpoint.tokenizer_export import write_meta
from nanogpt.eval.tasks import evaluate_loss
from nanogpt.llm import LLM
from nanogpt.tokenizer.characters import CharacterTokenizer
from nanogpt.train.config import TrainConfig, load_config
from nanogpt.train.dataset import open_dataset
from nanogpt.train.prepare import prepare_text

ROOT = Path(__file__).resolve().parent.parent.parent
WARMUP_STEPS = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="PATH", help="a clone of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="tinyshakespeare's input.txt")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shakespeare-char-cpu.toml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile for both")
    parser.add_argument("--precision", action="append", choices=("fp32", "bf16"), help="of ours; may be repeated")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = compare(args, Path(scratch))
    report(results)
    return 0


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data = folder / "ours"
    prepare_text(
        [args.text], data, tokenizer="characters", vocab_size=0, val_fraction=0.1, shard_tokens=10**8
    )  # fmt: skip
    text = args.text.read_text("utf-8")
    val = folder / "val.txt"
    val.write_text(text[int(len(text) * 0.9) :], "utf-8")
    changes = [f"data={data}", f"max_steps={args.steps}", f"warmup_steps={min(100, args.steps // 4)}", "log_interval=1",
               f"eval_interval={args.steps}", f"checkpoint_interval={args.steps}", "eval_batches=2", "keep_best=false",
               f"threads={args.threads}", f"device={args.device}", f"compile={str(args.compile).lower()}"]  # fmt: skip
    config = load_config(args.config, changes)
    runs = [theirs(args, config, folder / "theirs", data, val)]
    for precision in args.precision or ("fp32", "bf16"):
        out = folder / precision
        runs += [ours(args, [*changes, f"precision={precision}", f"out_dir={out}"], out, val)]
    return {
        "benchmark": "train", "config": args.config.stem, "steps": args.steps, "threads": args.threads,
        "device": args.device, "compile": args.compile, "machine": f"{platform.machine()}, {_processor()}",
        "runs": runs,
    }  # fmt: skip


def theirs(args: argparse.Namespace, config: TrainConfig, folder: Path, data: Path, val: Path) -> dict[str, Any]:
    folder.mkdir()
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(args.nanogpt / name, folder / name)
    dataset = open_dataset(data)
    place = folder / "data" / "bench"
    place.mkdir(parents=True)
    for split in ("train", "val"):
        np.concatenate([shard.tokens for shard in dataset.open(split)]).astype(np.uint16).tofile(place / f"{split}.bin")
    assert isinstance(dataset.tokenizer, CharacterTokenizer)
    write_meta(dataset.tokenizer, place / "meta.pkl")
    values: dict[str, Any] = {
        "out_dir": "out", "dataset": "bench", "eval_interval": args.steps, "eval_iters": 2, "log_interval": 1,
        "gradient_accumulation_steps": config.accumulation, "batch_size": config.batch_size,
        "block_size": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "dropout": config.dropout, "bias": config.bias, "learning_rate": config.learning_rate,
        "min_lr": config.min_learning_rate, "max_iters": args.steps, "lr_decay_iters": args.steps,
        "warmup_iters": config.warmup_steps, "beta1": config.beta1, "beta2": config.beta2,
        "weight_decay": config.weight_decay, "grad_clip": config.grad_clip, "device": args.device,
        "dtype": "bfloat16" if args.device == "cuda" else "float32", "compile": args.compile,
    }  # fmt: skip
    (folder / "bench.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    output = _run([sys.executable, "-W", "ignore", "train.py", "bench.py"], folder, args.threads)
    times = [float(match[1]) / 1000 for match in re.finditer(r"^iter \d+: loss \S+, time ([\d.]+)ms", output, re.M)]
    shutil.copy(place / "meta.pkl", folder / "out" / "meta.pkl")
    # The first step's time holds the first evaluation, the last one's the saving.
    return _result("nanoGPT", config, times[WARMUP_STEPS : args.steps], folder / "out", val, args.threads)


def ours(args: argparse.Namespace, changes: list[str], folder: Path, val: Path) -> dict[str, Any]:
    config = load_config(args.config, changes)
    command = [sys.executable, "-m", "nanogpt", "train", args.config, "--json"]
    output = _run([*command, *(f"--set={change}" for change in changes)], ROOT, args.threads)
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    tokens = config.batch_size * config.block_size * config.accumulation
    times = [tokens / event["tokens_per_second"] for event in events if event["event"] == "train"]
    return _result(f"ours, {config.precision}", config, times[WARMUP_STEPS:], folder, val, args.threads)


def _result(
    name: str, config: TrainConfig, times: list[float], checkpoint: Path, val: Path, threads: int
) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4)
    tokens = config.batch_size * config.block_size * config.accumulation
    with LLM(checkpoint, runner="torch", precision="fp32", device="cpu", threads=threads) as llm:
        loss = evaluate_loss(llm, val)
    return {
        "name": name, "tokens_per_second": round(tokens / quartiles[1]), "step_ms": round(quartiles[1] * 1000, 2),
        "step_ms_quartiles": [round(quartiles[0] * 1000, 2), round(quartiles[2] * 1000, 2)],
        "parameters": load_checkpoint(checkpoint).config.num_parameters(),
        "val_loss": round(loss["loss"], 4), "val_loss_margin": round(loss["loss_margin"], 4),
    }  # fmt: skip


def report(results: dict[str, Any]) -> None:
    runs = results["runs"]
    print(f"{results['config']}, {results['steps']} steps, {results['threads']} threads, {results['machine']}\n")
    for run in runs:
        low, high = run["step_ms_quartiles"]
        ratio = run["tokens_per_second"] / runs[0]["tokens_per_second"]
        print(
            f"{run['name']:<12} {run['tokens_per_second']:>9,} tok/s  ({ratio:.2f}x)"
            f"  step {run['step_ms']:.1f} ms ({low:.1f} to {high:.1f})  validation loss {run['val_loss']:.4f}"
        )
    print(json.dumps(results))


def _run(command: list[Any], folder: Path, threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-4000:]}")
    return result.stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
