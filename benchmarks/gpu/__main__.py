"""Texts on a GPU by this product, by transformers' generate and without a K/V cache, in one run. See README.md."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.models import MODELS, make_model
from nanogpt import LLM, SamplingParams, __version__
from nanogpt.checkpoint import load_checkpoint
from nanogpt.model.gpt import GPT

_ROOT = Path(__file__).parents[2]
_PROMPT = 64
_TOP_K = 200  # of nanoGPT's sample.py

Generate = Callable[[list[list[int]], int], None]
"""Writes so many tokens after each prompt."""


def ours(folder: Path, device: str, **params: Any) -> Generate:
    llm = LLM(str(folder), device=device, runner="torch", speculate="off")

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        llm.generate(prompts, SamplingParams(max_tokens=new_tokens, ignore_eos=True, **params))

    return generate


def transformers(folder: Path, device: str, dtype: torch.dtype) -> Generate:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts, device=device)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return generate


def without_cache(folder: Path, device: str, dtype: torch.dtype) -> Generate:
    """As nanoGPT's sample.py does it: the whole text anew for every token."""
    model = GPT.from_checkpoint(load_checkpoint(folder), device=device, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts, device=device)
        for _ in range(new_tokens):
            logits = model.head(model.transformer(ids)[:, -1]).float()
            kth = torch.topk(logits, min(_TOP_K, logits.shape[-1])).values[:, -1:]
            weights = torch.softmax(logits.masked_fill(logits < kth, -torch.inf), dim=-1)
            ids = torch.cat([ids, torch.multinomial(weights, 1)], dim=1)

    return generate


def tokens_per_s(generate: Generate, vocab_size: int, batch: int, new_tokens: int, repeats: int) -> dict[str, float]:
    """The first text warms up and does not count. Every text is of other prompts."""
    rates = []
    for number in range(repeats + 1):
        draw = random.Random(number)
        prompts = [[draw.randrange(256, vocab_size - 1) for _ in range(_PROMPT)] for _ in range(batch)]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        generate(prompts, new_tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rates.append(batch * new_tokens / (time.perf_counter() - started))
    rates = rates[1:]
    return {"median": round(statistics.median(rates), 1), "min": round(min(rates), 1), "max": round(max(rates), 1)}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="texts at once (default 1 8 32)")
    parser.add_argument("--new-tokens", type=int, default=128, help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="texts that a figure is the median of (default 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--cache", type=Path, default=_ROOT / "build" / "bench")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(words)
    model = MODELS[options.model]
    folder = make_model(model, options.cache / "models" / options.model)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    engines: dict[str, Callable[[], Generate]] = {
        "nano-gpt-api, greedy": lambda: ours(folder, options.device, temperature=0.0),
        f"nano-gpt-api, top_k {_TOP_K}": lambda: ours(folder, options.device, temperature=0.8, top_k=_TOP_K),
    }
    if not options.only_ours:
        engines["transformers generate, greedy"] = lambda: transformers(folder, options.device, dtype)
        engines[f"no K/V cache, top_k {_TOP_K}"] = lambda: without_cache(folder, options.device, dtype)
    rows = []
    for name, make in engines.items():
        generate = make()
        for batch in options.batches:
            figure = tokens_per_s(generate, model.vocab_size, batch, options.new_tokens, options.repeats)
            rows.append({"engine": name, "batch": batch, **figure})
            print(f"{name:32} {batch:4} at once: {figure['median']:10,.0f} tokens/s "
                  f"({figure['min']:,.0f} to {figure['max']:,.0f})", flush=True)  # fmt: skip
    about = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "versions": {"nano-gpt-api": __version__, "torch": torch.__version__},
        "model": options.model, "prompt": _PROMPT, "new_tokens": options.new_tokens, "dtype": str(dtype),
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps({"format": 1, **about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
