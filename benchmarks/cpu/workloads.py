"""What is measured: one request, several at once, a long prompt. Greedy, end of text ignored, fresh random prompts."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cpu.models import Model


@dataclass(frozen=True)
class Workload:
    """``batch`` requests at once, ``prompt`` tokens in (0: the model's prefill length), ``new`` tokens out."""

    name: str
    what: str
    batch: int
    prompt: int
    new: int

    def prompt_of(self, model: Model) -> int:
        return self.prompt or model.prefill


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "1 request, 32 in, 128 out: decode tokens/s", 1, 32, 128),
        Workload("W2-8", "8 requests, 64 in, 128 out: new tokens/s", 8, 64, 128),
        Workload("W2-16", "16 requests, 64 in, 128 out: new tokens/s", 16, 64, 128),
        Workload("W2-32", "32 requests, 64 in, 128 out: new tokens/s", 32, 64, 128),
        Workload("W3", "prefill: prompt tokens/s", 1, 0, 1),
    )
}


def tokens_per_s(workload: Workload, model: Model, seconds: list[float], first_token_s: list[float]) -> float:
    """The figure of one sample, from the wall times of its runs.

    W1 leaves the prompt out: it subtracts the time to the first token, measured on other prompts of that length.
    """
    mean = sum(seconds) / len(seconds)
    if workload.name == "W1":
        return (workload.new - 1) / (mean - sum(first_token_s) / len(first_token_s))
    if workload.name == "W3":
        return workload.prompt_of(model) / mean
    return workload.batch * workload.new / mean
