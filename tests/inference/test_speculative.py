"""Self-speculation: the tokens of plain decoding at the verifying recurrence, for any draft."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from minillm.config.train import ModelConfig
from minillm.errors import UsageError
from minillm.inference import speculative as room
from minillm.inference.speculative import Tally
from minillm.model.gpt import GPT
from minillm.ops import EAGER
from tests.support.broad import broad
from tests.support.generating import generated, speculated

PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 4, 9, 30, 2, 2, 8]]
SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.2, "top_k": 12}}


def model_of(**options) -> GPT:
    shape = {"vocab_size": 31, "seq_len": 24, "n_head": 2, "d_model": 16, "d_ff": 24}
    config = ModelConfig(**{**shape, "recurrent": "1,2,1", "mean_recurrence": 5, **options})
    model = GPT(config, EAGER, torch.float64, torch.Generator().manual_seed(3)).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


def rows(tokens) -> list[list[int]]:
    made = {}
    for token in tokens:
        made.setdefault(token.row, []).append((token.id, round(token.logprob, 6)))
    return [made[row] for row in sorted(made)]


@broad("style", ["huginn", "parcae"])
@pytest.mark.parametrize("how", SAMPLING)
@broad(("few", "lookahead"), [(1, 4), (3, 2), (4, 7)], quick=(1,))
def test_the_tokens_are_those_of_plain_decoding(style, how, few, lookahead):
    """Rows of different lengths, several tokens apart, beyond the context's end as well."""
    model, tally = model_of(recurrence_style=style), Tally()
    options = {"max_tokens": 40, "seed": 4, "recurrence": 5, **SAMPLING[how]}
    plain = rows(generated(model, PROMPTS, **options))
    ours = speculated(
        model, PROMPTS, draft_recurrence=few, lookahead=lookahead, tally=tally, **options
    )
    assert rows(ours) == plain
    assert 0 < tally.accepted <= tally.drafted
    assert len({id for row in plain for id, _ in row}) > 3


@pytest.mark.slow
def test_a_good_draft_is_accepted_and_a_bad_one_mostly_not():
    shares = []
    for few in (1, 39):
        tally = Tally()
        list(speculated(model_of(), PROMPTS, draft_recurrence=few, recurrence=40, max_tokens=15,
                       temperature=0.0, tally=tally))  # fmt: skip
        shares.append(tally.accepted / tally.drafted)
    assert shares[0] < shares[1] and shares[1] > 0.9


def test_the_draft_s_iterations_are_not_run_again(monkeypatch):
    """Of each token drafted the core runs r times in all, as in plain decoding."""
    ran, plain = [], GPT._iteration

    def counted(self, s, text, inputs, i):
        ran.extend([i] * s.shape[1])
        return plain(self, s, text, inputs, i)

    model, tally = model_of(), Tally()
    monkeypatch.setattr(GPT, "_iteration", counted)
    list(speculated(model, [[1, 2]], draft_recurrence=2, recurrence=5, max_tokens=9,
                   temperature=0.0, tally=tally))  # fmt: skip
    each = Counter(ran)
    assert len(each) == 5 and len(set(each.values())) == 1
    assert each[0] - tally.drafted in (2, 3)  # the prompt, and a last token that needs no draft


def test_a_row_that_stops_in_the_middle_of_a_draft():
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 2, "recurrence": 5}
    options["stop"] = lambda row, made: len(made) == (3, 6, 17)[row]
    model = model_of()
    plain = rows(generated(model, PROMPTS, **options))
    assert rows(speculated(model, PROMPTS, draft_recurrence=4, lookahead=5, **options)) == plain
    assert [len(row) for row in plain] == [3, 6, 17]


def test_a_mask_holds_for_drafts_and_their_verification():
    model, options = model_of(), {"max_tokens": 20, "temperature": 1.2, "recurrence": 5}

    def mask(row, new):  # no token twice in a row, and in row 1 none beyond 15
        allowed = torch.arange(31) < (16 if row == 1 else 31)
        allowed[new[-1:]] = False
        return allowed if new else None

    plain = rows(generated(model, PROMPTS, mask=mask, **options))
    ours = rows(speculated(model, PROMPTS, draft_recurrence=3, mask=mask, **options))
    assert ours == plain
    assert all(a != b for row in ours for (a, _), (b, _) in pairwise(row))
    assert plain != rows(generated(model, PROMPTS, **options))


def test_generate_drafts_where_it_is_asked_to():
    model, options = model_of(), {"max_tokens": 12, "temperature": 1.2, "recurrence": 5}
    drafted = rows(generated(model, PROMPTS, draft_recurrence=2, **options))
    assert drafted == rows(generated(model, PROMPTS, **options))


def test_a_verification_that_takes_wrong_drafts_is_seen(monkeypatch):
    """Were a wrong token kept, these tests would tell."""
    cycle = room._cycle

    def careless(*args):
        found = cycle(*args)
        return replace(found, counts=[found.ids.shape[1]] * len(found.counts))

    model = model_of()
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 4, "recurrence": 5}
    plain = rows(generated(model, PROMPTS, **options))
    monkeypatch.setattr(room, "_cycle", careless)
    assert rows(speculated(model, PROMPTS, draft_recurrence=1, **options)) != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_recurrence": 5}, "draft_recurrence 5: expected less than recurrence 5"),
        ({"draft_recurrence": 0}, "draft_recurrence 0 .* between 1 and"),
        ({"draft_recurrence": 2, "lookahead": 0}, "lookahead 0"),
        ({"draft_recurrence": 2, "recurrence": 0}, "recurrence 0 .* between 1 and"),
        ({"draft_recurrence": 1, "recurrence": 1}, "expected less than recurrence 1, or leave"),
        ({"draft_recurrence": None}, "draft_recurrence: .* needs it"),
        ({"draft_recurrence": 2, "repetition_penalty": 1.2}, "without repetition_penalty; drop"),
        (
            {"draft_recurrence": 2, "warm_start": True, "recurrent_cache": "slot"},
            "without warm_start, recurrent_cache; drop",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        list(speculated(model_of(), [[1]], **options))
    with pytest.raises(UsageError, match="no core to run again"):
        list(speculated(model_of(recurrent=None, n_layer=2), [[1]], draft_recurrence=1))
