"""`twinflow-rt eval`: how often a program finds in a model's images what their prompts asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import require_extra
from ..options import LoadOptions
from ..options import add_arguments as add_options
from .options import add_mode, add_model, load_model
from .progress import doing

if TYPE_CHECKING:
    from ..evaluate.check import Scores
    from ..evaluate.generator import Generator
    from ..training.scenes import Split

SCHEMA = 1  # of the report
SPLITS: tuple[Split, ...] = ("train", "heldout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_options(parser, LoadOptions, skip=("nfe", "preview"))
    parser.add_argument("--nfe", type=int, nargs="+", default=[1], metavar="N", help="evaluations per image to compare")
    add_mode(parser)
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance, for plain flow models"
    )
    parser.add_argument("--per-kind", type=int, default=50, metavar="N", help="captions per kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the captions; image k starts from noise seed k")
    parser.add_argument("--diversity", action="store_true", help="also compare the images of one prompt")
    parser.add_argument(
        "--data", action="store_true", help="first score the data itself, drawn and through the VAE (extra: train)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write prompts, images and verdicts as one picture")
    parser.add_argument("--confusion", action="store_true", help="also print what was shown where another was asked")
    parser.add_argument("--json", action="store_true", help="print scores as JSON, with the confusions")


def run(args: argparse.Namespace) -> int:
    """Score the model at every asked-for number of evaluations and print one line each."""
    require_extra("eval", "eval", "scipy")
    if args.data:
        require_extra("--data", "train", "diffusers", "transformers")
    from ..checkpoint.image_files import check_image_path
    from ..config import dtype_name
    from ..evaluate.generator import BATCH, Generator
    from ..sampling.schedule import preset

    if args.sheet is not None:
        check_image_path(args.sheet, "--sheet")
    samplers = {nfe: preset(nfe, args.mode) for nfe in args.nfe}
    pipe = load_model(args, nfe=None, largest=(None, None, BATCH))
    if args.mode is None:
        samplers = {nfe: pipe.sampler_of(nfe, None, pipe.sizes.resolve(None, None)) for nfe in args.nfe}
    generators = {nfe: Generator(pipe, sampler, args.guidance) for nfe, sampler in samplers.items()}
    rows: list[dict[str, Any]] = []
    with doing(f"scoring {args.model}") as tell:
        for row, scores in scored(pipe, generators, args, tell):
            rows.append(row)
            if not args.json:
                print(_line(row, header=len(rows) == 1), flush=True)
                if args.confusion:
                    print(_confusions(scores), flush=True)
                if "diversity" in row:
                    spread = row["diversity"], row["diversity_of_data"]
                    print("     pairwise distance {:.1f}, of the data {:.1f}".format(*spread), flush=True)
        if args.sheet is not None:
            tell("drawing the sheet")
            sheet(generators[args.nfe[0]], args.sheet)
    if args.json:
        report = {
            "schema": SCHEMA, "model": args.model, "dtype": dtype_name(pipe.dtype),
            "precision": pipe.program.plan.precision, "skip_layers": list(pipe.program.plan.skip_layers),
            "mode": args.mode, "guidance": args.guidance, "seed": args.seed, "rows": rows,
        }  # fmt: skip
        print(json.dumps(report, indent=1))
    return 0


def scored(
    pipe: Any, generators: dict[int, Generator], args: argparse.Namespace, tell: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], Scores]]:
    """Yield a row of the report, and the scores it was made of, for the data if asked for and each way to sample."""
    from ..evaluate.check import examine
    from ..evaluate.data import score_data
    from ..evaluate.diversity import diversity

    def row(nfe: int, captions: str, scores: Scores, **more: float) -> tuple[dict[str, Any], Scores]:
        confusion = {what: [[*pair, n] for pair, n in counts.items()] for what, counts in scores.confusion.items()}
        figures = {"images": scores.images, "mean": scores.mean, **scores.per_kind}
        return {"nfe": nfe, "captions": captions, **figures, "confusion": confusion, **more}, scores

    if args.data:
        tell("the data itself")
        for kind, scores in score_data(pipe.folder / "vae", args.per_kind, args.seed).items():
            yield row(0, kind, scores)
    for nfe, generate in generators.items():
        for split in SPLITS:
            tell(f"{nfe} evaluation(s), {split} captions")
            scores, spread = examine(generate, args.per_kind, split, args.seed), {}
            if args.diversity and split == SPLITS[-1]:
                spread = dict(zip(("diversity", "diversity_of_data"), diversity(generate, seed=args.seed), strict=True))
            yield row(nfe, split, scores, **spread)


def sheet(generate: Generator, path: Path, columns: int = 6) -> None:
    """Write one row of prompts, images and verdicts per kind."""
    from ..checkpoint.image_files import save_image
    from ..evaluate.sheet import contact_sheet
    from ..training.scenes import KINDS, prompts

    scenes = [s for kind in KINDS for s in prompts(kind, columns, "train", seed=1)]
    image = contact_sheet(list(generate([s.caption for s in scenes])), scenes, columns=columns)
    save_image(image, path)


def _line(row: dict[str, Any], header: bool) -> str:
    from ..training.scenes import KINDS

    names = ("mean", *KINDS)
    line = f"{row['nfe']:>4} {row['captions']:<8}" + "".join(f"{row[n]:>12.3f}" for n in names)
    return f"{'nfe':>4} {'captions':<8}" + "".join(f"{n:>12}" for n in names) + "\n" + line if header else line


def _confusions(scores: Scores) -> str:
    """Return one line for each thing that was asked for, with what was found instead, most often first."""
    lines = []
    for of, counts in scores.confusion.items():
        for asked in sorted({str(a) for a, _ in counts}):
            shown = {s: n for (a, s), n in counts.items() if str(a) == asked}
            ranked = sorted(shown.items(), key=lambda pair: -pair[1])
            lines.append(f"     {of} {asked}: " + ", ".join(f"{'nothing' if s is None else s} {n}" for s, n in ranked))
    return "\n".join(lines)
