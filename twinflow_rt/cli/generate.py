"""`twinflow-rt generate`: prompts to image files."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..checkpoint.image_files import grid, output_paths, save_image
from ..errors import ConfigError
from ..options import LoadOptions
from ..options import add_arguments as add_options
from .options import add_mode, add_model, add_on_oom, chosen_sampler, load_model, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="one or more prompts")
    parser.add_argument(
        "--prompt-embeds", type=Path, metavar="FILE", help="in place of prompts: embeddings that `encode` wrote"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("twinflow.png"), metavar="FILE",
        help="image file; several images become FILE-0, FILE-1, ... and FILE-grid (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="image k gets seed + k; default: random")
    parser.add_argument(
        "--size", type=parse_size, metavar="WxH",
        help="width x height in pixels, or one number for a square; default: the model's",
    )  # fmt: skip
    add_mode(parser)
    parser.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="images per prompt (default %(default)s)"
    )
    add_model(parser)
    add_options(parser, LoadOptions)
    add_on_oom(parser)
    parser.add_argument("--json", action="store_true", help="print files, seeds, seconds and bytes as JSON")


def run(args: argparse.Namespace) -> int:
    if bool(args.prompt) == (args.prompt_embeds is not None):
        raise ConfigError("give prompts, or a file of them encoded (--prompt-embeds), and not both")
    saved = None
    if args.prompt_embeds is not None:
        from ..stages.embeds_file import read

        saved = read(args.prompt_embeds)
    names = list(saved.names()) if saved is not None else args.prompt
    paths = output_paths(args.output, len(names) * args.num_images)
    from ..config import check_count, dtype_name

    check_count("num_images", args.num_images)
    start = time.perf_counter()
    width, height = args.size or (None, None)
    largest = (height, width, len(names) * args.num_images)
    pipe = load_model(args, nfe=None, sampler=chosen_sampler(args), largest=largest)
    load_seconds = time.perf_counter() - start
    given = args.prompt if saved is None else pipe.accept(saved, args.prompt_embeds)
    how = {"num_images": args.num_images, "preview": args.preview is not None, "on_oom": args.on_oom}
    result = pipe(given, width=width, height=height, seed=args.seed, **how)
    prompts, nfe = [p for p in names for _ in range(args.num_images)], len(pipe.program.schedule)
    loras = [str(lora) for lora in pipe.program.plan.loras]
    for path, image, prompt, seed in zip(paths, result.images, prompts, result.seeds, strict=False):
        facts = {"prompt": prompt, "seed": seed, "model": args.model, "nfe": nfe}
        save_image(image, path, facts | ({"loras": loras} if loras else {}))
    if len(result.images) > 1:
        save_image(grid(result.images, args.num_images if len(names) > 1 else None), paths[-1])
    report = {
        "files": [str(p) for p in paths],
        "seeds": result.seeds,
        "truncated": list(result.truncated),
        "size": list(result.images[0].size),
        "seconds": {"load": load_seconds, **result.timings},
        "peak_bytes": result.memory,
        "at_once": result.at_once,
        "device": str(pipe.device),
        "dtype": dtype_name(pipe.dtype),
    }
    print(json.dumps(report, indent=1) if args.json else summary(report))
    return 0


def summary(report: dict[str, Any]) -> str:
    """Return the report as text: a line per file, then time and memory."""
    seeds = [f" (seed {seed})" for seed in report["seeds"]]
    lines = [f"wrote {file}{seed}" for file, seed in zip(report["files"], [*seeds, ""], strict=False)]
    stages = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in report["seconds"].items())
    peak = max(report["peak_bytes"].values()) / 1e6
    return "\n".join([*lines, f"{report['device']} {report['dtype']}: {stages}; peak {peak:,.0f} MB"])
