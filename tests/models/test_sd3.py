"""What SD3.5 alone has; `test_transformers` has what all families have."""

from __future__ import annotations

import pytest
import torch

from tests.networks import FOUR, context_of, folded, inputs, ours, relative
from tests.sd3_factory import SHAPES, SMALL, TwinFlowReference
from twinflow_rt.errors import ConfigError
from twinflow_rt.models.transformers.sd3 import SD3Config, SD3Transformer
from twinflow_rt.passes.fold import folded_away


@pytest.fixture(scope="module")
def reference():
    return TwinFlowReference()


def test_a_context_holds_all_that_its_prompt_modulates(reference):
    """One row of constants per prompt and evaluation; images of a prompt share them."""
    network, args = folded(reference.tensors(), SMALL, FOUR), inputs(SHAPES[2], SMALL)
    with torch.no_grad():
        context = context_of(network, args)
        # blocks 0 and 1: 9 + 6 rows, the last: 6 + 2, the closing norm: 2
        assert context.constants.shape == (3, 4, 2 * (9 + 6) + 6 + 2 + 2, SMALL.dim)
        assert context.constants.dtype == torch.float32
        images = torch.cat((args.latents, args.latents))
        out = network(images, network.step_modulation(2), context.select([0, 1, 2, 2, 0, 1]))
        for image, prompt in ((3, 2), (5, 1)):
            alone = context_of(network, args.one(prompt))
            assert relative(out[image, None], network(images[image, None], 2, alone)) < 1e-5


def test_positions_are_those_of_the_middle(reference):
    """Latents of 4x6 get rows 3..4, columns 3..5 of a 9x9 table, which is read from the checkpoint."""
    network, table = ours(reference.tensors(), SMALL), reference.network.pos_embed.pos_embed.view(9, 9, -1)
    with torch.no_grad():
        tokens = network.pos_embed(torch.zeros(1, 4, 4, 6)) - network.pos_embed.proj.bias
    assert relative(tokens.view(2, 3, -1), table[3:5, 3:6]) < 1e-6
    with pytest.raises(ConfigError, match="latents of 20x4 exceed the 18"):
        network.pos_embed(torch.zeros(1, 4, 20, 4))


def test_prompts_of_several_lengths_are_refused():
    network = SD3Transformer(SMALL)
    with pytest.raises(ConfigError, match=r"lengths \(5, 4\) in embeddings of 5 rows"):
        network.encode_context(torch.zeros(2, 5, 20), (5, 4), pooled=torch.zeros(2, 10))


def test_full_size():
    """SD3.5 Medium is published with 2.24 billion parameters; positions are a table beside them."""
    from diffusers import SD3Transformer2DModel

    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = SD3Config()
    with torch.device("meta"):
        full, tables = SD3Transformer(config), SD3Transformer(config, folded_steps=1)
        peer = SD3Transformer2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    second = count(full.time_text_embed_2)
    assert (count(peer), second) == (2_243_171_520, 8_263_680)
    assert count(full) == count(peer) + second
    # folding leaves out two time MLPs; 767 million parameters of modulation run once per prompt
    assert sum(folded_away(full, tables).values()) == count(full) - count(tables) == 2 * 2_755_584
    prompt = sum(count(tables.get_submodule(name)) for name in tables.prompt_modules if "norm" in name)
    assert prompt == 767_270_400
    assert full.pos_embed.pos_embed.numel() == 384**2 * 1536
