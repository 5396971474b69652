"""OUT/*.json as one record, OUT/report.json, and one table, OUT/report.txt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODELS = ("z-image", "qwen-image")
KERNELS = ("checks", *(f"{kind}-{model}" for model in MODELS for kind in ("kernels", "layers", "rows")))
PARTS = ("kit", "env", *KERNELS, "z-image", "sd3.5-m", "sana", "qwen-image", "qwen-image-shallow",
         "z-image-fp8", "qwen-image-fp8", "z-image-int4", "qwen-image-int4")  # fmt: skip


def collect(out: Path) -> dict[str, Any]:
    """What the parts left; a part that did not run or was stopped while writing is absent or says so."""
    found: dict[str, Any] = {}
    for part in PARTS:
        path = out / f"{part}.json"
        if path.exists():
            try:
                found[part] = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                found[part] = {"unreadable": str(error)}
    return found


def kernels(record: dict[str, Any]) -> Table:
    """A row per case: the chosen implementation beside every other that was right."""
    table = Table(title="kernels: median time, share of this run's ceiling", title_justify="left")
    for column in ("size", "dtype", "case", "chosen", "time", "of ceiling", "others", "targets missed", "wrong"):
        table.add_column(column, overflow="fold")
    for case in record.get("cases", []):
        times, achieved, chosen = case.get("times", {}), case.get("achieved", {}), case["chosen"]
        others = sorted((t["median"], name) for name, t in times.items() if name != chosen)
        share = achieved.get(chosen, {}).get("share")
        table.add_row(
            case["size"], case["dtype"], case["case"], chosen,
            _time(times[chosen]["median"]) if chosen in times else "not timed",
            "" if share is None else f"{share:.0%}",
            ", ".join(f"{name} {_time(t)}" for t, name in others),
            ", ".join(name for name, met in case.get("targets", {}).items() if not met),
            "; ".join(f"{name}: {problem}" for name, problem in case["wrong"].items()),
        )  # fmt: skip
    return table


def outcomes(record: dict[str, Any]) -> Table:
    table = Table(title="parts", title_justify="left")
    for column in ("part", "status", "seconds", "reason"):
        table.add_column(column, overflow="fold")
    for name, outcome in record.items():
        dry = " (dry)" if outcome["dry"] else ""
        table.add_row(name, outcome["status"] + dry, f"{outcome['seconds']:.1f}", outcome["reason"] or "")
    return table


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def main(folder: str) -> int:
    out = Path(folder)
    found = collect(out)
    (out / "report.json").write_text(json.dumps(found, indent=1))
    with open(out / "report.txt", "w") as file:
        for console in (Console(width=160), Console(file=file, width=200)):
            machine = found.get("env", {}).get("machine", {})
            gpu = (machine.get("gpu") or {}).get("name", "no GPU")
            console.print(f"{gpu}; torch {machine.get('packages', {}).get('torch')}; commit {machine.get('commit')}")
            console.print(outcomes(found.get("kit", {})))
            for part in KERNELS:
                if part in found:
                    console.print(kernels(found[part]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
