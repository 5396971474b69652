"""Which linear layers suffer from 8 or 4 bits: the error of one forward with one kind of layer quantized at a time.

    error = |F_quantized - F| / |F|      (2-norms over the velocity of one image, at t = 1)

Errors of single forwards decide, not the likeness of final images: sampling moves those for reasons
that have nothing to do with quality. Kinds act about independently, so that their errors add up as
squares, and `advise` leaves out the worst until the sum is within a budget (of 4 bits: gives them 8). What comes of
it is measured together, and timed beside the network as it is: see `precision` for what becomes of the measurement.

bf16 has no kinds of layers to leave out: the whole model is loaded in bfloat16 and compared with itself in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import Target
from ..passes.layer_groups import Group
from ..passes.layers import QuantizedLinear, linear_layers, quantized_layers
from ..passes.quantize import bind_quantized, layer_groups, quantizes, require
from ..passes.replace import replaced
from ..runtime.machine import device_name
from ..runtime.timer import Timer
from . import precision as precisions

PROMPT, SEED = "a photograph of a lighthouse in a storm at dusk", 0
# of a forward's error; e4m3 has 4 significant bits where int8 has up to 7 and bfloat16 8; weights of 4 bits are off by
# 0.09 of their size
BUDGETS = {"int8": 0.03, "fp8": 0.06, "int4": 0.1, "bf16": 0.03}
INSTEAD = {"int4": ":int8"}  # what becomes of layers too sensitive for a precision, as `skip_layers` writes it
ROUNDS = 7  # of timing, each of both


def measure(network: nn.Module, run: Callable[[], Tensor], precision: str = "int8") -> tuple[Group, ...]:
    """Return the groups of layers that `precision` would quantize, most sensitive first. run() evaluates `network`."""
    exact = run().double()
    found = []
    for name, layers in layer_groups(network, precision).items():
        with replaced(network, quantized_layers(layers, precision)):
            size = sum(layer.weight.numel() for layer in layers.values())
            found.append(Group(name, len(layers), size, _error(run(), exact)))
    return tuple(sorted(found, key=lambda group: -group.error))


def advise(found: Sequence[Group], budget: float) -> tuple[str, ...]:
    """Return the names of groups to skip, so that the errors of the others, added as squares, stay within `budget`."""
    kept = sorted(found, key=lambda group: group.error)
    skipped: list[str] = []
    while kept and math.sqrt(sum(group.error**2 for group in kept)) > budget:
        skipped.append(kept.pop().name)
    return tuple(skipped)


def of_pipeline(
    pipe: Any, precision: str = "int8", budget: float | None = None, rounds: int = ROUNDS
) -> precisions.Measurement:
    """Measure "int8", "fp8" or "int4" on one image of the default size of a pipeline loaded without quantized layers.

    budget: default `BUDGETS[precision]`. rounds: of timing. Raises ConfigError where layers are quantized
    already, or the device has no products of that precision.
    """
    _require_whole(pipe)
    require(precision, pipe.device, pipe.dtype)
    budget, network = BUDGETS[precision] if budget is None else budget, pipe.program.network
    with torch.inference_mode():
        run = _evaluation(pipe)
        found = measure(network, run, precision)
        skipped = tuple(name + INSTEAD.get(precision, "") for name in advise(found, budget))
        figures = _together(pipe, run, precision, skipped, rounds)
    return _measurement(pipe, precision, budget, skipped, found, *figures)


def of_bfloat16(
    pipe: Any, reload: Callable[[torch.dtype], Any], budget: float | None = None, rounds: int = ROUNDS
) -> precisions.Measurement:
    """Measure the whole model in bfloat16, which reload(dtype) loads, against `pipe` in float32; see `of_pipeline`."""
    _require_whole(pipe)
    if reason := precisions.refuses_bf16(pipe.device, pipe.dtype):
        raise ConfigError(f"precision bf16: {reason}")
    figures = _as_bfloat16(pipe, reload(torch.bfloat16), rounds)
    return _measurement(pipe, "bf16", BUDGETS["bf16"] if budget is None else budget, (), (), *figures)


def _require_whole(pipe: Any) -> None:
    if pipe.program.plan.precision is not None:
        raise ConfigError("sensitivity is measured from weights that are not quantized yet")


def _measurement(
    pipe: Any, precision: str, budget: float, skipped: tuple[str, ...], found: tuple[Group, ...], error: float,
    seconds: float, before: float,
) -> precisions.Measurement:  # fmt: skip
    return precisions.Measurement(
        precision=precision, family=pipe.program.plan.family, weights=precisions.fingerprint(pipe.source),
        device=device_name(pipe.device), torch=torch.__version__, dtype=pipe.program.plan.dtype,
        budget=budget, skip_layers=skipped, error=error, seconds=seconds, seconds_before=before, groups=found,
    )  # fmt: skip


def _evaluation(pipe: Any) -> Callable[[], Tensor]:
    """Return a function that evaluates a pipeline's network once, for `PROMPT` and the noise of `SEED`."""
    from ..sampling.noise import initial_noise

    height, width = pipe.sizes.resolve(None, None)
    network, scale = pipe.program.network, pipe.vae.scale
    given = pipe.text([PROMPT]).to(pipe.device, pipe.dtype)
    context = network.encode_context(given.embeds, given.lengths, **given.extras)
    noise = initial_noise([SEED], (pipe.vae.channels, height // scale, width // scale), pipe.dtype, pipe.device)
    return lambda: network(noise, network.step_modulation(0), context)


def _together(
    pipe: Any, run: Callable[[], Tensor], precision: str, skip_layers: Sequence[str], rounds: int
) -> tuple[float, float, float]:
    """Return the error with layers quantized as `load` does it, and median seconds so and as they are, in turns."""
    timer, network = Timer(pipe.device), pipe.program.network
    kinds = {n: quantizes(network, n, m, pipe.device, precision, skip_layers) for n, m in linear_layers(network)}
    quantized = {n: QuantizedLinear(network.get_submodule(n), kind) for n, kind in kinds.items() if kind is not None}
    target = Target.of_network(network.config, pipe.device, pipe.dtype)
    exact, after, before = run().double(), [], []
    for _ in range(rounds):
        before.append(timer(run))
        with replaced(network, quantized):
            bind_quantized(network, target)
            error = _error(run(), exact)  # which warms up, too
            after.append(timer(run))
        run()
    return error, median(after), median(before)


def _as_bfloat16(pipe: Any, other: Any, rounds: int) -> tuple[float, float, float]:
    """Return the error of `other`, the model in bfloat16, against `pipe`, prompt included, and median seconds of an
    evaluation of either, taken in turns."""
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
