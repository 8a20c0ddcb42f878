"""From samples to figures: the table that is printed and the JSON that is kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.cpu.engines import Sample
from benchmarks.cpu.limits import decode_limit
from benchmarks.cpu.models import MODELS
from benchmarks.cpu.peers import OURS


@dataclass
class Result:
    """One row: an engine with a model. ``error`` says why figures are missing (of all workloads, or from then on)."""

    model: str
    engine: str
    bits: str
    mode: str
    about: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    error: str | None = None

    @property
    def peak_mb(self) -> float | None:
        peaks = [sample.peak_mb for samples in self.samples.values() for sample in samples]
        return max(peaks) if peaks else None


@dataclass(frozen=True)
class Figure:
    """``repeats`` samples count; ``disturbed`` of them were taken while others used the machine."""

    median: float
    min: float
    max: float
    repeats: int
    disturbed: int


def figure(samples: Iterable[Sample], repeats: int) -> Figure | None:
    """The figure of the ``repeats`` quietest samples, so that a disturbed one counts only where no other was got."""
    kept = sorted(samples, key=lambda sample: (sample.disturbed, sample.foreign if sample.disturbed else 0.0))[:repeats]
    if not kept:
        return None
    values = [sample.tokens_per_s for sample in kept]
    return Figure(
        round(statistics.median(values), 1),
        round(min(values), 1),
        round(max(values), 1),
        len(values),
        sum(sample.disturbed for sample in kept),
    )


def ratios(results: list[Result], workloads: list[str], repeats: int) -> list[dict[str, Any]]:
    """Ours over the best peer of the same bits, a column at a time."""
    found: list[dict[str, Any]] = []
    for ours in (result for result in results if result.engine == OURS):
        peers = [r for r in results if r.engine != OURS and r.model == ours.model and r.bits == ours.bits]
        for workload in workloads:
            own = figure(ours.samples.get(workload, ()), repeats)
            rivals = [(f.median, p) for p in peers if (f := figure(p.samples.get(workload, ()), repeats))]
            if own and rivals:
                best, peer = max(rivals, key=lambda rival: rival[0])
                found.append(
                    {
                        "model": ours.model,
                        "bits": ours.bits,
                        "workload": workload,
                        "ratio": round(own.median / best, 2),
                        "best_peer": f"{peer.engine} {peer.mode}",
                    }
                )
    return found


def as_json(
    results: list[Result],
    workloads: list[str],
    repeats: int,
    machine: dict[str, Any],
    limits: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    rows = []
    for result in results:
        figures = {w: figure(result.samples.get(w, ()), repeats) for w in workloads}
        rows.append(
            {
                "model": result.model,
                "engine": result.engine,
                "bits": result.bits,
                "mode": result.mode,
                "about": result.about,
                "error": result.error,
                "tokens_per_s": {w: asdict(f) for w, f in figures.items() if f},
                "peak_mb": result.peak_mb,
                "samples": {w: [asdict(sample) for sample in samples] for w, samples in result.samples.items()},
            }
        )
    return {
        "format": 1,
        "machine": machine,
        "options": options,
        "limits": limits,
        "rows": rows,
        "ratios": ratios(results, workloads, repeats),
    }


def table(results: list[Result], workloads: list[str], repeats: int, limits: dict[str, Any]) -> str:
    """Markdown. ``*`` marks a figure with disturbed samples in it."""
    lines: list[str] = []
    for name in dict.fromkeys(result.model for result in results):
        model = MODELS[name]
        shape = f"{model.n_layer} layers, {model.n_embd} wide, vocabulary {model.vocab_size:,}"
        lines += [f"### {name}: {shape}; W3 is {model.prefill} tokens", ""]
        lines += ["| | " + " | ".join(workloads) + " | memory, MB |", "|---" * (len(workloads) + 2) + "|"]
        of_model = [result for result in results if result.model == name]
        for result in of_model:
            cells = [_cell(figure(result.samples.get(w, ()), repeats)) for w in workloads]
            memory = f"{result.peak_mb:,.0f}" if result.peak_mb else "–"
            lines.append(f"| {result.engine} {result.mode} | " + " | ".join(cells) + f" | {memory} |")
        for bits in ("int8", "int4"):
            limit = decode_limit(limits, model, bits)
            if limit:
                cells = [f"{limit:,.0f}" if w == "W1" else "" for w in workloads]
                lines.append(f"| limit of the memory, {bits} | " + " | ".join(cells) + " | |")
        of_ours = [ratio for ratio in ratios(results, workloads, repeats) if ratio["model"] == name]
        for bits in dict.fromkeys(ratio["bits"] for ratio in of_ours):
            by_workload = {ratio["workload"]: ratio["ratio"] for ratio in of_ours if ratio["bits"] == bits}
            cells = [f"**{by_workload[w]:.2f} ×**" if w in by_workload else "" for w in workloads]
            lines.append(f"| **ours / best {bits} peer** | " + " | ".join(cells) + " | |")
        lines.append("")
        lines += [f"- {result.engine} {result.mode}: {result.error}" for result in of_model if result.error]
        lines.append("")
    return "\n".join(lines)


def _cell(found: Figure | None) -> str:
    if found is None:
        return "–"
    mark = "*" if found.disturbed else ""
    return f"{found.median:,.0f}{mark} ({found.min:,.0f}–{found.max:,.0f})"
