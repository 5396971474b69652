"""Score against evaluations, from the JSON of `twinflow-rt eval`, as one SVG picture:

    python -m twinflow_rt.evaluate.plot scores.svg TwinFlow=twinflow.json "flow matching=flow.json" ...

A name may be given several files; their evaluations form one line. Held-out captions are drawn.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..bench.svg import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Axis, apart, dot, frame, line, text
from ..checkpoint.atomic import write_text
from ..checkpoint.files import parse_json
from ..checkpoint.versions import refusal
from ..errors import ConfigError

SCHEMA = 1  # of the report of `twinflow-rt eval --json`
Series = dict[str, list[tuple[int, float]]]
COLORS = ("#2563c9", "#b4541a", "#2f7d4f", "#8a4fa3", "#66655f")
# the page's ground is drawn too: GitHub shows pictures on dark and on light
STYLE = """svg { font: 12px system-ui, sans-serif; background: #fcfcfb } text { fill: #1c1c1a }
.tick, .label { fill: #66655f; font-size: 11px } .grid { stroke: #e6e5e0; fill: none } .axis { stroke: #66655f }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round } polyline.grid, polyline.axis { stroke-width: 1 }"""


def read(pairs: Sequence[tuple[str, Path]]) -> Series:
    """(name, file) -> points (evaluations, mean score) by name, sorted. ConfigError for other files."""
    series: Series = defaultdict(list)
    for name, path in pairs:
        try:
            report = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not readable JSON ({error}); name a report of `twinflow-rt eval`") from None
        if not isinstance(report, dict) or "rows" not in report:
            raise ConfigError(f"{path} is no report of `twinflow-rt eval --json`; name one")
        if report.get("schema") != SCHEMA:
            raise ConfigError(refusal(path, report.get("schema"), SCHEMA, "evaluate again"))
        series[name] += [(r["nfe"], r["mean"]) for r in report["rows"] if r["nfe"] and r["captions"] == "heldout"]
    return {name: sorted(points) for name, points in series.items()}


def draw(series: Series) -> str:
    """The picture. The axis of evaluations is logarithmic."""
    counts = sorted({n for points in series.values() for n, _ in points})
    x = Axis(0.9, max(counts) * 1.1, LEFT, WIDTH - 150, log=True)
    y = Axis(0, 1, HEIGHT - BOTTOM, TOP)
    parts = frame(
        x, y, "evaluations of the velocity network", "share of images that show what was asked", lambda v: f"{v:g}",
        lambda v: f"{v:g}", counts,
    )  # fmt: skip
    heights = apart([y(points[-1][1]) + 4 for points in series.values()])
    for i, ((name, points), height) in enumerate(zip(series.items(), heights, strict=True)):
        parts.append(f'<g stroke="{(color := COLORS[i % len(COLORS)])}">')
        parts.append(line([(x(n), y(score)) for n, score in points], "series") + "</g>")
        parts.append(f'<g fill="{color}">' + "".join(dot(x(n), y(s), "", f"{name}, {n}: {s:.2f}") for n, s in points))
        parts.append("</g>" + text(x(points[-1][0]) + 9, height, f"{name} {points[-1][1]:.2f}"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    title = "Share of right images against evaluations"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</svg>\n"


def main(argv: Sequence[str]) -> int:
    """Entry of the command."""
    if len(argv) < 2 or not all("=" in pair for pair in argv[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    pairs = [(name, Path(path)) for name, path in (pair.split("=", 1) for pair in argv[1:])]
    write_text(Path(argv[0]), draw(read(pairs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
