"""Layers of the Qwen-Image network, under the checkpoint's names: two streams, one attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import OpTable
from ..layers import (
    ROWS,
    Constants,
    FeedForward,
    JointAttention,
    Readers,
    SinusoidEmbedder,
    Stream,
    finish,
    modulation_rows,
)

TIME_SCALE = 1000.0


class TimeEmbedding(nn.Module):
    """[B] -> [B, dim] float32 of times in [-1, 1]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = SinusoidEmbedder(dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.timestep_embedder(t, TIME_SCALE)


class Block(nn.Module):
    """One block. steps: None builds the modulation layers, N > 0 tables of N rows, 0 neither.

    `prompt_output=False` leaves out what only a later block would read.
    """

    img_table: Tensor
    txt_table: Tensor

    def __init__(self, heads: int, head_dim: int, steps: int | None, prompt_output: bool) -> None:
        super().__init__()
        dim = heads * head_dim
        self.attn = JointAttention(heads, head_dim, prompt_output)
        self.img_mlp = FeedForward(dim)
        if prompt_output:
            self.txt_mlp = FeedForward(dim)
        for stream in ("img", "txt"):
            if steps is None:
                layer = nn.Sequential(nn.SiLU(), nn.Linear(dim, ROWS * dim))
                setattr(self, f"{stream}_mod", layer)
            elif steps:
                self.register_buffer(f"{stream}_table", torch.empty(steps, ROWS, dim))

    def constants(self, stream: str, temb: Tensor) -> Tensor:
        """Rows of `Constants` for "img" or "txt", [B, 6, dim] float32."""
        return modulation_rows(getattr(self, f"{stream}_mod")[1], temb, scales=(1, 4))

    def forward(
        self, image: Stream, prompt: Stream, now: tuple[Constants, Constants],
        after: tuple[Constants, Constants | None], rope: tuple[Tensor, Tensor],
        lengths: Tensor | None, ops: OpTable, readers: Readers = (None, None),
    ) -> tuple[Stream, Stream | None]:  # fmt: skip
        """now: this block's constants of both streams; after: those of the layers that read its output,
        `readers`; None for the prompt when nobody does. lengths: keys that count, of image then prompt."""
        n = image[0].shape[1]
        rows = n if after[1] is None else None
        out = self.attn(image[1], prompt[1], rope, lengths, rows, ops)
        image = finish(image[0], self.attn.to_out[0](out[:, :n]), self.img_mlp, now[0], after[0], readers[0], ops)
        if after[1] is None:
            return image, None
        branch = self.attn.to_add_out(out[:, n:])
        return image, finish(prompt[0], branch, self.txt_mlp, now[1], after[1], readers[1], ops)
