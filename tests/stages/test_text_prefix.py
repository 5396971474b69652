"""The template's beginning, read once, against reading whole prompts; and buckets of lengths."""

from __future__ import annotations

import pytest
import torch

from tests.factory import make_model, open_text, read
from tests.runtime.test_capture import FakeGraphs
from twinflow_rt.models.context import BUCKET
from twinflow_rt.planning.footprint import work_of
from twinflow_rt.runtime.capture import Captures
from twinflow_rt.stages.stage import StageOptions
from twinflow_rt.stages.text_encoders import OpenUniText

CPU = torch.device("cpu")
PROMPTS = ["a red square", "", "日本の\n火山 🌋", "x" * 90]
STAGES = {"qwen3": "z-image", "qwen2.5-vl": "qwen-image", "gemma2": "sana", "openuni": "openuni"}


@pytest.fixture(scope="module", params=list(STAGES))
def text(request, tmp_path_factory):
    stage = read(open_text(make_model(tmp_path_factory.mktemp(request.param) / "m", STAGES[request.param])))
    stage.least_prefix = 1  # Qwen3's is three tokens, not worth it but for this test
    return stage


@torch.inference_mode()
def rows(text, prompts):
    out = text(prompts)
    return [row[:n] for row, n in zip(out.embeds, out.lengths, strict=True)]


@pytest.fixture(scope="module")
def whole(text):
    """Without a prefix."""
    text.least_prefix = 10**9
    try:
        return rows(text, PROMPTS)
    finally:
        text.least_prefix = 1


def seen(text, prompts):
    """Embeddings, and tokens per row of the network's last run, OpenUni's queries among them."""
    lengths = []
    handle = text.network.layers[0].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    try:
        return rows(text, prompts), lengths[-1]
    finally:
        handle.remove()


def tokens_of(text):
    """Tokens of each of the prompts."""
    return [len(ids) for ids in text.tokenizer(PROMPTS, 900)]


def queries(text):
    return text.connector.config.num_queries if isinstance(text, OpenUniText) else 0


def test_embeddings_are_those_of_the_whole_prompt(text, whole):
    ours, length = seen(text, PROMPTS)
    for a, b in zip(ours, whole, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5 * b.abs().max()
    fixed = len(text.prefix_ids)
    assert fixed >= 3 and length == max(tokens_of(text)) + queries(text) - fixed


def test_the_beginning_is_read_once(text):
    read, calls = text.network.read, []
    text._prefix, text.network.read = None, lambda ids: calls.append(ids.shape) or read(ids)
    try:
        for prompts in (PROMPTS[:1], PROMPTS[1:], PROMPTS[:2]):
            rows(text, prompts)
    finally:
        del text.network.read
    assert calls == [(1, len(text.prefix_ids))]


def test_prompts_that_begin_otherwise_are_read_whole(text, whole):
    class Other(type(text.tokenizer)):
        def __call__(self, prompts, max_tokens):
            ids = super().__call__(prompts, max_tokens)
            return [[i[0] + 1, *i[1:]] if p == "" else i for p, i in zip(prompts, ids, strict=True)]

    plain = text.tokenizer.__class__
    text.tokenizer.__class__ = Other
    try:
        ours, length = seen(text, PROMPTS)
    finally:
        text.tokenizer.__class__ = plain
    assert (ours[0] - whole[0]).abs().max() < 1e-5 * whole[0].abs().max()
    assert length == max(tokens_of(text)) + queries(text)


def test_other_weights_forget_it(text, whole):
    before = text.prefix(text.tokenizer(PROMPTS, 900))
    text.materialize(CPU, torch.float32)
    assert text.prefix(text.tokenizer(PROMPTS, 900)) is not before
    for a, b in zip(rows(text, PROMPTS), whole, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_what_is_counted_leaves_the_beginning_out(text):
    tokens = len(text.prefix_ids) + 8
    assert text.probe(tokens).embeds.shape == (1, queries(text) or tokens, text.width)
    with_prefix = work_of(lambda: text.probe(tokens)).flops
    text.least_prefix = 10**9
    try:
        assert text.probe(tokens).embeds.shape == (1, queries(text) or tokens, text.width)
        assert with_prefix < work_of(lambda: text.probe(tokens)).flops
    finally:
        text.least_prefix = 1


def test_lengths_in_a_bucket_share_a_graph(text, whole):
    """Padding to the bucket changes no embedding."""
    graphs = Captures(FakeGraphs())
    text.options = StageOptions(graphs)
    try:
        for prompt, expected in zip(PROMPTS, whole, strict=True):
            (row,) = rows(text, [prompt])
            assert (row - expected).abs().max() < 1e-5 * expected.abs().max()
        together = rows(text, PROMPTS)
    finally:
        text.options = StageOptions()
    for a, b in zip(together, whole, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    buckets = {-(-(length - len(text.prefix_ids)) // BUCKET) for length in tokens_of(text)}
    assert graphs.stats()["text after prefix"].recorded == len(buckets) + 1
    assert graphs.stats()["text after prefix"].replayed == len(PROMPTS) + 1
