"""``GET /metrics``: what the engine counts and what the workers count, in Prometheus' text format or OpenMetrics.

Any worker answers for the whole server: the engine sends its numbers to all of them, and the workers' own are kept in
common (``metrics``). The nouns are those of vLLM's metrics; docs/metrics.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flask import Blueprint, Response, request

from nanogpt._version import __version__
from nanogpt.engine.stats import BOUNDS
from nanogpt.engine.status import EngineStatus
from nanogpt.web.metrics import metrics

# Name under our prefix, help, name in EngineStats. All have the label model_name.
_GAUGES = (
    ("num_requests_running", "Sequences that are being computed now.", "num_running"),
    ("num_requests_waiting", "Sequences that wait for a place now.", "num_waiting"),
    ("kv_cache_capacity_tokens", "Positions of K and V that all slots hold together.", "num_positions"),
    ("kv_cache_held_tokens", "Positions with K and V of use now, of running sequences and of kept ones.",
     "num_positions_held"),
)  # fmt: skip
_COUNTERS = (
    ("prompt_tokens_total", "Prompt tokens of the requests that were admitted.", "num_prompt_tokens"),
    ("generation_tokens_total", "Tokens that were generated.", "num_output_tokens"),
    ("computed_tokens_total", "Tokens that the model computed: prompts without what was cached, and outputs.",
     "num_computed_tokens"),
    ("prefix_cache_queries_total", "Prompt tokens that were looked up among the K and V of other sequences.",
     "num_queried_tokens"),
    ("prefix_cache_hits_total", "Prompt tokens whose K and V were there already.", "num_cached_tokens"),
    ("spec_decode_num_draft_tokens_total", "Tokens that speculation guessed and the model computed.",
     "num_guessed_tokens"),
    ("spec_decode_num_accepted_tokens_total", "Guessed tokens that the model drew, too.", "num_accepted_tokens"),
    ("queue_full_total", "Sequences that were refused because the queue was full.", "num_queue_full"),
    ("steps_total", "Steps that the engine computed.", "num_steps"),
)  # fmt: skip
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "Time from a request's arrival in the engine to its first token.", "ttft"),
    ("inter_token_latency_seconds", "Time between two tokens of a sequence.", "itl"),
    ("e2e_request_latency_seconds", "Time from arrival to end of the requests that ended by themselves.", "e2e"),
    ("request_queue_time_seconds", "Time from arrival to admission.", "queue"),
    ("request_prompt_tokens", "Prompt tokens of a request that ended by itself.", "prompt_tokens"),
    ("request_generation_tokens", "Generated tokens of a request that ended by itself.", "output_tokens"),
    ("step_time_seconds", "Time of one step of the engine.", "step"),
    ("step_sequences", "Sequences that were computed in one step: the batch size.", "step_sequences"),
    ("step_tokens", "Tokens that were computed in one step.", "step_tokens"),
)


def make_metrics_page(states: Callable[[], Sequence[EngineStatus]]) -> Blueprint:
    """The route. ``states`` tells how the engines are, without waiting: that of the default model first."""
    page = Blueprint("metrics", __name__)

    @page.get("/metrics")
    def show() -> Response:
        return render(states(), request.headers.get("Accept", ""))

    return page


def render(states: Sequence[EngineStatus], accept: str) -> Response:
    from prometheus_client import CollectorRegistry, exposition

    class Page:
        def collect(self) -> Iterator[Any]:
            yield from _about(states[0])
            yield from _models(states)
            if len(states) > 1:
                yield from _compared(states[1])
            yield from _engines([status for status in states if status.stats])
            yield from metrics.collect()

    try:
        generate, content_type = exposition.choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        generate, content_type = exposition.choose_encoder("")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Page())
    return Response(generate(registry), content_type=content_type)


def _about(status: EngineStatus) -> Iterable[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    build = GaugeMetricFamily(
        "nanogpt_build_info",
        "The server's version, and what computes. Always 1.",
        labels=["version", "runner", "device", "precision"],
    )
    build.add_metric([__version__, status.runner or "", status.device or "", status.precision or ""], 1)
    yield build
    yield GaugeMetricFamily(
        "nanogpt_engine_ready", "Whether the engine takes requests.", value=float(status.state == "ready")
    )
    yield CounterMetricFamily(
        "nanogpt_engine_restarts", "How often the engine was started again.", value=float(status.restarts)
    )


def _models(states: Sequence[EngineStatus]) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    info = GaugeMetricFamily(
        "nanogpt_model_info",
        "The models that are served: name, digest of the weights, family. Always 1.",
        labels=["model_name", "digest", "family"],
    )
    for status in states:
        if status.model is not None:
            info.add_metric([status.model, status.digest or "", str((status.card or {}).get("family", ""))], 1)
    if info.samples:
        yield info


def _compared(status: EngineStatus) -> Iterator[Any]:
    """Of the second model's engine; the names without ``compare`` are what wakes somebody up."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily(
        "nanogpt_compare_engine_ready",
        "Whether the engine of the model to compare with takes requests.",
        value=float(status.state == "ready"),
    )
    yield CounterMetricFamily(
        "nanogpt_compare_engine_restarts", "How often that engine was started again.", value=float(status.restarts)
    )


def _engines(states: Sequence[EngineStatus]) -> Iterator[Any]:
    """What each engine counts, under its model's name."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if not states:
        return
    engines = [(status.model or "", status.stats) for status in states]
    for name, text, field in _GAUGES:
        gauge = GaugeMetricFamily(f"nanogpt_{name}", text, labels=["model_name"])
        for model, stats in engines:
            gauge.add_metric([model], stats[field])
        yield gauge
    slots = GaugeMetricFamily("nanogpt_kv_cache_slots", "Slots by what they hold now.", labels=["model_name", "state"])
    for model, stats in engines:
        running, cached = stats["num_slots_running"], stats["num_slots_cached"]
        for state, value in (("running", running), ("cached", cached), ("free", stats["num_slots"] - running - cached)):
            slots.add_metric([model, state], value)
    yield slots
    usage = GaugeMetricFamily(
        "nanogpt_kv_cache_usage_ratio",
        "Slots that running sequences own, of all (0 to 1). Kept ones count as free: they make room.",
        labels=["model_name"],
    )
    for model, stats in engines:
        usage.add_metric([model], stats["num_slots_running"] / max(1, stats["num_slots"]))
    yield usage
    finished = CounterMetricFamily(
        "nanogpt_requests_finished",
        "Sequences that ended, by their finish_reason; aborted are those that nobody waited for or that took too long.",
        labels=["model_name", "finished_reason"],
    )
    for model, stats in engines:
        for reason, value in stats["finished"].items():
            finished.add_metric([model, reason], value)
    yield finished
    for name, text, field in _COUNTERS:
        counter = CounterMetricFamily(f"nanogpt_{name}", text, labels=["model_name"])
        for model, stats in engines:
            counter.add_metric([model], stats[field])
        yield counter
    for name, text, field in _HISTOGRAMS:
        histogram = HistogramMetricFamily(f"nanogpt_{name}", text, labels=["model_name"])
        for model, stats in engines:
            *counts, total = stats[field]
            buckets, so_far = [], 0
            for bound, count in zip([*BOUNDS[field], float("inf")], counts, strict=True):
                so_far += count
                buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), so_far))
            histogram.add_metric([model], buckets, total)
        yield histogram
