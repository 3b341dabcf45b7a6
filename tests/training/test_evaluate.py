"""The validation loss: every token once, each weighing the same, in nats and in bits a byte."""

import math

import pytest
import torch

from minillm.config.train import ModelConfig
from minillm.data.batches import Tokens, evaluation_windows
from minillm.data.prepare import Preparation, prepare
from minillm.distributed.ranks import Ranks
from minillm.model.gpt import GPT
from minillm.model.recurrence import state_keys
from minillm.ops import EAGER
from minillm.training import recurrence_metrics
from minillm.training.evaluate import Evaluation, evaluate


@pytest.fixture(scope="module")
def corpus(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    how = Preparation(tokenizer="char", val_fraction=0.1)
    return prepare([str(text_file)], how, cache_dir=folder)


@pytest.fixture(scope="module")
def model(corpus) -> GPT:
    config = ModelConfig(
        vocab_size=corpus.vocab_size, seq_len=16, n_layer=1, n_head=2, d_model=16, dropout=0.5
    )
    return GPT(config, EAGER, generator=torch.Generator().manual_seed(0))


def test_it_is_the_direct_sum_over_the_split(corpus, model):
    ids = torch.from_numpy(Tokens(corpus, "val").read(0, corpus.tokens["val"]))
    assert (len(ids) - 1) % 16 != 0  # so that the last window is a short one
    model.eval()
    losses = []
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logp = model(window[None, :-1]).double().log_softmax(-1)[0]
        losses += (-logp.gather(-1, window[1:, None])).detach()[:, 0].tolist()
    model.train()
    assert len(losses) == len(ids) - 1
    for batch_size in (1, 3, 1000):
        result = evaluate(model, evaluation_windows(corpus, "val", 16), batch_size)
        assert result.tokens == len(losses)
        assert result.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
        assert model.training


def test_a_part_of_the_split_has_its_own_mean(corpus, model):
    windows = list(evaluation_windows(corpus, "val", 16))
    part = evaluation_windows(corpus, "val", 16, 5)
    assert len(part) == 5
    assert evaluate(model, part, 2).tokens <= 80 < evaluate(model, windows, 2).tokens
    assert evaluate(model, part, 2) == evaluate(model, list(part), 2)


def test_bits_per_byte():
    # Two bytes a token on average and ln 2 nats a token: half a bit a byte.
    assert Evaluation(math.log(2), 7).bits_per_byte(100, 200) == pytest.approx(0.5)
    # What is uniform over bytes takes eight bits.
    assert Evaluation(math.log(256), 7).bits_per_byte(50, 50) == pytest.approx(8.0)


@torch.no_grad()
def test_start_states_are_those_of_each_window(corpus):
    """Of the key of its number in the split, however many are read at a time: in the loss, and in
    the losses by recurrence."""
    shape = {"vocab_size": corpus.vocab_size, "seq_len": 16, "n_head": 2, "d_model": 16}
    config = ModelConfig(**shape, recurrent="1,1,1", mean_recurrence=2)
    model = GPT(config, EAGER, generator=torch.Generator().manual_seed(0)).eval()
    windows = list(evaluation_windows(corpus, "val", 16, 7))
    tokens, targets = (torch.stack(column) for column in zip(*windows, strict=True))
    keys = state_keys(0, torch.arange(7))
    told = {r: float(model(tokens, targets, r, keys)) for r in (1, 2, 4, 8)}
    assert told[2] != pytest.approx(float(model(tokens, targets)), abs=1e-4)  # all of one key
    others = state_keys(0, torch.tensor([0, 1, 2, 0, 1, 2, 0]))  # were they numbered by batch
    assert told[2] != pytest.approx(float(model(tokens, targets, 2, others)), abs=1e-4)
    for batch_size in (3, 7):
        assert evaluate(model, windows, batch_size).loss == pytest.approx(told[2], abs=2e-6)
        found = recurrence_metrics.measure(model, windows, batch_size)["val_loss_at_r"]
        assert found == pytest.approx({str(r): loss for r, loss in told.items()}, abs=2e-6)


def test_sums_need_no_fp64_on_mps(corpus):
    """A device that has none: here not even one that torch can put anything on."""
    mac = Ranks(device="mps")
    shape = {"vocab_size": corpus.vocab_size, "seq_len": 16, "n_head": 2, "d_model": 16}
    model = GPT(ModelConfig(**shape, recurrent="1,1,1", mean_recurrence=2), EAGER)
    windows = evaluation_windows(corpus, "val", 16, 4)
    assert mac.minimum(3.0) == 3.0
    assert evaluate(model, windows, 2, mac) == evaluate(model, windows, 2)
    assert recurrence_metrics.measure(model, windows, 2, mac) == recurrence_metrics.measure(
        model, windows, 2
    )
