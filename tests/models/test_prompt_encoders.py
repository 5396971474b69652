"""CLIP's text tower, T5's encoder and Gemma 2 against transformers; DC-AE's decoder against diffusers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import sana_factory, sd3_factory
from tests.factory import randomize, read
from tests.networks import relative
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.models.autoencoders import autoencoder_dc
from twinflow_rt.models.text_encoders import clip_text, gemma2, t5
from twinflow_rt.stages.stage import open_part
from twinflow_rt.stages.tokenizer import PaddingTokenizer, read_core
from twinflow_rt.stages.vae import VaeDecoder

CPU = torch.device("cpu")
WIDTHS = pytest.mark.parametrize("width", [8, 64])  # on a CPU, wide layers are packed


def loaded(model, peer, folder, dtype=torch.float32):
    peer.save_pretrained(folder)
    part = open_part(folder, model)
    part.load(CPU, dtype)
    return part.network


def clip():
    return sd3_factory.clip_encoder(8, 6, "gelu", True)


def ids_of(vocab, *shape):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy", [False, True])
@WIDTHS
@torch.no_grad()
def test_clip(tmp_path, act, legacy, width):
    """`legacy`: files that give the end token a wrong number, 2, for which the highest id is taken."""
    peer = randomize(sd3_factory.clip_encoder(width, 6, act, legacy), 1)
    network = loaded(clip_text.MODEL, peer, tmp_path / "clip")
    ids = ids_of(514, 3, sd3_factory.CLIP_TOKENS)
    for row, end in enumerate((4, 11, 1)):
        ids[row, end:] = 515
    expected = peer(ids, output_hidden_states=True)
    states, pooled = network(ids)
    assert relative(states, expected.hidden_states[-2]) < 1e-5
    assert relative(pooled, expected.text_embeds) < 1e-5


@pytest.mark.parametrize("length", [1, 7, 50])
@WIDTHS
@torch.no_grad()
def test_t5(tmp_path, length, width):
    """Up to distances beyond the 20 that the buckets tell apart."""
    peer = randomize(sd3_factory.t5_encoder(width), 1)
    network, ids = loaded(t5.MODEL, peer, tmp_path / "t5"), ids_of(128, 2, length)
    assert relative(network(ids), peer(ids).last_hidden_state) < 1e-5


@torch.no_grad()
def test_t5_in_float16_keeps_its_widest_layers_wide(tmp_path):
    """The output of `wo` may exceed float16's range: there its weights and the residual are float32."""
    peer = randomize(sd3_factory.t5_encoder(), 1)
    for block in peer.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(1e5)
    network, ids = loaded(t5.MODEL, peer, tmp_path / "t5", torch.float16), ids_of(128, 2, 9)
    wide = {name for name, p in network.named_parameters() if p.dtype == torch.float32 and "norm" not in name}
    assert wide == {f"block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    out = network(ids)
    assert out.dtype == torch.float16 and relative(out, peer(ids).last_hidden_state) < 1e-2


@pytest.mark.parametrize("head", [False, True])
@WIDTHS
@torch.no_grad()
def test_gemma2(tmp_path, head, width):
    """Also where scores are capped hard; padding on the right changes nothing."""
    peer = sana_factory.text_encoder(head, width)
    network, ids = loaded(gemma2.MODEL, peer, tmp_path / "gemma"), ids_of(600, 2, 30)
    expected = (peer.model if head else peer)(ids).last_hidden_state
    assert relative(network(ids), expected) < 1e-5
    assert relative(network(ids[:, :11]), expected[:, :11]) < 1e-5
    with pytest.raises(ConfigError, match="5000 tokens exceeds the window of 4096"):
        network(torch.zeros(1, 5000, dtype=torch.int64))


@pytest.mark.parametrize(
    ("model", "make", "change", "match"),
    [
        (clip_text.MODEL, clip, {"model_type": "clip"}, "'clip', not"),
        (clip_text.MODEL, clip, {"hidden_act": "relu"}, "activation 'relu'"),
        (t5.MODEL, sd3_factory.t5_encoder, {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
        (gemma2.MODEL, sana_factory.text_encoder, {"model_type": "gemma3"}, "model_type 'gemma3'"),
        (gemma2.MODEL, sana_factory.text_encoder, {"attention_bias": True}, "or biases"),
        (gemma2.MODEL, sana_factory.text_encoder, {"rope_parameters": {"rope_type": "yarn"}}, "rope of type 'yarn'"),
    ],
)
def test_other_encoders_are_refused(tmp_path, model, make, change, match):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=match):
        open_part(tmp_path, model)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_tokens_from_either_kind_of_file(tmp_path, pad):
    """vocab.json and merges.txt, as Stable Diffusion ships them, or tokenizer.json, against transformers."""
    from transformers import CLIPTokenizer

    peer = sd3_factory.clip_tokenizer(pad)
    peer.save_pretrained(tmp_path / "fast")
    slow = tmp_path / "slow"
    slow.mkdir()
    core = json.loads((tmp_path / "fast" / "tokenizer.json").read_text())
    (slow / "vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    (slow / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, core["model"]["merges"])))
    names = [(515, "<|endoftext|>"), (514, "<|startoftext|>"), *([(0, "!")] if pad == "!" else [])]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(number): {"content": token, **flags} for number, token in names}
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": pad, "added_tokens_decoder": added}
    (slow / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["", "a RED square", "it's  \t 42 é¼ <|endoftext|>!", "x" * 40, "wow! café\n"]
    theirs = CLIPTokenizer.from_pretrained(slow, model_max_length=12)
    expected = [theirs(t, padding="max_length", max_length=12, truncation=True).input_ids for t in texts]
    assert PaddingTokenizer(slow)(texts, 12) == expected
    expected = [peer(t, padding="max_length", max_length=12, truncation=True).input_ids for t in texts]
    assert PaddingTokenizer(tmp_path / "fast")(texts, 12) == expected


def test_broken_tokenizers_are_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        read_core(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(CheckpointError, match=r"vocab.json and merges.txt do not fit"):
        read_core(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match=r"lacks <\|startoftext\|> or"):
        read_core(tmp_path)
    sd3_factory.clip_tokenizer("!").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<none>"}))
    with pytest.raises(CheckpointError, match="pad_token '<none>' is not in the vocabulary"):
        PaddingTokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"upsample_block_type": "pixel_shuffle", "latent_channels": 2},
        {"decoder_block_out_channels": (16, 64, 64), "decoder_norm_types": ["rms_norm"] * 3},
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(16, 16), (3, 5), (1, 1)])
@torch.inference_mode()
def test_deep_decoder(tmp_path, changes, size):
    peer = sana_factory.autoencoder(**changes)
    peer.save_pretrained(tmp_path / "vae")
    decoder = read(VaeDecoder(tmp_path / "vae", autoencoder_dc.MODEL))
    assert (decoder.scale, decoder.channels) == (4, peer.config.latent_channels)
    latents = torch.randn(2, decoder.channels, *size, generator=torch.Generator().manual_seed(0))
    image = decoder.decode(latents)
    # in float64: the reference's own float32 is off by up to 1e-5, more than ours
    expected = peer.double().decode((latents / peer.config.scaling_factor).double()).sample
    assert image.shape == (2, 3, 4 * size[0], 4 * size[1])
    assert relative(image, expected) < 1e-5
    assert decoder.reports[0].bytes_unused > 0  # the encoder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"decoder_norm_types": "batch_norm"}, "batch_norm"),
        ({"decoder_act_fns": "relu"}, "relu"),
        ({"decoder_in_shortcut": False}, "another shape"),
        ({"_class_name": "AutoencoderKL"}, "says _class_name 'AutoencoderKL'"),
    ],
)
def test_other_deep_autoencoders_are_refused(tmp_path, changes, match):
    sana_factory.autoencoder().save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=match):
        VaeDecoder(tmp_path / "vae", autoencoder_dc.MODEL)


def test_weights_of_another_encoder_are_refused(tmp_path):
    sd3_factory.t5_encoder().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.block.1.layer.1.DenseReluDense.wi_1.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing block.1.layer.1.DenseReluDense.wi_1.weight"):
        open_part(tmp_path, t5.MODEL).load(CPU, torch.float32)
