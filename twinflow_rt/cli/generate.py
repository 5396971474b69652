"""`twinflow-rt generate`: prompts to image files."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.image_files import grid, output_paths, save_image
from ..errors import ConfigError
from ..options import GuidanceOptions, LoadOptions, read_arguments
from ..options import add_arguments as add_options
from .options import add_mode, add_model, add_on_oom, chosen_sampler, load_model, parse_size
from .progress import counting


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
    add_options(parser, GuidanceOptions)
    parser.add_argument(
        "--image", action="append", metavar="FILE",
        help="picture to start from, which gives the default size; several times: one for each prompt",
    )  # fmt: skip
    parser.add_argument("--mask", action="append", metavar="FILE", help="of an image's size: white is painted anew")
    parser.add_argument(
        "--strength", type=float, help="how far from the picture, above 0 and up to 1 (default 0.6; docs/editing.md)"
    )
    parser.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="images per prompt (default %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="images made together, and then written (default 4)"
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
    from ..config import check_count, dtype_name, resolve_prompts
    from ..sampling.noise import resolve_seeds
    from ..stages.image_input import read_pictures, resolve_strength

    check_count("num_images", args.num_images)
    check_count("batch_size", args.batch_size)
    resolve_prompts(names)
    resolve_strength(args.image, args.mask, args.strength)
    pictures = {k: read_pictures(k, v) for k, v in (("image", args.image), ("mask", args.mask)) if v is not None}
    if strange := [k for k, v in pictures.items() if len(v) not in (1, len(names))]:
        raise ConfigError(f"--{strange[0]}: give one file for all prompts, or one for each of {len(names)}")
    seeds = resolve_seeds(args.seed, len(names) * args.num_images)
    start = time.perf_counter()
    width, height = args.size or (None, None)
    largest = (height, width, min(len(seeds), args.batch_size))
    pipe = load_model(args, **chosen_sampler(args), largest=largest)
    load_seconds = time.perf_counter() - start
    given = args.prompt if saved is None else pipe.accept(saved, args.prompt_embeds)
    facts: dict[str, Any] = {"model": args.model, "nfe": len(pipe.program.schedule)}
    if loras := [str(lora) for lora in pipe.program.plan.loras]:
        facts["loras"] = loras
    facts |= {k: v for k in ("image", "mask", "strength") if (v := getattr(args, k)) is not None}
    facts |= read_arguments(args, GuidanceOptions).given()
    images: list[Any] = []
    calls = []
    for result in paint(pipe, given, seeds, args, pictures):
        for image, seed in zip(result.images, result.seeds, strict=True):
            path, prompt = paths[len(images)], names[len(images) // args.num_images]
            save_image(image, path, {"prompt": prompt, "seed": seed, **facts})
            images.append(image)
            if not args.json:
                print(f"wrote {path} (seed {seed})", flush=True)
        calls.append(result)
    if len(images) > 1:
        save_image(grid(images, args.num_images if len(names) > 1 else None), paths[-1])
    report = {
        "files": [str(p) for p in paths],
        "seeds": seeds,
        "truncated": [cut for call in calls for cut in call.truncated],
        "size": list(images[0].size),
        "seconds": {"load": load_seconds, **{k: sum(c.timings[k] for c in calls) for k in calls[0].timings}},
        "peak_bytes": {k: max(c.memory[k] for c in calls) for k in calls[0].memory},
        "at_once": max(c.at_once for c in calls),
        "device": str(pipe.device),
        "dtype": dtype_name(pipe.dtype),
        "precision": pipe.program.plan.arithmetic,
    }
    print(json.dumps(report, indent=1) if args.json else summary(report))
    return 0


def paint(
    pipe: Any, prompts: Any, seeds: list[int], args: argparse.Namespace, pictures: dict[str, list[Any]]
) -> Iterator[Any]:
    """Yield the results of calls of at most --batch-size images, and say how far they are. pictures: image and mask,
    one for all prompts or one for each."""
    width, height = args.size or (None, None)
    how = {"width": width, "height": height, "preview": args.preview is not None, "on_oom": args.on_oom}
    how |= {"strength": args.strength, **read_arguments(args, GuidanceOptions).given()}
    evaluations = len(pipe.program.schedule)
    with counting(f"making {len(seeds)} image{'s' * (len(seeds) > 1)}", len(seeds)) as advance:
        if evaluations > 1:  # one is over at once, and has kernels that go on to the decoder
            how["callback"] = lambda done, total, x0: advance(0, f"evaluation {done} of {total}")
        for part, repeats in calls_of(len(seeds) // args.num_images, args.num_images, args.batch_size):
            some = [prompts[i] for i in part] if isinstance(prompts, list) else prompts.select(part)
            count = len(part) * repeats
            own = {name: each if len(each) == 1 else [each[i] for i in part] for name, each in pictures.items()}
            yield pipe(some, num_images=repeats, seed=seeds[:count], **how, **own)
            seeds = seeds[count:]
            advance(count)


def calls_of(prompts: int, repeats: int, most: int) -> list[tuple[range, int]]:
    """Return calls of at most `most` images that make `repeats` of each prompt, in order: (prompts, images of each)."""
    if repeats <= most:
        step = most // repeats
        return [(range(i, min(i + step, prompts)), repeats) for i in range(0, prompts, step)]
    parts = [min(most, repeats - made) for made in range(0, repeats, most)]
    return [(range(i, i + 1), part) for i in range(prompts) for part in parts]


def summary(report: dict[str, Any]) -> str:
    """Return the report as text: the sheet's file, then time and memory."""
    files, made = report["files"], len(report["seeds"])
    stages = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in report["seconds"].items())
    peak = max(report["peak_bytes"].values()) / 1e6
    lines = [f"wrote {file}" for file in files[made:]]
    return "\n".join([*lines, f"{report['precision']}, on {report['device']}: {stages}; peak {peak:,.0f} MB"])
