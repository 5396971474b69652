"""Score against evaluations, from the JSON of `twinflow-rt eval`, as one SVG picture:

    python -m benches.score_plot scores.svg TwinFlow=twinflow.json "flow matching=flow.json" ...

A name may be given several files; their evaluations form one line. Held-out captions are drawn.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from twinflow_rt.checkpoint.atomic import write_text
from twinflow_rt.checkpoint.files import parse_json
from twinflow_rt.checkpoint.versions import refusal
from twinflow_rt.cli.eval import SCHEMA
from twinflow_rt.errors import ConfigError, extra_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[int, float]]]
LABEL = "held-out captions drawn right: mean share over the six kinds"
COLORS = ("#2563c9", "#b4541a", "#2f7d4f", "#8a4fa3", "#66655f")
PAGE, INK, GRID = "#fcfcfb", "#1c1c1a", "#e6e5e0"  # the page is drawn, too: GitHub shows pictures on dark and on light


def read(pairs: Sequence[tuple[str, Path]]) -> Series:
    """Return the sorted points (evaluations, mean score) of each name.

    pairs: (name, report's file). Raises ConfigError for other files.
    """
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


def draw(series: Series) -> Figure:
    """Return the picture. The axis of evaluations is logarithmic. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise extra_missing(f"plots need {error.name}", "report") from None
    figure = Figure((7.8, 4.2), layout="constrained", facecolor=PAGE)
    axes = figure.add_subplot(facecolor=PAGE)
    for (name, points), color in zip(series.items(), cycle(COLORS)):
        last, score = points[-1]
        axes.semilogx(*zip(*points, strict=True), color=color, marker="o", label=f"{name}: {score:.2f} at {last}")
    axes.set_ylim(0, 1)
    axes.set_xticks(sorted({n for points in series.values() for n, _ in points}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(length=0)
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("evaluations of the velocity network per image")
    axes.set_title(LABEL, loc="left", fontsize="medium", color=INK)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def write(figure: Figure, path: Path) -> Path:
    """Write `figure` as SVG, the same bytes for the same data, with its text as text."""
    from matplotlib import rc_context

    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scores"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)  # without a DTD that lies on the web
    return write_text(path, f'{head} role="img" aria-label="{LABEL}">{body}')


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    if len(argv) < 2 or not all("=" in pair for pair in argv[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    pairs = [(name, Path(path)) for name, path in (pair.split("=", 1) for pair in argv[1:])]
    write(draw(read(pairs)), Path(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
