"""A warm start: the core begins each new token where the one before it ended."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UsageError
from minillm.exit_rules import ExitRule
from minillm.generate import generate
from minillm.model import GPT
from minillm.ops import EAGER

SHAPE = {"vocab_size": 31, "seq_len": 24, "n_head": 2, "d_model": 16, "d_ff": 24}
PROMPTS = [[5, 7, 1, 2], [3], [9, 9, 30, 4, 8, 2]]
NEVER = ExitRule("latent", 0.0, 0)


def model_of(style: str = "huginn", start: str = "noise") -> GPT:
    config = ModelConfig(
        **SHAPE, recurrent="1,2,1", mean_recurrence=3, recurrence_style=style, start_state=start
    )
    model = GPT(config, EAGER, torch.float32, torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that distributions differ from token to token
    return model


def ids_of(model: GPT, prompts, **options) -> list[list[int]]:
    options = {"max_tokens": 30, "temperature": 0.0, "warm_start": True, "recurrence": 2} | options
    rows = [[] for _ in prompts]
    for token in generate(model, prompts, **options):
        rows[token.row].append(token.id)
    return rows


@torch.no_grad()
def oracle(model: GPT, prompt: list[int], r: int, count: int) -> list[int]:
    """By hand: the prompt at once, then a token at a time, its state handed on."""
    cache = model.make_cache(1, recurrence=r)
    (prelude, core, coda), kept, found = model.config.depths, None, []
    tokens = torch.tensor([prompt])
    for _ in range(count):
        place, x = model.embedded(tokens, cache)
        x = model.run(range(prelude), x, place)
        text = model.injection.prepare(x)
        s = model.start_state(x, None, place) if kept is None else kept
        for i in range(r):
            s = model.iterate(s, text, place, i)
        kept = s[:, -1:]
        y = model.run(range(prelude + core, prelude + core + coda), model.norm(s), place)
        cache.advance(tokens.shape[1])
        found.append(int(model.logits(model.norm(y))[0, -1].argmax()))
        tokens = torch.tensor([found[-1:]])
    return found


@pytest.mark.parametrize("style", ["huginn", "parcae"])
def test_against_an_oracle(style):
    model = model_of(style, start="zero")
    ours = [ids_of(model, [prompt], max_tokens=15)[0] for prompt in PROMPTS]
    assert ours == [oracle(model, prompt, 2, 15) for prompt in PROMPTS]
    cold = [ids_of(model, [prompt], max_tokens=15, warm_start=False)[0] for prompt in PROMPTS]
    assert cold != ours  # it is another computation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recurrent_cache": "slot"},
        {"exit_rule": NEVER},
        {"exit_rule": ExitRule("confidence", 0.4, 0)},
    ],
    ids=str,
)
def test_a_batch_gives_what_each_row_gives_alone(options):
    """Also past seq_len, where rows are read anew one by one, and after one has ended."""
    model = model_of()

    def stop(row: int, ids: list[int]) -> bool:
        return row == 1 and len(ids) == 9

    together = ids_of(model, PROMPTS, stop=stop, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = ids_of(model, [prompt], samples=[row], **options)[0]
        assert together[row] == alone[: len(together[row])]
    assert [len(row) for row in together] == [30, 9, 30]


def test_a_rule_that_never_holds_changes_nothing():
    model = model_of()
    assert ids_of(model, PROMPTS, exit_rule=NEVER) == ids_of(model, PROMPTS)


def test_where_it_cannot_be():
    flat = GPT(ModelConfig(**SHAPE, n_layer=1), EAGER)
    for model, options in ((flat, {"recurrence": None}), (model_of(), {"use_cache": False})):
        with pytest.raises(UsageError, match="warm start"):
            ids_of(model, PROMPTS, **options)
