"""What Qwen-Image alone has; `test_transformers` has what all families have."""

from __future__ import annotations

import torch

from tests.networks import ours, relative
from tests.qwen_image_factory import SMALL, TwinFlowReference


def test_time_embedding_follows_the_formula_in_float64():
    """temb = e1(t) + (t - tt) e2(tt), e = W2 silu(W1 [cos, sin](1000 t f) + b1) + b2, f = 10000^(-i/128)."""
    tensors = TwinFlowReference().tensors()
    weights = {k: v.double() for k, v in tensors.items() if k.startswith("time_text")}
    t, tt = torch.tensor([0.5, 0.125, 1.0]), torch.tensor([0.25, 0.125, 0.0])

    def embed(prefix, t):
        angles = 1000 * t.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        x = torch.cat((angles.cos(), angles.sin()), 1)
        for i, act in ((1, torch.nn.functional.silu), (2, lambda x: x)):
            at = f"{prefix}.timestep_embedder.linear_{i}."
            x = act(x @ weights[at + "weight"].T + weights[at + "bias"])
        return x

    gap = (t - tt).double()[:, None]
    expected = embed("time_text_embed", t) + gap * embed("time_text_embed_2", tt)
    with torch.no_grad():
        # phases of up to 1000 rad are float32, resolved to 6e-5
        assert relative(ours(tensors, SMALL).embed_time(t, tt), expected) < 1e-4
