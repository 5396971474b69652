"""Convolutions: behind a nearest upsampling, and on a CPU with weights laid out once, at load, as oneDNN's kernels
read them or in Winograd's form.

F(2x2, 3x3) takes 16 products per 2x2 outputs and pair of channels in place of 36:

    Y = A^T [ (G g G^T) * (B^T d B) ] A      per tile: d 4x4 inputs, g the kernel, Y 2x2 outputs

(Lavin and Gray, arXiv 1509.09308). G g G^T is made once, at load (`winograd_weight`). Of a nearest enlargement by 2
the middle two of a tile's four rows and columns are equal: one of the four points of each axis is zero, and 9 products
remain, of which the 2x2 outputs of plain code take 36 and of `fold_upsample` 16. In float32 the error is no larger than
that of the direct sum, which is longer. The transforms are native kernels (`native.conv`), the products are oneDNN's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .declaration import Op, op

STRIP = 256  # tiles transformed and multiplied at once: what lies between stays in the cache
LEAST = 64  # fewer are padded to so many: oneDNN's layout of the weights is the same from here to STRIP
_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
# row u of a stride-2 transposed convolution's kernel is the sum of these rows of the 3-tap kernel that
# read the same pixel of the smaller image: output 2y meets rows 3 and 1 (pixels y-1, y), 2y+1 rows 2 and 0
_FOLD = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def fold_upsample(weight: Tensor) -> Tensor:
    """Kernel of `upsample_conv` from that of a 3x3 convolution which follows a nearest upsampling by 2.

    An output pixel's nine taps read only 2x2 pixels of the smaller image, which four depending on its
    parity: four 2x2 convolutions, interleaved, are one transposed convolution of stride 2. weight:
    [O, I, 3, 3]; returns [I, O, 4, 4] in its dtype. Sums in float32 (float64 for float64), one rounding.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    fold = torch.tensor(_FOLD, dtype=wide, device=weight.device)
    return torch.einsum("ui,vj,ocij->couv", fold, fold, weight.to(wide)).to(weight.dtype).contiguous()


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(nearest upsampling of x by 2), by either form of its kernel.

    x: [B, I, H, W]; bias: [O] or None. weight: [O, I, 3, 3], as a checkpoint has it, or [I, O, 4, 4] from
    `fold_upsample`: then it takes 4 instead of 9 multiplications per output pixel and channel pair, and
    the enlarged input is never made. Returns [B, O, 2H, 2W]. Rounding as that of torch's convolutions.
    """
    if weight.shape[-1] == 4:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, enlarged: bool = False, added: Tensor | None = None
) -> Tensor:
    """conv3x3(x) + added, with a border of zeros; enlarged: of x after nearest upsampling by 2.

    x: [B, I, H, W]; weight: [O, I, 3, 3]; bias: [O] or None; added: like the result, or None. Returns [B, O, H, W],
    enlarged [B, O, 2H, 2W]. The specification of `native.conv.conv_winograd`.
    """
    y = upsample_conv(x, weight, bias) if enlarged else F.conv2d(x, weight, bias, padding=1)
    return y if added is None else y + added


def winograd_points(enlarged: bool) -> int:
    """Products per tile and pair of channels."""
    return 9 if enlarged else 16


def winograd_weight(weight: Tensor, enlarged: bool) -> Tensor:
    """G g G^T of every kernel g of weight [O, I, 3, 3] float32, computed in float64 and rounded once: one matrix
    [O, I] per point, as the groups of a 1x1 convolution [points * O, I, 1, 1], in oneDNN's layout for `STRIP` tiles."""
    g = torch.tensor(_G, dtype=torch.float64)
    g = g[[0, 1, 3]] if enlarged else g
    matrices = torch.einsum("ua,vb,ocab->uvoc", g, g, weight.double()).float()
    points, inner = winograd_points(enlarged), weight.shape[1]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        matrices.reshape(-1, inner, 1, 1), [0, 0], [1, 1], [1, 1], points, [1, points * inner, 1, STRIP]
    )
    return packed


def winograd_products(x: Tensor, weight: Tensor, points: int) -> Tensor:
    """Points [T, points, I] times their matrices, a `winograd_weight`; returns [T, points, O]."""
    tiles = x.view(1, len(x), 1, -1).permute(0, 3, 2, 1)
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        tiles, weight, None, [0, 0], [1, 1], [1, 1], points, "none", [], ""
    )
    return y.permute(0, 3, 2, 1).view(len(x), points, -1)


def pack_conv(layer: nn.Conv2d) -> Tensor:
    """The weight of `layer`, float32 or bfloat16, as oneDNN's kernel for this CPU reads it: an opaque tensor of its
    shape and size; `.to_dense()` gives the weight back."""
    settings: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *settings, None)
    return packed


def conv_packed(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x), whose weight is from `pack_conv`."""
    y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
        x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
    )
    return y


_FOLDED: Any = ((1, 1), (0, 0), (2, 2), (1, 1), 1)  # `upsample_conv`'s border, output border, stride, dilation, groups


def pack_folded(weight: Tensor) -> Tensor:
    """A kernel from `fold_upsample` as oneDNN reads it."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *_FOLDED, None)
    return packed


def upsample_conv_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ops.upsample_conv` with a weight from `pack_folded`."""
    y: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise.default(x, weight, bias, *_FOLDED, "none", [], "")
    return y


@dataclass(frozen=True)
class ConvOps:
    """Convolutions that a network may exchange; the others are layers of their own."""

    upsample_conv: Op = op(upsample_conv, "folded")
