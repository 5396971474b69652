"""`twinflow-rt encode`: prompts to a file of embeddings; only the text encoder is loaded."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteError
from ..options import LoadOptions, read_arguments
from ..options import add_arguments as add_options
from .options import add_model
from .progress import doing
from .prompt_file import FILES, read_rows

if TYPE_CHECKING:
    from ..stages.text import PromptEmbeds

BATCH = 16  # prompts encoded at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="prompts")
    parser.add_argument("--file", type=Path, metavar="FILE", help=f"more prompts; {FILES}")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("prompts.safetensors"), metavar="FILE",
        help="file to write (default %(default)s); generate takes it as --prompt-embeds",
    )  # fmt: skip
    add_model(parser)
    add_options(parser, LoadOptions, only=(
        "base", "files", "device", "dtype", "text_precision", "text_skip_layers", "check_finite", "download"
    ))
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Encode the prompts of `args` and print what that took."""
    from ..checkpoint.atomic import check_target
    from ..config import resolve_prompts
    from ..stages.embeds_file import write

    rows = [] if args.file is None else read_rows(args.file)
    prompts = resolve_prompts([*args.prompt, *(row["prompt"] for row in rows)])
    check_target(args.output, "--output")
    began = time.perf_counter()
    options = read_arguments(args, LoadOptions)
    with doing(f"encoding {len(prompts)} prompts") as tell:
        tell(f"loading {args.model}'s text encoder")
        family, text = open_text(args.model, options)
        loaded = time.perf_counter()
        tell("text encoder loaded")
        embeds = encode(text, prompts)
    if options.check_finite and not all(x.isfinite().all() for x in (embeds.embeds, *embeds.extras.values())):
        raise NonFiniteError("these prompts become NaN or infinity, and black images: try --dtype float32")
    write(args.output, embeds, model=args.model, family=family, text=text, prompts=prompts)
    report: dict[str, Any] = {
        "file": str(args.output), "prompts": len(prompts), "tokens": list(embeds.lengths),
        "truncated": list(embeds.truncated),
        "bytes": args.output.stat().st_size,
        "seconds": {"load": loaded - began, "encode": time.perf_counter() - loaded},
    }  # fmt: skip
    size, seconds = report["bytes"] / 1e6, report["seconds"]["encode"]
    line = f"wrote {args.output}: {len(prompts)} prompts, {sum(embeds.lengths)} tokens, {size:,.2f} MB; {seconds:.2f} s"
    print(json.dumps(report, indent=1) if args.json else line)
    return 0


def open_text(model: str | Path, options: LoadOptions) -> tuple[str, Any]:
    """Return a model's family and its text stage, loaded; of the other parts configs and headers are read."""
    import torch

    from ..checkpoint.checkpoint import Checkpoint
    from ..config import resolve_device, resolve_dtype
    from ..families import family_of
    from ..loading import open_model
    from ..stages.stage import StageOptions

    (folder, files), target = open_model(model, options), resolve_device(options.device)
    transformer = Checkpoint.of_part(folder / "transformer", files, quantized=True)
    family = family_of(transformer.config)
    text, _, _ = family.open(folder, transformer.config, files)
    with torch.no_grad():
        dtype = resolve_dtype(options.dtype, target, transformer.main_dtype())
        precision, skip_layers = options.text_precision, tuple(options.text_skip_layers)
        text.require_precision(precision, skip_layers, target, dtype)
        text.materialize(target, dtype, StageOptions(precision=precision, skip_layers=skip_layers))
    return family.name, text


def encode(text: Any, prompts: Sequence[str]) -> PromptEmbeds:
    """Return the embeddings of any number of prompts, `BATCH` at a time, in one tensor padded with zeros."""
    import torch
    import torch.nn.functional as F

    from ..stages.text import PromptEmbeds

    with torch.inference_mode():
        made = [text(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        longest = max(m.embeds.shape[1] for m in made)
        embeds = torch.cat([F.pad(m.embeds, (0, 0, 0, longest - m.embeds.shape[1])) for m in made])
        extras = {name: torch.cat([m.extras[name] for m in made]) for name in made[0].extras}
    lengths, truncated = (tuple(one for m in made for one in getattr(m, name)) for name in ("lengths", "truncated"))
    return PromptEmbeds(embeds, lengths, extras, truncated)
