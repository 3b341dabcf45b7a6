"""The micro-batch: the largest divisor of the batch that fits, by a memory of our own making."""

import pytest
import torch

from minillm import microbatch
from minillm.config import ModelConfig
from minillm.errors import UnavailableError
from minillm.microbatch import largest_that_fits, seconds_per_step
from minillm.model import GPT
from minillm.ops import EAGER

CPU = torch.device("cpu")


@pytest.fixture
def model() -> GPT:
    return GPT(ModelConfig(vocab_size=20, seq_len=16, n_layer=2, n_head=2, d_model=16), EAGER)


@pytest.mark.parametrize(
    "sequences, batch_size, expected",
    [(100, 12, 12), (11, 12, 6), (5, 12, 4), (3.5, 12, 3), (1, 12, 1), (6, 7, 1), (7, 7, 7)],
)
def test_the_largest_divisor_that_fits(model, monkeypatch, sequences, batch_size, expected):
    each = microbatch._bytes_for_backward(model, CPU)
    room = int(sequences * each / microbatch.SHARE) + 1
    monkeypatch.setattr(microbatch, "available_memory", lambda device: room)
    assert largest_that_fits(model, batch_size, CPU) == expected


def test_no_room_for_one_sequence(model, monkeypatch):
    monkeypatch.setattr(microbatch, "available_memory", lambda device: 1000)
    with pytest.raises(UnavailableError, match="one sequence of 16 tokens does not fit"):
        largest_that_fits(model, 8, CPU)


def test_what_a_backward_keeps_grows_with_the_model(model):
    kept = microbatch._bytes_for_backward(model, CPU)
    # At the least the inputs of the eight matrices of two blocks: 16 tokens of 16 (or 64) floats.
    assert kept > 2 * 16 * (3 * 16 + 64) * 4
    deeper = GPT(ModelConfig(vocab_size=20, seq_len=16, n_layer=4, n_head=2, d_model=16), EAGER)
    assert 1.5 * kept < microbatch._bytes_for_backward(deeper, CPU) < 2.1 * kept


def test_on_a_gpu_running_out_is_caught(model, monkeypatch):
    tried = []

    def run(model, rows, device):
        tried.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(microbatch, "_run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert largest_that_fits(model, 12, torch.device("cuda")) == 4
    assert tried == [12, 6, 4]


def test_a_trial_leaves_no_gradient_and_no_change(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    largest_that_fits(model, 4, CPU)
    assert seconds_per_step(model, 4, 2, CPU) > 0
    for name, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
