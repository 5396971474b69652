"""Which linear layers suffer from 8 bits: the error of one forward with one kind of layer quantized at a time.

    error = |F_quantized - F| / |F|      (2-norms over the velocity of one image, at t = 1)

Errors of single forwards decide, not the likeness of final images: sampling moves those for reasons
that have nothing to do with quality. Kinds act about independently, so that their errors add up as
squares, and `advise` leaves out the worst until the sum is within a budget. What remains is measured
together, and timed beside the network as it is: see `precision` for what becomes of the measurement.

bf16 has no kinds of layers to leave out: the whole model is loaded in bfloat16 and compared with itself in float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.selection import Target
from ..passes.layer_groups import Group
from ..passes.quantize import Trial, attach, groups, require
from ..runtime.machine import device_name
from ..runtime.timer import Timer
from . import precision as precisions

PROMPT, SEED = "a photograph of a lighthouse in a storm at dusk", 0
# of a forward's error; e4m3 has 4 significant bits where int8 has up to 7 and bfloat16 8
BUDGETS = {"int8": 0.03, "fp8": 0.06, "bf16": 0.03}
ROUNDS = 7  # of timing, each of both


def measure(network: nn.Module, run: Callable[[], Tensor], precision: str = "int8") -> tuple[Group, ...]:
    """The groups that `precision` would quantize, most sensitive first. run(): one evaluation of `network`."""
    exact = run().double()
    found = []
    for name, layers in groups(network, precision).items():
        with Trial(layers, precision):
            found.append(Group(name, len(layers), sum(m.weight.numel() for m in layers), _error(run(), exact)))
    return tuple(sorted(found, key=lambda group: -group.error))


def advise(found: Sequence[Group], budget: float) -> tuple[str, ...]:
    """Names to exempt so that the errors of the others, added as squares, stay within `budget`."""
    kept = sorted(found, key=lambda group: group.error)
    exempt: list[str] = []
    while kept and math.sqrt(sum(group.error**2 for group in kept)) > budget:
        exempt.append(kept.pop().name)
    return tuple(exempt)


def of_pipeline(
    pipe: Any, precision: str = "int8", budget: float | None = None, rounds: int = ROUNDS
) -> precisions.Measurement:
    """Measures one image of the default size of a pipeline loaded without quantized layers, on its device.

    budget: default `BUDGETS[precision]`. rounds: of timing. Raises ConfigError where layers are quantized
    already, or the device has no products of that precision.
    """
    if pipe.program.plan.precision is not None:
        raise ConfigError("sensitivity is measured from weights that are not quantized yet")
    budget = BUDGETS[precision] if budget is None else budget
    if precision == "bf16":
        return _measurement(pipe, precision, budget, (), (), *_as_bfloat16(pipe, rounds))
    require(precision, pipe.device, pipe.dtype)
    network = pipe.program.network
    with torch.inference_mode():
        run = _evaluation(pipe)
        found = measure(network, run, precision)
        exempt = advise(found, budget)
        layers = [m for name, some in groups(network, precision).items() if name not in exempt for m in some]
        figures = _together(pipe, layers, run, precision, rounds)
    return _measurement(pipe, precision, budget, exempt, found, *figures)


def _measurement(
    pipe: Any, precision: str, budget: float, exempt: tuple[str, ...], found: tuple[Group, ...], error: float,
    seconds: float, before: float,
) -> precisions.Measurement:  # fmt: skip
    folder = pipe.folder / "transformer"
    return precisions.Measurement(
        precision=precision, family=pipe.program.plan.family, weights=precisions.fingerprint(folder),
        device=device_name(pipe.device), torch=torch.__version__, dtype=pipe.program.plan.dtype,
        budget=budget, exempt=exempt, error=error, seconds=seconds, seconds_before=before, groups=found,
    )  # fmt: skip


def _evaluation(pipe: Any) -> Callable[[], Tensor]:
    """One evaluation of a pipeline's network, of `PROMPT` and the noise of `SEED`."""
    from ..sampling.noise import initial_noise

    height, width = pipe.sizes.resolve(None, None)
    network, scale = pipe.program.network, pipe.vae.scale
    given = pipe.text([PROMPT]).to(pipe.device, pipe.dtype)
    context = network.encode_context(given.embeds, given.lengths, **given.extras)
    noise = initial_noise([SEED], (pipe.vae.channels, height // scale, width // scale), pipe.dtype, pipe.device)
    return lambda: network(noise, network.step_modulation(0), context)


def _together(
    pipe: Any, layers: Sequence[nn.Linear], run: Callable[[], Tensor], precision: str, rounds: int
) -> tuple[float, float, float]:
    """Error with all `layers` quantized, and median seconds so and as they are, taken in turns."""
    trial, timer, network = Trial(layers, precision), Timer(pipe.device), pipe.program.network
    target = Target.of_network(network.config, pipe.device, pipe.dtype)
    exact, after, before = run().double(), [], []
    for _ in range(rounds):
        before.append(timer(run))
        with trial:
            attach(network, target)
            error = _error(run(), exact)  # which warms up, too
            after.append(timer(run))
        run()
    return error, median(after), median(before)


def _as_bfloat16(pipe: Any, rounds: int) -> tuple[float, float, float]:
    """Error of the model in bfloat16 against `pipe`, prompt included, and median seconds of an evaluation so and as
    it is, taken in turns."""
    from ..loading import load

    if reason := precisions.refuses_bf16(pipe.device, pipe.dtype):
        raise ConfigError(f"precision bf16: {reason}")
    other = load(pipe.folder, device=pipe.device, dtype=torch.bfloat16, sampler=pipe.sampler)
    timer, after, before = Timer(pipe.device), [], []
    with torch.inference_mode():
        plain, short = _evaluation(pipe), _evaluation(other)
        error = _error(short(), plain().double())
        for _ in range(rounds):
            before.append(timer(plain))
            after.append(timer(short))
    return error, median(after), median(before)


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder (diffusers layout), or 'demo'")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: fits model and device")
    parser.add_argument("--precision", choices=precisions.MEASURED, help="default: fp8 on a GPU, int8 on a CPU")
    budgets = ", ".join(f"{name}: {budget:g}" for name, budget in BUDGETS.items())
    parser.add_argument("--budget", type=float, help=f"error of one forward to stay within (default {budgets})")
    parser.add_argument(
        "--save", nargs="?", const="", metavar="FILE",
        help="write the measurement to FILE, for load(..., exempt=FILE) and --exempt FILE; without FILE to the "
        "user's cache, where precision 'auto' finds it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the measurement as JSON")


def run(args: argparse.Namespace, pipe: Any) -> int:
    """Measures, prints the groups and what to exempt, and keeps it if asked to."""
    precision = args.precision or ("fp8" if pipe.device.type == "cuda" else "int8")
    found = of_pipeline(pipe, precision, args.budget)
    where = None if args.save is None else precisions.save(found, args.save or None)
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    for group in found.groups:
        print(f"{group}" + ("  exempt" if group.name in found.exempt else ""))
    names = ", ".join(f'"{name}"' for name in found.exempt)
    exempt = "" if precision == "bf16" else f", exempt=[{names}]"
    print(f'load(..., precision="{precision}"{exempt}): error {found.error:.2e} of at most {found.budget:g}')
    gain = found.seconds_before / found.seconds
    print(f"one evaluation {1e3 * found.seconds:.3g} ms, {gain:.2f}x as fast as {found.dtype} on {found.device}")
    if where is not None:
        print(f"wrote {where}")
    return 0
