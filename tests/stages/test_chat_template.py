"""Chat templates against transformers' own rendering of the same folder."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.factory import tokenizer
from twinflow_rt.errors import CheckpointError
from twinflow_rt.stages.chat_template import chat_template
from twinflow_rt.stages.tokenizer import ChatTokenizer

PROMPTS = ["a red square", "", "日本の\n火山 🌋 <b>'\"&</b> {{ messages }}"]
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "generation": LOOP + "{% generation %}\n{{ m.content }}\n{% endgeneration %}\n!{% endfor %}",
    "generation without blanks": LOOP + "a  {%- generation -%}  {{ m.content }} {%- endgeneration %} b{% endfor %}",
    "generation around blocks": (
        LOOP + "{% set k = 1 %}{% generation %}{% if m.role == 'user' %}{{ m.content }}{{ k + loop.index }}{% endif %}"
        "{% endgeneration %}{% endfor %}"
    ),
    "tojson": "{{ messages | tojson }}",
    "tojson as ASCII": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson in Unicode": "{{ messages | tojson(ensure_ascii=False) }}",
    "tojson in lines": "{{ messages | tojson(indent=2, sort_keys=True, separators=(',', ':')) }}",
    "tojson by position": "{{ messages | tojson(true, 4) }}",
    "the day": "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
    "blocks trimmed": "  {% if true %}\n  {{ messages[0].content }}\n  {% endif %}\n{# said #}\n\nend",
    "loop controls": (
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ),
    "tools and unknown names": "{{ tools is none }}{{ documents is defined }}{{ custom is defined }}{{ xml }}",
    "the flags": "{{ add_generation_prompt }} {{ enable_thinking }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}",
    "namespace and dict": "{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(b=2).b }}",
    "a macro": "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[0].content) }}",
    "an exception not raised": "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}fine",
    "string methods": "{{ messages[0].content.split('a')[-1].strip() | trim | upper }}{{ 'x' * 3 }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tokenizer"
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_in_transformers(folder, reference, name):
    render = ChatTokenizer(write(folder, TEMPLATES[name])).render
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        expected = reference.apply_chat_template(messages, chat_template=TEMPLATES[name], **options)
        assert render(prompt) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only turns of a user') }}", "only turns of a user"),
        ("{% generation %}", "does not compile"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ dict.mro() }}", "is unsafe"),
        ("{{ messages | tojson(wrong=1) }}", "failed"),
        ("{% include 'x' %}", "failed"),
    ],
)
def test_refusals_are_named(folder, template, message):
    with pytest.raises(CheckpointError, match=message):
        chat_template(write(folder, template))("a")


def test_special_tokens_may_stand_with_their_flags(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "t")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    token = {"content": "<eos>", "lstrip": False, "__type": "AddedToken"}
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": token, "bos_token": None}))
    assert chat_template(write(copy, "{{ eos_token }}{{ bos_token is defined }}"))("a") == "<eos>False"
