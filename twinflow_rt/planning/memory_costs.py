"""What holding a model and running its stages takes, per way of holding it: counted from headers, and by running
each stage on the meta device (`meta_model`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fuse import sources
from ..checkpoint.layout import Layout
from ..checkpoint.reading import Reader
from ..ops import Target, select
from ..ops.linear import int8_mm, sums_int8
from ..ops.native.int4 import BLOCK
from ..passes import quantize
from ..passes.blocks import block_names, parameters_of, token_tables
from ..passes.convolutions import folded_bytes, refuses, winograd_bytes
from ..passes.layers import BESIDE, GROUP, KINDS, QuantizedLinear, declared_values, quantized_values
from ..stages import tiles
from ..stages.prompt_cache import context_bytes
from ..stages.stage import DEFAULTS, StageOptions
from ..stages.text import TextStage
from ..stages.vae import VaeDecoder
from .footprint import peak_of
from .meta_model import MetaModel

GPU = torch.device("cuda")  # whose memory is counted whether or not there is one
WEIGHTS = {kind.weight for kind in KINDS.values()}


@dataclass(frozen=True)
class Weights:
    """Bytes of one stage's weights: what stays in any case, each block that could stream, in order, and what
    each of these needs while it streams (on a CPU less: what is used as its file has it takes no room). making: what
    is needed for a moment while a weight is quantized as it comes. tables: what of `fixed` a GPU's host keeps
    while blocks stream."""

    fixed: int
    blocks: tuple[int, ...] = ()
    passing: tuple[int, ...] = ()
    making: int = 0
    tables: int = 0

    @classmethod
    def of_parts(cls, parts: Iterable[Weights]) -> Weights:
        """Return the bytes of a stage of several networks."""
        fixed, blocks, passing, making, tables = zip(*map(astuple, parts), strict=True)
        return cls(sum(fixed), sum(blocks, ()), sum(passing, ()), max(making), sum(tables))

    def held(self, streamed: int, slots: int) -> int:
        """Return the bytes resident while the last `streamed` blocks go through `slots` buffers."""
        if not streamed:
            return self.fixed + sum(self.blocks)
        first = len(self.blocks) - streamed
        stays = self.fixed - self.tables + sum(self.blocks[:first])
        return stays + min(slots, streamed) * max(self.passing[first:])


@dataclass(frozen=True)
class Costs:
    """What a model takes.

    weights: per stage (text, network, vae). text, velocity: bytes that a call of the stage works in;
    decode(tile): likewise, in tiles of that side or (None) whole. context: what is kept of the prompts meanwhile.
    least_tile: the VAE's, in pixels. slots: blocks in memory while blocks stream."""

    weights: Mapping[str, Weights]
    text: int
    context: int
    velocity: int
    decode: Callable[[int | None], int]
    least_tile: int
    slots: int


@dataclass(frozen=True)
class Network:
    """A network on the meta device and how it will be held. streams: whether its blocks can. absorb: whether constants
    go into its weights, which then are no file's any more. channels_last: whether kernels of convolutions are laid out
    so. precision, skip_layers: see `passes.quantize.convert_layers`."""

    module: Any
    checkpoint: Checkpoint
    layout: Layout
    streams: bool = True
    absorb: bool = False
    channels_last: bool = False
    precision: str | None = None
    skip_layers: Sequence[str] = ()


def costs_of(
    text: TextStage, vae: VaeDecoder, network: Network, *, device: torch.device, dtype: torch.dtype,
    largest: tuple[int, int, int], text_options: StageOptions = DEFAULTS, guided: bool = False,
) -> Costs:  # fmt: skip
    """Count a model whose stages are open but not read. text_options: how the text stage will be read. guided: whether
    calls have negative prompts besides, which are kept, and go through the network after the others."""
    height, width, images = largest
    encoders = _encoders(text, text_options)
    target = Target.of(torch.device("cpu"), torch.float32)  # whose ops run on the meta device, too
    model = MetaModel.of(text, network.module, vae, (height, width), images, select(target)[0])
    if device.type == "cpu":  # whose products of 8 bits need more room for their results than others
        for real, copy in (*zip(encoders, model.encoders, strict=True), (network, model.network)):
            quantize.declare_quantized(copy, device, real.precision, real.skip_layers)
            quantize.bind_quantized(copy, target)
            if sums_int8():
                _count_products(copy)
    prompt, text_work = peak_of(lambda: model.prompt(text.max_tokens))
    context, context_work = peak_of(lambda: model.encode(prompt))
    with torch.inference_mode():
        context = context.select([0] * images)
    velocity, prompts = peak_of(lambda: model.velocity(context))[1], 1 + guided
    ratio = dtype.itemsize / torch.float32.itemsize  # the meta model is float32
    image = 4 * images * 3 * height * width
    # beside what the decoder makes: the float image becomes bytes in float32 (see ops.decode.to_uint8)
    decode = cache(lambda tile: round(ratio * _decode(model, tile, image)))
    return Costs(
        weights_of(text, vae, network, device, dtype, text_options),
        round(ratio * max(text_work, prompts * (prompt.embeds.nbytes + context_work))),
        round(ratio * prompts * context_bytes(context)), round(ratio * velocity), decode, tiles.smallest(model.decoder),
        slots=1 if device.type == "cpu" else 2,
    )  # fmt: skip


def _count_products(network: nn.Module) -> None:
    """Make quantized layers on the meta device take what theirs take on this CPU beside their result: torch's int8
    product the sums in 32 bits, those of 4 bits their weight, widened."""

    def w4a8(x: Tensor, x_scales: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        return int8_mm(x, x_scales, x.new_empty(len(packed), x.shape[-1]), *rest[2:])

    def w4a16(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        block = x.new_empty(min(len(packed) * x.shape[-1], BLOCK // torch.float32.itemsize), dtype=torch.float32)
        return block.new_empty((*x.shape[:-1], len(packed)), dtype=x.dtype)

    for layer in network.modules():
        if isinstance(layer, QuantizedLinear) and layer.kind != "fp8":
            ops = replace(layer.quantized_ops, linear_quantized=int8_mm, linear_w4a8=w4a8, linear_w4a16=w4a16)
            layer.quantized_ops = ops


def weights_of(
    text: TextStage, vae: VaeDecoder, network: Network, device: torch.device, dtype: torch.dtype,
    text_options: StageOptions = DEFAULTS,
) -> dict[str, Weights]:  # fmt: skip
    """Return `Costs.weights` of a model whose stages are open but not read."""
    decoders = [Network(p.network, p.checkpoint, p.layout, channels_last=True) for p in vae.parts]
    parts = {"text": _encoders(text, text_options), "network": [network], "vae": decoders}
    made = {name: Weights.of_parts(network_weights(one, device, dtype) for one in some) for name, some in parts.items()}
    if device.type != "cpu":  # where encoders are quantized before the network is there
        made["text"] = replace(made["text"], making=0)
    return made


def _encoders(text: TextStage, options: StageOptions) -> list[Network]:
    kind, skip = options.precision, options.skip_layers
    return [Network(p.network, p.checkpoint, p.layout, precision=kind, skip_layers=skip) for p in text.parts]


def _decode(model: MetaModel, tile: int | None, image: int) -> int:
    """Return the float32 bytes that decoding works in. image: bytes of the result."""
    if tile is None:
        return peak_of(model.decode)[1]
    decoder, latents = model.decoder, model.latents
    one = latents[:1]
    with torch.inference_mode():
        features: Tensor = decoder.trunk(one)
    core, far = max(tile // tiles.cell(decoder), 1), tiles.margin(decoder)
    sides = [tiles.window_side(n, core, far) for n in features.shape[2:]]
    part = features.new_empty((1, features.shape[1], *sides))
    tail = peak_of(lambda: decoder.tail(part))[1] + part.nbytes
    both = 2 * image if len(latents) > 1 else image  # images are put together at the end
    return max(peak_of(lambda: decoder.trunk(one))[1], features.nbytes + both + tail)


def network_weights(network: Network, device: torch.device, dtype: torch.dtype) -> Weights:
    """Return the bytes of a network's tensors on the device. One that a CPU uses as its file has it takes none."""
    module, checkpoint, layout, cpu = network.module, network.checkpoint, network.layout, device.type == "cpu"
    known: set[str] = set(checkpoint)
    tensors: dict[str, Tensor] = module.state_dict()
    reader = Reader(tensors, checkpoint, layout, device, dtype)
    linears = {f"{name}.weight": m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    how = device, network.precision, network.skip_layers
    named = ((name, quantize.quantizes(module, name.removesuffix(".weight"), m, *how)) for name, m in linears.items())
    kinds = {name: kind for name, kind in named if kind is not None}
    forms = {name: reader.int4_form(name)[0] for name, kind in kinds.items() if KINDS[kind].in_groups}

    def held_in(name: str) -> tuple[torch.dtype, bool]:
        """Return the dtype of a tensor when read, and whether it is another then than in its file."""
        parts = sources(name, layout.fused)
        if name in known and checkpoint.dtype(name) in WEIGHTS:
            return checkpoint.dtype(name), False
        made = not all(part in known for part in parts)  # a folded table
        wanted = torch.float32 if made else layout.dtype_of(name, dtype) or checkpoint.dtype(parts[0])
        if made or len(parts) > 1 or checkpoint.dtype(parts[0]) != wanted:
            return wanted, True
        return wanted, checkpoint.nbytes(name) != checkpoint.numel(name) * wanted.itemsize  # in blocks

    def size(name: str, streams: bool = False) -> int:
        tensor, (wanted, moved) = tensors[name], held_in(name)
        if wanted in WEIGHTS:  # of a saved program
            leaves = (f"{name.removesuffix('weight')}{leaf}" for leaf in ("weight", *BESIDE))
            return 0 if cpu else sum(checkpoint.nbytes(leaf) for leaf in leaves if leaf in known)
        if name in kinds:
            values = declared_values(kinds[name], tensor.shape[0], tensor.shape[1], forms.get(name) or GROUP)
            moved, nbytes = True, sum(value.nbytes for value in values.values())
        else:
            nbytes = tensor.numel() * wanted.itemsize
            if not streams:
                moved = moved or network.absorb or name in linears or (network.channels_last and tensor.ndim == 4)
        return nbytes if moved or not cpu else 0

    def making(name: str) -> int:
        """Return the bytes beside its quantized form while a weight is quantized, or joined from files' 4 bits."""
        wanted, moved = held_in(name)
        if forms.get(name) or wanted in WEIGHTS:
            return size(name)
        weight = torch.empty_like(tensors[name], dtype=wanted, device="meta")
        peak = peak_of(lambda: quantized_values(weight, kinds[name]))[1] - size(name)
        return peak + (weight.nbytes if moved else 0)

    blocks = [parameters_of(module, block) for block in block_names(module)]
    streaming = {name for names in blocks for name in names}
    fixed = sum(size(name) for name in tensors if name not in streaming) + folded_bytes(module, dtype)
    if network.channels_last and refuses(Target.of(device, dtype)) is None:
        fixed += winograd_bytes(module)
    kept, passing = (tuple(sum(size(n, streams) for n in names) for names in blocks) for streams in (False, True))
    if not network.streams:
        return Weights(fixed + sum(kept))
    most = max(map(making, kinds), default=0)
    return Weights(fixed, kept, passing, most, 0 if cpu else sum(map(size, token_tables(module))))
