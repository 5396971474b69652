"""`twinflow-rt train demo`: the shipped miniature, trained from nothing."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from ..errors import require_extra
from ..options import LoadOptions
from ..options import add_arguments as add_options

RECIPES = ("cold", "flow", "rcgm", "twinflow")  # of training.demo, whose import takes seconds
STEPS = (
    "scenes", "autoencoder_steps", "text_steps", "flow_steps", "settle_steps", "samples", "warm_steps", "last_steps",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_subparsers(dest="trained", required=True, metavar="model")
    demo = models.add_parser("demo", help="the shipped miniature, on two CPU cores")
    demo.add_argument("--out", type=Path, default=Path("demo-run"), help="run folder; an interrupted run resumes")
    demo.add_argument("--recipe", choices=RECIPES, default="twinflow")
    demo.add_argument("--compile", action="store_true", help="torch.compile the network (needs a C++ compiler)")
    add_options(demo, LoadOptions, only=("device",))
    demo.add_argument("--seed", type=int, default=0)
    for name in STEPS:
        demo.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)


def run(args: argparse.Namespace) -> int:
    require_extra("training", "train", "diffusers", "transformers")
    from ..checkpoint.atomic import check_target
    from ..config import resolve_device
    from ..training import demo as trainer

    check_target(args.out, "--out", make_parents=True)
    names = {field.name for field in fields(trainer.Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    recipe = replace(trainer.RECIPES[args.recipe], **given)
    folder = trainer.train(
        args.out, recipe, lambda line: print(line, flush=True), args.compile, resolve_device(args.device)
    )
    print(f"wrote {folder}")
    return 0
