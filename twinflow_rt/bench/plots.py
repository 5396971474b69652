"""The report's plots of a record, by matplotlib. Each returns a figure, or None where the record has no data for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..errors import extra_missing
from .record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER = ("text", "context", "noise", "velocity", "decode", "output")
MARKERS = "os^Dvp"
TIMES = ((1.0, "seconds"), (1e3, "milliseconds"), (1e6, "microseconds"))
RATES = ((1e-12, "TFLOP/s"), (1e-9, "GFLOP/s"), (1e-6, "MFLOP/s"))
# of the light page, as variables of its style name them: a dark page has others in their place
COLOURS = {
    "ink": "#1c1c1a", "soft": "#66655f", "grid": "#e6e5e0", "one": "#2563c9", "two": "#b4541a", "mute": "#b9b7b0",
}  # fmt: skip
INK, SOFT, GRID, ONE, TWO, MUTE = COLOURS.values()
POINTS = 72  # an inch
STYLE: dict[Any, Any] = {  # the keys' type is a Literal of all that matplotlib knows
    "text.color": INK, "text.parse_math": False, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "grid.color": GRID,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False, "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "xtick.bottom": False, "ytick.left": False, "xtick.minor.bottom": False, "ytick.minor.left": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
}  # fmt: skip


def inline(plot: Callable[[Record], Figure | None], record: Record, name: str, label: str) -> str | None:
    """Return a plot as an <svg> element for an HTML page, None where the record has no data for it.

    name: its id. label: its accessible name. The element refers to nothing outside itself and is the same for the
    same record. Raises ConfigError where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError as error:
        raise extra_missing(f"plots need {error.name}", "report") from None
    file, unsaid = StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = plot(record)
        if figure is None:
            return None
        figure.savefig(file, format="svg", transparent=True, metadata=unsaid)
    body = file.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)  # "axes_1" and the like, which every plot has
    for colour, value in COLOURS.items():
        body = body.replace(value, f"var(--{colour})")
    body = body.replace("'DejaVu Sans'", "system-ui")
    width, height = figure.get_size_inches() * POINTS
    return f'<svg id="{name}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">{body}'


def _axes(height: float = 300, x: str = "", y: str = "") -> tuple[Figure, Axes]:
    """Return an empty plot of 560 x `height` points and its axes. x, y: their titles."""
    from matplotlib.figure import Figure

    figure = Figure((560 / POINTS, height / POINTS), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize="medium", color=SOFT)
    axes.grid(axis="y")
    return figure, axes


def _unit(largest: float, units: Sequence[tuple[float, str]]) -> tuple[Callable[..., str], str]:
    """Return how an axis up to `largest` states its values, all in one unit, and the unit. units: (factor, name),
    those of the largest first."""
    factor, name = next((unit for unit in units if largest * unit[0] >= 1), units[-1])
    return lambda value, _=None: f"{value * factor:.3g}" if value * factor < 1000 else f"{value * factor:.0f}", name


def stage_waterfall(record: Record) -> Figure:
    """Draw the stages one after the other as in a call; `between` is what their sum leaves of the whole call."""
    nfe, spans, at = record["settings"]["nfe"], [], 0.0
    for name in ORDER:
        took = record["stages"][name]["median"] * (nfe if name == "velocity" else 1)
        spans.append((f"{name} x{nfe}" if name == "velocity" and nfe > 1 else name, at, took))
        at += took
    total = record["stages"]["total"]["median"]
    if total > at:
        spans.append(("between", at, total - at))
    return _waterfall([*spans, ("whole call", 0.0, total)])


def cold_waterfall(record: Record) -> Figure | None:
    """Draw the phases of a fresh process until the first image, and a second image for comparison."""
    if record["cold_start"] is None:
        return None
    spans, at = [], 0.0
    for name, samples in record["cold_start"]["phases"].items():
        if name != "total":
            spans.append((name.replace("_", " "), at, samples["median"]))
            at += samples["median"]
    return _waterfall(spans)


def _waterfall(spans: Sequence[tuple[str, float, float]]) -> Figure:
    """Draw one bar per span (name, start, duration), in seconds, the first on top; a line leads from a name to it."""
    end = max(start + took for _, start, took in spans)
    state, unit = _unit(end, TIMES)
    figure, axes = _axes(56 + 26 * len(spans), x=unit)
    for place, (name, start, took) in enumerate(spans):
        muted = name in ("between", "whole call", "warm image")
        axes.plot((0, start), (place, place), color=MUTE, linewidth=0.8)
        axes.barh(place, took, 0.62, start, color=MUTE if muted else ONE)
        _label(axes, state(took), start + took, place, (5, -3.5))
    axes.set_yticks(range(len(spans)), [name for name, _, _ in spans])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * end or 1)
    axes.xaxis.set_major_formatter(state)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x")
    return figure


def _label(axes: Axes, text: str, x: float, y: float, offset: tuple[float, float] = (6, -14)) -> None:
    """Write beside a point. offset: in points."""
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points")


def roofline(record: Record) -> Figure:
    """Draw the FLOP/s reached against FLOPs per byte of weights, under this run's ceilings."""
    ceilings, dtype = record["ceilings"], record["settings"]["dtype"]
    peak, copy = ceilings["gemm"][dtype], ceilings["copy"]
    points = {
        name: (stage["flops"] / stage["weight_bytes"], stage["flops_per_second"], stage["fraction_of_floor"])
        for name, stage in record["efficiency"].items()
        if stage["flops"] and stage["weight_bytes"]
    }
    ridge = peak / copy
    reach = [ridge, *(x for x, _, _ in points.values())]
    low, high = min(reach) / 3, max(reach) * 30
    bottom = min([peak, *(y for _, y, _ in points.values())]) / 5
    state, unit = _unit(peak, RATES)
    figure, axes = _axes(x="FLOPs per byte of weights", y=unit)
    axes.loglog([low, ridge, high], [low * copy, peak, peak], color=TWO)
    _label(axes, f"{state(peak)} in {dtype}", high, peak, (-120, 6))
    for marker, (name, (intensity, reached, share)) in zip(MARKERS, points.items(), strict=False):
        axes.plot(intensity, reached, marker, color=ONE, label=f"{name}, {share:.0%} of its floor")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, 3 * peak)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(state)
    axes.minorticks_off()
    axes.legend(loc="lower right")
    return figure


def evaluations(record: Record) -> Figure | None:
    """Draw the median time of a call at each number of evaluations; bars span the middle half of the samples."""
    rows = [row for row in record["evaluations"] if "seconds" in row]
    if not rows:
        return None
    counts, medians = [row["nfe"] for row in rows], [row["seconds"]["median"] for row in rows]
    state, unit = _unit(max(medians), TIMES)
    figure, axes = _axes(x="evaluations per image", y=f"{unit} per call")
    axes.errorbar(counts, medians, [row["seconds"]["iqr"] / 2 for row in rows], color=ONE, marker="o")
    for count, median in zip(counts, medians, strict=True):
        _label(axes, state(median), count, median)
    _from_zero(axes, counts)
    axes.yaxis.set_major_formatter(state)
    return figure


def throughput(record: Record) -> Figure | None:
    """Draw images per second against batch size."""
    rows = [row for row in record["batches"] if "images_per_second" in row]
    if not rows:
        return None
    figure, axes = _axes(x="images per batch", y="images per second")
    sizes = [row["batch"] for row in rows]
    axes.plot(sizes, [row["images_per_second"] for row in rows], color=ONE, marker="o")
    _from_zero(axes, sizes)
    return figure


def _from_zero(axes: Axes, counts: Sequence[int]) -> None:
    """Have both axes begin at 0 and the horizontal one state `counts`."""
    axes.set_xlim(0, 1.12 * max(counts))
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.set_xticks(counts)
    axes.yaxis.set_major_formatter("{x:g}")
