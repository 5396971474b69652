"""What SANA alone has; `test_transformers` has what all families have."""

from __future__ import annotations

import math

import torch

from tests.networks import relative
from twinflow_rt.models.transformers.sana import SanaConfig, SanaTransformer
from twinflow_rt.ops import linear_attention
from twinflow_rt.passes.fold import folded_away


def test_linear_attention_is_its_quadratic_form():
    """relu(q) relu(k)^T, its rows divided by their sums, times v: in float64, per head; 0 for dead queries."""
    q, k, v = torch.randn(3, 2, 37, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q[0, 3] = -1
    scores = torch.einsum("bshd,bthd->bhst", q.relu(), k.relu())
    weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-15)
    expected = torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)
    out = linear_attention(q.float(), k.float(), v.float())
    assert out.dtype == torch.float32 and relative(out, expected) < 1e-6
    assert not out[0, 3].any()
    half = linear_attention(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16 and relative(half, expected) < 2e-2


def test_sprints_flow_is_linear():
    """cos(s) x + sin(s) z = ((1-t) x + t z) * (sin(s) + cos(s)) at t = sin(s) / (sin(s) + cos(s)), and the
    published step, which forms a TrigFlow velocity of the network's F and takes x from that, is x_t - t F."""
    x, z, flow = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for s in (0.3, 1.1, 1.3, math.pi / 2):
        t, total = math.sin(s) / (math.sin(s) + math.cos(s)), math.sin(s) + math.cos(s)
        state, linear = math.cos(s) * x + math.sin(s) * z, (1 - t) * x + t * z
        assert relative(linear * total, state) < 1e-12
        norm = math.hypot(t, 1 - t)
        trig = ((1 - 2 * t) * linear + (1 - 2 * t + 2 * t * t) * flow) / norm
        assert relative(math.cos(s) * state - math.sin(s) * trig, linear - t * flow) < 1e-12


def test_full_size():
    """SANA 1.6B, and what folding leaves of it."""
    from diffusers import SanaTransformer2DModel

    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = SanaConfig()
    with torch.device("meta"):
        full, tables = SanaTransformer(config), SanaTransformer(config, folded_steps=1)
        inside = SanaTransformer(config, folded_steps=1, absorbed=True)
        peer = SanaTransformer2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    assert (count(peer), count(full.time_embed_2)) == (1_604_462_752, 35_714_560)
    assert count(full) == count(peer) + count(full.time_embed_2)
    assert count(tables) == 1_568_474_912
    assert sum(folded_away(full, tables).values()) == count(full) - count(tables)
    # absorbed shifts give the attention's input projections a bias, and nothing else
    assert count(inside) - count(tables) == 20 * 3 * 2240
    assert sum(b.numel() for b in tables.buffers()) == (20 * 6 + 2) * 2240 and not list(inside.buffers())
