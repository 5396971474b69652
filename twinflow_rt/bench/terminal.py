"""Records and comparisons as rich tables."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .comparison import Comparison
from .record import Record

COLOURS = {"faster": "green", "better": "green", "slower": "red", "worse": "red"}


def seconds(value: float) -> str:
    """Return three digits and a unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    raise AssertionError


def size(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def rate(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def headline(record: Record) -> list[str]:
    """Return what was measured where, in words."""
    machine, asked, ceilings = record["machine"], record["settings"], record["ceilings"]
    gpu = machine["gpu"]
    where = gpu["name"] if gpu else f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    dtype = asked["dtype"]
    lines = [
        f"{asked['model']} {asked['width']}x{asked['height']}, batch {asked['batch']}, {asked['nfe']} evaluation(s), "
        f"{asked['precision'] or dtype} on {asked['device']}: {record['model']['parameters']:,} parameters",
        f"{where}; torch {machine['packages']['torch']}, commit {machine['commit'] or 'unknown'}, {record['created']}",
        f"ceilings: {rate(ceilings['gemm'][dtype], 'FLOP/s')} {dtype}, copy {rate(ceilings['copy'], 'B/s')}, this run",
    ]
    verdict = record["correctness"]
    return [*lines, f"outputs: {'correct' if verdict['passed'] else 'NOT KNOWN TO BE CORRECT'} ({verdict['reason']})"]


def show(record: Record, console: Console | None = None) -> None:
    """Print a record."""
    tables = [t for t in (_stages(record), _cold(record), _sweeps(record), _peers(record)) if t is not None]
    notes = [f"note: {note}" for note in record["notes"]]
    lines, console = [Text(line) for line in headline(record)], console or Console()
    for column in (column for table in tables for column in table.columns if column.no_wrap):
        column.min_width = max(len(str(text)) for text in (column.header, *column.cells))
    wide = console.options.update(max_width=999)  # tables are rather wider than the room than cut
    console.width = max(console.width, *(console.measure(table, options=wide).minimum for table in tables))
    console.print(Group(*lines, *tables, *map(Text, notes)))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=name != "why")
    return table


def _stages(record: Record) -> Table:
    table = _table("Time per call, warm", "stage", "median", "p90", "p99", "MAD", "FLOP/s", "B/s", "floor", "peak")
    for name, samples in record["stages"].items():
        if name == "total":
            table.add_section()
        reached = record["efficiency"].get(name)
        rates: tuple[str, ...] = ("", "", "")
        if reached:
            rates = (rate(reached["flops_per_second"], ""), rate(reached["bytes_per_second"], ""))
            rates += (f"{reached['fraction_of_floor']:.0%}",)
        table.add_row(name, *_times(samples), *rates, _peak(record["memory"]["stages"][name]))
    return table


def _times(samples: dict[str, Any]) -> tuple[str, ...]:
    return tuple(seconds(samples[key]) for key in ("median", "p90", "p99", "mad"))


def _peak(peaks: dict[str, Any]) -> str:
    if peaks["device_allocated"] is None:
        return size(peaks["host_resident"])
    return f"{size(peaks['device_allocated'])} / {size(peaks['device_reserved'])}"


def _cold(record: Record) -> Table | None:
    cold = record["cold_start"]
    if cold is None:
        return None
    table = _table(f"Cold start, {cold['runs']} run(s)", "phase", "median", "min")
    for name, samples in cold["phases"].items():
        table.add_row(name.replace("_", " "), seconds(samples["median"]), seconds(samples["min"]))
    return table


def _sweeps(record: Record) -> Table | None:
    table = _table("Throughput", "", "median", "p90", "p99", "MAD", "images/s", "peak")
    for key, label in (("batches", "batch"), ("concurrency", "threads"), ("evaluations", "nfe")):
        for row in record.get(key, []):
            name = {"threads": "callers", "nfe": "evaluations"}.get(label, label) + f" {row[label]}"
            if "seconds" not in row:
                table.add_row(name, row["reason"])
                continue
            peak = _peak(row["memory"]) if "memory" in row else ""
            table.add_row(name, *_times(row["seconds"]), f"{row['images_per_second']:.3g}", peak)
        if record.get(key):
            table.add_section()
    return table if table.row_count else None


PEER_COLUMNS = ("peer", "median", "speed-up", "95% interval", "why")


def peer_rows(record: Record) -> list[tuple[str, ...]]:
    """Return a line of text per peer, of `PEER_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for peer in record["peers"]:
        median = seconds(peer["seconds"]["median"]) if peer["seconds"] else "-"
        ratio = f"{peer['speedup']:.2f}x" if peer["speedup"] is not None else "refused"
        interval = "{:.2f} to {:.2f}".format(*peer["interval"]) if peer["interval"] else "-"
        rows.append((peer["name"], median, ratio, interval, peer["reason"]))
    return rows


def _peers(record: Record) -> Table | None:
    if not record["peers"]:
        return None
    table = _table("Against peers: whole calls in the same rounds", *PEER_COLUMNS)
    for row in peer_rows(record):
        table.add_row(*row)
    return table


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison; gated figures are marked."""
    console = console or Console()
    table = Table(title="B against A", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name, fixed in (("figure", True), ("verdict", True), ("why", False)):
        table.add_column(name, overflow="fold", no_wrap=fixed)
    for d in comparison.differences:
        gate = " (gate)" if d.gated else ""
        table.add_row(d.figure + gate, Text(d.verdict, style=COLOURS.get(d.verdict, "")), d.reason)
    console.print(table)
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}"))
