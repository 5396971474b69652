"""Axes and marks as SVG text: what the report's plots share. Colours are CSS classes of `html.STYLE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 14, 44


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to pixels [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        return self.start + (place - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside the range: powers of ten, or multiples of 1, 2 or 5 times one."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            step = max(1, math.ceil(len(powers) / (about + 1)))
            return [10.0**p for p in powers][::step]
        raw = (self.high - self.low) / about or 1
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def text(x: float, y: float, content: str, anchor: str = "start", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(content)}</text>'


def line(points: Sequence[tuple[float, float]], style: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="{style}"/>'


def dot(x: float, y: float, style: str, tip: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{style}"><title>{escape(tip)}</title></circle>'


def bar(x: float, y: float, width: float, height: float, style: str, tip: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" rx="2" class="{style}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def figure(name: str, label: str, body: Sequence[str], height: int = HEIGHT) -> str:
    """An <svg> with an accessible name."""
    head = f'<svg id="{name}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(body) + "</svg>"


def frame(
    x: Axis, y: Axis, x_label: str, y_label: str, x_format: Callable[[float], str], y_format: Callable[[float], str],
    x_ticks: Sequence[float] | None = None,
) -> list[str]:  # fmt: skip
    """Horizontal grid lines, tick labels and axis titles of a plot."""
    parts = []
    for tick in y.ticks():
        parts.append(line([(x.start, y(tick)), (x.end, y(tick))], "grid"))
        parts.append(text(x.start - 6, y(tick) + 4, y_format(tick), "end", "tick"))
    for tick in x.ticks() if x_ticks is None else x_ticks:
        parts.append(text(x(tick), y.start + 16, x_format(tick), "middle", "tick"))
    parts.append(line([(x.start, y.start), (x.end, y.start)], "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 36, x_label, "middle", "label"))
    parts.append(text(4, TOP - 2, y_label, "start", "label"))
    return parts


def apart(places: Sequence[float], least: float = 13) -> list[float]:
    """The same heights, moved down as little as keeps them `least` pixels apart."""
    moved, free = list(places), -math.inf
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        moved[i] = max(places[i], free)
        free = moved[i] + least
    return moved
