"""Prompts longer than a model reads: what is lost is told, once, by whatever reads them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from tests.factory import make_model, open_text
from twinflow_rt.errors import CheckpointError, ConfigError, PromptTruncatedWarning
from twinflow_rt.loading import load
from twinflow_rt.stages.text import PromptEmbeds

END = "and this is the end"
LONG = f"{'many words ' * 200}{END}"
LIMITS = {"z-image": 544, "qwen-image": 1024, "sd3": 256, "sana": 300}
SMALL = {"height": 16, "width": 16, "seed": 0, "output": "np"}


def told(function):
    """What a call returns, and the warnings about prompts that it issues."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [w for w in caught if w.category is PromptTruncatedWarning]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("long") / "m")


@pytest.fixture(scope="module")
def pipe(model):
    return load(model, device="cpu", prompt_cache=1_000_000)


@pytest.fixture(scope="module", params=list(LIMITS))
def text(request, tmp_path_factory):
    """A text stage of each family, whose weights are not needed."""
    stage = open_text(make_model(tmp_path_factory.mktemp(request.param) / "m", request.param))
    assert stage.max_tokens == LIMITS[request.param]
    return stage


def tokens(tokenizer, prompt):
    """How many tokens a prompt has with all that is written around it."""
    tokenizer.core.no_truncation()
    return len(tokenizer.core.encode(tokenizer.render(prompt)).ids)


def test_every_family_says_what_it_does_not_read(text):
    counts = [tokens(tokenizer, LONG) for _, tokenizer, _ in text.readers()]
    cut, (warning,) = told(lambda: text.truncated(["a", LONG, "a red circle", LONG]))
    message, lost = str(warning.message), warning.message.lost
    assert cut == (False, True, False, True) and warning.filename == __file__
    assert lost.endswith(END) and LONG.endswith(lost) and END in message
    for (name, _, most), count in zip(text.readers(), counts, strict=True):
        assert f"{name} reads {most} of {count} tokens, without '" in message


def test_the_first_token_too_many_is_told(text):
    """Nothing of what is written around a prompt counts as lost."""
    _, tokenizer, most = text.readers()[0]
    whole, longer = next(
        ("z " * (n - 1) + "q", "z " * n + "q") for n in range(1, 2000) if tokens(tokenizer, "z " * n + "q") > most
    )
    cut, (warning,) = told(lambda: text.truncated([whole, longer]))
    assert cut == (False, True) and longer.endswith(warning.message.lost) and len(warning.message.lost) <= 4


def test_released_sizes(model):
    """Z-Image's axes leave 992 of the 1024 tokens that the original asks for, larger ones all; the image follows."""
    path = model / "transformer" / "config.json"
    before = path.read_text()
    try:
        for axis, most in ((1024, 992), (1056, 1024), (4096, 1024)):
            path.write_text(json.dumps({**json.loads(before), "axes_lens": [axis, 32, 32]}))
            assert open_text(model).max_tokens == most
    finally:
        path.write_text(before)


def test_openuni_reads_what_its_language_model_was_made_for(tmp_path):
    folder = make_model(tmp_path / "m", "openuni")
    queries = open_text(folder).connector.config.num_queries
    assert open_text(folder).max_tokens == 32768 - queries
    path = folder / "text_encoder" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "max_position_embeddings": 100}))
    assert open_text(folder).max_tokens == 100 - queries
    path.write_text(json.dumps({**raw, "max_position_embeddings": queries}))
    with pytest.raises(CheckpointError, match="leave no room for a prompt"):
        open_text(folder)


def test_a_memory_budget_counts_on_shorter_prompts(tmp_path):
    pipe = load(make_model(tmp_path / "m", "openuni"), device="cpu", memory_budget="1GB")
    assert pipe.text.max_tokens == 2048


def test_results_say_which_images(pipe):
    result, caught = told(lambda: pipe([LONG, "a", LONG], num_images=2, **SMALL))
    assert result.truncated == (True, True, False, False, True, True) and result.truncated and len(caught) == 1
    assert caught[0].filename == __file__
    again, _ = told(lambda: pipe([LONG, "a", LONG], num_images=2, **SMALL))  # by now in the prompt cache
    assert again.truncated == result.truncated
    short, caught = told(lambda: pipe("a", **SMALL))
    assert short.truncated == (False,) and not short.truncated and not caught


def test_parts_of_a_batch_tell_once(pipe):
    pipe.batch_invariant = True
    try:
        result, caught = told(lambda: pipe([LONG, LONG], num_images=2, **SMALL))
    finally:
        pipe.batch_invariant = False
    assert result.truncated == (True,) * 4 and len(caught) == 1


def test_embeddings_carry_it(pipe):
    embeds, caught = told(lambda: pipe.text(["a", LONG]))
    assert embeds.truncated == (False, True) and len(caught) == 1
    result, caught = told(lambda: pipe(embeds, num_images=2, **SMALL))
    assert result.truncated == (False, False, True, True) and not caught
    assert embeds.select([1, 0]).truncated == (True, False) and embeds.to(pipe.device, torch.float16).truncated
    plain = PromptEmbeds(embeds.embeds, embeds.lengths)
    assert pipe(plain, **{**SMALL, "seed": None}).truncated == (False, False)


@pytest.mark.parametrize("truncated", [(True,), [1, 0], "ab", None, torch.ones(2), 3])
def test_other_marks_are_refused(pipe, truncated):
    embeds = pipe.text(["a", "b"])
    with pytest.raises(ConfigError, match="truncated"):
        pipe(PromptEmbeds(embeds.embeds, embeds.lengths, {}, truncated), **SMALL)


@pytest.mark.parametrize("prompt", [None, [], [None], 3, "\ud800", ["a", b"b"], "x" * 100_001])
def test_the_stage_itself_refuses_what_is_no_prompt(pipe, prompt):
    with pytest.raises(ConfigError, match="prompt"):
        pipe.text(prompt)
    assert pipe.text("one").lengths == pipe.text(["one"]).lengths
