"""Which linear layers suffer from int8: the error of one forward with one kind of layer quantized at a time.

    error = |F_quantized - F| / |F|      (2-norms over the velocity of one image, at t = 1)

Errors of single forwards decide, not the likeness of final images: sampling moves those for reasons
that have nothing to do with quality. Kinds act about independently, so that their errors add up as
squares, and `advise` leaves out the worst until the sum is within a budget.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .passes.quantize import groups, quantized

PROMPT, SEED = "a photograph of a lighthouse in a storm at dusk", 0
BUDGET = 0.03


@dataclass(frozen=True)
class Group:
    """Linear layers of one kind (block numbers dropped from their names) and the error of quantizing them alone."""

    name: str
    layers: int
    parameters: int
    error: float


def measure(network: nn.Module, run: Callable[[], Tensor]) -> tuple[Group, ...]:
    """The groups that int8 would quantize, most sensitive first. run(): one evaluation of `network`."""
    exact = run().double()
    found = []
    for name, layers in groups(network).items():
        with quantized(layers):
            error = float((run().double() - exact).norm() / exact.norm())
        found.append(Group(name, len(layers), sum(layer.weight.numel() for layer in layers), error))
    return tuple(sorted(found, key=lambda group: -group.error))


def advise(found: Sequence[Group], budget: float) -> tuple[str, ...]:
    """Names to exempt so that the errors of the others, added as squares, stay within `budget`."""
    kept = sorted(found, key=lambda group: group.error)
    exempt: list[str] = []
    while kept and math.sqrt(sum(group.error**2 for group in kept)) > budget:
        exempt.append(kept.pop().name)
    return tuple(exempt)


def of_pipeline(pipe: Any) -> tuple[Group, ...]:
    """`measure` on one image of the default size of a pipeline loaded on the CPU without int8.

    Raises ConfigError where int8 was loaded already.
    """
    from .noise import initial_noise

    if pipe.device.type != "cpu" or pipe.program.plan.precision is not None:
        raise ConfigError("sensitivity is measured on a CPU, from weights that are not quantized yet")
    height, width = pipe.sizes.resolve(None, None)
    network, scale = pipe.program.network, pipe.vae.scale
    with torch.inference_mode():
        given = pipe.text([PROMPT]).to(pipe.device, pipe.dtype)
        context = network.encode_context(given.embeds, given.lengths, **given.extras)
        shape = (pipe.vae.channels, height // scale, width // scale)
        noise = initial_noise([SEED], shape, pipe.dtype, pipe.device)
        return measure(network, lambda: network(noise, network.step_modulation(0), context))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder (diffusers layout), or 'demo'")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="error of one forward to stay within (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace, pipe: Any) -> int:
    """Prints the groups and what to exempt."""
    found = of_pipeline(pipe)
    exempt = advise(found, args.budget)
    if args.json:
        report = {"groups": [asdict(group) for group in found], "budget": args.budget, "exempt": exempt}
        print(json.dumps(report, indent=1))
        return 0
    for group in found:
        note = "  exempt" if group.name in exempt else ""
        print(f"{group.error:.2e}  {group.layers:>4} layers  {group.parameters / 1e6:>8,.2f}M  {group.name}{note}")
    names = ", ".join(f'"{name}"' for name in exempt)
    print(f'load(..., precision="int8", exempt=[{names}]) stays within {args.budget:g}')
    return 0
