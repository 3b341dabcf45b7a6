"""Scores: exact for every token, in windows, in batches, and for every kind of model."""

import math

import pytest
import torch

from minillm.config.model import ModelConfig
from minillm.config.sampling import SamplingParams
from minillm.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from minillm.errors import DivergedError, UsageError
from minillm.inference.generate import generate
from minillm.inference.score import ROWS, score, windows_of
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER

TEXT = "the cat sat on a mat \u20ac and more. " * 20
MODELS = {
    "plain": {"n_layer": 2},
    "learned positions": {"n_layer": 1, "position": "learned", "seq_len": 5},
    "one token": {"n_layer": 1, "seq_len": 1},
    "document mask": {"n_layer": 1, "document_mask": True, "bos_id": 256},
    "recurrent": {"recurrent": "1,1,1", "mean_recurrence": 3},
}


def model_of(name: str = "plain", **options) -> GPT:
    shape = {"vocab_size": 257, "seq_len": 16, "n_head": 2, "d_model": 16, "d_ff": 24}
    config = ModelConfig(**{**shape, **MODELS[name], **options})
    model = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(2)).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)  # so that probabilities differ from token to token
    return model


@torch.no_grad()
def by_hand(model: GPT, tokenizer: Tokenizer, text: str, r: int | None = None) -> list[float]:
    """The log-probability of each token, in a forward pass of its own."""
    T, found, start = model.config.seq_len, [], 0
    whole = tokenizer.prompt_ids("", model.config.document_mask)
    for token in tokenizer.encode(text):
        if len(whole) - start > T:
            start = len(whole) - max(1, T // 2)
        keys = state_keys(0, torch.zeros(1, dtype=torch.int64))
        logits = model(torch.tensor([whole[start:]]), recurrence=r, keys=keys)[0, -1].double()
        found.append(float(logits.log_softmax(-1)[token]))
        whole.append(token)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_token_is_scored_as_by_hand(name):
    model, tokenizer = model_of(name), ByteTokenizer()
    for length in (1, 5, 13, 14, 15, 16, 17, 40, 120):
        found = score(model, tokenizer, [TEXT[:length]])[0]
        assert found.tokens == list(TEXT[:length].encode())
        assert found.logprobs == pytest.approx(by_hand(model, tokenizer, TEXT[:length]), abs=1e-4)
        assert found.nats == pytest.approx(-sum(found.logprobs))
        each_byte = found.nats / math.log(2) / len(TEXT[:length].encode())
        assert found.bits_per_byte == pytest.approx(each_byte)


def test_the_recurrence_is_that_which_is_asked_for():
    model, tokenizer = model_of("recurrent"), ByteTokenizer()
    for r in (1, 5):
        found = score(model, tokenizer, [TEXT[:20]], r)[0]
        assert found.logprobs == pytest.approx(by_hand(model, tokenizer, TEXT[:20], r), abs=1e-4)


def test_a_tokenizer_without_bos():
    tokenizer = CharTokenizer("abc\n")
    model = model_of(vocab_size=tokenizer.vocab_size)
    found = score(model, tokenizer, ["abcabc"])[0]
    assert found.logprobs == pytest.approx(by_hand(model, tokenizer, "abcabc"), abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_in_a_batch_is_scored_as_alone(name):
    model, tokenizer = model_of(name), ByteTokenizer()
    texts = ["the cat", TEXT[:70], "a", TEXT[:16], TEXT[:300]]
    for found, text in zip(score(model, tokenizer, texts), texts, strict=True):
        alone = score(model, tokenizer, [text])[0]
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_score_is_what_generate_reports(name):
    model, tokenizer = model_of(name), ByteTokenizer()
    params = SamplingParams(max_tokens=50, temperature=1.0, top_p=1.0)
    ascii_only = torch.arange(257) < 128  # so that the tokens are text
    prompt = tokenizer.prompt_ids("", model.config.document_mask)
    made = list(generate(model, [prompt], params, mask=lambda row, new: ascii_only))
    found = score(model, tokenizer, [tokenizer.decode([token.id for token in made])])[0]
    assert found.logprobs == pytest.approx([token.logprob for token in made], abs=1e-4)


@pytest.mark.parametrize("longest", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
def test_every_token_is_the_target_of_one_window(longest, length):
    before, tokens = [100, 101], list(range(length))
    windows = list(windows_of(3, before, tokens, longest, max(1, longest // 2)))
    assert [t for window in windows for t in window.targets] == tokens
    assert all(len(window.ids) <= longest and window.text == 3 for window in windows)
    for window in windows:
        n, whole = len(window.targets), before + tokens
        at = len(before) + tokens.index(window.targets[-1])
        assert window.ids == whole[at - len(window.ids) : at] and len(window.ids) >= min(n, longest)


def test_what_cannot_be_scored_is_refused():
    model, tokenizer = model_of(), ByteTokenizer()
    with pytest.raises(UsageError, match="text 1 is empty"):
        score(model, tokenizer, ["a", ""])
    with torch.no_grad():
        model.embed.weight[ord("c")] = math.nan
    with pytest.raises(DivergedError, match=r"token \d of the text has log-probability nan"):
        score(model, tokenizer, ["abcd"])


def test_a_model_in_training_is_refused_if_it_has_dropout():
    tokenizer, model = ByteTokenizer(), model_of(dropout=0.1)
    alone = score(model, tokenizer, ["abcd"])
    with pytest.raises(UsageError, match="training mode and has dropout, .* model.eval"):
        score(model.train(), tokenizer, ["abcd"])
    assert score(model.eval(), tokenizer, ["abcd"]) == alone
    assert len(score(model_of().train(), tokenizer, ["abcd"])) == 1


def test_short_texts_are_not_padded_to_the_longest(monkeypatch):
    model, tokenizer = model_of(), ByteTokenizer()
    texts = [TEXT[i : i + (3 if i % 2 else 15)] for i in range(2 * ROWS)] + [TEXT[:40]]
    alone = [score(model, tokenizer, [text])[0] for text in texts]
    shapes, trunk = [], model.trunk

    def recorded(tokens, *args):
        shapes.append(tuple(tokens.shape))
        return trunk(tokens, *args)

    monkeypatch.setattr(model, "trunk", recorded)
    found = score(model, tokenizer, texts)
    width = len(tokenizer.prompt_ids("")) + 2  # the last of 3 tokens is only a target
    assert shapes[0] == (ROWS, width) and all(rows <= ROWS for rows, _ in shapes)
    for each, by_itself in zip(found, alone, strict=True):
        assert each.tokens == by_itself.tokens
        assert each.logprobs == pytest.approx(by_itself.logprobs, abs=1e-4)
