"""The page: self-contained, complete, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from twinflow_rt.bench import html, plots, terminal
from twinflow_rt.errors import ConfigError

FIGURES = ("waterfall", "roofline", "evaluations", "throughput", "cold")
FETCHING = ("src", "href", "srcset", "data", "action", "xlink:href")
VOID = {"meta", "br", "img", "link", "input"}


class Outline(HTMLParser):
    """Tags in use, attributes that could fetch, and whether tags close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.fetching, self.open, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetching += [(tag, k, v) for k, v in attrs if k in FETCHING]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_fetches_nothing(record):
    page = html.render(record)
    outline = Outline(page)
    assert not outline.open and all(value.startswith("#") for *_, value in outline.fetching)  # shapes of the page's own
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert "default-src 'none'" in page and "@import" not in page and "://" not in page
    assert "url(" not in page.replace("url(#", "")
    assert re.findall(r'<svg id="([a-z]+)"', page) == list(FIGURES)
    assert html.render(record) == page
    marks = page.partition("</head>")[2]
    assert "var(--one)" in marks and not re.search(r"#[0-9a-f]{6}\b", marks)  # colours are the page's, dark ones too
    text = " ".join(outline.text)
    for stage in (*record["stages"], "diffusers", "GFLOP/s"):
        assert stage in text


def test_names_are_escaped(record):
    record["settings"]["model"] = "<b>&bold"
    record["notes"] = ["<script>alert(1)</script>"]
    page = html.render(record)
    assert "&lt;b&gt;&amp;bold" in page and "<script" not in page


def test_what_was_not_measured_is_left_out(record):
    record["cold_start"], record["evaluations"], record["batches"] = None, [], []
    page = html.render(record)
    assert re.findall(r'<svg id="([a-z]+)"', page) == ["waterfall", "roofline"]


def test_waterfall_is_to_scale(record):
    """Every bar begins where the one before ends and is as long as the stage's median."""
    axes = plots.stage_waterfall(record).axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    medians = [record["stages"][name]["median"] for name in plots.ORDER]
    starts = [sum(medians[:i]) for i in range(len(medians))]
    assert bars[: len(medians)] == [pytest.approx(pair) for pair in zip(starts, medians, strict=True)]
    total = record["stages"]["total"]["median"]
    assert bars[-1] == pytest.approx((0, total))
    between = [pytest.approx((sum(medians), total - sum(medians)))] if total > sum(medians) else []
    assert bars[len(medians) : -1] == between
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*plots.ORDER, *(["between"] if between else []), "whole call"]


def test_plots_show_the_records_figures(record):
    ceiling, *stages = _lines(plots.roofline(record))
    peak, copy = record["ceilings"]["gemm"]["float32"], record["ceilings"]["copy"]
    assert ceiling[1] == pytest.approx((peak / copy, peak)) and ceiling[0][1] == pytest.approx(ceiling[0][0] * copy)
    stage = record["efficiency"]["text"]
    assert stages[0] == [pytest.approx((stage["flops"] / stage["weight_bytes"], stage["flops_per_second"]))]
    (line,) = _lines(plots.evaluations(record))
    assert line == [(row["nfe"], pytest.approx(row["seconds"]["median"])) for row in record["evaluations"]]
    (batches,) = _lines(plots.throughput(record))
    assert batches == [(row["batch"], row["images_per_second"]) for row in record["batches"]]


@pytest.mark.parametrize("scale", [1e-4, 1, 100])  # of the record's times
@pytest.mark.parametrize(("plot", "of", "units"), [
    (plots.stage_waterfall, "x", plots.TIMES), (plots.cold_waterfall, "x", plots.TIMES),
    (plots.evaluations, "y", plots.TIMES), (plots.roofline, "y", plots.RATES),
])  # fmt: skip
def test_an_axis_has_one_unit_and_its_labels_have_it_too(record, plot, of, units, scale):
    phases = {"start": 0.04, "import": 1.1, "load": 0.2, "first image": 0.03, "warm image": 0.002}
    record["cold_start"] = {"runs": 1, "phases": {name: {"median": took} for name, took in phases.items()}}
    for samples in (*record["stages"].values(), *record["cold_start"]["phases"].values(),
                    *(row["seconds"] for row in record["evaluations"])):  # fmt: skip
        samples["median"] *= scale
    for reached in record["efficiency"].values():
        reached["flops_per_second"] /= scale
    figure = plot(record)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    title = axes.get_title(loc="left") if of == "y" else axes.get_xlabel()
    assert title.removesuffix(" per call") in [name for _, name in units]
    ticks = [label.get_text() for label in getattr(axes, f"get_{of}ticklabels")()]
    said = [text.get_text().partition(" in ")[0] for text in axes.texts]
    assert ticks and said and all(float(text) >= 0 for text in (*ticks, *said))


def test_a_line_leads_from_each_phase_to_its_bar(record):
    for plot in (plots.stage_waterfall, plots.cold_waterfall):
        figure = plot(record)
        starts = [bar.get_x() for bar in figure.axes[0].patches]
        assert _lines(figure) == [[(0, i), (pytest.approx(x), i)] for i, x in enumerate(starts)]


def test_memory_that_a_cpu_has_none_of_is_left_out(record):
    assert record["settings"]["device"] == "cpu"
    assert "resident" in html.render(record) and not re.search("allocated|reserved|<td>-</td>", html.render(record))
    for peaks in record["memory"]["stages"].values():
        peaks.update(device_allocated=10**9, device_reserved=2 * 10**9)
    assert all(text in html.render(record) for text in ("<th>allocated", "<th>reserved", "<td>1 GB", "<td>2 GB"))


@pytest.mark.parametrize("width", [30, 80])
def test_tables_are_not_cut(record, width):
    said = StringIO()
    terminal.show(record, Console(file=said, width=width))
    assert "…" not in said.getvalue()
    for samples in record["stages"].values():
        assert all(terminal.seconds(samples[key]) in said.getvalue() for key in ("median", "p90", "p99", "mad"))


def _lines(figure):
    return [[tuple(point) for point in line.get_xydata()] for line in figure.axes[0].lines]


def test_without_matplotlib_the_extra_is_named(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plots need matplotlib: pip install '\.\[report\]'"):
        html.render(record)


def test_drawn_by_a_browser(record, tmp_path):
    """Chromium lays the page out offline: all plots visible, in their colours, nothing beyond the right edge."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    from PIL import Image

    page, shot = html.save(record, tmp_path / "page.html"), tmp_path / "page.png"
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,1700",
        "--enable-logging=stderr", f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shot.exists(), done.stderr
    assert "CONSOLE" not in done.stderr  # refused by the page's own policy, or broken
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue, orange = (np.abs(pixels - colour).max(-1) < 8 for colour in ((0x25, 0x63, 0xC9), (0xB4, 0x54, 0x1A)))
    for place, name in enumerate(FIGURES):  # in rows of two
        top, left = 230 + 375 * (place // 2), 600 * (place % 2)
        assert (blue | orange)[top : top + 375, left : left + 600].sum() > 30, name
    assert (pixels[:, -8:] == pixels[0, 0]).all()
