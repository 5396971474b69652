"""Prints docs/api.md from the code: signatures and docstrings of what `twinflow_rt` exports, and the options of `load`.

    python docs/make_api.py > docs/api.md
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any

import twinflow_rt
from twinflow_rt.config import CALL_NAMES, LOAD_NAMES, METHODS
from twinflow_rt.export.runtime import Exported
from twinflow_rt.integrations.diffusers import Accelerated
from twinflow_rt.options import LoadOptions, table

INTRO = """# Public API

Printed from the code by `python docs/make_api.py`. Everything here is importable from `twinflow_rt`; importing the
package itself loads nothing heavy."""
LOADING = """Every command that loads a model takes the options as `--option`, and so does the server. `exempt` and
`text_exempt`, the old names of `skip_layers` and `text_skip_layers`, still work, with a `DeprecationWarning`. Names of
diffusers ([a table](#from-diffusers)) are taken where they mean the same; any other value is refused in a line that
says what to use. Integers, booleans, lists and paths may be numpy's, `range` or any path-like."""
DIFFUSERS = """## From diffusers

`DiffusionPipeline.from_pretrained(folder).to("cuda")` is `twinflow_rt.load(folder)`, and
`pipe(prompt, num_inference_steps=1).images[0]` the same call here. `twinflow_rt.accelerate(pipe)` speeds up a pipeline
that must stay diffusers'. Of diffusers' names, those with one here are taken as they are; the others are taken at
values that ask for nothing, and else refused with what the table says.

| diffusers | here |
|---|---|"""
PRESETS = """## `PRESETS`

Settings by name, read only: TwinFlow's released ones for 1, 2 and 4 evaluations, and those that `preset` starts
from:"""
RETURNED = {"accelerate": Accelerated, "load_exported": Exported}  # documented below what returns them
MORE = {  # pages that say more
    "Pipeline.plan": "stages.md", "Pipeline.set_loras": "models.md", "Pipeline.parallelize": "parallel.md",
    "accelerate": "serving.md#a-diffusers-pipeline", "export_model": "embedding.md", "load_exported": "embedding.md",
    "Pipeline.save": "reliability.md",
}  # fmt: skip
OPTIONS = [option.name for option in fields(LoadOptions)]
INSTANCES = {"Pipeline": "pipe", "PromptEmbeds": "embeds"}  # else the class in lower case
WIDTH = 116
NAME = r'"?[\w.]+"?(?: None|\([\w, ]+\))?'  # an argument, as docstrings write it before a colon
LABEL = re.compile(rf"^({NAME}(?:(?:, | or ){NAME})*): ")
SENTENCE = re.compile(rf"(?<=[.:]) (?=(?:{NAME}(?:(?:, | or ){NAME})*): |Raises )")



def main() -> str:
    """Return the page."""
    names = [name for name in twinflow_rt.__all__ if name not in ("__version__", "load", "LoadOptions", "PRESETS")]
    errors = [name for name in names if name.endswith("Error")]
    parts = [INTRO, *described("load", twinflow_rt.load, of_load=True), LOADING]
    parts += ["<!-- options -->\n" + table() + "\n<!-- end of options -->", *described("LoadOptions", LoadOptions)]
    for name in names:
        if name not in errors:
            parts += described(name, getattr(twinflow_rt, name))
        if name in RETURNED:
            parts += described(RETURNED[name].__name__, RETURNED[name])
    parts += [f"{PRESETS} " + ", ".join(f"`{name!r}`" for name in twinflow_rt.PRESETS) + "."]
    parts += ["## Errors", "\n".join(map(error, errors)), "\n".join([DIFFUSERS, *from_diffusers()])]
    return "\n\n".join(parts) + "\n"


def described(name: str, value: Any, of_load: bool = False) -> list[str]:
    """Return the parts of the page about a function, or about a class and its public members."""
    doc = inspect.getdoc(value) or ""
    if of_load:  # whose options the table has
        doc = re.sub(rf"^({'|'.join(OPTIONS)}): .*\n", "", doc, flags=re.MULTILINE)
    parts = [f"{'###' if '.' in name else '##'} `{name}`"]
    if callable(value) and not (inspect.isclass(value) and not is_dataclass(value)) and value is not LoadOptions:
        parts.append(f"```python\n{signature(name, value, of_load)}\n```")
    parts += [paragraph(text) for text in doc.split("\n\n") if text]
    if name in MORE:
        parts.append(f"More: [{MORE[name]}]({MORE[name]}).")
    members = vars(value) if inspect.isclass(value) and value is not LoadOptions else {}
    for member in sorted(members, key=lambda member: member != "__call__"):
        found = getattr(members[member], "__func__", members[member])
        if (member == "__call__" or member[0] != "_") and (inspect.isfunction(found) or isinstance(found, property)):
            parts += described(f"{name}.{member}", found)
    return parts


def signature(name: str, value: Any, of_load: bool) -> str:
    """Return a call's signature in lines of at most WIDTH characters."""
    found = inspect.signature(value)
    given = [p for p in found.parameters.values() if p.name not in ("self", "cls") and not p.name.startswith("_")]
    if of_load:
        given = [p for p in given if p.name not in OPTIONS]
    words: list[str] = []
    for before, p in zip([None, *given], given, strict=False):
        if p.kind is p.KEYWORD_ONLY and (before is None or before.kind is not p.KEYWORD_ONLY):
            words.append("*")
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        plain = p.default is None or isinstance(p.default, (bool, int, float, str, tuple))
        words.append(f"{text}: {p.annotation}" if p.annotation is not p.empty else text)
        words[-1] += "" if p.default is p.empty else f" = {p.default!r}" if plain else " = ..."
    words += ["**options"] if of_load else []
    of, _, method = name.rpartition(".")
    call = f"{INSTANCES.get(of, of.lower())}.{method}".removesuffix(".__call__").removeprefix(".")
    end = "" if inspect.isclass(value) or found.return_annotation is found.empty else f" -> {found.return_annotation}"
    lines = [f"{call}("]
    for i, word in enumerate(words):
        word += ")" + end if i == len(words) - 1 else ","
        if len(lines[-1]) + len(word) + 1 > WIDTH:
            lines.append("   ")
        lines[-1] += word if lines[-1].endswith("(") else f" {word}"
    return "\n".join(lines) if words else f"{call}(){end}"


def paragraph(text: str) -> str:
    """Return a docstring's paragraph: what it says of each argument becomes an item of a list."""
    lines = text.splitlines()
    apart = any(line.startswith(" ") for line in lines)  # where lines that go on are indented, the others begin anew
    told = ""
    for line in lines:
        told += ("\n" if apart and not line.startswith(" ") else " ") + line.strip()
    parts = [part for line in told.strip().splitlines() for part in SENTENCE.split(line)]
    items = [LABEL.sub(r"- `\1`: ", part.strip().replace("<", r"\<")) for part in parts]
    joined = ""
    for before, item in zip(["", *items], items, strict=False):
        joined += ("\n" if before[:1] == item[:1] == "-" else "\n\n" if before else "") + item
    return joined


def from_diffusers() -> list[str]:
    """Return the rows of the table, one for all of diffusers' names of which the same is to be said."""
    rows: dict[tuple[str, str], list[str]] = {}
    for where, known in (("from_pretrained", LOAD_NAMES), ("a call", CALL_NAMES)):
        for name, here in known.items():
            instead = ", ".join(filter(None, (f"`{here.name}=`" if here.name else "", here.instead)))
            if not here.old:
                rows.setdefault((f"of {where}: ", instead), []).append(f"`{name}=`")
    for name, instead in METHODS.items():
        rows.setdefault(("", instead), []).append(f"`pipe.{name}`")
    return [f"| {where}{', '.join(names)} | {instead} |" for (where, instead), names in rows.items()]


def error(name: str) -> str:
    """Return an item about an exception."""
    kind = getattr(twinflow_rt, name)
    bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
    return f"- `{name}` ({bases}): " + " ".join((inspect.getdoc(kind) or "").split())


if __name__ == "__main__":
    print(main(), end="")
