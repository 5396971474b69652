"""A record as one HTML page: inline style and SVG, no script, nothing fetched (its own policy forbids it)."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.atomic import write_text
from . import plots
from .record import Record
from .terminal import PEER_COLUMNS, headline, peer_rows, rate, seconds, size

# id, plot, title, caption
PLOTS = (
    ("waterfall", plots.stage_waterfall, "Where a call's time goes",
     "Medians of stages on their own and of whole calls, in turns."),
    ("roofline", plots.roofline, "How near the machine's limits",
     "Limits are this run's own measured matrix products and copies."),
    ("evaluations", plots.evaluations, "Time against evaluations",
     "Medians; bars span the middle half of the samples."),
    ("throughput", plots.throughput, "Images per second", "Larger batches."),
    ("cold", plots.cold_waterfall, "Time to the first image",
     "Medians over fresh processes; files were in the page cache."),
)  # fmt: skip


def render(record: Record) -> str:
    """Return the page (report.html). Raises ConfigError where matplotlib is not installed."""
    from jinja2 import Environment

    drawn = [(plots.inline(plot, record, name, title), title, caption) for name, plot, title, caption in PLOTS]
    memory = {"host_resident": "resident"}
    if record["memory"]["stages"]["total"]["device_allocated"] is not None:
        memory = {"device_allocated": "allocated", "device_reserved": "reserved", **memory}
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    return template.render(
        record=record, headline=headline(record), tiles=_tiles(record), plots=[row for row in drawn if row[0]],
        columns=("stage", "median", "p90", "p99", "MAD", "reached", "of floor", *memory.values()),
        rows=_rows(record, list(memory)), peer_columns=PEER_COLUMNS, peers=peer_rows(record),
    )  # fmt: skip


def save(record: Record, path: str | Path) -> Path:
    return write_text(path, render(record))


def _tiles(record: Record) -> list[tuple[str, str]]:
    total, memory = record["stages"]["total"], record["memory"]["stages"]
    peaks = [m["device_allocated"] or m["host_resident"] for m in memory.values()]
    tiles = [(seconds(total["median"]), "per call, median"), (seconds(total["p99"]), "99th percentile")]
    best = max((r["images_per_second"] for r in record["batches"] if "images_per_second" in r), default=None)
    if best is not None:
        tiles.append((f"{best:.3g}", "images per second, best batch"))
    where = "device" if memory["total"]["device_allocated"] is not None else "resident"
    tiles.append((size(max(peaks)), f"peak {where} memory"))
    if record["cold_start"]:
        tiles.append((seconds(record["cold_start"]["phases"]["total"]["median"]), "from process start to first image"))
    return tiles


def _rows(record: Record, memory: list[str]) -> list[list[str]]:
    """Return the cells of the table of stages. memory: which peaks are shown."""
    rows = []
    for name, samples in record["stages"].items():
        reached = record["efficiency"].get(name)
        peaks = record["memory"]["stages"][name]
        rows.append([
            name, *(seconds(samples[key]) for key in ("median", "p90", "p99", "mad")),
            rate(reached["flops_per_second"], "FLOP/s") if reached else "",
            f"{reached['fraction_of_floor']:.0%} ({reached['bound']})" if reached else "",
            *(size(peaks[series]) for series in memory),
        ])  # fmt: skip
    return rows
