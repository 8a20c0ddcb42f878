"""Plots as SVG text: lines, points and bars with axes. Colours are the page's (CSS variables); nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 44
_MAX_POINTS = 1500

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """``kind``: line, steps or points. ``colour``: which of the page's colours, from 1."""

    name: str
    points: Sequence[Point]
    colour: int = 1
    kind: str = "line"


def plot(title: str, x_label: str, y_label: str, series: Sequence[Series], *, limits: dict[str, float] | None = None,
         limit_axis: str = "x", log_x: bool = False) -> str:  # fmt: skip
    """One figure. ``limits`` are drawn across it at their value on ``limit_axis``."""
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    limits = limits or {}
    xs = [x for one in shown for x, _ in one.points] + (list(limits.values()) if limit_axis == "x" else [])
    ys = [y for one in shown for _, y in one.points] + (list(limits.values()) if limit_axis == "y" else [])
    x_axis, y_axis = _Axis(xs, log=log_x, zero=not log_x), _Axis(ys, zero=True)

    def at(point: Point) -> str:
        x = _LEFT + x_axis.share(point[0]) * (WIDTH - _LEFT - _RIGHT)
        return f"{x:.1f},{_y(y_axis.share(point[1])):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in y_axis.ticks():
        y = _y(y_axis.share(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in x_axis.ticks():
        x = _LEFT + x_axis.share(value) * (WIDTH - _LEFT - _RIGHT)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<text x="{(_LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    for name, value in limits.items():
        if limit_axis == "x":
            x = _LEFT + x_axis.share(value) * (WIDTH - _LEFT - _RIGHT)
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"'
            place = f'x="{x - 4:.1f}" y="{HEIGHT - _BOTTOM - 6}"'
        else:
            y = _y(y_axis.share(value))
            line = f'x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            place = f'x="{WIDTH - _RIGHT}" y="{y - 4:.1f}"'
        parts.append(f'<line class="limit" {line}/><text class="limit" {place} text-anchor="end">{escape(name)}</text>')
    for one in shown:
        points = _thinned(one.points)
        if one.kind == "points":
            parts += [
                f'<circle class="s{one.colour}" cx="{cx}" cy="{cy}" r="3"><title>{escape(one.name)}: '
                f"{_number(point[1])} ({escape(x_label)} {_number(point[0])})</title></circle>"
                for point in points
                for cx, cy in [at(point).split(",")]
            ]
        else:
            path = " ".join(at(point) for point in (_steps(points) if one.kind == "steps" else points))
            parts.append(
                f'<polyline class="s{one.colour}" points="{path}"><title>{escape(one.name)}</title></polyline>'
            )
    parts.append("</svg>")
    legend = "".join(f'<span class="key s{one.colour}"></span>{escape(one.name)} ' for one in shown)
    return f"<figure><figcaption><b>{escape(title)}</b><br>{legend}</figcaption>{''.join(parts)}</figure>"


def cumulative(values: Sequence[float]) -> list[Point]:
    """For each value the share of values up to it, in percent."""
    ordered = sorted(values)
    return [(value, 100 * (i + 1) / len(ordered)) for i, value in enumerate(ordered)]


class _Axis:
    def __init__(self, values: Sequence[float], *, log: bool = False, zero: bool = False) -> None:
        self._log = log
        low, high = min(values), max(values)
        if log:
            low = max(low, 1e-6)
            self._low, self._high = math.log10(low), math.log10(max(high, low * 1.1))
            return
        low = min(0.0, low) if zero else low
        self._step = _step(max(high - low, 1e-9))
        self._low, self._high = low, max(high, low + self._step)

    def share(self, value: float) -> float:
        if self._log:
            value = math.log10(max(value, 1e-6))
        return min(1.0, max(0.0, (value - self._low) / (self._high - self._low)))

    def ticks(self) -> list[float]:
        if not self._log:
            first, last = math.ceil(self._low / self._step - 1e-9), math.floor(self._high / self._step + 1e-9)
            return [i * self._step for i in range(first, last + 1)]
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        inside = [v for v in every if self._low - 1e-9 <= math.log10(v) <= self._high + 1e-9]
        return inside if len(inside) <= 9 else [v for v in inside if math.log10(v) == round(math.log10(v))]


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that four to nine ticks fit."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 8)


def _y(share: float) -> float:
    return _TOP + (1 - share) * (HEIGHT - _TOP - _BOTTOM)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Every n-th, and the last: more than pixels do not show."""
    every = math.ceil(len(points) / _MAX_POINTS)
    return points if every <= 1 else [*points[::every], points[-1]]


def _steps(points: Sequence[Point]) -> list[Point]:
    path: list[Point] = []
    for x, y in points:
        if path:
            path.append((x, path[-1][1]))
        path.append((x, y))
    return path


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
