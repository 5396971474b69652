"""Layers that several networks are built of, under the names that checkpoints give them.

Three groups: torch's containers and convolutions with what networks here need besides; linear layers with what
follows them; and the two-stream transformer block of SD3 (arXiv 2403.03206), which Qwen-Image has as well. In that
block image and prompt tokens, each with weights of their own, meet in one joint attention. With LN a LayerNorm
without parameters, a block does to each of the two streams

    x <- x + gate * f(LN(x) * scale + shift)        f = joint attention, then a GELU MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import OpTable, ops_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, ValuesView
    from typing import Generic, TypeVar, overload

    M = TypeVar("M")

    class ModuleList(nn.ModuleList, Generic[M]):
        def __init__(self, modules: Iterable[M] = ()) -> None: ...
        def __iter__(self) -> Iterator[M]: ...  # type: ignore[override]
        @overload  # type: ignore[override]
        def __getitem__(self, index: int) -> M: ...
        @overload
        def __getitem__(self, index: slice) -> ModuleList[M]: ...
        def __getitem__(self, index: int | slice) -> M | ModuleList[M]: ...

    class ModuleDict(nn.ModuleDict, Generic[M]):
        def __init__(self, modules: Mapping[str, M] | None = None) -> None: ...
        def __getitem__(self, key: str) -> M: ...  # type: ignore[override]
        def values(self) -> ValuesView[M]: ...  # type: ignore[override]

else:
    ModuleDict, ModuleList = nn.ModuleDict, nn.ModuleList


class Module(nn.Module):
    """A module that finds the modules it holds as fast as plain attributes.

    nn.Module looks for them only after Python's own look-up has failed, which takes as long as a view of a tensor;
    a layer of a small network looks for a dozen. Modules may be replaced by assignment as usual.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        self._forget(name)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        self._forget(name)
        super().__delattr__(name)

    def _forget(self, name: str) -> None:
        if isinstance(self.__dict__.get(name), nn.Module):
            del self.__dict__[name]


class UpsampleConv(nn.Conv2d):
    """A nearest enlargement by 2 and the 3x3 convolution behind it, under the convolution's name in the checkpoint.

    folded: the kernel of one transposed convolution that does both (`convolutions`), or None. It is not saved, so
    that what is saved are the weights as they were loaded.
    """

    folded: Tensor | None

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer, 3, padding=1)
        self.register_buffer("folded", None, persistent=False)

    def enlarged(self, x: Tensor, ops: OpTable) -> Tensor:
        """Return the convolution [B, outer, 2H, 2W] of x [B, inner, H, W] enlarged."""
        y: Tensor = ops.upsample_conv(x, self.weight if self.folded is None else self.folded, self.bias)
        return y


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution by its checkpoint's shape, applied as the linear layer that it is to [..., inner]."""

    def __init__(self, inner: int, outer: int, bias: bool = True) -> None:
        super().__init__(inner, outer, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class MixFeedForward(nn.Module):
    """Gated MLP with a 3x3 depthwise convolution on the image grid in its middle (SANA, and its DC-AE).

    [B, H, W, dim] -> the same, a channels-last image as it lies.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv_inverted = PointwiseConv(dim, 2 * hidden)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = PointwiseConv(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_inverted(x))
        hidden, gate = self.conv_depth(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).chunk(2, -1)
        out: Tensor = self.conv_point(hidden * F.silu(gate))
        return out


def conv_residual(residual: Tensor, layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return residual + layer(x), in one pass where the layer has an `add_to(residual, x)` that does so."""
    add_to: Callable[[Tensor, Tensor], Tensor] | None = getattr(layer, "add_to", None)
    return layer(x).add_(residual) if add_to is None else add_to(residual, x)


# -- linear layers with what follows them, in one op where the table has one ----------------------------------
# (a layer that was packed or quantized multiplies in a way of its own, so what follows it is a separate op)


def _plain(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear


def with_swiglu(layer: nn.Linear, x: Tensor, ops: OpTable) -> Tensor:
    """Return `ops.swiglu` of layer(x), a merged w1|w3 projection without bias."""
    return ops.linear_swiglu(x, layer.weight) if _plain(layer) else ops.swiglu(layer(x))


def with_gelu(layer: nn.Linear, x: Tensor, ops: OpTable) -> Tensor:
    """Return `ops.gelu_tanh` of layer(x), a projection with bias."""
    return ops.linear_gelu(x, layer.weight, layer.bias) if _plain(layer) else ops.gelu_tanh(layer(x))


def with_residual(residual: Tensor, layer: nn.Linear, x: Tensor, ops: OpTable) -> Tensor:
    """Return residual + layer(x), of a projection without bias. The residual stream may have a wider dtype."""
    if _plain(layer) and residual.dtype == x.dtype == (weight := layer.weight).dtype:
        return ops.linear_residual(residual, x, weight)
    return residual + layer(x)


# -- time and two-stream blocks -------------------------------------------------------------------------------

EPS = 1e-6  # of every norm
FREQUENCY_DIM = 256
MLP_RATIO = 4
BLOCK_CONSTANTS = 6  # per stream: the fields of `Constants`

Stream = tuple[Tensor, Tensor]  # residual stream x, and x under the norm that reads it next
Readers = tuple[nn.Module | None, nn.Module | None]  # the layers that read an image's and a prompt's stream next

# merged tensors of a joint attention -> the checkpoint's, in the order of their rows (within a block's prefix)
JOINT_FUSED = {
    f"attn.{merged}.{leaf}": tuple(f"attn.{part}.{leaf}" for part in parts)
    for merged, parts in (
        ("to_qkv", ("to_q", "to_k", "to_v")),
        ("add_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    )
    for leaf in ("weight", "bias")
}


class Constants(NamedTuple):
    """What time and prompt do to one stream in one block, in order of use; None is the identity.

    Each [B or 1, 1, dim] float32. `scale` is the effective one: 1 + what the modulation gives.
    """

    shift_a: Tensor | None = None
    scale_a: Tensor | None = None
    gate_a: Tensor | None = None
    shift_f: Tensor | None = None
    scale_f: Tensor | None = None
    gate_f: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor) -> Constants:
        """Return the constants in rows [B, R, dim] of a table, in the order of the fields; the others are None."""
        return cls(*rows.unsqueeze(2).unbind(1))


IDENTITY = Constants()


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return layer(x) computed in float32, as all constants are."""
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


def time_sign(config: Any, dim: int) -> nn.Linear | None:
    """Return SimpleTuner's embedding of the sign of time, a weight [2, dim], where the config asks for one."""
    return nn.Linear(dim, 2, bias=False) if config.enable_time_sign_embed else None


def signed(temb: Tensor, sign: nn.Linear | None) -> Tensor:
    """Return temb [B, dim] of positive times with their row of `sign`."""
    return temb if sign is None else temb + sign.weight[0].float()


def modulation_rows(layer: nn.Linear, temb: Tensor, scales: Sequence[int]) -> Tensor:
    """Return the constants [B, R, dim] float32 that a modulation layer makes of temb [B, dim], R its output features
    over its input features. scales: numbers of those that multiply, to which 1 is added."""
    rows = linear32(layer, F.silu(temb)).unflatten(-1, (-1, layer.in_features))
    one = rows.new_zeros(rows.shape[1], 1)
    one[list(scales)] = 1
    return rows + one


def sinusoids(value: Tensor, scale: float = 1.0) -> Tensor:
    """Return cosines, then sines [B, 256] float32 of value [B] * scale, at frequencies 10000^(-i/128).

    Phases reach 1000 rad, where float32 resolves 6e-5, so it matters where `scale` enters: last, as in Qwen-Image.
    Other families scale `value` beforehand.
    """
    half = FREQUENCY_DIM // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=value.device).float() / half)
    angles = value.float()[:, None] * freqs * scale
    return torch.cat((angles.cos(), angles.sin()), -1)


class SinusoidEmbedder(nn.Module):
    """An MLP over the sinusoids of a scalar: [B] -> [B, dim] float32."""

    def __init__(self, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(FREQUENCY_DIM, dim, bias), nn.Linear(dim, dim, bias)

    def forward(self, value: Tensor, scale: float = 1.0) -> Tensor:
        return linear32(self.linear_2, F.silu(linear32(self.linear_1, sinusoids(value, scale))))


class JointAttention(nn.Module):
    """Attention among image and prompt tokens; prompt_output: whether a later block reads the prompt's result."""

    def __init__(self, heads: int, head_dim: int, prompt_output: bool, bias: bool = True) -> None:
        super().__init__()
        dim, self.heads = heads * head_dim, heads
        self.to_qkv, self.add_qkv = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, 3 * dim, bias)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=EPS), nn.RMSNorm(head_dim, eps=EPS)
        self.norm_added_q = nn.RMSNorm(head_dim, eps=EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias)])
        if prompt_output:
            self.to_add_out = nn.Linear(dim, dim, bias)

    def forward(
        self, image: Tensor, prompt: Tensor, rope: tuple[Tensor, Tensor], lengths: Tensor | None,
        queries: int | None, ops: OpTable,
    ) -> Tensor:  # fmt: skip
        """Return what the tokens image [B, S, dim], then prompt [B, L, dim], attend to; of the first `queries` alone if
        given. lengths: int64 [B], keys that count, or None: all."""
        q, k, v = ops.joint_qk_norm_rope(
            (self.to_qkv(image), self.add_qkv(prompt)),
            (self.norm_q.weight.float(), self.norm_added_q.weight.float()),
            (self.norm_k.weight.float(), self.norm_added_k.weight.float()),
            *rope, self.heads, EPS,
        )  # fmt: skip
        return ops.attention(q[:, :queries], k, v, lengths)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * dim
        self.net: ModuleDict[Any] = ModuleDict(
            {"0": ModuleDict({"proj": nn.Linear(dim, hidden)}), "2": nn.Linear(hidden, dim)}
        )

    @property
    def first(self) -> nn.Module:
        """The layer that reads the norm."""
        layer: nn.Module = self.net["0"]["proj"]
        return layer

    def forward(self, x: Tensor, ops: OpTable) -> Tensor:
        return self.net["2"](with_gelu(self.net["0"]["proj"], x, ops_for(self.net["2"], ops)))


def add_branch(x: Tensor, branch: Tensor, gate: Tensor | None, ops: OpTable) -> Tensor:
    """Return x + gate * branch where no norm follows, in one pass of the op instead of four elementwise ones."""
    return ops.residual_layer_norm(x, branch, gate, None, None, EPS)[0]


def finish_block(
    x: Tensor, branch: Tensor, mlp: Any, now: Constants, after: Constants, reader: nn.Module | None,
    ops: OpTable,
) -> Stream:  # fmt: skip
    """Add attention's branch to x, then the MLP's; return x and its norm for `reader`, the layer that reads it next.
    mlp: has the layer that reads its norm as `first`. now, after: the constants of this block and of the reader."""
    first = ops_for(mlp.first, ops)
    x, h = first.residual_layer_norm(x, branch, now.gate_a, now.scale_f, now.shift_f, EPS)
    return ops_for(reader, ops).residual_layer_norm(x, mlp(h, ops), now.gate_f, after.scale_a, after.shift_a, EPS)


def pack(latents: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as tokens [B, H/2*W/2, 4C], features ordered (channel, row, column)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """Return the latents [B, C, 2*height, 2*width] of tokens [B, height*width, 4C]: the inverse of `pack`."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (height, width)), 2)


def channels_first(tokens: Tensor, height: int, width: int, size: int) -> Tensor:
    """Return tokens [B, height*width, C*size*size], features ordered (channel, row, column), as the view
    [B, C, height, size, width, size] that `ops.x0_to_vae` reads."""
    return tokens.unflatten(1, (height, width)).unflatten(-1, (-1, size, size)).permute(0, 3, 1, 4, 2, 5)


def channels_last(tokens: Tensor, height: int, width: int, size: int) -> Tensor:
    """Return the same for features ordered (row, column, channel)."""
    return tokens.unflatten(1, (height, width)).unflatten(-1, (size, size, -1)).permute(0, 5, 1, 3, 2, 4)


def join_patches(patches: Tensor, sign: float) -> Tensor:
    """Return sign * the image [B, C, H, W] of patches [B, C, H/p, p, W/p, p]."""
    image = patches.flatten(4, 5).flatten(2, 3)
    return image if sign == 1 else sign * image
