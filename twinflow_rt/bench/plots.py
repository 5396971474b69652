"""The report's plots of a record. Each returns an <svg> element, or None where the record has no data for it."""

from __future__ import annotations

from collections.abc import Sequence

from .record import Record
from .svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, apart, bar, dot, figure, frame, line, text
from .terminal import rate, seconds, size

ROW = 26
ORDER = ("text", "context", "noise", "velocity", "decode", "output")


def stage_waterfall(record: Record) -> str:
    """Stages one after the other as in a call; what their sum leaves of the whole call is `between`."""
    nfe, spans, at = record["settings"]["nfe"], [], 0.0
    for name in ORDER:
        took = record["stages"][name]["median"] * (nfe if name == "velocity" else 1)
        spans.append((f"{name} x{nfe}" if name == "velocity" and nfe > 1 else name, at, took))
        at += took
    total = record["stages"]["total"]["median"]
    if total > at:
        spans.append(("between", at, total - at))
    return _waterfall("waterfall", "Stages of a warm call", [*spans, ("whole call", 0.0, total)])


def cold_waterfall(record: Record) -> str | None:
    """Phases of a fresh process until the first image, and a second image for comparison."""
    if record["cold_start"] is None:
        return None
    spans, at = [], 0.0
    for name, samples in record["cold_start"]["phases"].items():
        if name == "total":
            continue
        spans.append((name.replace("_", " "), at, samples["median"]))
        at += samples["median"]
    return _waterfall("cold", "Phases of a cold start", spans)


def _waterfall(name: str, label: str, spans: Sequence[tuple[str, float, float]]) -> str:
    bottom = TOP + ROW * len(spans)
    x = Axis(0, max(start + took for _, start, took in spans) or 1, 92, WIDTH - 74)
    parts = [line([(x(t), TOP), (x(t), bottom)], "grid") for t in x.ticks()]
    parts += [text(x(t), bottom + 16, seconds(t) if t else "0", "middle", "tick") for t in x.ticks()]
    for i, (stage, start, took) in enumerate(spans):
        y = TOP + ROW * i
        style = "fill muted" if stage in ("between", "whole call", "warm image") else "fill one"
        parts.append(bar(x(start), y + 5, x(start + took) - x(start), ROW - 10, style, f"{stage}: {seconds(took)}"))
        parts.append(text(x.start - 8, y + 17, stage, "end", "name"))
        parts.append(text(x(start + took) + 6, y + 17, seconds(took), "start", "name"))
    return figure(name, label, parts, bottom + 24)


def roofline(record: Record) -> str:
    """FLOP/s reached against FLOPs per byte of weights, under this run's ceilings."""
    ceilings, dtype = record["ceilings"], record["settings"]["dtype"]
    peak, copy = ceilings["gemm"][dtype], ceilings["copy"]
    points = {
        name: (stage["flops"] / stage["weight_bytes"], stage["flops_per_second"])
        for name, stage in record["efficiency"].items()
        if stage["flops"] and stage["weight_bytes"]
    }
    ridge = peak / copy
    xs, ys = [p[0] for p in points.values()] + [ridge], [p[1] for p in points.values()]
    x = Axis(min(xs) / 3, max(xs) * 30, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(min([*ys, peak]) / 5, peak * 3, HEIGHT - BOTTOM, TOP, log=True)
    start = max(x.low, y.low / copy)
    roof = [(x(start), y(start * copy)), (x(ridge), y(peak)), (x(x.high), y(peak))]
    labels = ("FLOPs per byte of weights", "FLOP/s")
    parts = [*frame(x, y, *labels, lambda v: f"{v:g}", lambda v: rate(v, "")), line(roof, "stroke two")]
    parts.append(text(x.end, y(peak) - 6, f"{rate(peak, 'FLOP/s')} {dtype}", "end", "name"))
    heights = apart([y(v) + 4 for _, v in points.values()])
    for (name, (intensity, reached)), height in zip(points.items(), heights, strict=True):
        share = f"{record['efficiency'][name]['fraction_of_floor']:.0%} of its floor"
        parts.append(dot(x(intensity), y(reached), "dot one", f"{name}: {rate(reached, 'FLOP/s')}, {share}"))
        parts.append(text(x(intensity) + 9, height, name, "start", "name"))
    return figure("roofline", "Roofline", parts)


def evaluations(record: Record) -> str | None:
    """Median seconds of a call at each number of evaluations; bars span the middle half of the samples."""
    rows = [row for row in record["evaluations"] if "seconds" in row]
    if not rows:
        return None
    counts = [row["nfe"] for row in rows]
    x = Axis(0, max(counts) + 0.5, LEFT, WIDTH - RIGHT)
    y = Axis(0, max(row["seconds"]["median"] + row["seconds"]["iqr"] for row in rows) * 1.1, HEIGHT - BOTTOM, TOP)
    parts = frame(x, y, "evaluations per image", "seconds per call", lambda v: f"{v:g}", _plain, counts)
    parts.append(line([(x(row["nfe"]), y(row["seconds"]["median"])) for row in rows], "stroke one"))
    for row in rows:
        median, half = row["seconds"]["median"], row["seconds"]["iqr"] / 2
        at = x(row["nfe"])
        parts.append(line([(at, y(median - half)), (at, y(median + half))], "stroke one"))
        parts.append(dot(at, y(median), "dot one", f"{row['nfe']} evaluation(s): {seconds(median)}"))
        parts.append(text(at + 8, y(median) + 16, seconds(median), "start", "name"))
    return figure("evaluations", "Latency against evaluations", parts)


def memory_timeline(record: Record) -> str | None:
    """Resident and device memory of a cold start over time, with the ends of its phases."""
    if record["cold_start"] is None:
        return None
    timeline = record["cold_start"]["timeline"]
    times, series = timeline["seconds"], [("host resident", "one", timeline["host_resident"])]
    if any(timeline["device_allocated"]):
        series.append(("device allocated", "two", timeline["device_allocated"]))
    x = Axis(0, max(times), LEFT, WIDTH - 136)
    y = Axis(0, max(max(values) for _, _, values in series) * 1.08, HEIGHT - BOTTOM, TOP)
    parts = frame(x, y, "seconds since the process started", "bytes", _plain, lambda v: size(v) if v else "0")
    marks = [mark for mark in timeline["marks"] if mark["phase"] != "start"]
    for i, mark in enumerate(marks):
        phase, at = mark["phase"].replace("_", " "), mark["seconds"]
        parts.append(bar(x(at) - 0.5, y.end, 1, y.start - y.end, "fill muted", f"{phase} ends at {at:.2f} s"))
        parts.append(text(WIDTH - 128, TOP + 18 + 14 * i, f"{at:.2f} s {phase}", "start", "tick"))
    for label, style, values in series:
        parts.append(line([(x(t), y(v)) for t, v in zip(times, values, strict=True)], f"stroke {style}"))
        parts.append(text(x.start + 8, y(max(values)) + 14, f"{label}, at most {size(max(values))}", "start", "name"))
    return figure("memory", "Memory over time", parts)


def throughput(record: Record) -> str | None:
    """Images per second against batch size and against concurrent callers."""
    series = (("batch size", "one", "batches", "batch"), ("callers", "two", "concurrency", "threads"))
    lines = [
        (label, style, [(row[key], row["images_per_second"]) for row in record[field] if "images_per_second" in row])
        for label, style, field, key in series
    ]
    lines = [entry for entry in lines if entry[2]]
    if not lines:
        return None
    counts = sorted({n for _, _, points in lines for n, _ in points})
    x = Axis(0, max(counts) + 0.5, LEFT, WIDTH - 90)
    y = Axis(0, max(v for _, _, points in lines for _, v in points) * 1.15, HEIGHT - BOTTOM, TOP)
    parts = frame(x, y, "images per batch, or callers", "images per second", lambda v: f"{v:g}", _plain, counts)
    ends = apart([y(points[-1][1]) + 4 for _, _, points in lines])
    for (label, style, points), end in zip(lines, ends, strict=True):
        parts.append(line([(x(n), y(v)) for n, v in points], f"stroke {style}"))
        parts += [dot(x(n), y(v), f"dot {style}", f"{label} {n}: {v:.3g} images/s") for n, v in points]
        parts.append(text(x(points[-1][0]) + 9, end, label, "start", "name"))
    return figure("throughput", "Throughput", parts)


def _plain(value: float) -> str:
    return f"{value:.4g}"
