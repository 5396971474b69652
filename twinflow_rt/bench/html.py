"""A record as one HTML page: inline style and SVG, no script, nothing fetched (its own policy forbids it)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..checkpoint.atomic import write_text
from . import plots
from .record import Record
from .terminal import PEER_COLUMNS, headline, peer_rows, rate, seconds, size

STYLE = """
:root { --page: #fcfcfb; --ink: #1c1c1a; --soft: #66655f; --grid: #e6e5e0;
  --one: #2563c9; --two: #b4541a; --mute: #b9b7b0 }
@media (prefers-color-scheme: dark) { :root { --page: #181817; --ink: #edece8; --soft: #a3a19a; --grid: #33322f;
  --one: #74a5f5; --two: #e8935c; --mute: #5d5c57 } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1.25rem }
h1 { font-size: 1.4rem; margin: 0 0 .3rem } h2 { font-size: 1rem; margin: 0 0 .2rem }
p { margin: 0 0 .3rem } .soft, figcaption, th { color: var(--soft) }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0 }
.tiles b { display: block; font-size: 1.5rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem 2.5rem }
figure { margin: 0 } figcaption { font-size: .85rem; margin-bottom: .4rem }
.wide { overflow-x: auto; margin-top: 1.6rem } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem 1rem .2rem 0; text-align: right; font-weight: normal; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td:last-child { white-space: normal }
tr + tr td { border-top: 1px solid var(--grid) }
@media (max-width: 45rem) { th, td { white-space: normal; padding-right: .5rem; font-size: .8rem } }
code { font-size: .9em; overflow-wrap: anywhere } .bad { color: var(--two) }
svg { width: 100%; height: auto; display: block }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
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
    """Return the page. Raises ConfigError where matplotlib is not installed."""
    drawn = [(plots.inline(plot, record, name, title), title, caption) for name, plot, title, caption in PLOTS]
    figures = "".join(
        f"<figure><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for svg, title, caption in drawn
        if svg is not None
    )
    first, *facts = headline(record)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(record['settings']['model'])}: benchmark</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(first)}</h1>" + "".join(f'<p class="soft">{escape(line)}</p>' for line in facts)
        + f'<div class="tiles">{_tiles(record)}</div><div class="plots">{figures}</div>{_tables(record)}'
        + "".join(f'<p class="bad">Note: {escape(note)}</p>' for note in record["notes"])
        + f"<p>Measured by <code>{escape(record['command'])}</code></p></body></html>\n"
    )  # fmt: skip


def save(record: Record, path: str | Path) -> Path:
    return write_text(path, render(record))


def _tiles(record: Record) -> str:
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
    return "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for value, label in tiles)


def _tables(record: Record) -> str:
    rows, memory = [], {"host_resident": "resident"}
    if record["memory"]["stages"]["total"]["device_allocated"] is not None:
        memory = {"device_allocated": "allocated", "device_reserved": "reserved", **memory}
    for name, samples in record["stages"].items():
        reached = record["efficiency"].get(name)
        peaks = record["memory"]["stages"][name]
        rows.append([
            name, *(seconds(samples[key]) for key in ("median", "p90", "p99", "mad")),
            rate(reached["flops_per_second"], "FLOP/s") if reached else "",
            f"{reached['fraction_of_floor']:.0%} ({reached['bound']})" if reached else "",
            *(size(peaks[series]) for series in memory),
        ])  # fmt: skip
    columns = ("stage", "median", "p90", "p99", "MAD", "reached", "of floor", *memory.values())
    peers = _table(PEER_COLUMNS, peer_rows(record)) if record["peers"] else ""
    return _table(columns, rows) + peers


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
