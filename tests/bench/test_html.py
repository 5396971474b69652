"""The page: self-contained, complete, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from twinflow_rt.bench import html, plots, svg

FIGURES = ("waterfall", "roofline", "evaluations", "throughput", "memory", "cold")
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
    assert not outline.open and not outline.fetching
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page and "://" not in page
    assert re.findall(r'<svg id="([a-z]+)"', page) == list(FIGURES)
    text = " ".join(outline.text)
    for stage in (*record["stages"], "diffusers", "GFLOP/s"):
        assert stage in text


def test_names_are_escaped(record):
    record["settings"]["model"] = "<b>&bold"
    record["notes"] = ["<script>alert(1)</script>"]
    page = html.render(record)
    assert "&lt;b&gt;&amp;bold" in page and "<script" not in page


def test_what_was_not_measured_is_left_out(record):
    record["cold_start"], record["evaluations"], record["batches"], record["concurrency"] = None, [], [], []
    page = html.render(record)
    assert re.findall(r'<svg id="([a-z]+)"', page) == ["waterfall", "roofline"]


def test_waterfall_is_to_scale(record):
    """Every bar begins where the one before ends; lengths are proportional to the medians."""
    drawn = plots.stage_waterfall(record)
    bars = [tuple(map(float, m)) for m in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)]
    medians = [record["stages"][name]["median"] for name in plots.ORDER]
    scale = bars[-1][1] / max(record["stages"]["total"]["median"], sum(medians)) if len(bars) == 8 else None
    at = bars[0][0]
    for (x, width), median in zip(bars, medians, strict=False):
        assert x == pytest.approx(at, abs=0.2)
        if scale:
            assert width == pytest.approx(max(1, median * scale), abs=0.2)
            at += median * scale
        else:
            break


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [(0, 10, False, [0, 2, 4, 6, 8, 10]), (0, 0.13, False, [0, 0.05, 0.1]), (3, 2e4, True, [10, 100, 1000, 10000])],
)
def test_axes(low, high, log, expected):
    axis = svg.Axis(low, high, 100, 300, log=log)
    assert axis.ticks() == pytest.approx(expected)
    assert axis(low) == pytest.approx(100) and axis(high) == pytest.approx(300)


def test_labels_are_moved_apart():
    assert svg.apart([10, 11, 50, 9]) == [22, 35, 50, 9]


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
    for row in range(3):  # three rows of two plots each
        band = slice(230 + 375 * row, 230 + 375 * (row + 1))
        for side in (slice(0, 600), slice(600, 1200)):
            assert (blue | orange)[band, side].sum() > 30, (row, side)
    assert (pixels[:, -8:] == pixels[0, 0]).all()
