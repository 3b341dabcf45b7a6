"""From prompts to text: rows of a batch, token healing, stop texts, masks, and what is refused."""

import pytest
import torch

from minillm.config.model import ModelConfig
from minillm.config.sampling import SamplingParams
from minillm.data.tokenizer import train_tokenizer
from minillm.errors import UnavailableError, UsageError
from minillm.inference import complete as module
from minillm.inference.complete import complete, encode_prompt, stream_text
from minillm.model.gpt import GPT
from minillm.ops import EAGER

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = ["the ", "the c", "", "the cat sat on the ", "x" * 70]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", ["the cat sat on the mat and the dog ran far away\n"] * 30, 330)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    config = ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=32, n_layer=1, n_head=2,
                         d_model=16, d_ff=24, bos_id=tokenizer.bos_id)  # fmt: skip
    model = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(2)).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model


def test_a_row_of_a_batch_is_what_it_is_alone(model, tokenizer):
    """Each row has its own token to heal, or none."""
    encoded = [encode_prompt(model, tokenizer, prompt, print) for prompt in PROMPTS]
    assert len({tuple(each.first) for each in encoded}) > 2 and [] in [e.first for e in encoded]
    together = complete(model, tokenizer, PROMPTS, GREEDY)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = complete(model, tokenizer, [prompt], GREEDY)[0]
        assert (found.text, found.tokens) == (alone.text, alone.tokens)
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_healed_prompt_and_its_continuation_are_the_text_of_the_tokens(model, tokenizer):
    hot = SamplingParams(max_tokens=9, temperature=3.0, top_p=1.0)
    for found in complete(model, tokenizer, ["the cat "] * 20, hot):
        ids = encode_prompt(model, tokenizer, "the cat ", print).ids
        assert "the cat " + found.text == tokenizer.decode(ids + found.tokens)


def test_a_completion_holds_all_of_its_sample(model, tokenizer):
    pieces = list(stream_text(model, tokenizer, ["the ", "cat"], GREEDY))
    for row in (0, 1):
        mine = [piece for piece in pieces if piece.row == row]
        found = mine[-1].completion
        assert "".join(piece.text for piece in mine) == found.text
        assert len(mine) == len(found.tokens) + 1 == len(found.logprobs) + 1
        assert found.prompt == ("the ", "cat")[row] and found.recurrences == [None] * 12
        assert found.finish == "length"


def test_how_a_sample_ends(model, tokenizer):
    whole = complete(model, tokenizer, ["the "], GREEDY)[0].text
    stop = whole[4:6]
    params = SamplingParams(max_tokens=12, temperature=0.0, stop=[stop, "@@"])
    found = complete(model, tokenizer, ["the "], params)[0]
    assert (found.finish, found.text) == ("stop", whole[: whole.index(stop)])

    def bos(row, new):  # after two tokens
        allowed = torch.arange(tokenizer.vocab_size) == tokenizer.bos_id
        return allowed if len(new) == 2 else ~allowed

    found = complete(model, tokenizer, ["cat"], GREEDY, mask=bos)[0]
    assert found.finish == "document" and len(found.tokens) == len(found.logprobs) == 2


def test_a_mask_goes_together_with_healing(model, tokenizer):
    encoded = encode_prompt(model, tokenizer, "the ", print)
    one = encoded.first[-1]
    asked = []

    def mask(row, new):
        asked.append((row, list(new)))
        return torch.arange(tokenizer.vocab_size) >= one if not new else None

    hot = SamplingParams(max_tokens=3, temperature=5.0, top_p=1.0)
    found = complete(model, tokenizer, ["the "] * 3, hot, mask=mask)
    assert [each.tokens[0] for each in found] == [one] * 3
    assert asked[:4] == [(0, []), (1, []), (2, []), (0, [one])]


def test_what_cannot_be_is_refused_before_the_first_piece(model, tokenizer, monkeypatch):
    with pytest.raises(UsageError, match="half a character at position 1"):
        stream_text(model, tokenizer, ["a\udcff"], GREEDY)
    with pytest.raises(UsageError, match="^warm_start: this model has no core"):
        stream_text(model, tokenizer, ["a"], SamplingParams(warm_start=True))
    # 32 tokens of 2 x 16 floats take 4 KiB a row.
    monkeypatch.setattr(module.device, "available_memory", lambda device: 5 << 12)
    with pytest.raises(UnavailableError, match="6 samples need .*; at most 5 fit"):
        stream_text(model, tokenizer, ["a"] * 6, GREEDY)
    assert len(complete(model, tokenizer, ["a"] * 5, GREEDY)) == 5


def test_a_note_says_that_a_prompt_is_cut(model, tokenizer):
    said = []
    complete(model, tokenizer, ["x" * 70], GREEDY, say=said.append)
    assert len(said) == 1 and "only its last 16 are read" in said[0]
