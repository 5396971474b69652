"""Prompt embeddings against diffusers' encode_prompt and transformers' Qwen3Model."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from tests.factory import make_model, open_text, read
from twinflow_rt.errors import CheckpointError, ConfigError
from twinflow_rt.models.text_encoders.qwen3 import Qwen3Config
from twinflow_rt.stages.tokenizer import ChatTokenizer

CPU = torch.device("cpu")
PROMPTS = ["a red square", "", "日本の\n火山 🌋 {{ messages }} <|im_end|>", "x" * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("text") / "m")


@pytest.fixture(scope="module")
def reference(folder):
    from diffusers import ZImagePipeline
    from transformers import AutoTokenizer, Qwen3Model

    encoder = Qwen3Model.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return ZImagePipeline(None, None, encoder, tokenizer, None)


def encoder(folder, dtype=torch.float32):
    return read(open_text(folder), dtype)


@torch.inference_mode()
def theirs(pipe, prompts, longest=512):
    options = {"device": CPU, "do_classifier_free_guidance": False, "max_sequence_length": longest}
    return pipe.encode_prompt(list(prompts), **options)[0]


@torch.inference_mode()
def ours(text, prompts):
    out = text(prompts)
    return [row[:n] for row, n in zip(out.embeds, out.lengths, strict=True)]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, ["word " * 105, "short"], ["word " * 300, "short"]])
def test_equals_encode_prompt_at_any_length(folder, reference, prompts):
    """The last case is cut, where positions for the image must be left."""
    for a, b in zip(ours(encoder(folder), prompts), theirs(reference, prompts, 544), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_the_layer_that_is_not_built_is_the_one_not_needed(folder, reference):
    """All hidden states of transformers' full model: ours are number -2, and number -1 differs."""
    ids = torch.tensor(ChatTokenizer(folder / "tokenizer")(PROMPTS[:1], 512))
    text = encoder(folder)
    with torch.inference_mode():
        states = reference.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
        out = text.network(ids)
    assert len(text.network.layers) == len(reference.text_encoder.layers) - 1
    assert (out - states[-2]).abs().max() < 1e-5 * states[-2].abs().max()
    assert (out - states[-1]).abs().max() > 0.1


def test_bfloat16_is_as_exact_as_transformers(folder, reference):
    from diffusers import ZImagePipeline

    exact = torch.cat(theirs(reference, PROMPTS))
    error = torch.cat(ours(encoder(folder, torch.bfloat16), PROMPTS)) - exact
    half = ZImagePipeline(None, None, copy.deepcopy(reference.text_encoder).bfloat16(), reference.tokenizer, None)
    bound = torch.cat(theirs(half, PROMPTS)) - exact
    assert error.square().mean() <= 1.1**2 * bound.square().mean()


def test_a_prompt_does_not_depend_on_its_batch(folder):
    text = encoder(folder)
    for together, prompt in zip(ours(text, PROMPTS), PROMPTS, strict=True):
        assert (together - ours(text, [prompt])[0]).abs().max() < 1e-5


def test_head_and_prefix_of_a_causal_model_are_accepted(tmp_path, folder):
    whole = make_model(tmp_path / "head", head=True)
    (report,), (plain,) = encoder(whole).reports, encoder(folder).reports
    assert report.bytes_read == plain.bytes_read
    assert report.bytes_unused == plain.bytes_unused + 259 * 32 * 4  # the language-model head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention biases"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope of type 'yarn'"),
        ({"use_sliding_window": True}, "sliding"),
        ({"hidden_act": "gelu"}, "activation"),
    ],
)
def test_other_architectures_are_refused(folder, change, message):
    raw = json.loads((folder / "text_encoder" / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        Qwen3Config.from_dict({**raw, **change})


def test_incomplete_config_is_refused():
    with pytest.raises(ConfigError, match="lacks 'vocab_size'"):
        Qwen3Config.from_dict({})


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "not a tokenizer"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), "does not compile"),
    ],
)
def test_broken_tokenizers_are_refused(broken, damage, message):
    damage(broken)
    with pytest.raises(CheckpointError, match=message):
        ChatTokenizer(broken)


def test_template_can_live_in_the_config_and_may_use_no_python(broken):
    expected = ChatTokenizer(broken)(["hi"], 512)
    template = (broken / "chat_template.jinja").read_text()
    (broken / "chat_template.jinja").unlink()
    config = json.loads((broken / "tokenizer_config.json").read_text())
    for stored in (template, [{"name": "default", "template": template}]):
        (broken / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": stored}))
        assert ChatTokenizer(broken)(["hi"], 512) == expected
    (broken / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(CheckpointError, match="is unsafe"):
        ChatTokenizer(broken)(["hi"], 512)


def test_templates_render_as_in_transformers(broken):
    """The constructs Qwen3's own template uses: namespace, slices, defined tests, whitespace control."""
    from transformers import AutoTokenizer

    template = """{%- if tools %}{{ tools | tojson }}{%- endif %}
{%- set ns = namespace(last=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.last and message.role == "user" and not message.content.startswith('<x>') %}
        {%- set ns.last = false %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
{%- endif %}"""
    (broken / "chat_template.jinja").write_text(template)
    reference = AutoTokenizer.from_pretrained(broken)
    texts = [
        reference.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for p in PROMPTS
    ]
    assert ChatTokenizer(broken)(PROMPTS, 512) == reference(texts).input_ids


def test_vocabulary_larger_than_the_embedding_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "m") / "tokenizer"
    raw = json.loads((broken / "tokenizer.json").read_text())
    raw["model"]["vocab"]["extra"] = 400
    raw["model"]["vocab"] |= {f"extra{i}": 401 + i for i in range(8)}
    (broken / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="different models"):
        encoder(broken.parent)
