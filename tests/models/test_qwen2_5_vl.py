"""Qwen-Image's prompt embeddings against diffusers' encode_prompt and transformers' Qwen2.5-VL."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factory import open_text, read
from tests.networks import merge, relative
from tests.qwen_image_factory import make_model
from twinflow_rt.checkpoint.fuse import sources
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.models.text_encoders.language_model import FUSED
from twinflow_rt.models.text_encoders.qwen2_5_vl import MODEL, Qwen25VLConfig
from twinflow_rt.stages.tokenizer import ChatTokenizer, Tokenizer

CPU = torch.device("cpu")
PROMPTS = ["a red square", "", "日本の\n火山 🌋 {} {{ x }} <|im_end|>", "x" * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen") / "m")


@pytest.fixture(scope="module")
def reference(folder):
    from diffusers import QwenImagePipeline
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return QwenImagePipeline(None, None, encoder, tokenizer, None)


@torch.inference_mode()
def theirs(pipe, prompts):
    embeds, mask = pipe.encode_prompt(list(prompts), device=CPU)
    counts = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
    return [row[:n] for row, n in zip(embeds, counts, strict=True)]


@torch.inference_mode()
def ours(text, prompts):
    out = text(prompts)
    return [row[:n] for row, n in zip(out.embeds, out.lengths, strict=True)]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, ["word " * 300, "short"]])
def test_equals_encode_prompt_at_any_length(folder, reference, prompts):
    """The last case is cut at 1024 tokens after the 34 of the template."""
    text = read(open_text(folder))
    for a, b in zip(ours(text, prompts), theirs(reference, prompts), strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_side_of_the_tokenizer_changes_nothing(folder, reference, padding_side):
    reference.tokenizer.padding_side = padding_side
    text = read(open_text(folder))
    for a, b in zip(ours(text, PROMPTS), theirs(reference, PROMPTS), strict=True):
        assert relative(a, b) < 1e-5


def test_rope_on_three_axes_is_plain_rope_for_text(reference):
    """transformers' own M-RoPE with explicit three-axis positions gives what our plain rope gives."""
    ids = torch.arange(3, 40)[None]
    network = MODEL.network(Qwen25VLConfig.from_dict(reference.text_encoder.config.to_dict()))
    inner = reference.text_encoder.model.language_model
    state = inner.state_dict()
    network.load_state_dict(merge(state, FUSED))
    with torch.inference_mode():
        out = inner(input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1), output_hidden_states=True)
        assert relative(network(ids), out.last_hidden_state) < 1e-5
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        shifted = torch.arange(ids.shape[1]).expand(3, 1, -1).clone()
        shifted[1] += 9 * shifted[1]  # an axis of its own is another function: the check can fail
        assert relative(network(ids), inner(input_ids=ids, position_ids=shifted).last_hidden_state) > 1e-3


def rename(folder, target, rule):
    """The model with its text encoder's keys under other names."""
    shutil.copytree(folder, target)
    file = target / "text_encoder" / "model.safetensors"
    save_file({rule(k): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    return target


def in_language_model(key):
    if key.startswith("visual."):
        return "model." + key
    return key.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("rule", [in_language_model, lambda key: key.removeprefix("model.")])
def test_every_layout_of_released_files_gives_the_same(folder, tmp_path, rule):
    other = read(open_text(rename(folder, tmp_path / "m", rule)))
    text = read(open_text(folder))
    assert torch.equal(other(PROMPTS).embeds, text(PROMPTS).embeds)
    assert other.reports[0].bytes_read == text.reports[0].bytes_read


def test_vision_tower_and_head_stay_in_the_files(folder, reference):
    text = read(open_text(folder))
    language = reference.text_encoder.model.language_model
    assert sum(p.numel() for p in text.network.parameters()) == sum(p.numel() for p in language.parameters())
    unused = sum(p.numel() for p in reference.text_encoder.parameters()) - sum(p.numel() for p in language.parameters())
    assert text.reports[0].bytes_unused == 4 * unused
    assert not any("visual" in name or "head" in name for name, _ in text.network.named_parameters())


def test_released_size():
    """Qwen2.5-7B's language model: 7.62B parameters with its head of 0.54B."""
    raw = {
        "model_type": "qwen2_5_vl", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "use_sliding_window": False, "hidden_act": "silu",
    }  # fmt: skip
    with torch.device("meta"):
        network = MODEL.network(Qwen25VLConfig.from_dict(raw))
    count = sum(p.numel() for p in network.parameters())
    assert count == 7_070_619_136
    assert count + 152064 * 3584 == 7_615_616_512
    names = {part for name in network.state_dict() for part in sources(name, MODEL.layout(network.config).fused)}
    assert len(names) == 338  # of the 729 in the released index, the others being vision and head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "'qwen3', not 'qwen2_5_vl'"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope of type 'yarn'"),
        ({"text_config": {"use_sliding_window": True}}, "sliding"),
        ({"text_config": {"hidden_act": "gelu"}}, "activation 'gelu'"),
        ({"text_config": {}}, "lacks 'vocab_size'"),
    ],
)
def test_other_architectures_are_refused(folder, change, message):
    raw = json.loads((folder / "text_encoder" / "config.json").read_text())
    merged = {**raw, **change}
    if change.get("text_config"):
        merged["text_config"] = {**raw["text_config"], **change["text_config"]}
    with pytest.raises(ConfigError, match=message):
        Qwen25VLConfig.from_dict(merged)


@pytest.fixture
def slow(tmp_path):
    """A tokenizer as Qwen-Image ships it: vocab.json and merges.txt, added tokens in the config."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "i n", "Ġ the", "1 2", "' s", "! !"]
    vocab = {c: i for i, c in enumerate([*letters, *("".join(m.split()) for m in merges)])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {str(len(vocab) + i): {"content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
             "single_word": False} for i, t in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}  # fmt: skip
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_slow_files_tokenize_as_transformers_does(slow):
    from transformers import Qwen2Tokenizer

    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    theirs = Qwen2Tokenizer(json.loads((slow / "vocab.json").read_text()), [
        tuple(line.split()) for line in (slow / "merges.txt").read_text().splitlines()[1:]
    ])  # fmt: skip
    theirs.add_tokens(added, special_tokens=True)
    texts = [*PROMPTS, "the then  the\n\n 12 123's IT'S !!! <|im_start|>in the<|im_end|>", "e\u0301 \t x"]
    assert Tokenizer(slow)(texts, 999) == [theirs(t).input_ids for t in texts]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "vocab.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "merges.txt").write_text("#version: 0.2\nq q\n"), "do not fit"),
        (lambda f: (f / "vocab.json").write_text(json.dumps(json.loads((f / "vocab.json").read_text()) | {"zz": 900})),
         "should be 263"),
    ],
)  # fmt: skip
def test_broken_slow_files_are_refused(slow, damage, message):
    damage(slow)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(slow)


def test_chat_models_need_a_template(slow):
    with pytest.raises(CheckpointError, match="no chat template"):
        ChatTokenizer(slow)
