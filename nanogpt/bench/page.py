"""The report as one HTML file: figures, plots, errors, how it was measured. No script, nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from nanogpt.bench.measures import QUANTILES
from nanogpt.bench.plots import Series, cumulative, plot
from nanogpt.bench.report import TIMES, how_loaded, what_asked

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --front: #1c2024; --soft: #5b6470; --line: #dfe3e8; --card: #f6f8fa;
  --c1: #0b62d6; --c2: #b4540a; --c3: #157f3b; --bad: #c0262d; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --front: #e6e9ec; --soft: #9aa4af; --line: #30363d;
  --card: #1d2126; --c1: #62a8ff; --c2: #f0a35e; --c3: #5fce85; --bad: #ff7b80; } }
body { background: var(--back); color: var(--front); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1360px; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } p { margin: .25rem 0; }
.soft { color: var(--soft); } .bad { color: var(--bad); font-weight: 600; }
.cards, .plots { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); margin-top: .75rem; }
.cards div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } figure { margin: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child, td.left { text-align: left; } th { color: var(--soft); font-weight: 600; }
svg { display: block; height: auto; width: 100%; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } line.limit { stroke: var(--bad); stroke-dasharray: 5 4; }
text.limit { fill: var(--bad); }
polyline { fill: none; stroke-width: 2; } .key { border-radius: 2px; display: inline-block; height: .7em; margin:
  0 .35em 0 .6em; width: .7em; }
polyline.s1 { stroke: var(--c1); } polyline.s2 { stroke: var(--c2); } polyline.s3 { stroke: var(--c3); }
circle.s1, .key.s1 { fill: var(--c1); background: var(--c1); }
circle.s2, .key.s2 { fill: var(--c2); background: var(--c2); } circle.s3, .key.s3 { fill: var(--c3);
  background: var(--c3); } circle.s4, .key.s4 { fill: var(--bad); background: var(--bad); }
"""


def page(report: dict[str, Any]) -> str:
    """The whole file."""
    parts = [f"<h1>Load test of {escape(report['model'])}</h1>"]
    how = how_loaded(report) if "figures" in report else what_asked(report)
    parts.append(f'<p class="soft">{escape(report["url"])} · {escape(how)} · {escape(report["time"])}</p>')
    parts += _capacity(report["capacity"]) if "capacity" in report else []
    parts += _run(report) if "figures" in report else []
    parts.append("<h2>How this was measured</h2>" + _method(report))
    title = f"Load test of {escape(report['model'])}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>' + title + "</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _run(report: dict[str, Any]) -> list[str]:
    figures = report["figures"]
    limits = figures.get("goodput", {}).get("slo_ms", {})
    cards = {
        "requests a second": f"{figures['requests_per_s']:,.2f}",
        "output tokens a second": f"{figures['output_tokens_per_s']:,.0f}",
        "completed": f"{figures['completed']:,} of {figures['requests']:,}",
        **{f"{TIMES[name].split(',')[0]}, p50": f"{figures[name]['p50']:,.1f} ms" for name in TIMES if figures[name]},
    }
    if goodput := figures.get("goodput"):
        cards["goodput, requests a second"] = f"{goodput['requests_per_s']:,.2f} ({goodput['attainment']:.1%})"
    requests = report["each_request"]
    seconds = report["per_second"]

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["sent_s"], row[name]) for row in requests if row[name] is not None and not row["error"]]

    shares = [
        plot(f"{label} of requests", "ms", "% of requests", [Series(label, cumulative([y for _, y in points(name)]))],
             limits={key: limit for key, limit in limits.items() if f"{key}_ms" == name})
        for name, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("e2e_ms", "E2E"))
    ]  # fmt: skip
    quantiles = [
        (100 * share, figures["itl_ms"][name]) for name, share in QUANTILES.items() if figures["itl_ms"]
    ]  # fmt: skip
    failed = [(row["sent_s"], row["e2e_ms"]) for row in requests if row["error"]]
    plots = [
        plot("Output tokens a second", "s", "tokens", [Series("tokens", _over(seconds, "tokens"), 3, "steps")]),
        plot("Requests under way", "s", "requests", [Series("under way", _over(seconds, "running"), 1, "steps")]),
        plot("TTFT of each request", "sent at, s", "ms", [Series("TTFT", points("ttft_ms"), 1, "points")],
             limits={k: v for k, v in limits.items() if k == "ttft"}, limit_axis="y"),
        plot("E2E of each request", "sent at, s", "ms",
             [Series("completed", points("e2e_ms"), 2, "points"), Series("failed", failed, 4, "points")],
             limits={k: v for k, v in limits.items() if k == "e2e"}, limit_axis="y"),
        *shares,
        plot("ITL, quantiles of all gaps", "percentile", "ms", [Series("ITL", quantiles, 2)]) if quantiles else "",
    ]  # fmt: skip
    client = report["client"]
    warning = f'<p class="bad">{escape(client["warning"])}</p>' if client["warning"] else ""
    return [_cards(cards), warning, "<h2>Latencies and lengths</h2>" + _latencies(figures), _errors(figures["errors"]),
            "<h2>Over time, and distributions</h2>", f'<div class="plots">{"".join(plots)}</div>']  # fmt: skip


def _capacity(found: dict[str, Any]) -> list[str]:
    sure = "confirmed" if found["confirmed"] else "not confirmed"
    cards = {"capacity, requests a second": f"{found['rate']:,.3f}" if found["rate"] else "none", "verdict": sure}
    cards |= {f"limit of {name}": f"{limit:g} ms" for name, limit in found["slo_ms"].items()}
    cards["of all requests"] = f"{found['attainment']:.1%}"
    heads = ("", "requests/s", "verdict", "within limits", "TTFT p50 / p99, ms", "ITL mean / p99, ms", "tokens/s")
    rows: list[tuple[str, ...]] = []
    for trial in found["trials"]:
        figures = trial["figures"]
        ttft, itl = figures["ttft_ms"] or {}, figures["itl_ms"] or {}
        rows.append((
            trial["purpose"], f"{trial['rate']:.3f}", "met" if trial["met"] else "not met",
            "given up early" if trial["cut_short"] else f"{trial['attainment']:.1%}",
            f"{ttft.get('p50', 0):.1f} / {ttft.get('p99', 0):.1f}",
            f"{itl.get('mean', 0):.2f} / {itl.get('p99', 0):.2f}",
            f"{figures['output_tokens_per_s']:,.0f}",
        ))  # fmt: skip
    by_rate = {
        met: sorted((t["rate"], t["figures"]["ttft_ms"]["p99"]) for t in found["trials"]
                    if t["met"] == met and t["figures"]["ttft_ms"])
        for met in (True, False)
    }  # fmt: skip
    limits = {"ttft": found["slo_ms"]["ttft"]} if "ttft" in found["slo_ms"] else {}
    figure = plot("TTFT p99 by rate", "requests a second", "ms",
                  [Series("met", by_rate[True], 3, "points"), Series("not met", by_rate[False], 4, "points")],
                  limits=limits, limit_axis="y", log_x=True)  # fmt: skip
    advice = "".join(
        f"<tr><td><code>{escape(name)}={escape(str(value['value']))}</code></td>"
        f'<td class="left">{escape(value["why"])}</td></tr>'
        for name, value in (found["recommended"] or {}).items()
    )
    return [
        "<h2>Capacity</h2>", _cards(cards), f"<p>{escape(found['why'])}</p>", _table(heads, rows),
        f'<div class="plots">{figure}</div>',
        f"<h2>Settings to begin with</h2><table>{advice}</table>" if advice else "",
    ]  # fmt: skip


def _latencies(figures: dict[str, Any]) -> str:
    names = {**TIMES, "prompt_tokens": "prompt tokens", "output_tokens": "output tokens"}
    columns = ("mean", *QUANTILES, "max")
    rows = [
        (label, *(f"{figures[name][column]:,.2f}" for column in columns))
        for name, label in names.items()
        if figures[name]
    ]
    return _table(("", *columns), rows)


def _errors(errors: dict[str, int]) -> str:
    if not errors:
        return "<p>No errors.</p>"
    return "<h2>Errors</h2>" + _table(("kind", "requests"), [(kind, f"{n:,}") for kind, n in errors.items()])


def _method(report: dict[str, Any]) -> str:
    workload = report["workload"]
    lines = [
        f"{report['tool']} on {report['client_machine']}; prompts are {workload['prompts']}, seed {workload['seed']}.",
        "TTFT: from sending a request (before its connection is looked for) to the first event with text. ITL: between"
        " two events with text of a stream, over all streams. TPOT: of a request, from its first text to its last,"
        " over its tokens less one. E2E: until the answer is complete.",
        "Goodput counts the requests that met every limit; the limit of ITL is for the mean of a request's gaps.",
    ]
    if client := report.get("client"):
        lag = client["loop_lag_ms"] or {}
        lines.append(
            f"The client used {client['cpu_share']:.0%} of a processor, {client['cpu_us_per_token'] or 0:g} µs a token;"
            f" its event loop was late by {lag.get('p99', 0):.1f} ms at p99."
        )
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)


def _over(seconds: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [(float(i), row[name]) for i, row in enumerate(seconds)]


def _cards(cards: dict[str, str]) -> str:
    items = "".join(f'<div><b>{escape(value)}</b><span class="soft">{escape(name)}</span></div>' for name, value in
                    cards.items())  # fmt: skip
    return f'<div class="cards">{items}</div>'


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
