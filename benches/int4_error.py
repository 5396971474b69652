"""What 4-bit weights cost, per way to make them: errors of one forward, weight bits, and the miniature's score.

    python -m benches.int4_error --json benches/records/int4-cpu.json [--per-kind 500] [--groups 64] [--only NAME ...]

Every way is tried on two networks, its groups 64 and 128 inputs wide, with plain rows (W4A16) and with rows of int8
(W4A8); the error is |F_quantized - F| / |F| of the velocity.

    miniature    the shipped model on 24 captions, all layers of its blocks: root mean square over eight random orders
                 of each layer's inputs, for so small a network has good and bad luck with its groups. Widths that are
                 no multiple of a group (144 is none) are filled up with zeros, which the product does not do
    full width   one block of Z-Image (3840 wide) with random weights that have outliers, see `fill`

--per-kind N: also the miniature's score over 6 N held-out captions, as `twinflow-rt eval` counts (groups of 64, W4A8).
Writes its rows into "quality" of FILE, whose other rows and entries stay.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinflow_rt.checkpoint.atomic import write_json
from twinflow_rt.checkpoint.files import read_json
from twinflow_rt.evaluate.check import examine
from twinflow_rt.evaluate.generator import Generator
from twinflow_rt.families import family_of
from twinflow_rt.loading import load
from twinflow_rt.models.transformers.z_image import ZImageConfig
from twinflow_rt.ops import Target, select
from twinflow_rt.ops.int4 import dense, quantize_int4
from twinflow_rt.ops.linear import quantize_rows
from twinflow_rt.passes.layers import dense_weight
from twinflow_rt.passes.quantize import layer_groups
from twinflow_rt.passes.replace import replaced
from twinflow_rt.sampling.noise import initial_noise
from twinflow_rt.sampling.schedule import preset
from twinflow_rt.training.scenes import KINDS, prompts

GROUPS = (64, 128)
ORDERS = 8  # of the miniature's inputs
CAPTIONS = 4  # of each kind
RANKS, OF_WIDTH = (16, 32), 3840  # of the low-rank branch; narrower layers have a smaller one in proportion
ROTATED = 128  # inputs that a Hadamard matrix mixes at most
SMALLEST = 1e-12
Quantize = Callable[[Tensor, int], Tensor]  # weight [N, K], group -> what its codes stand for


def nearest(weight: Tensor, group: int) -> Tensor:
    """The largest magnitude of a group is code 7 or -7."""
    x = weight.unflatten(-1, (-1, group))
    step = (x.abs().amax(-1, keepdim=True) / 7).clamp_min(SMALLEST)
    made: Tensor = (x / step).round_().clamp_(-8, 7) * step
    return made.flatten(-2)


def least_squares(weight: Tensor, group: int) -> Tensor:
    """What precision "int4" does."""
    return dense(quantize_int4(weight, group))


def by_rows(quantize: Quantize) -> Quantize:
    """Return `quantize` for a few rows at a time, which stay in the processor's cache."""

    def run(weight: Tensor, group: int) -> Tensor:
        return torch.cat([quantize(part, group) for part in weight.split(max((1 << 17) // weight.shape[1], 1))])

    return run


@by_rows
def with_minimums(weight: Tensor, group: int) -> Tensor:
    """Step and minimum of least squares for the codes of several shrunken ranges, the best of them."""
    x = weight.unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    kept, least = torch.zeros_like(x), torch.full_like(low, math.inf)
    for share in (0.8, 0.85, 0.9, 0.95, 1.0):
        step = ((high - low) * share / 15).clamp_min(SMALLEST)
        low_end = (low + high) / 2 - 7.5 * step
        for _ in range(2):
            codes = ((x - low_end) / step).round_().clamp_(0, 15)
            spread = codes - codes.mean(-1, keepdim=True)
            step = (spread * x).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp_min(SMALLEST)
            step = step.clamp_min(SMALLEST)
            low_end = (x - codes * step).mean(-1, keepdim=True)
        made = ((x - low_end) / step).round_().clamp_(0, 15) * step + low_end
        left = (made - x).square().sum(-1, keepdim=True)
        kept, least = torch.where(left < least, made, kept), torch.minimum(left, least)
    return kept.flatten(-2)


@by_rows
def half_quadratic(weight: Tensor, group: int) -> Tensor:
    """Zero points that leave the least |error|^p, by half-quadratic splitting with soft thresholds (HQQ: Badri and
    Shaji, 2023); the steps are those of the whole range."""
    x = weight.unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(SMALLEST)
    x, zero = x / step, -low / step
    best, least, p, beta = zero, math.inf, 0.7, 10.0
    for _ in range(20):
        codes = (x + zero).round_().clamp_(0, 15)
        error = (x - codes + zero) * step
        if (found := float(error.abs().mean())) < least:
            best, least = zero, found
        shrunk = error.sign() * (error.abs() - (error.abs() + 1e-12).pow(p - 1) / beta).clamp_min(0)
        zero = (codes - x + shrunk / step).mean(-1, keepdim=True)
        beta *= 1.01
    made: Tensor = ((x + best).round_().clamp_(0, 15) - best) * step
    return made.flatten(-2)


def low_rank(weight: Tensor, group: int, rank: int) -> Tensor:
    """The largest singular vectors are kept beside the codes of what they leave (SVDQuant, arXiv 2411.05007)."""
    rank = rank_of(weight, rank)
    u, s, v = torch.svd_lowrank(weight, rank + 8, niter=2)
    kept = (u * s)[:, :rank] @ v[:, :rank].t()
    return kept + least_squares(weight - kept, group)


def rank_of(weight: Tensor, rank: int) -> int:
    return math.ceil(rank * min(weight.shape) / OF_WIDTH)


def hadamard(width: int) -> Tensor:
    """The orthonormal Hadamard matrix of the largest power of two, up to `ROTATED`, that divides `width`."""
    matrix = torch.ones(1, 1)
    while len(matrix) < min(width & -width, ROTATED):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / math.sqrt(2)
    return matrix


@dataclass(frozen=True)
class Way:
    """A way to make 4-bit weights. values: numbers of 16 bits that a group keeps; rotates: whether inputs are mixed by
    a Hadamard matrix before they are quantized; rank: of the low-rank factors, of 16 bits; 0: none."""

    quantize: Quantize
    values: int = 1
    rotates: bool = False
    rank: int = 0

    def bits(self, weight: Tensor, group: int) -> float:
        """Bits per weight, scales and factors included; what fills a group up is not counted."""
        factors = 16 * rank_of(weight, self.rank) * sum(weight.shape) / weight.numel()
        return 4 + 16 * self.values / group + factors


WAYS = {
    "round to nearest": Way(nearest),
    "least squares": Way(least_squares),
    "least squares, minimums": Way(with_minimums, values=2),
    "half-quadratic, minimums": Way(half_quadratic, values=2),
    "Hadamard, least squares": Way(least_squares, rotates=True),
} | {f"rank {rank}, least squares": Way(partial(low_rank, rank=rank), rank=rank) for rank in RANKS}


class Emulated(nn.Linear):
    """A layer that multiplies a quantized weight in float32. eight_bits: by rows that are rounded to int8."""

    def __init__(self, layer: nn.Linear, weight: Tensor, mix: Tensor | None, eight_bits: bool) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        self.mix, self.eight_bits = mix, eight_bits

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.mix is None else mixed(x, self.mix)
        if self.eight_bits:
            values, scales = quantize_rows(x, torch.int8)
            x = values * scales
        return F.linear(x, self.weight, self.bias)


def mixed(x: Tensor, mix: Tensor) -> Tensor:
    parts: Tensor = x.unflatten(-1, (-1, len(mix)))
    return (parts @ mix).flatten(-2)


def quantized(layer: nn.Linear, way: Way, group: int, order: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight that a layer's codes stand for, and what mixes its inputs. order: of inputs in groups."""
    weight, width = dense_weight(layer).float(), layer.in_features
    mix = hadamard(width) if way.rotates else None
    weight = weight if mix is None else mixed(weight, mix)
    made = torch.empty_like(weight)
    made[:, order] = way.quantize(F.pad(weight[:, order], (0, -width % group)), group)[:, :width]
    return made, mix


@dataclass(frozen=True)
class Measured:
    """A network in float32, the layers that would be quantized, and what evaluates it."""

    network: nn.Module
    run: Callable[[], Tensor]
    layers: Mapping[str, nn.Linear]
    exact: Tensor

    @classmethod
    def of(cls, network: nn.Module, run: Callable[[], Tensor]) -> Measured:
        layers = {name: layer for some in layer_groups(network, "int8").values() for name, layer in some.items()}
        return cls(network, run, layers, run().double())

    def errors(self, way: Way, group: int, orders: int = 0) -> tuple[float, float]:
        """Return the root mean square errors of W4A16 and of W4A8 over random orders of inputs, or over none."""
        squares = []
        for seed in range(max(orders, 1)):
            random = torch.Generator().manual_seed(seed)
            mix = partial(torch.randperm, generator=random) if orders else torch.arange
            made = {n: quantized(layer, way, group, mix(layer.in_features)) for n, layer in self.layers.items()}
            squares.append([self._error(made, eight_bits) ** 2 for eight_bits in (False, True)])
        plain, eight = torch.tensor(squares).mean(0).sqrt().tolist()
        return plain, eight

    def int8(self) -> float:
        """Return the error of precision "int8" on a CPU with VNNI or a GPU."""
        made = {}
        for name, layer in self.layers.items():
            values, scales = quantize_rows(dense_weight(layer), torch.int8)
            made[name] = (values * scales, None)
        return self._error(made, True)

    def _error(self, made: Mapping[str, tuple[Tensor, Tensor | None]], eight_bits: bool) -> float:
        with self.with_weights(made, eight_bits):
            return float((self.run().double() - self.exact).norm() / self.exact.norm())

    def with_weights(self, made: Mapping[str, tuple[Tensor, Tensor | None]], eight_bits: bool) -> Any:
        return replaced(self.network, {n: Emulated(self.layers[n], *how, eight_bits) for n, how in made.items()})


def miniature(pipe: Any) -> Measured:
    """Return the shipped model on some held-out captions."""
    captions = [scene.caption for kind in KINDS for scene in prompts(kind, CAPTIONS, "heldout", 0)]
    network, given = pipe.program.network, pipe.text(captions)
    context = network.encode_context(given.embeds, given.lengths, **given.extras)
    height, width = (side // pipe.vae.scale for side in pipe.sizes.resolve(None, None))
    noise = initial_noise(list(range(len(captions))), (pipe.vae.channels, height, width), pipe.dtype, pipe.device)
    return Measured.of(network, lambda: network(noise, network.step_modulation(0), context))


def full_width() -> Measured:
    """Return a network of one block of Z-Image's width, for one image of 64 tokens and a prompt of 32."""
    config = ZImageConfig(n_layers=1, n_refiner_layers=0, cap_feat_dim=256)
    family = family_of({"_class_name": ZImageConfig.class_name})
    network = family.build(config, folded_steps=1).to_empty(device="cpu").eval()
    random = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        fill(name, tensor, random)
    network.ops, _ = select(Target.of_network(config, torch.device("cpu"), torch.float32))
    context = network.encode_context(torch.randn((1, 32, 256), generator=random), [32])
    noise = torch.randn((1, 16, 16, 16), generator=random)
    return Measured.of(network, lambda: network(noise, network.step_modulation(0), context))


def fill(name: str, tensor: Tensor, random: torch.Generator) -> None:
    """Fill with random values of a trained layer's kind: rows and columns of different sizes, 6 % of the energy in 1 %
    of the singular vectors, as in the miniature's layers and a published sentence encoder's; and outliers beyond those
    of both: one column of 300 is four times as large (kurtosis 9, where they have 3 to 8).

    Norm weights vary as the miniature's; 4 channels of tokens are 50 times the others, and their norm weights small.
    """
    normal = partial(torch.randn, generator=random)
    if tensor.ndim < 2 or "norm_table" in name or "pad_token" in name:
        tensor.copy_((0.5 * normal(tensor.shape)).exp())
        if "norm_table" in name:
            tensor[..., :4] *= 0.1
        return
    rows, columns = tensor.shape
    tensor.copy_(normal(rows, columns))
    tensor *= (0.3 * normal(rows, 1)).exp() * (0.25 * normal(columns)).exp()
    tensor[:, torch.randperm(columns, generator=random)[: columns // 300]] *= 4
    rank = max(min(rows, columns) // 100, 1)
    tensor += normal(rows, rank) @ normal(rank, columns) * math.sqrt(0.06 / rank)
    tensor /= math.sqrt(columns)
    if "x_embedder" in name or "cap_embedder" in name:
        tensor[:4] *= 50


def table(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each way and group, and first those of what is not quantized to 4 bits."""
    pipe = load("demo", device="cpu", dtype="float32", capture="off", prompt_cache=1 << 30)
    small, wide, generate = miniature(pipe), full_width(), Generator(pipe, preset(1))

    def score(weights: Mapping[str, Any] | None = None) -> dict[str, float]:
        if not args.per_kind:
            return {}
        with small.with_weights(weights or {}, True):
            return {"score": examine(generate, args.per_kind, "heldout").mean, "captions": 6.0 * args.per_kind}

    if not args.only:
        yield {"way": "float32", "bits": 32.0, **score()}
        yield {"way": "int8", "bits": 8.0, "miniature_w8a8": small.int8(), "full_width_w8a8": wide.int8()}
    for group in args.groups:
        for name in args.only or WAYS:
            way, row = WAYS[name], {"way": name, "group": group}
            for network, measured, orders in (("miniature", small, ORDERS), ("full_width", wide, 0)):
                errors, weight = measured.errors(way, group, orders), max(measured.layers.values(), key=size).weight
                row |= {f"{network}_w4a16": errors[0], f"{network}_w4a8": errors[1]}
            row["bits"] = way.bits(weight, group)
            if group == GROUPS[0]:
                as_is = {
                    n: quantized(layer, way, group, torch.arange(layer.in_features))
                    for n, layer in small.layers.items()
                }
                row |= score(as_is)
            yield row


def size(layer: nn.Linear) -> int:
    return layer.weight.numel()


def seconds_for(parameters: float = 20e9) -> float:
    """Return the seconds of one core in which `quantize_int4` makes the weights of a model of so many parameters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = torch.randn(2048, 3840, dtype=torch.bfloat16)
    start = time.process_time()
    quantize_int4(weight, GROUPS[0])
    torch.set_num_threads(threads)
    return (time.process_time() - start) * parameters / weight.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--per-kind", type=int, default=0, metavar="N")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, choices=GROUPS)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), metavar="NAME")
    args = parser.parse_args()
    record: dict[str, Any] = read_json(args.json) if args.json and args.json.exists() else {"schema": 1}
    quality = record.setdefault("quality", {"torch": torch.__version__, "rows": []})
    rows = {(row["way"], row.get("group")): row for row in quality["rows"]}
    with torch.inference_mode():
        quality["minutes_for_20e9"] = seconds_for() / 60
        print(f"20 billion parameters quantized in {quality['minutes_for_20e9']:.1f} minutes of one core")
        for row in table(args):
            rows[row["way"], row.get("group")] = row
            figures = (f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
            print(f"{row['way']:<25} {row.get('group', ''):>4}  " + "  ".join(figures), flush=True)
            quality["rows"] = list(rows.values())
            if args.json is not None:  # row by row: all of them take an hour
                write_json(args.json, record)


if __name__ == "__main__":
    main()
