"""Padded rows: their tokens are read as if nothing stood beside them."""

import pytest
import torch

from minillm.config.train import ModelConfig
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER, select
from tests.support.broad import broad

SHAPE = {"vocab_size": 31, "seq_len": 16, "n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 24}
RECURRENT = {"recurrent": "1,1,1", "mean_recurrence": 3}
VARIANTS = [
    *({"position": name} for name in ("rope", "learned", "sinusoidal", "alibi", "none")),
    {"window": 4},
    {"document_mask": True, "bos_id": 0},
    RECURRENT,
    {**RECURRENT, "recurrence_style": "parcae", "start_state": "noise"},
    {**RECURRENT, "document_mask": True, "bos_id": 0},
]
ROWS = [[0, 5, 9, 2, 0, 7, 11, 3], [0, 8, 4], [0, 6, 1, 12, 30]]


def model_of(options: dict, ops=EAGER) -> GPT:
    config = ModelConfig(**{**SHAPE, **options})
    return GPT(config, ops, torch.float32, torch.Generator().manual_seed(5)).eval()


def padded(before: int, with_token: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens and mask of ROWS, (3, 11), at most `before` of the padding at the left; starts."""
    tokens = torch.full((len(ROWS), 11), with_token)
    mask, starts = torch.zeros_like(tokens), []
    for row, ids in enumerate(ROWS):
        start = min(before, 11 - len(ids))
        tokens[row, start : start + len(ids)] = torch.tensor(ids)
        mask[row, start : start + len(ids)] = 1
        starts.append(start)
    return tokens, mask, starts


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("before", [0, 2, 11])
@torch.no_grad()
def test_padding_changes_no_token(options, before):
    model = model_of(options)
    tokens, mask, starts = padded(before, with_token=17)
    keys = state_keys(3, torch.arange(3)) if "recurrent" in options else None
    ours = model(tokens, keys=keys, attention_mask=mask)
    for row, (ids, start) in enumerate(zip(ROWS, starts, strict=True)):
        key = None if keys is None else keys[row : row + 1]
        alone = model(torch.tensor([ids]), keys=key)[0]
        torch.testing.assert_close(ours[row, start : start + len(ids)], alone)
    if before == 2 or before and "document_mask" not in options:  # without it padding is seen
        assert not torch.allclose(ours, model(tokens, keys=keys), atol=1e-3)


def test_gradients_are_those_of_the_rows_alone():
    model, grads = model_of(RECURRENT), []
    keys = state_keys(3, torch.arange(3))
    tokens, mask, starts = padded(11)
    targets = torch.where(mask.bool(), tokens.roll(-1, 1), -100)
    targets[:, -1] = -100
    model(tokens, targets, keys=keys, attention_mask=mask).backward()
    grads.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    count = sum(len(ids) - 1 for ids in ROWS)
    for row, ids in enumerate(ROWS):
        x = torch.tensor([ids])
        loss = model(x[:, :-1], x[:, 1:], keys=keys[row : row + 1])
        (loss * (len(ids) - 1) / count).backward()
    for ours, p in zip(*grads, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_mask_of_ones_is_no_mask():
    model = model_of(RECURRENT)
    tokens = torch.tensor([ROWS[0]])
    ours = model(tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(ours, model(tokens))


@broad("before", [2, 11])
@torch.no_grad()
def test_padding_with_kernels(before, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = model_of(RECURRENT)
    theirs = GPT(model.config, select("triton", "cpu"), torch.float32).eval()
    theirs.load_state_dict(model.state_dict())
    tokens, mask, _ = padded(before)
    ours = model(tokens, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(
        theirs(tokens, attention_mask=mask)[mask.bool()], ours, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_what_a_mask_cannot_be():
    model = model_of(RECURRENT)
    tokens = torch.tensor([ROWS[0]])
    hole = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="the attention mask has a hole"):
        model(tokens, attention_mask=hole)
    for shape in ((8,), (1, 7), (2, 8), (1, 8, 1)):
        with pytest.raises(ValueError, match=r"attention_mask is \(.*\); expected \(1, 8\)"):
            model(tokens, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="mask and a cache exclude each other"):
        model.trunk(tokens, model.make_cache(1), attention_mask=torch.ones_like(tokens))
